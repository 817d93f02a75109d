"""A killed process's sockets close at once, though it held much memory; nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tarragon.agent.priority import group_nice

TIMEOUT_S = 60.0
HOLDER = """
import mmap, sys, threading, time
from tarragon.native.undertaker import spawn_undertaker
memory = mmap.mmap(-1, 64 << 20)
for page in range(0, len(memory), 4096):
    memory[page] = 1
print(spawn_undertaker(), flush=True)
for _ in range(8):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
time.sleep(600)
"""


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has reaped yet: its memory is free."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def descriptors(pid: int) -> list[str]:
    """What the process holds open now; the undertaker is closing what it inherited meanwhile."""
    held = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.append(os.readlink(entry))
    return held


@contextlib.contextmanager
def holding(*passed: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that holds memory, and its undertaker's pid; however the test ends, so does the process."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, pass_fds=passed) as holder:
        try:
            assert holder.stdout is not None
            yield holder, int(holder.stdout.readline())
        finally:
            holder.kill()


def test_the_end_of_file_comes_before_the_memory_is_freed_and_the_undertaker_follows() -> None:
    ours, theirs = socket.socketpair()
    with holding(theirs.fileno()) as (holder, undertaker):
        theirs.close()
        assert not ended(undertaker)
        # It starts beside its parent and at the lowest priority: it may not have come to this yet.
        deadline = time.monotonic() + TIMEOUT_S
        while (held := descriptors(undertaker)) != ["anon_inode:[pidfd]"]:
            assert time.monotonic() < deadline, f"it holds more than its view of its parent: {held}"
            time.sleep(0.01)
        holder.send_signal(signal.SIGKILL)
        ours.settimeout(TIMEOUT_S)
        assert ours.recv(1) == b""
        holder.wait(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while not ended(undertaker):
        assert time.monotonic() < deadline, "the undertaker outlived its parent"
        time.sleep(0.01)


def test_signals_for_the_parent_leave_the_undertaker_alone() -> None:
    with holding() as (holder, undertaker):
        os.kill(undertaker, signal.SIGINT)
        os.kill(undertaker, signal.SIGTERM)
        time.sleep(0.1)
        assert not ended(undertaker)
        assert holder.poll() is None


@pytest.mark.parametrize("is_leader", [True, False])
def test_only_a_session_of_the_workers_own_is_made_nice(is_leader: bool) -> None:
    """In a shell's session, say, all that is begun afterwards would run at the lowest priority."""
    worker = 'echo $BASHPID; exec "$0" -c "$1"'
    script = f"sleep 600 & {worker}" if is_leader else f"({worker}) & sleep 600"
    command = ["bash", "-c", script, sys.executable, HOLDER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as leader:
        try:
            assert leader.stdout is not None
            holder, undertaker = (int(leader.stdout.readline()) for _ in range(2))
            other = next(pid for pid in session(leader.pid) if pid not in (holder, undertaker))
            assert (holder == leader.pid) == is_leader
            if group_nice(other) is None:
                pytest.skip("the kernel does not weigh sessions against each other")
            assert group_nice(other) == 0
            os.kill(holder, signal.SIGKILL)
            deadline = time.monotonic() + TIMEOUT_S
            while not ended(undertaker):
                assert time.monotonic() < deadline, "the undertaker outlived its parent"
                time.sleep(0.01)
            assert group_nice(other) == (19 if is_leader else 0)
        finally:
            os.killpg(leader.pid, signal.SIGKILL)


def session(leader: int) -> list[int]:
    """Processes of the session, as far as they have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, ProcessLookupError):
            pid = int(entry.name)
            if os.getsid(pid) == leader and not ended(pid):
                found.append(pid)
    return found
