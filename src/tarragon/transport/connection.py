"""What is a connection? An authenticated, framed, blocking stream between two processes of one host.

The peer's death is an end of file and nothing else: ``recv`` returns None for
EOF and for a reset, ``send`` raises ConnectionError for EPIPE and for a peer
that takes nothing for too long.
"""

from __future__ import annotations

import array
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from tarragon.config import SEND_TIMEOUT_S
from tarragon.messages import Control, ProtocolError, decode_control, encode_control
from tarragon.transport.frames import BUFFERS_PER_CALL_MAX, FrameReader, Payload, encode_frame, unsent
from tarragon.transport.sockets import SEND_FLAGS, abandon, hang_up, wait_ready

_DESCRIPTOR_SPACE: Final = socket.CMSG_SPACE(array.array("i").itemsize)


class Connection:
    """An authenticated stream of frames; one thread may send while another receives.

    ``torn`` counts frames that the end of file cut in two. ``peer_pid`` is the
    process at the other end when the connection was made.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        frame_bytes_max: int,
        send_timeout_s: float = SEND_TIMEOUT_S,
        peer_pid: int = 0,
    ) -> None:
        # The descriptor blocks; whoever must not wait says so in each call (MSG_DONTWAIT), because
        # a time-out of the socket object would be shared by the sending and the receiving thread.
        sock.setblocking(True)
        self.sock = sock
        self.peer_pid = peer_pid
        self.torn = 0
        self._reader = FrameReader(frame_bytes_max)
        self._frame_bytes_max = frame_bytes_max
        self._send_timeout_s = send_timeout_s
        self._send_lock = threading.Lock()
        self._owner_pid = os.getpid()

    def fileno(self) -> int:
        """For select and poll: readable means that the next ``recv`` finds bytes or the end of file."""
        return self.sock.fileno()

    def send(self, payload: Payload) -> None:
        """Send one frame made of one buffer or of several, which are not joined.

        Raises ConnectionError if the peer is gone or takes nothing for too long, ProtocolError if
        the frame is longer than the bound (nothing is sent then).
        """
        self._send(encode_frame(payload, self._frame_bytes_max))

    def send_control(self, message: Control) -> None:
        """Send one control message; raises as ``send`` does."""
        self.send(encode_control(message))

    def send_with_fd(self, payload: bytes, fd: int) -> None:
        """Send one frame together with a duplicate of ``fd``; raises as ``send`` does."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())
        self._send(encode_frame(payload, self._frame_bytes_max), [rights])

    def recv(self, timeout_s: float | None = None) -> bytes | None:
        """Payload of the next frame, or None once the peer is gone.

        Raises TimeoutError (what arrived so far is kept for the next call) and ProtocolError for a
        bad or overlong frame. A descriptor that comes with the frame is closed by the kernel.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            count = self._patiently(self._recv_plain, deadline_s)
            if count == 0:
                self.torn += self._reader.is_torn
                return None
            payload = self._reader.received(count)
            if payload is not None:
                return payload

    def recv_control(self, timeout_s: float | None = None) -> Control | None:
        """Next control message, or None once the peer is gone; raises as ``recv`` does."""
        payload = self.recv(timeout_s)
        return None if payload is None else decode_control(payload)

    def recv_with_fd(self, timeout_s: float | None = None) -> tuple[bytes, int]:
        """Payload and descriptor of the next frame; the caller owns the descriptor (close-on-exec).

        Raises ConnectionError once the peer is gone, TimeoutError, and ProtocolError for a bad frame
        or any number of descriptors but one. Whatever is raised, no descriptor is left open.
        """
        payload, descriptors = self.recv_with_fds(timeout_s)
        if len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ProtocolError(f"frame with {len(descriptors)} descriptors, expected 1")
        return payload, descriptors[0]

    def recv_with_fds(self, timeout_s: float | None = None) -> tuple[bytes, list[int]]:
        """As ``recv_with_fd``, but for a frame that may have come without a descriptor."""
        descriptors: list[int] = []
        try:
            return self._recv_collecting(descriptors, timeout_s), descriptors
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def close(self) -> None:
        """Close; a thread that waits in ``recv`` sees the end of file. Closing twice is harmless."""
        hang_up(self.sock, self._owner_pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, views: list[memoryview], ancillary: list[tuple[int, int, bytes]] | None = None) -> None:
        deadline_s = time.monotonic() + self._send_timeout_s
        rights = ancillary or []
        with self._send_lock:
            while views:
                try:
                    sent_bytes = self.sock.sendmsg(views[:BUFFERS_PER_CALL_MAX], rights, SEND_FLAGS)
                except BlockingIOError:
                    self._wait_writable(deadline_s)
                    continue
                except OSError as error:
                    if self.sock.fileno() < 0:
                        raise ConnectionResetError("the connection is closed") from error
                    raise
                rights = []  # they went out with the first byte
                views = unsent(views, sent_bytes)

    def _wait_writable(self, deadline_s: float) -> None:
        try:
            wait_ready(self.sock, select.POLLOUT, deadline_s)
        except TimeoutError as error:
            abandon(self.sock)  # part of a frame may be out: nothing that follows it could be read
            raise ConnectionAbortedError(
                f"the other end took no frame for {self._send_timeout_s} s: given up"
            ) from error

    def _recv_plain(self, flags: int) -> int:
        return self.sock.recv_into(self._reader.space(), 0, flags)

    def _recv_collecting(self, descriptors: list[int], timeout_s: float | None) -> bytes:
        """Payload of the next frame; the descriptors that come with it are appended as they arrive."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            count = self._patiently(lambda flags: self._recv_rights(descriptors, flags), deadline_s)
            if count == 0:
                self.torn += self._reader.is_torn
                raise ConnectionResetError("the other end is gone")
            payload = self._reader.received(count)
            if payload is not None:
                return payload

    def _recv_rights(self, descriptors: list[int], flags: int) -> int:
        flags |= socket.MSG_CMSG_CLOEXEC
        count, ancillary, flags, _ = self.sock.recvmsg_into([self._reader.space()], _DESCRIPTOR_SPACE, flags)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
                descriptors.extend(received)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("frame with more descriptors than the one expected")
        return count

    def _patiently(self, receive: Callable[[int], int], deadline_s: float | None) -> int:
        """Call ``receive(flags)`` until it has bytes; 0 once the peer is gone; TimeoutError."""
        flags = 0 if deadline_s is None else socket.MSG_DONTWAIT
        while True:
            try:
                return receive(flags)
            except BlockingIOError:
                pass
            except OSError as error:
                if isinstance(error, ConnectionError) or self.sock.fileno() < 0:
                    return 0
                raise
            wait_ready(self.sock, select.POLLIN, deadline_s)
