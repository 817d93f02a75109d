"""The asyncio twins of ``local``: same wire format, same rules, nothing blocks the event loop.

Works on the sockets themselves rather than on asyncio's streams: a receive that
is cancelled loses no bytes, a send of several buffers joins none, and nothing
beyond the current frame is read.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final

from tarragon.config import (
    DIAL_PAUSE_S_MAX,
    DIAL_PAUSE_S_MIN,
    EXHAUSTED_PAUSE_S,
    HANDSHAKES_PENDING_MAX,
    SEND_TIMEOUT_S,
)
from tarragon.messages import Control, decode_control, encode_control
from tarragon.transport.frames import BUFFERS_PER_CALL_MAX, FrameReader, Payload, encode_frame, unsent
from tarragon.transport.handshake import DialerHandshake, Handshake, HandshakeError, ListenerHandshake
from tarragon.transport.sockets import (
    EXHAUSTED,
    SEND_FLAGS,
    abandon,
    check_same_user,
    connect_once,
    hang_up,
    listening_socket,
    recv_handshake,
    send_handshake,
)

_FRAMES_BETWEEN_YIELDS: Final = 32
"""A peer that sends without pause must not keep the event loop from its other tasks."""


class AsyncConnection:
    """An authenticated stream of frames in one event loop; several tasks may send, one at a time receives.

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
        sock.setblocking(False)
        self.sock = sock
        self.peer_pid = peer_pid
        self.torn = 0
        self._reader = FrameReader(frame_bytes_max)
        self._frame_bytes_max = frame_bytes_max
        self._send_timeout_s = send_timeout_s
        self._send_lock = asyncio.Lock()
        self._waits = Waits(sock)
        self._owner_pid = os.getpid()
        self._frames_without_wait = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    async def send(self, payload: Payload) -> None:
        """Send one frame made of one buffer or of several, which are not joined.

        Raises ConnectionError if the peer is gone or takes nothing for too long, ProtocolError if
        the frame is longer than the bound (nothing is sent then). A send that is cancelled between
        two pieces ends the connection: nothing that followed could be read.
        """
        views = encode_frame(payload, self._frame_bytes_max)
        async with self._send_lock:
            views = self._send_some(views)
            if views:
                await self._send_rest(views)

    async def send_control(self, message: Control) -> None:
        """Send one control message; raises as ``send`` does."""
        await self.send(encode_control(message))

    async def recv(self) -> bytes | None:
        """Payload of the next frame, or None once the peer is gone or this end is closed.

        Raises ProtocolError for a bad or overlong frame. If it is cancelled, what arrived so far is
        kept for the next call.
        """
        await self._maybe_yield()
        while True:
            try:
                count = self.sock.recv_into(self._reader.space())
            except BlockingIOError:
                self._frames_without_wait = 0
                await self._waits.readable()
                continue
            except OSError as error:
                if not isinstance(error, ConnectionError) and self.sock.fileno() >= 0:
                    raise
                count = 0
            if count == 0:
                self.torn += self._reader.is_torn
                return None
            payload = self._reader.received(count)
            if payload is not None:
                return payload

    async def recv_control(self) -> Control | None:
        """Next control message, or None once the peer is gone; raises as ``recv`` does."""
        payload = await self.recv()
        return None if payload is None else decode_control(payload)

    def close(self) -> None:
        """Close; a task that waits in ``recv`` sees the end of file. Closing twice is harmless."""
        self._waits.wake_all()
        hang_up(self.sock, self._owner_pid)

    async def _maybe_yield(self) -> None:
        self._frames_without_wait += 1
        if self._frames_without_wait >= _FRAMES_BETWEEN_YIELDS:
            self._frames_without_wait = 0
            await asyncio.sleep(0)

    def _send_some(self, views: list[memoryview]) -> list[memoryview]:
        """Send what there is room for; return the rest. Raises ConnectionError."""
        try:
            while views:
                sent_bytes = self.sock.sendmsg(views[:BUFFERS_PER_CALL_MAX], [], SEND_FLAGS)
                views = unsent(views, sent_bytes)
        except BlockingIOError:
            pass
        except OSError as error:
            if self.sock.fileno() < 0:
                raise ConnectionResetError("the connection is closed") from error
            raise
        return views

    async def _send_rest(self, views: list[memoryview]) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                while views:
                    await self._waits.writable()
                    views = self._send_some(views)
        except TimeoutError as error:
            raise ConnectionAbortedError(
                f"the other end took no frame for {self._send_timeout_s} s: given up"
            ) from error
        finally:
            if views:  # too slow, cancelled, or gone: this frame will never be whole
                abandon(self.sock)


