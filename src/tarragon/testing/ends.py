"""Tools for tests of the transport: both ends of a connection, processes that may die, what must not leak."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

from tarragon.transport.local import (
    AsyncConnection,
    AsyncServer,
    Connection,
    Listener,
    dial,
    dial_async,
    serve_async,
)
from tarragon.transport.probe import probe_open
from tarragon.transport.responder import ProbeResponder

SECRET: Final = b"s" * 32
FRAME_BYTES_MAX: Final = 1 << 20
WAIT_S: Final = 10.0
"""No test waits longer than this for anything."""
AT_ONCE_S: Final = 5.0
"""Generous on a busy machine, where a killed process that has much mapped takes seconds to be gone, and below
every time-out."""

_fork = multiprocessing.get_context("fork")


def new_address() -> str:
    return f"\0tarragon-test/{uuid.uuid4().hex}"


def listen(
    address: str,
    *,
    secret: bytes = SECRET,
    handshake_timeout_s: float = WAIT_S,
    frame_bytes_max: int = FRAME_BYTES_MAX,
    handshakes_pending_max: int = 8,
) -> Listener:
    return Listener(
        address,
        secret,
        frame_bytes_max=frame_bytes_max,
        handshake_timeout_s=handshake_timeout_s,
        handshakes_pending_max=handshakes_pending_max,
    )


def call(address: str, *, secret: bytes = SECRET, timeout_s: float = WAIT_S) -> Connection:
    return dial(address, secret, timeout_s=timeout_s, frame_bytes_max=FRAME_BYTES_MAX)


def connection_pair(send_timeout_s: float = WAIT_S) -> tuple[Connection, Connection]:
    """Two ends that need no handshake."""
    one, two = socket.socketpair()
    return (
        Connection(one, frame_bytes_max=FRAME_BYTES_MAX, send_timeout_s=send_timeout_s),
        Connection(two, frame_bytes_max=FRAME_BYTES_MAX, send_timeout_s=send_timeout_s),
    )


def raw_pair(
    send_timeout_s: float = WAIT_S, frame_bytes_max: int = FRAME_BYTES_MAX
) -> tuple[socket.socket, Connection]:
    """A bare socket (the hostile end) and a connection."""
    bare, sock = socket.socketpair()
    return bare, Connection(sock, frame_bytes_max=frame_bytes_max, send_timeout_s=send_timeout_s)


async def call_async(address: str, *, secret: bytes = SECRET, timeout_s: float = WAIT_S) -> AsyncConnection:
    return await dial_async(address, secret, timeout_s=timeout_s, frame_bytes_max=FRAME_BYTES_MAX)


def async_pair(send_timeout_s: float = WAIT_S) -> tuple[socket.socket, AsyncConnection]:
    """A bare non-blocking socket and a connection."""
    bare, sock = socket.socketpair()
    bare.setblocking(False)
    return bare, AsyncConnection(sock, frame_bytes_max=FRAME_BYTES_MAX, send_timeout_s=send_timeout_s)


async def echo(connection: AsyncConnection) -> None:
    while (payload := await connection.recv()) is not None:
        await connection.send(payload)


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[[AsyncConnection], Awaitable[None]] = echo, handshake_timeout_s: float = WAIT_S
) -> AsyncIterator[tuple[str, AsyncServer]]:
    server = await serve_async(
        address := new_address(),
        SECRET,
        handler,
        frame_bytes_max=FRAME_BYTES_MAX,
        handshake_timeout_s=handshake_timeout_s,
    )
    try:
        yield address, server
    finally:
        server.close()
        await server.wait_closed()


def frame_bytes(payload: bytes) -> bytes:
    """What a frame looks like on the wire."""
    bare, tap = raw_pair()
    with bare, tap:
        tap.send(payload)
        return bare.recv(1 << 16)


@contextlib.contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    """A forked process that is killed, if need be, and reaped at the end."""
    child = _fork.Process(target=target, args=arguments)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join(WAIT_S)
        assert child.exitcode is not None
        child.close()


def stop(pid: int) -> None:
    """Stop a process, and wait until it is: each thread goes on until it is scheduled and sees the signal."""
    os.kill(pid, signal.SIGSTOP)
    deadline_s = time.monotonic() + WAIT_S
    while set(_thread_states(pid)) != {"T"}:
        assert time.monotonic() < deadline_s, f"process {pid} does not stop"
        time.sleep(0.002)


def _thread_states(pid: int) -> Iterator[str]:
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread that has ended since
            yield stat.read_text().rpartition(")")[2].split()[0]


def answer_probes(address: str, epoch: int, works: bool, accept_s: float) -> None:
    """A worker process: a thread of it answers probes; it makes progress if it ``works``.

    It looks for connections for ``accept_s`` between two beats.
    """
    with contextlib.closing(listen(address)) as listener:
        responder = ProbeResponder(epoch)
        while True:
            with contextlib.suppress(TimeoutError):
                connection = listener.accept(accept_s)
                opened = probe_open(connection.recv(WAIT_S) or b"")
                assert opened is not None
                responder.adopt(connection, opened)
            if works:
                responder.pulse.beat()


class Outcome:
    """What a thread returned (``value``) or raised (``error``), once it is done."""

    def __init__(self) -> None:
        self.value: object = None
        self.error: Exception | None = None
        self.done = False


@contextlib.contextmanager
def thread(target: Callable[[], object]) -> Iterator[Outcome]:
    """Run ``target`` beside the test, and wait for its end at the end of the block."""
    outcome = Outcome()

    def run() -> None:
        try:
            outcome.value = target()
        except Exception as error:
            outcome.error = error
        outcome.done = True

    runner = threading.Thread(target=run, daemon=True)
    runner.start()
    yield outcome
    runner.join(WAIT_S)
    assert outcome.done, "the thread hangs"


@contextlib.contextmanager
def connected() -> Iterator[tuple[Connection, Connection]]:
    """Who dialled and who listened, after a true handshake."""
    listener = listen(address := new_address())
    with contextlib.closing(listener), thread(lambda: call(address)) as dialled:
        accepted = listener.accept(WAIT_S)
    assert isinstance(dialled.value, Connection), dialled.error
    with dialled.value as dialer, accepted:
        yield dialer, accepted


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Within the block this process can open no other descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)  # the lowest free number: whatever is opened would get it
    taken = [os.dup(0) for _ in range(max(map(int, os.listdir("/proc/self/fd"))) - free)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken, default=free - 1) + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapped_regions() -> int:
    """How many regions this process has mapped."""
    with open("/proc/self/maps") as maps:
        return maps.read().count("tarragon-region")


@contextlib.contextmanager
def no_leak() -> Iterator[None]:
    """Decorates a test that leaves as many descriptors and mappings as it found."""
    gc.collect()
    before = open_descriptors(), mapped_regions()
    yield
    deadline_s = time.monotonic() + WAIT_S
    while True:
        after = open_descriptors(), mapped_regions()
        # Fewer is no leak: a thread of a test before this one may have ended meanwhile.
        if all(now <= then for now, then in zip(after, before, strict=True)):
            return
        assert time.monotonic() < deadline_s, f"descriptors and mappings: {before} before, {after} after"
        gc.collect()  # what an exception's traceback still held is no leak
        time.sleep(0.01)
