"""One connection of the orchestrator: sending never waits, and one that does not listen is cut."""

from __future__ import annotations

import asyncio
from collections import Counter

from tarragon.messages import Control, ProtocolError
from tarragon.transport.local import AsyncConnection


class Line:
    """Owns a connection and the messages that wait for it. ``cause`` says why it ended.

    ``refused`` counts "malformed_frame": what is no frame, no message, or was cut in two ends the line.
    """

    def __init__(
        self, connection: AsyncConnection, queue_max: int, refused: Counter[str], epoch: int = 0
    ) -> None:
        self.connection = connection
        self.epoch = epoch
        self.cause = "connection lost"
        self._refused = refused
        self._queue: asyncio.Queue[Control] = asyncio.Queue(queue_max)
        self._writer = asyncio.get_running_loop().create_task(self._write_forever())

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be sent."""
        return self._queue.empty()

    def send(self, message: Control) -> None:
        """Queue ``message``; a full queue ends the connection, as its peer has not listened for long."""
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self._cut(f"{self._queue.maxsize} messages not taken")

    async def receive(self) -> Control | None:
        """Next message; None once the connection has ended or broken the protocol."""
        try:
            message = await self.connection.recv_control()
            if message is None and self.connection.torn:
                self._refused["malformed_frame"] += 1
            return message
        except ProtocolError as error:
            self._refused["malformed_frame"] += 1
            self._cut(f"protocol error: {error}")
        except OSError as error:
            self._cut(str(error))
        return None

    def close(self) -> None:
        """End the connection; what is still queued is dropped. Closing twice is harmless."""
        self._writer.cancel()
        self.connection.close()

    def _cut(self, cause: str) -> None:
        self.cause = cause
        self.close()

    async def _write_forever(self) -> None:
        while True:
            message = await self._queue.get()
            try:
                await self.connection.send_control(message)
            except (OSError, ProtocolError) as error:
                self.cause = f"cannot send: {error}"
                self.connection.close()
                return
