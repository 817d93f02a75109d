"""What the environment must say before torch and vLLM are imported, and the libraries loaded before them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

REQUIRED: Final[Mapping[str, str]] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs inside our process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers share the cores
    "VLLM_CPU_ATTN_SPLIT_KV": "0",  # with the split, a row depends on its batch
    "OMP_WAIT_POLICY": "passive",  # threads that spin steal the cores of the other workers
    "KMP_BLOCKTIME": "0",
    # numpy's and OpenCV's OpenBLAS start threads when imported; the parent of all forks must have one.
    "OPENBLAS_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "SPT_NOENV": "1",  # process titles leave /proc/<pid>/environ as it is
}
DEFAULTS: Final[Mapping[str, str]] = {"VLLM_LOGGING_LEVEL": "WARNING"}
_REEXECUTED: Final = "TARRAGON_PRELOADED"
STOP_WITH_PID: Final = "TARRAGON_STOP_WITH_PID"
"""Environment variable with the pid whose end shall be the cluster's end too."""


def wanted(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of ``environ`` that have to change, with their new values."""
    changes = {name: value for name, value in REQUIRED.items() if environ.get(name) != value}
    changes.update({name: value for name, value in DEFAULTS.items() if name not in environ})
    return changes


def with_preloads(preload: str, libraries: list[Path]) -> str:
    """Return the value of LD_PRELOAD that has ``libraries`` too, unless their like is there already."""
    loaded = preload.replace(":", " ").split()
    names = [Path(entry).name.split(".")[0].split("_")[0] for entry in loaded]
    missing = [str(path) for path in libraries if path.name.split(".")[0].split("_")[0] not in names]
    return ":".join([*missing, *loaded])


def preloadable() -> list[Path]:
    """Libraries that make vLLM's CPU engine faster if they are loaded first, where installed."""
    found: list[Path] = []
    vllm = importlib.util.find_spec("vllm")
    for folder in (vllm.submodule_search_locations or []) if vllm else []:
        found += sorted(Path(folder, "libs").glob("libtcmalloc*.so*"))[:1]
    # Intel's OpenMP runtime is not among them: passive waiting gains nothing from it, and a killed process
    # leaves its registration in /dev/shm.
    return found


def prepare() -> None:
    """Set the environment of this process, and start its program again, once, if a library must be preloaded.

    Call it before any thread runs and before torch is imported.
    """
    os.environ.update(wanted(os.environ))
    preload = with_preloads(os.environ.get("LD_PRELOAD", ""), preloadable())
    if preload == ":".join(os.environ.get("LD_PRELOAD", "").replace(":", " ").split()):
        return
    if _REEXECUTED in os.environ:  # once only, whatever the loader made of it
        return
    os.environ.update({"LD_PRELOAD": preload, _REEXECUTED: "1"})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606
