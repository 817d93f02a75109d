"""Programs begun by fork from a process that has imported torch and vLLM: twelve core-seconds saved on each.

What a cluster runs then is the command line of ``tarragon serve``, from its first statement; it only finds
its imports done. That a start from nothing works is held by the tests that do not ask for this.

    client                                         forkserver (python -m tests.forkserver FD)
    order: function, arguments, environment  --->  fork ---> function(arguments)
    pid, exit code                           <---  reaps
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import msgspec

from tarragon.agent import environment, preload
from tarragon.boot import Boot
from tarragon.cluster import MARK, Cluster

COMMAND_LINE = "tarragon.cli:main"
ORDER_BYTES_MAX = 128 << 10
NUMBER = struct.Struct("q")
NO_MARK = "-" * 16
"""In the forkserver's own environment, as long as a cluster's mark: forks overwrite it."""
PRELOADED = (*preload.PRELOAD_MODULES, "tarragon.cli", "tarragon.agent.agent", "tarragon.agent.console")


class Order(msgspec.Struct, frozen=True):
    """What one program is begun with; the descriptors of its stdout, stderr and life come along."""

    function: str
    """"module:name"; it returns the exit code."""
    arguments: list[str]
    environ: dict[str, str]


# ------------------------------------------------------------------ the side of the tests


class Forked:
    """As much of subprocess.Popen as is used here, for a process that another one has forked."""

    def __init__(self, life: socket.socket) -> None:
        self._life = life
        self.returncode: int | None = None
        self.pid = self._receive(None)
        self._handle = os.pidfd_open(self.pid)  # a number may be given to another process, this may not

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._receive(timeout)
            os.close(self._handle)
            self._life.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _receive(self, timeout_s: float | None) -> int:
        self._life.settimeout(timeout_s)
        try:
            return int(NUMBER.unpack(self._life.recv(NUMBER.size))[0])
        except (BlockingIOError, TimeoutError):
            raise subprocess.TimeoutExpired("a fork", timeout_s or 0.0) from None
        except struct.error:
            raise RuntimeError("the forkserver is gone") from None


class ForkServer:
    """One process that waits, imports done, until programs are wanted. It ends with ``close`` or with us."""

    def __init__(self) -> None:
        self._door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=Path(__file__).parents[1],
                env={**os.environ, MARK: NO_MARK},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def cluster(self, *args: Any, **options: Any) -> Cluster:
        """Like ``Cluster(...)``, not yet started."""
        return _ForkedCluster(self, *args, **options)

    def run(
        self, function: str, arguments: Sequence[str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """A program, to its end. Raises subprocess.TimeoutExpired."""
        with TemporaryFile() as out, TemporaryFile() as log:
            process = self.begin(function, arguments, os.environ, out, log)
            try:
                code = process.wait(timeout_s)
            finally:
                process.kill()
            texts = [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, log)]
        return subprocess.CompletedProcess(arguments, code, *texts)

    def worker(self, boot: Boot, log: IO[Any]) -> Forked:
        """The process of ``boot.role`` by itself, as the node agent forks it; all it says goes to ``log``."""
        program = "tests.forkserver:work"
        return self.begin(program, [msgspec.json.encode(boot).decode()], os.environ, log, log)

    def begin(
        self,
        function: str,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        out: IO[Any],
        log: IO[Any],
    ) -> Forked:
        """Fork a program; returns once it exists."""
        order = msgspec.json.encode(Order(function, list(arguments), {MARK: NO_MARK, **environ}))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._door, [order], [out.fileno(), log.fileno(), theirs.fileno()])
        return Forked(ours)

    def close(self) -> None:
        self._door.close()
        self._process.wait()


@functools.cache
def the_forkserver() -> ForkServer:
    """The one of this test process; it imports when it is asked for the first time."""
    found = ForkServer()
    atexit.register(found.close)
    return found


class _ForkedCluster(Cluster):
    def __init__(self, forkserver: ForkServer, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forkserver = forkserver

    def _launch(self) -> Any:
        serve = self._command.index("serve")
        return self._forkserver.begin(
            COMMAND_LINE, self._command[serve:], self._environ, self._out, self._log
        )


def work(arguments: Sequence[str]) -> int:
    """What a worker's process runs. The only argument is its Boot as JSON."""
    boot = msgspec.json.decode(arguments[0], type=Boot)
    importlib.import_module(preload.WORKER_MODULES[boot.role]).main(boot)
    return 0


# ------------------------------------------------------------------ the forkserver itself


def main(door: socket.socket) -> int:
    """Fork what is ordered and tell how it ended, until nobody can order any more; the forks return too."""
    preload.import_all(PRELOADED)
    preload.settle()
    selector = selectors.DefaultSelector()
    selector.register(door, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not door:
                _tell_end(selector, key.fd, *key.data)
                continue
            told, descriptors, _, _ = socket.recv_fds(door, ORDER_BYTES_MAX, 3)
            if not told:
                return 0
            order = msgspec.json.decode(told, type=Order)
            pid = os.fork()
            if pid == 0:
                _leave_the_forkserver(selector)
                return _become(order, *descriptors)
            *streams, life = descriptors
            for descriptor in streams:
                os.close(descriptor)
            os.write(life, NUMBER.pack(pid))
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, life))


def _tell_end(selector: selectors.BaseSelector, handle: int, pid: int, life: int) -> None:
    selector.unregister(handle)
    os.close(handle)
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):  # nobody wants to know
        os.write(life, NUMBER.pack(os.waitstatus_to_exitcode(status)))
    os.close(life)


def _leave_the_forkserver(selector: selectors.BaseSelector) -> None:
    for key in list(selector.get_map().values()):
        if key.data:
            _, life = key.data
            os.close(life)
        os.close(key.fd)
    selector.close()


def _become(order: Order, out: int, log: int, life: int) -> int:
    os.setsid()
    for descriptor, number in ((out, 1), (log, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.close(life)
    _mark(order.environ[MARK])
    wanted = {**order.environ, "LD_PRELOAD": os.environ.get("LD_PRELOAD", "")}
    # Only what differs: process titles find their place by the first string of the environment.
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})
    module, _, name = order.function.partition(":")
    return int(getattr(importlib.import_module(module), name)(order.arguments))


def _mark(mark: str) -> None:
    """Write a cluster's mark over ours where /proc/<pid>/environ shows it; setenv would write elsewhere."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    assert len(mark) == len(NO_MARK)
    ctypes.memmove(libc.getenv(MARK.encode()), mark.encode(), len(mark))


if __name__ == "__main__":
    environment.prepare()
    sys.exit(main(socket.socket(fileno=int(sys.argv[1]))))
