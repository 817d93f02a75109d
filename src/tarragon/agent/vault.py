"""Where do checkpoint buckets live? In memory files that the node agent keeps open (section 6).

So they outlive the store's process and the attention workers'. They end with this process, whatever ends it:
memory files have no name, and forked workers close what they inherit.
"""

from __future__ import annotations

import os
import selectors
from collections.abc import Callable
from dataclasses import dataclass

from tarragon.agent.log import LogWriter
from tarragon.checkpoint import messages
from tarragon.checkpoint.ledger import Incarnation
from tarragon.checkpoint.messages import FRAME_BYTES_MAX, Bucket, Deposit, Dropped, Returned
from tarragon.config import BUCKETS_MAX, VAULT_GUESTS_MAX, VAULT_SEND_TIMEOUT_S, Config
from tarragon.messages import ProtocolError
from tarragon.transport.local import Connection, Listener


@dataclass(eq=False)
class _Guest:
    connection: Connection
    epoch: int = -1
    """Of the store; -1 until it has said who it is."""
    announced: Bucket | None = None
    """The bucket whose descriptor comes next."""


class Vault:
    """Listens for the store, keeps what it deposits, and gives it back to the next one. Never waits."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        address: str,
        secret: bytes,
        config: Config,
        log: LogWriter,
        is_store: Callable[[int, str, int], bool],
    ) -> None:
        """``is_store(pid, worker_id, epoch)``: whether that child of ours is this incarnation of the store.

        Raises OSError if the address is taken.
        """
        self._selector, self._log, self._is_store = selector, log, is_store
        self._kept: dict[Incarnation, tuple[int, int]] = {}
        """Size and descriptor of each bucket."""
        self._guests: list[_Guest] = []
        self._newest_epoch = -1
        self._starts = 0
        self._listener = Listener(
            address,
            secret,
            frame_bytes_max=FRAME_BYTES_MAX,
            handshake_timeout_s=config.handshake_timeout_s,
            send_timeout_s=VAULT_SEND_TIMEOUT_S,
        )
        selector.register(self._listener, selectors.EVENT_READ, self._on_dialer)

    @property
    def kept(self) -> list[Incarnation]:
        return list(self._kept)

    def release(self) -> None:
        """In a forked child: close the sockets; the buckets' bare descriptors go with the sweep after it."""
        self._listener.close()
        for guest in self._guests:
            guest.connection.close()

    def close(self) -> None:
        """Let go of everything."""
        for guest in list(self._guests):
            self._dismiss(guest)
        self._selector.unregister(self._listener)
        self._listener.close()
        for _, fd in self._kept.values():
            os.close(fd)
        self._kept.clear()

    # ------------------------------------------------------------------ events

    def _on_dialer(self) -> None:
        try:
            connection = self._listener.accept(timeout_s=0)
        except (TimeoutError, ProtocolError, OSError):  # not done yet, or not one of us
            return
        if len(self._guests) >= VAULT_GUESTS_MAX:
            self._dismiss(self._guests[0])
        guest = _Guest(connection)
        self._guests.append(guest)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._on_guest(guest))

    def _on_guest(self, guest: _Guest) -> bool:
        """Read one message; False if there was none."""
        if guest not in self._guests:  # dismissed since the selector looked
            return False
        try:
            if guest.announced is not None:
                self._keep(guest.announced, messages.take_bucket(guest.connection, guest.announced, 0))
                guest.announced = None
                return True
            message = messages.receive(guest.connection, timeout_s=0)
        except TimeoutError:
            return False
        except (ProtocolError, ConnectionError) as error:
            self._log.write("agent", [f"the link to the store broke: {error}"])
            message = None
        match message:
            case Deposit(worker_id=worker_id, epoch=epoch) if guest.epoch < 0:
                self._welcome(guest, worker_id, epoch)
            case Bucket() if guest.epoch >= 0:
                guest.announced = message
            case Dropped(worker_id=worker_id, epoch=epoch) if guest.epoch >= 0:
                self._let_go((worker_id, epoch))
            case _:
                self._dismiss(guest)
                return False
        return True

    def _welcome(self, guest: _Guest, worker_id: str, epoch: int) -> None:
        """Give a new store all that is kept, after its predecessor's last words."""
        pid = guest.connection.peer_pid
        if epoch <= self._newest_epoch or not self._is_store(pid, worker_id, epoch):
            self._log.write("agent", [f"process {pid} is not the store's incarnation {epoch}: refused"])
            self._dismiss(guest)
            return
        self._newest_epoch = guest.epoch = epoch
        self._starts += 1
        for former in [g for g in self._guests if g.epoch >= 0 and g is not guest]:
            while self._on_guest(former):
                pass
            self._dismiss(former)
        try:
            for (owner, owner_epoch), (total_bytes, fd) in self._kept.items():
                bucket = Bucket(worker_id=owner, epoch=owner_epoch, total_bytes=total_bytes)
                messages.hand_over(guest.connection, bucket, fd)
            messages.send(guest.connection, Returned(starts=self._starts))
        except ConnectionError as error:
            self._log.write("agent", [f"the store did not take its buckets: {error}"])
            self._dismiss(guest)

    # ------------------------------------------------------------------ buckets

    def _keep(self, bucket: Bucket, fd: int) -> None:
        if len(self._kept) >= BUCKETS_MAX and (bucket.worker_id, bucket.epoch) not in self._kept:
            self._log.write("agent", [f"{len(self._kept)} buckets are kept, and no more: one is refused"])
            os.close(fd)
            return
        self._let_go((bucket.worker_id, bucket.epoch))
        self._kept[bucket.worker_id, bucket.epoch] = bucket.total_bytes, fd

    def _let_go(self, incarnation: Incarnation) -> None:
        if incarnation in self._kept:
            os.close(self._kept.pop(incarnation)[1])

    def _dismiss(self, guest: _Guest) -> None:
        if guest in self._guests:
            self._guests.remove(guest)
            self._selector.unregister(guest.connection)
            guest.connection.close()
