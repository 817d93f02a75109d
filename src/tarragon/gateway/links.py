"""The gateway's connections to attention workers: one task per worker keeps one up, or reports it down."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Protocol

from tarragon.boot import Boot
from tarragon.config import WORKER_REDIAL_PAUSE_S_MAX, WORKER_REDIAL_PAUSE_S_MIN
from tarragon.gateway import wire
from tarragon.messages import Peer, ProtocolError
from tarragon.transport.local import AsyncConnection, dial_async
from tarragon.transport.sockets import abandon


class Events(Protocol):
    """What a link tells its owner. ``link_up`` precedes all ``received``, ``link_down`` follows them.

    A link that raises ProtocolError from ``link_up`` or ``received`` is hung up.
    """

    def link_up(self, link: Link, facts: wire.Facts) -> None: ...

    async def room(self) -> None: ...  # waits until a message may be received

    def received(self, link: Link, message: wire.Message) -> None: ...

    def unsendable(self, link: Link, message: wire.Message, error: Exception) -> None: ...

    def link_down(self, link: Link, cause: str, kind: str) -> None: ...  # kind: the cause in one word


class Link:
    """Dials one incarnation of an attention worker, again and again until ``close``."""

    def __init__(
        self, boot: Boot, peer: Peer, events: Events, on_refused: Callable[[Peer, str], None]
    ) -> None:
        self.peer = peer
        self.up = False
        self._connection: AsyncConnection | None = None
        self._was_cut = False
        self._boot = boot
        self._events = events
        self._on_refused = on_refused
        self._codec = wire.Codec(wire.FROM_WORKER)
        # Holds at most an Add and an Abort per live request, whose number is bounded.
        self._outbox: asyncio.Queue[wire.Message] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"link {peer.worker_id}")

    def send(self, message: wire.Message) -> None:
        """Queue one message; what a dead link has not sent is lost with it."""
        self._outbox.put_nowait(message)

    @property
    def hung_up(self) -> bool:
        """Whether the worker has closed the link, though something may be left to read."""
        if not self.up or self._connection is None or self._connection.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def cut(self, cause: str, kind: str) -> None:
        """Hang up on a worker that does not work, and dial it again; reports ``link_down`` at once."""
        self._was_cut = True
        self._down(cause, kind)
        if self._connection is not None:
            self._connection.close()

    def close(self, cause: str, kind: str = "removed") -> None:
        """Hang up for good; reports ``link_down`` before it returns if the link was up."""
        self._task.cancel()
        self._down(cause, kind)

    # ------------------------------------------------------------------ the task

    async def _keep(self) -> None:
        pause_s = WORKER_REDIAL_PAUSE_S_MIN
        while True:
            self._was_cut = False
            try:
                cause, kind = await self._run(), "closed"
                pause_s = WORKER_REDIAL_PAUSE_S_MIN
            except (OSError, TimeoutError, ProtocolError) as error:
                cause = str(error) or type(error).__name__
                kind = "protocol" if isinstance(error, ProtocolError) else "closed"
            if self.up:
                self._down(cause, kind)
            elif not self._was_cut:
                self._on_refused(self.peer, cause)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, WORKER_REDIAL_PAUSE_S_MAX)

    async def _run(self) -> str:
        """Dial, attach, receive until the end of file; return why it ended; raise as the transport does."""
        config = self._boot.config
        connection = await dial_async(
            self.peer.address,
            self._boot.secret,
            timeout_s=config.connect_timeout_s,
            frame_bytes_max=config.engine_frame_bytes_max,
        )
        writer: asyncio.Task[str] | None = None
        try:
            facts = await self._attach(connection)
            self._outbox = asyncio.Queue()
            writer = asyncio.get_running_loop().create_task(self._write(connection))
            self._connection = connection
            self._events.link_up(self, facts)
            self.up = True
            await self._events.room()
            # To the end of file, or a reset: what a dying worker has sent counts before it is lost.
            while (frame := await connection.recv()) is not None:
                # No await until its tokens are on their way: what counts as sent must reach the client.
                self._events.received(self, self._codec.decode(frame))
                await self._events.room()
            return _why(writer)
        finally:
            if writer is not None:
                writer.cancel()
            connection.close()

    async def _attach(self, connection: AsyncConnection) -> wire.Facts:
        await connection.send(self._codec.encode(wire.Attach(self._boot.epoch, self.peer.epoch)))
        async with asyncio.timeout(self._boot.config.handshake_timeout_s):
            frame = await connection.recv()
        if frame is None:
            raise ProtocolError("it hung up instead of saying what it serves")
        facts = self._codec.decode(frame)
        if not isinstance(facts, wire.Facts):
            raise ProtocolError(f"its first message is {type(facts).__name__}, not Facts")
        if (facts.worker_id, facts.epoch) != (self.peer.worker_id, self.peer.epoch):
            raise ProtocolError(f"it says that it is {facts.worker_id} of epoch {facts.epoch}")
        return facts

    async def _write(self, connection: AsyncConnection) -> str:
        """Send what is queued; end with the reason why no more can be sent."""
        try:
            return await self._send_queued(connection)
        finally:
            # However it ends: a worker that gets nothing any more must not seem to be there. Not close():
            # the receiving side first reads what has come, then sees the end of file.
            abandon(connection.sock)

    async def _send_queued(self, connection: AsyncConnection) -> str:
        while True:
            message = await self._outbox.get()
            try:
                parts = self._codec.encode(message)
                if sum(map(len, parts)) > self._boot.config.engine_frame_bytes_max:
                    raise ValueError("it is longer than a frame may be")
            except Exception as error:  # whatever a client's values do to the encoder is the client's fault
                self._events.unsendable(self, message, error)
                continue
            try:
                await connection.send(parts)
            except OSError as error:
                return str(error)

    def _down(self, cause: str, kind: str) -> None:
        if self.up:
            self.up = False
            self._events.link_down(self, cause, kind)


def _why(writer: asyncio.Task[str]) -> str:
    """Why a connection ended whose writing side may have ended first."""
    if not writer.done() or writer.cancelled():
        return "its connection ended"
    error = writer.exception()
    return writer.result() if error is None else f"nothing more could be sent: {error!r}"
