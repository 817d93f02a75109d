"""A replacement's priority: low until it is ready (5.4), and then its node agent's.

Linux weighs a process against the others of its scheduling group. Where no container and no service manager
has made a group, the kernel makes one of every session (sched_autogroup), and every worker has a session of
its own: its niceness would mean nothing to the other workers. So the group gets the niceness as well.

Niceness is about shares. Who is woken still waits until a nicer process has used up its slice (1.4 ms on two
cores), and a token of 30 layers wakes somebody a hundred times. An idle process (SCHED_IDLE) gives way at
once; but on a machine that is never idle it might never be ready, so it is one for a limited time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from tarragon.config import GROUP_NICE_ATTEMPTS, GROUP_NICE_INTERVAL_S

_CAP_SYS_NICE: Final = 23


class Politeness(NamedTuple):
    """How a process begins."""

    nice: int
    """0 to 19."""
    idle_s: float
    """So long its threads are idle ones as well."""


def lower(polite: Politeness) -> None:
    """Make the calling process, which has one thread and a session of its own, polite.

    What could not be undone later is left as it is: without CAP_SYS_NICE, the process's own priority.
    """
    if may_raise():
        os.nice(polite.nice)
        if polite.idle_s > 0:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            timer = threading.Timer(polite.idle_s, _each_thread, (_end_idleness,))
            timer.daemon = True
            timer.start()
    _set_group(polite.nice)


def restore() -> None:
    """Give every thread of this process, and its session's group, the priority of the process's parent."""
    parent = os.getppid()

    def like_parent(thread: int) -> bool:
        changed = _end_idleness(thread)
        normal = os.getpriority(os.PRIO_PROCESS, parent)
        if os.getpriority(os.PRIO_PROCESS, thread) <= normal:
            return changed
        os.setpriority(os.PRIO_PROCESS, thread, normal)
        return True

    _each_thread(like_parent)
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


def _each_thread(change: Callable[[int], bool]) -> None:
    """Change every thread of this process, and those that one not yet changed has started meanwhile."""
    changed = True
    while changed:
        changed = False
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):  # it has ended, or may not be changed
                changed |= change(int(thread))


def _end_idleness(thread: int) -> bool:
    """Let it have its share of the cores; returns whether it was idle."""
    if os.sched_getscheduler(thread) != os.SCHED_IDLE:
        return False
    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
    return True


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
