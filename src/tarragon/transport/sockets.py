"""Abstract Unix stream sockets: how one is opened, and who is at the other end."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from typing import Final

from tarragon.transport.handshake import HandshakeError

_UCRED: Final = struct.Struct("3i")  # pid, uid, gid
BACKLOG: Final = 128
EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of accept that pass when others release what they hold."""
SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def listening_socket(address: str) -> socket.socket:
    """A non-blocking listener on an abstract ``address``; OSError if it is taken."""
    sock = _open(address)
    try:
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_once(address: str) -> socket.socket | None:
    """A connected non-blocking socket, or None while nobody listens there or the queue is full."""
    sock = _open(address)
    try:
        # A Unix socket connects at once or not at all: there is nothing to wait for.
        sock.connect(address)
    except (ConnectionRefusedError, FileNotFoundError, BlockingIOError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def _open(address: str) -> socket.socket:
    if not address.startswith("\0"):
        raise ValueError(f"socket address {address!r} is not abstract: it must begin with NUL")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)  # close-on-exec, as all of Python's
    sock.setblocking(False)
    return sock


def check_same_user(sock: socket.socket) -> int:
    """Process id of the other end; HandshakeError if another user runs it.

    An abstract address has no file mode: anybody on the host may dial it, or
    take it before we do. The kernel's word on the peer is asked first of all.
    """
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.geteuid():
        raise HandshakeError(f"the other end runs as user {uid}, not {os.geteuid()}")
    return int(pid)


def send_handshake(sock: socket.socket, message: bytes) -> None:
    """Send a message of the handshake, all at once: on a fresh socket there is always room for it.

    Raises ConnectionError.
    """
    try:
        sent_bytes = sock.send(message, SEND_FLAGS) if message else 0
    except BlockingIOError:
        sent_bytes = -1
    if sent_bytes != len(message):
        raise ConnectionAbortedError("the other end takes no bytes")


def recv_handshake(sock: socket.socket, bytes_max: int) -> bytes:
    """Some bytes of a message of the handshake; BlockingIOError if none are there, ConnectionError at EOF."""
    received = sock.recv(bytes_max, socket.MSG_DONTWAIT)
    if not received:
        raise ConnectionResetError("the other end hung up")
    return received


def wait_ready(sock: socket.socket, events: int, deadline_s: float | None) -> None:
    """Wait for poll ``events`` (or an error, which the next call on ``sock`` will tell) until ``deadline_s``.

    ``deadline_s`` is on the clock of ``time.monotonic``. Raises TimeoutError.
    """
    descriptor = sock.fileno()
    if descriptor < 0:
        raise ConnectionResetError("the connection is closed")
    poll = select.poll()
    poll.register(descriptor, events)
    if deadline_s is None:
        poll.poll()
        return
    # Poll counts in milliseconds; rounding up avoids a busy last millisecond.
    remaining_ms = max(0.0, (deadline_s - time.monotonic()) * 1e3)
    if not poll.poll(int(remaining_ms) + (remaining_ms > 0)):
        raise TimeoutError("the other end was silent for too long")


def abandon(sock: socket.socket) -> None:
    """Make both ends see an end of file, without closing a descriptor that another thread may be using."""
    with contextlib.suppress(OSError):  # already disconnected or closed, which is what was wanted
        sock.shutdown(socket.SHUT_RDWR)


def hang_up(sock: socket.socket, owner_pid: int) -> None:
    """Close ``sock``, and cut the connection itself if this process (and not a parent of it) made it.

    Cutting reaches every duplicate: the peer sees the end even if some child inherited a descriptor.
    A forked child that closes what it inherited, on the other hand, must not cut its parent's connection.
    """
    if os.getpid() == owner_pid:
        abandon(sock)
    sock.close()
