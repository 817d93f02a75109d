"""An attention worker's link to the gateway: read by a thread of its own, while the engine computes a step.

So what a request from elsewhere needs is on its way before the engine takes it up: with steps of 130 ms, a
restoration that began with the step after its arrival would cost its reader one step more.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from tarragon.attention.resume import Foreseen
from tarragon.gateway.wire import FROM_GATEWAY, Add, Codec, Message
from tarragon.messages import ProtocolError
from tarragon.transport.local import Connection


class Mail(NamedTuple):
    """A message, and what was begun for it."""

    message: Message
    foreseen: Foreseen | None = None


class Ended(NamedTuple):
    """Nothing more comes."""

    cause: str
    malformed: bool = False


class GatewayLink:
    """One gateway's connection; ``mail`` has what came, in order, and ends with Ended.

    Args:
        wake_fd: an eventfd that wakes the engine when it has nothing to do.
        foresee: begins what a request from elsewhere needs; called by this link's thread.
    """

    def __init__(self, connection: Connection, wake_fd: int, foresee: Callable[[Add], Foreseen]) -> None:
        self.mail: queue.SimpleQueue[Mail | Ended] = queue.SimpleQueue()
        self._connection, self._wake_fd, self._foresee = connection, wake_fd, foresee
        self.send, self.close = connection.send, connection.close
        threading.Thread(target=self._read, name="gateway", daemon=True).start()

    def _read(self) -> None:
        ended = Ended("its reader failed")
        try:
            ended = self._read_all()
        finally:  # whatever happened: nobody would know that no more is read
            self._post(ended)

    def _read_all(self) -> Ended:
        codec = Codec(FROM_GATEWAY)
        try:
            while (frame := self._connection.recv()) is not None:
                self._post(self._begun(codec.decode(frame)))
        except (ConnectionError, ProtocolError) as error:
            return Ended(str(error), isinstance(error, ProtocolError))
        return Ended("the gateway closed its link")

    def _begun(self, message: Message) -> Mail:
        if isinstance(message, Add) and message.origins:
            return Mail(message, self._foresee(message))
        return Mail(message)

    def _post(self, item: Mail | Ended) -> None:
        self.mail.put(item)
        os.eventfd_write(self._wake_fd, 1)
