"""Who may come in? A listener that shakes hands with many dialers at once.

A dialer that is slow, stopped or hostile in mid-handshake delays nobody else:
all pending handshakes make progress within one ``accept``.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time

from tarragon.config import EXHAUSTED_PAUSE_S, HANDSHAKES_PENDING_MAX, SEND_TIMEOUT_S
from tarragon.transport.connection import Connection
from tarragon.transport.handshake import HandshakeError, ListenerHandshake
from tarragon.transport.sockets import (
    EXHAUSTED,
    abandon,
    check_same_user,
    listening_socket,
    recv_handshake,
    send_handshake,
)


class _Pending:
    """One dialer that has not yet proved who it is."""

    def __init__(self, sock: socket.socket, secret: bytes, deadline_s: float) -> None:
        self.sock = sock
        self.deadline_s = deadline_s
        self.peer_pid = check_same_user(sock)
        self._handshake = ListenerHandshake(secret)
        self._message = b""

    def progress(self) -> bool:
        """Take what has arrived; True once it is complete. Raises HandshakeError, ConnectionError."""
        self._message += recv_handshake(self.sock, self._handshake.wanted - len(self._message))
        if len(self._message) == self._handshake.wanted:
            message, self._message = self._message, b""
            try:
                send_handshake(self.sock, self._handshake.step(message))
            except HandshakeError as error:
                send_handshake(self.sock, error.farewell)
                raise
        return self._handshake.wanted == 0


class Listener:
    """Accepts authenticated connections at an abstract ``address``; several threads may call ``accept``.

    ``refused`` counts dialers that were turned away: another user, another secret, another protocol,
    too slow, or hung up before they were done.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        *,
        frame_bytes_max: int,
        handshake_timeout_s: float,
        send_timeout_s: float = SEND_TIMEOUT_S,
        handshakes_pending_max: int = HANDSHAKES_PENDING_MAX,
    ) -> None:
        ListenerHandshake(secret)  # an unusable secret is the caller's fault, not the first dialer's
        self.refused = 0
        self._secret = secret
        self._frame_bytes_max = frame_bytes_max
        self._handshake_timeout_s = handshake_timeout_s
        self._send_timeout_s = send_timeout_s
        self._pending_max = handshakes_pending_max
        self._pending: dict[int, _Pending] = {}  # by descriptor, oldest first
        self._lock = threading.Lock()
        self._socket = listening_socket(address)
        self._epoll = select.epoll()
        self._epoll.register(self._socket.fileno(), select.EPOLLIN)
        self._closed = False
        self._owner_pid = os.getpid()

    def fileno(self) -> int:
        """For select and poll: readable means that ``accept`` has something to do (it may still wait)."""
        return self._epoll.fileno()

    def accept(self, timeout_s: float | None = None) -> Connection:
        """The next connection whose handshake is done.

        Raises HandshakeError for each dialer that is refused (call again), TimeoutError, and
        ConnectionAbortedError once the listener is closed.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        # One thread at a time serves all dialers; the others wait for their turn.
        if not self._lock.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise TimeoutError("nobody dialled")
        try:
            while True:
                self._refuse_overdue()
                for descriptor, _ in self._wait(until_s):
                    connection = self._progress(descriptor)
                    if connection is not None:
                        return connection
                if until_s is not None and time.monotonic() >= until_s:
                    raise TimeoutError("nobody dialled")
        finally:
            self._lock.release()

    def close(self) -> None:
        """Stop listening and hang up on pending dialers; wakes a thread that waits in ``accept``."""
        self._closed = True
        # As in hang_up: what a forked child closes must go on listening in its parent.
        if os.getpid() == self._owner_pid:
            abandon(self._socket)
        with self._lock:
            for pending in self._pending.values():
                pending.sock.close()
            self._pending.clear()
            self._socket.close()
            self._epoll.close()

    def _wait(self, until_s: float | None) -> list[tuple[int, int]]:
        """Descriptors with news, until ``until_s`` or the first deadline of a pending handshake."""
        if not self._closed:
            deadlines = [pending.deadline_s for pending in self._pending.values()]
            wake_s = min([*deadlines, *([] if until_s is None else [until_s])], default=None)
            events = self._epoll.poll(None if wake_s is None else max(0.0, wake_s - time.monotonic()))
        if self._closed:
            raise ConnectionAbortedError("the listener is closed")
        return events

    def _progress(self, descriptor: int) -> Connection | None:
        if descriptor == self._socket.fileno():
            self._take_dialer()
            return None
        pending = self._pending.get(descriptor)
        if pending is None:
            return None
        try:
            done = pending.progress()
        except BlockingIOError:
            return None
        except HandshakeError:
            self._refuse(descriptor)
            raise
        except ConnectionError as error:
            self._refuse(descriptor)
            raise HandshakeError("the dialer hung up during the handshake") from error
        return self._promote(descriptor) if done else None

    def _take_dialer(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return  # it left again
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            # Out of descriptors or memory: whoever dials stays in the queue until there is room again.
            time.sleep(EXHAUSTED_PAUSE_S)
            return
        try:
            pending = _Pending(sock, self._secret, time.monotonic() + self._handshake_timeout_s)
        except BaseException:
            sock.close()
            self.refused += 1
            raise
        self._pending[sock.fileno()] = pending
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        if len(self._pending) > self._pending_max:
            self._refuse(next(iter(self._pending)))
            raise HandshakeError(f"more than {self._pending_max} handshakes at once: the oldest was given up")

    def _refuse_overdue(self) -> None:
        now_s = time.monotonic()
        for descriptor, pending in self._pending.items():
            if pending.deadline_s <= now_s:
                self._refuse(descriptor)
                raise HandshakeError(f"the dialer took longer than {self._handshake_timeout_s} s")

    def _refuse(self, descriptor: int) -> None:
        self.refused += 1
        self._forget(descriptor).close()

    def _promote(self, descriptor: int) -> Connection:
        peer_pid = self._pending[descriptor].peer_pid
        return Connection(
            self._forget(descriptor),
            frame_bytes_max=self._frame_bytes_max,
            send_timeout_s=self._send_timeout_s,
            peer_pid=peer_pid,
        )

    def _forget(self, descriptor: int) -> socket.socket:
        self._epoll.unregister(descriptor)
        return self._pending.pop(descriptor).sock
