"""How does an attention worker get its bucket, and everybody else's? A thread that talks to the store (6.1).

The store is in no data path: while it is away, workers go on writing into the memory that they have mapped,
and this thread dials until it is back.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from tarragon.boot import Boot, socket_address
from tarragon.checkpoint import messages
from tarragon.checkpoint.ledger import Incarnation
from tarragon.checkpoint.messages import (
    FRAME_BYTES_MAX,
    Bucket,
    Dropped,
    Listed,
    NoRoom,
    OpenBucket,
    Stale,
    StoreMessage,
)
from tarragon.config import BUCKET_FD_TIMEOUT_S, STORE_REDIAL_PAUSE_S
from tarragon.messages import ProtocolError
from tarragon.transport.local import Connection, dial


class StoreClient(threading.Thread):
    """Keeps a connection to the store for the life of the process; ``start`` it, like any thread.

    The callbacks run in this thread. Descriptors are closed when a callback returns: it maps or duplicates
    what it needs. Whatever of ValueError and OSError a callback raises is logged, and its bucket left alone.
    """

    def __init__(
        self,
        boot: Boot,
        total_bytes: int,
        on_bucket: Callable[[int], None],
        on_peer: Callable[[str, int, int], None],
        on_lost: Callable[[], None],
        on_gone: Callable[[str, int], None],
    ) -> None:
        """
        ``on_bucket(fd)``: this incarnation's bucket of ``total_bytes``, zeroed at first; again with the same
        memory whenever the store is back.
        ``on_peer(worker_id, epoch, fd)``: another incarnation's bucket, once each.
        ``on_gone(worker_id, epoch)``: that bucket is dropped.
        ``on_lost()``: the connection to the store ended.
        """
        super().__init__(name="store-client", daemon=True)
        self._boot = boot
        self._total_bytes = total_bytes
        self._on_bucket, self._on_peer = on_bucket, on_peer
        self._on_lost, self._on_gone = on_lost, on_gone
        self._me: Incarnation = (boot.worker_id, boot.epoch)
        self._known: dict[Incarnation, tuple[int, int]] = {}
        """Identity of every bucket's memory file."""
        self._passed_on: set[Incarnation] = set()
        self._connection: Connection | None = None
        self._is_announced = False
        self._closing = threading.Event()
        self.connected = threading.Event()
        """Set while the connection stands and all buckets have been announced."""
        self.frames_malformed = 0
        """Messages of the store that are none."""
        self.granted = threading.Event()
        """Set once this worker has its bucket."""
        self.refusal = ""
        """Why this worker has no bucket, in the store's words; "" if nothing was refused."""

    def run(self) -> None:
        while not self._closing.is_set():
            try:
                if not self._talk():
                    return
            except ProtocolError:
                self.frames_malformed += 1
            except OSError:  # it is not up yet, restarts, or has just died
                pass
            finally:
                self._hang_up()
            self._closing.wait(STORE_REDIAL_PAUSE_S)

    def close(self) -> None:
        """End the thread, from any other one."""
        self._closing.set()
        connection = self._connection
        if connection is not None:
            connection.close()

    def _talk(self) -> bool:
        """One connection, from the first word to its end; False if there shall be no other."""
        config = self._boot.config
        connection = self._connection = dial(
            socket_address(self._boot.cluster, "store"),
            self._boot.secret,
            timeout_s=config.connect_timeout_s,
            frame_bytes_max=FRAME_BYTES_MAX,
        )
        if self._closing.is_set():  # `close` came too early to find this connection
            return False
        worker_id, epoch = self._me
        asked = OpenBucket(worker_id=worker_id, epoch=epoch, total_bytes=self._total_bytes)
        messages.send(connection, asked)
        self._is_announced = True
        announced: set[Incarnation] = set()
        while (message := messages.receive(connection)) is not None:
            if isinstance(message, Stale):
                self.refusal = message.reason
                print(f"the checkpoint store refuses this worker: {message.reason}", file=sys.stderr)
                return False
            if isinstance(message, Bucket):
                announced.add((message.worker_id, message.epoch))
                self._take(connection, message)
            elif isinstance(message, Listed):
                for incarnation in set(self._known) - announced - {self._me}:
                    self._forget(incarnation)
                self.connected.set()
            else:
                self._on_news(message)
        return True

    def _on_news(self, message: StoreMessage) -> None:
        match message:
            case Dropped(worker_id=worker_id, epoch=epoch):
                self._forget((worker_id, epoch))
            case NoRoom(reason=reason):
                self.refusal = reason
                print(f"no room for checkpoints: {reason}", file=sys.stderr)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for an attention worker")

    def _take(self, connection: Connection, bucket: Bucket) -> None:
        """Pass on a bucket that is new to us. Raises ProtocolError if it is not what it is said to be."""
        incarnation = (bucket.worker_id, bucket.epoch)
        fd = messages.take_bucket(connection, bucket, BUCKET_FD_TIMEOUT_S)
        try:
            status = os.fstat(fd)
            memory = status.st_dev, status.st_ino
            if incarnation != self._me and self._known.get(incarnation, memory) != memory:
                self._forget(incarnation)  # it was dropped while we were away, and asked for anew
            if self._known.setdefault(incarnation, memory) != memory:
                raise ProtocolError("it is not the memory that was handed out before")
            if incarnation == self._me:
                if bucket.total_bytes != self._total_bytes:
                    raise ProtocolError(f"{bucket.total_bytes} bytes, not {self._total_bytes}")
                self._on_bucket(fd)
                self.refusal = ""
                self.granted.set()
            elif incarnation not in self._passed_on:
                self._passed_on.add(incarnation)
                self._on_peer(bucket.worker_id, bucket.epoch, fd)
        except (ValueError, OSError) as error:
            print(f"the bucket of {bucket.worker_id} ({bucket.epoch}) is of no use: {error}", file=sys.stderr)
        finally:
            os.close(fd)

    def _forget(self, incarnation: Incarnation) -> None:
        self._known.pop(incarnation, None)
        if incarnation in self._passed_on:
            self._passed_on.discard(incarnation)
            self._on_gone(*incarnation)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.connected.clear()
        if self._is_announced:
            self._is_announced = False
            self._on_lost()
