"""How one worker process is born by fork, what it inherits, and how its end is put in words.

A worker is forked from a parent that has already imported torch and vLLM, so
that a new one is ready in seconds (5.4). It inherits memory and nothing else:
no descriptor, no signal handler, no random state, and it dies with its parent.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import gc
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from tarragon.agent import priority

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_F_SETPIPE_SZ: Final = 1031
_LOG_PIPE_BYTES: Final = 1 << 20
_FORK_EXIT_CODE: Final = 71
"""Exit code of a child that could not be set up (EX_OSERR)."""

_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Make orphans of dead workers children of this process, so that it can end and reap them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def thread_count() -> int:
    """Threads of this process, counted by the kernel (native ones too)."""
    return len(os.listdir("/proc/self/task"))


def fork_child(
    title: str,
    body: Callable[[], None],
    release: Callable[[], None],
    polite: priority.Politeness | None = None,
    *,
    piped: bool = True,
) -> tuple[int, int]:
    """Fork a child that runs ``body`` and then ends; return (pid, log descriptor) in the parent.

    ``release`` runs in the child and closes the Python objects that own
    descriptors of the parent, so that none of them closes a reused number
    later; whatever descriptor is left above 2 is closed after it. With
    ``piped`` the child's stdout and stderr go to a pipe whose non-blocking
    read end is returned; without, it keeps the parent's and -1 is returned.

    Raises OSError if the process or the pipe cannot be made.
    """
    read_end, write_end = _log_pipe() if piped else (-1, -1)
    parent_pid = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # Blocked, because a signal that reached the child before it has its own
    # handlers would be written to the parent's wake-up pipe.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _child(title, body, release, parent_pid, write_end, polite)
    except OSError:
        for fd in (read_end, write_end):
            if fd >= 0:
                os.close(fd)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    if write_end >= 0:
        os.close(write_end)
    return pid, read_end


def exit_words(code: int, status: int) -> str:
    """How a child ended, by ``si_code`` and ``si_status`` of waitid: "exit code 2", "killed by SIGKILL"."""
    if code == os.CLD_EXITED:
        return f"exit code {status}"
    try:
        name = signal.Signals(status).name
    except ValueError:
        name = f"signal {status}"
    return f"killed by {name}" + (" (core dumped)" if code == os.CLD_DUMPED else "")


def children_of(pid: int) -> list[int]:
    """Pids whose parent is ``pid``, zombies included."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError), open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                # "pid (comm) state ppid ...": comm may hold anything, so count from its last bracket.
                if int(file.read().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry))
    return found


def end_children() -> None:
    """Kill and reap every child of this process, and those that become its children by that."""
    while orphans := children_of(os.getpid()):
        for pid in orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in orphans:
            os.waitpid(pid, 0)


def remove_openmp_mark(pid: int) -> None:
    """Unlink what an LLVM or Intel OpenMP runtime leaves of a killed process in shared memory."""
    with suppress(OSError):
        os.unlink(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}")  # noqa: S108


def die_with_parent() -> None:
    """Have this process killed when the thread that started it ends. Raises OSError."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _log_pipe() -> tuple[int, int]:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read_end, False)
    with suppress(
        OSError
    ):  # room for a worker's words while its parent is busy; unprivileged limits may differ
        fcntl.fcntl(write_end, _F_SETPIPE_SZ, _LOG_PIPE_BYTES)
    return read_end, write_end


def _child(
    title: str,
    body: Callable[[], None],
    release: Callable[[], None],
    parent_pid: int,
    log_fd: int,
    polite: priority.Politeness | None,
) -> NoReturn:
    """Everything that the child does, from its first instruction to its exit."""
    code = _FORK_EXIT_CODE
    try:
        die_with_parent()
        if os.getppid() != parent_pid:  # the parent died before the line above: nobody would tell us
            os._exit(_FORK_EXIT_CODE)
        os.setsid()
        _take_stdio(log_fd)
        _reset_signals()
        release()
        _close_all_above_stdio()
        _reseed()
        set_title(title)
        if polite is not None:
            priority.lower(polite)
        faulthandler.enable()
        gc.enable()
        code = 1
        body()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _take_stdio(log_fd: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if null > 2:
        os.close(null)
    if log_fd >= 0:
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        # Whole lines, at once: the parent prefixes lines, and the last one may be all that is left. New
        # objects, because the old ones remember what kind of file they had; sys.__stdout__ keeps those alive.
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which then tells its workers
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _close_all_above_stdio() -> None:
    for entry in os.listdir("/proc/self/fd"):
        fd = int(entry)
        if fd > 2:
            with suppress(OSError):  # the descriptor of this very listing is gone already
                os.close(fd)


def _reseed() -> None:
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def set_title(title: str) -> None:
    """What `ps` shows for this process."""
    with suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(title)
