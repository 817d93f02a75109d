"""The attention worker's control thread: orchestrator, links to expert workers, gateway connections.

It never touches the engine: what it learns goes to REFE and to the engine loop
through their mailboxes.
"""

from __future__ import annotations

import queue
import threading
import time

from tarragon.boot import Boot
from tarragon.control import WorkerControl
from tarragon.messages import (
    Control,
    Peer,
    Ready,
    Report,
    Suspicion,
    Table,
    TableAck,
    TableUpdate,
    Welcome,
)
from tarragon.refe.engine import LinkDown, NewLink, NewTable, Refe
from tarragon.transport.link import DataLink, LinkRefused, Offer
from tarragon.transport.local import Connection, dial
from tarragon.transport.region import RegionShape


class ControlThread(WorkerControl):
    """Keeps one data link per live expert worker and accepts the gateway.

    ``gateways`` delivers accepted connections with their first frame.
    """

    def __init__(self, boot: Boot, refe: Refe, region: RegionShape) -> None:
        super().__init__(boot, frame_bytes_max=boot.config.engine_frame_bytes_max)
        self.refe, self.region = refe, region
        self.gateways: queue.SimpleQueue[tuple[Connection, bytes]] = queue.SimpleQueue()
        self._dialled: set[tuple[str, int]] = set()
        self._linked: set[tuple[str, int]] = set()
        self._table: Table | None = None
        self._changed = threading.Condition()

    # ------------------------------------------------------------------ called by the engine thread

    def lost(self, peer: Peer, cause: str) -> None:
        """Tell the orchestrator that the link to ``peer`` died."""
        with self._changed:
            self._linked.discard((peer.worker_id, peer.epoch))
        self.send(
            Suspicion(
                reporter_id=self.boot.worker_id,
                suspect_id=peer.worker_id,
                suspect_epoch=peer.epoch,
                cause=cause,
            )
        )

    def acknowledge(self, version: int) -> None:
        self.send(TableAck(worker_id=self.boot.worker_id, epoch=self.boot.epoch, version=version))

    def ready(self, fingerprint: str, inexact_reason: str) -> None:
        """Wait for the links to all expert workers of the first table, then report ready (5.4)."""
        deadline = time.monotonic() + self.boot.config.worker_ready_timeout_s
        with self._changed:
            while not self._all_linked():
                if not self._changed.wait(timeout=deadline - time.monotonic()):
                    raise TimeoutError("no expert worker came up in time")
        self.send(
            Ready(
                worker_id=self.boot.worker_id,
                epoch=self.boot.epoch,
                fingerprint=fingerprint,
                exact=not inexact_reason,
                inexact_reason=inexact_reason,
            )
        )

    def report(self) -> None:
        self.send(
            Report(
                worker_id=self.boot.worker_id,
                epoch=self.boot.epoch,
                counters=self.refe.counters.as_dict(),
            )
        )

    # ------------------------------------------------------------------ the thread

    def accept(self) -> bool:
        try:
            connection = self._listener.accept()
            attach = connection.recv(self.boot.config.handshake_timeout_s)
        except (ConnectionError, TimeoutError, ValueError):
            return False
        self.gateways.put((connection, attach or b""))
        return True

    def handle(self, message: Control) -> None:
        if isinstance(message, (Welcome, TableUpdate)):
            self._take_table(message.table)

    def _take_table(self, table: Table) -> None:
        with self._changed:
            self._table = table
            live = {(peer.worker_id, peer.epoch) for peer in table.workers}
            gone = self._linked - live
            self._linked &= live
            self._changed.notify_all()
        for worker_id, epoch in gone:
            self.refe.post(LinkDown(worker_id, epoch, "left the table"))
        self.refe.post(NewTable(table))
        for peer in table.workers:
            if (peer.worker_id, peer.epoch) not in self._dialled:
                self._dialled.add((peer.worker_id, peer.epoch))
                threading.Thread(target=self._link, args=(peer,), daemon=True).start()

    def _link(self, peer: Peer) -> None:
        """Set up the data link to one expert worker; on failure the orchestrator hears of it."""
        config = self.boot.config
        offer = Offer(
            worker_id=self.boot.worker_id,
            epoch=self.boot.epoch,
            peer_epoch=peer.epoch,
            shape=self.region,
        )
        try:
            connection = dial(
                peer.address,
                self.boot.secret,
                timeout_s=config.connect_timeout_s,
                frame_bytes_max=config.control_frame_bytes_max,
            )
            link = DataLink.offer(connection, offer)
        except (ConnectionError, TimeoutError, LinkRefused, ValueError) as error:
            self.lost(peer, f"no data link: {error}")
            return
        self.refe.post(NewLink(peer, link))
        with self._changed:
            self._linked.add((peer.worker_id, peer.epoch))
            self._changed.notify_all()

    def _all_linked(self) -> bool:
        table = self._table
        return (
            table is not None
            and bool(table.workers)
            and all((peer.worker_id, peer.epoch) in self._linked for peer in table.workers)
        )