class Waits:
    """Tasks of this event loop that wait for one socket to become readable or writable."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    async def readable(self) -> None:
        """Wait for bytes, the end of file or ``wake_all``."""
        assert self._reader is None, "two tasks receive from one connection"
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        loop.add_reader(self._sock.fileno(), _resolve, self._reader)
        try:
            await self._reader
        finally:
            # A closed descriptor's number may already belong to somebody else.
            if self._sock.fileno() >= 0:
                loop.remove_reader(self._sock.fileno())
            self._reader = None

    async def writable(self) -> None:
        """Wait for room, the peer's end or ``wake_all``."""
        assert self._writer is None, "two tasks send on one connection"
        loop = asyncio.get_running_loop()
        self._writer = loop.create_future()
        loop.add_writer(self._sock.fileno(), _resolve, self._writer)
        try:
            await self._writer
        finally:
            if self._sock.fileno() >= 0:
                loop.remove_writer(self._sock.fileno())
            self._writer = None

    def wake_all(self) -> None:
        """To be called just before the socket is closed: the event loop forgets it, who waits goes on."""
        for future, writing in ((self._reader, False), (self._writer, True)):
            if future is None or self._sock.fileno() < 0:
                continue
            loop = future.get_loop()
            (loop.remove_writer if writing else loop.remove_reader)(self._sock.fileno())
            _resolve(future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def dial_async(
    address: str,
    secret: bytes,
    *,
    timeout_s: float,
    frame_bytes_max: int,
    send_timeout_s: float = SEND_TIMEOUT_S,
) -> AsyncConnection:
    """Connect to the listener at ``address``, waiting for it to exist, and shake hands.

    Raises TimeoutError if there is no listener, or no answer from it, within ``timeout_s``, and
    HandshakeError if it is not one of us or does not want us.
    """
    handshake = DialerHandshake(secret)
    deadline_s = time.monotonic() + timeout_s
    pause_s = DIAL_PAUSE_S_MIN
    while (sock := connect_once(address)) is None:
        if time.monotonic() + pause_s > deadline_s:
            raise TimeoutError(f"nobody listens at {address!r} after {timeout_s} s")
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, DIAL_PAUSE_S_MAX)
    try:
        peer_pid = check_same_user(sock)
        async with asyncio.timeout(deadline_s - time.monotonic()):
            await _shake_hands(sock, handshake)
        return AsyncConnection(
            sock, frame_bytes_max=frame_bytes_max, send_timeout_s=send_timeout_s, peer_pid=peer_pid
        )
    except BaseException:
        sock.close()
        raise


async def _shake_hands(sock: socket.socket, handshake: Handshake) -> None:
    """Drive ``handshake`` over a non-blocking ``sock``; raises HandshakeError. The caller bounds the time."""
    waits = Waits(sock)
    try:
        send_handshake(sock, handshake.opening)
        while handshake.wanted:
            message = b""
            while len(message) < handshake.wanted:
                await waits.readable()
                message += recv_handshake(sock, handshake.wanted - len(message))
            try:
                send_handshake(sock, handshake.step(message))
            except HandshakeError as error:
                send_handshake(sock, error.farewell)
                raise
    except ConnectionError as error:
        raise HandshakeError("the other end hung up during the handshake") from error


Handler = Callable[[AsyncConnection], Awaitable[None]]


class AsyncServer:
    """Accepts authenticated connections; each gets a task that shakes hands and then runs the handler.

    ``refused`` counts dialers that were turned away: another user, another secret, another protocol,
    too slow, or hung up before they were done.
    """

    def __init__(
        self,
        sock: socket.socket,
        secret: bytes,
        handler: Handler,
        *,
        frame_bytes_max: int,
        handshake_timeout_s: float,
        handshakes_pending_max: int = HANDSHAKES_PENDING_MAX,
    ) -> None:
        self.refused = 0
        self._socket = sock
        self._secret = secret
        self._handler = handler
        self._frame_bytes_max = frame_bytes_max
        self._handshake_timeout_s = handshake_timeout_s
        self._pending = 0
        self._pending_max = handshakes_pending_max
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening and cancel every handshake and handler; their connections close."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        for task in self._tasks:
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until all handlers have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return  # it left again
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            # Out of descriptors or memory: whoever dials stays in the queue until there is room again.
            self._loop.remove_reader(self._socket.fileno())
            self._loop.call_later(EXHAUSTED_PAUSE_S, self._listen_again)
            return
        if self._pending >= self._pending_max:
            self.refused += 1
            sock.close()
            return
        self._pending += 1
        task = self._loop.create_task(self._serve(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Here and not in the task: one that is cancelled before its first step runs no code at all.
        task.add_done_callback(lambda _: sock.close())

    def _listen_again(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    async def _serve(self, sock: socket.socket) -> None:
        connection = await self._welcome(sock)
        if connection is None:
            return
        try:
            await self._handler(connection)
        except Exception as error:
            self._loop.call_exception_handler(
                {"message": "the handler of a connection failed", "exception": error}
            )
        finally:
            connection.close()

    async def _welcome(self, sock: socket.socket) -> AsyncConnection | None:
        """Shake hands; None if the dialer was refused (the end of the task closes the socket)."""
        try:
            sock.setblocking(False)
            peer_pid = check_same_user(sock)
            async with asyncio.timeout(self._handshake_timeout_s):
                await _shake_hands(sock, ListenerHandshake(self._secret))
        except (HandshakeError, TimeoutError):
            self.refused += 1
            return None
        finally:
            self._pending -= 1
        return AsyncConnection(sock, frame_bytes_max=self._frame_bytes_max, peer_pid=peer_pid)


async def serve_async(
    address: str,
    secret: bytes,
    handler: Handler,
    *,
    frame_bytes_max: int,
    handshake_timeout_s: float,
) -> AsyncServer:
    """Listen at ``address``; each connection gets a task that runs ``handler(connection)`` and closes it.

    Raises OSError if the address is taken.
    """
    ListenerHandshake(secret)  # an unusable secret is the caller's fault, not the first dialer's
    return AsyncServer(
        listening_socket(address),
        secret,
        handler,
        frame_bytes_max=frame_bytes_max,
        handshake_timeout_s=handshake_timeout_s,
    )
