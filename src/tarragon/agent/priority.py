"""A replacement's priority: low until it is ready (5.4), and then its node agent's.

Linux weighs a process against the others of its scheduling group. Where no container and no service manager
has made a group, the kernel makes one of every session (sched_autogroup), and every worker has a session of
its own: its niceness would mean nothing to the other workers. So the group gets the niceness as well.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from tarragon.config import GROUP_NICE_ATTEMPTS, GROUP_NICE_INTERVAL_S

_CAP_SYS_NICE: Final = 23


def lower(nice: int) -> None:
    """Give the calling process, which has one thread and a session of its own, this niceness (0 to 19).

    What could not be undone later is left as it is: without CAP_SYS_NICE, the process's own.
    """
    if may_raise():
        os.nice(nice)
    _set_group(nice)


def restore() -> None:
    """Give every thread of this process, and its session's group, the priority of the process's parent."""
    parent = os.getppid()
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):
            normal = os.getpriority(os.PRIO_PROCESS, parent)
            if os.getpriority(os.PRIO_PROCESS, int(thread)) > normal:
                os.setpriority(os.PRIO_PROCESS, int(thread), normal)
    wanted = group_nice(parent) or 0  # the machine's first session is in no group
    own = group_nice(os.getpid())
    if own is not None and own > wanted:
        _set_group(wanted)


def group_nice(pid: int) -> int | None:
    """The niceness of a process's session among the sessions; None if it is in no group."""
    try:
        return int(Path(f"/proc/{pid}/autogroup").read_text().rsplit(maxsplit=1)[-1])
    except (OSError, ValueError, IndexError):
        return None


def _set_group(nice: int) -> None:
    # The kernel lets those without privileges do it ten times a second, all of them together.
    for attempt in range(GROUP_NICE_ATTEMPTS):
        if attempt:
            time.sleep(GROUP_NICE_INTERVAL_S)
        try:
            Path("/proc/self/autogroup").write_text(str(nice))
        except BlockingIOError:
            continue
        except OSError:
            pass
        return


def may_raise() -> bool:
    """Whether this process may raise its priority again: without that, niceness is for life."""
    try:
        status = Path("/proc/self/status").read_text()
        effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_NICE & 1)
