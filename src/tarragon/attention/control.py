"""The attention worker's control thread: orchestrator, links to expert workers, gateway connections.

It never touches the engine: what it learns goes to REFE and to the engine loop
through their mailboxes.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable

from tarragon.attention.times import TIMES
from tarragon.boot import Boot
from tarragon.control import WorkerControl
from tarragon.messages import (
    Checkpointing,
    Control,
    Failpoint,
    Peer,
    Probing,
    Ready,
    Report,
    Suspicion,
    Table,
    TableAck,
    TableUpdate,
    Welcome,
)
from tarragon.refe.engine import Refe
from tarragon.refe.links import LinkDown, NewLink, NewTable
from tarragon.transport.link import DataLink, Offer
from tarragon.transport.local import Connection, dial
from tarragon.transport.probe_dial import open_channel
from tarragon.transport.region import RegionShape


class ControlThread(WorkerControl):
    """Keeps one data link per live expert worker and accepts the gateway.

    ``gateways`` delivers accepted connections with their first frame.
    """

    def __init__(self, boot: Boot, refe: Refe, region: RegionShape) -> None:
        super().__init__(boot, frame_bytes_max=boot.config.engine_frame_bytes_max)
        self.refe, self.region = refe, region
        refe.beat = self.responder.pulse.beat
        self.gateways: queue.SimpleQueue[tuple[Connection, bytes]] = queue.SimpleQueue()
        self._dialled: set[tuple[str, int]] = set()
        self._linked: set[tuple[str, int]] = set()
        self._table: Table | None = None
        self._changed = threading.Condition()
        self.counters: Callable[[], dict[str, float]] = dict
        """What besides REFE's counters is reported."""
        self.on_mode: Callable[[str, bool], None] = lambda _mode, _reprotect: None
        """Called with another way to checkpoint."""
        self.on_failpoint: Callable[[Failpoint], None] = lambda _order: None

    # ------------------------------------------------------------------ called by the engine thread

    def lost(self, peer: Peer, cause: str) -> None:
        """Tell the orchestrator that the link to ``peer`` died; dial again if that one lives on."""
        with self._changed:
            self._linked.discard((peer.worker_id, peer.epoch))
        self._suspect(peer, cause)
        threading.Thread(target=self._link_again, args=(peer,), name="link", daemon=True).start()

    def _suspect(self, peer: Peer, cause: str, *, withdrawn: bool = False) -> None:
        self.send(
            Suspicion(
                reporter_id=self.boot.worker_id,
                suspect_id=peer.worker_id,
                suspect_epoch=peer.epoch,
                cause=cause,
                withdrawn=withdrawn,
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
                counters={
                    **self.refe.counters.as_dict(),
                    **TIMES.as_dict(),
                    **self.responder.counters,
                    **self.counters(),
                    "links_refused": float(DataLink.refused),
                },
                traffic=self.refe.traffic_latest(),
            )
        )

    # ------------------------------------------------------------------ the thread

    def admit(self, connection: Connection, first: bytes, descriptors: list[int]) -> bool:
        for descriptor in descriptors:
            os.close(descriptor)
        self.gateways.put((connection, first))
        return True

    def handle(self, message: Control) -> None:
        if isinstance(message, (Welcome, TableUpdate)):
            self._take_table(message.table)
        elif isinstance(message, Checkpointing):
            self.on_mode(message.mode, message.reprotect)
        elif isinstance(message, Probing):
            self.refe.probe(message.enabled)
        elif isinstance(message, Failpoint) and self.boot.config.failpoints:
            self.on_failpoint(message)

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
                threading.Thread(target=self._link, args=(peer,), name="link", daemon=True).start()

    def _link_again(self, peer: Peer) -> None:
        """After a lost link: a cut between two that live heals, a dead one leaves the table."""
        if not self.stopping.wait(self.boot.config.link_retry_ms / 1e3):
            self._link(peer, again=True)

    def _link(self, peer: Peer, *, again: bool = False) -> None:
        """Connect to one expert worker, for as long as the table names it; failures are told."""
        while not self.stopping.is_set() and self._is_wanted(peer):
            try:
                new = self._connect(peer)
            except (OSError, TimeoutError, ValueError) as error:
                self._suspect(peer, f"no link: {error}")
                again = True
                self.stopping.wait(self.boot.config.link_retry_ms / 1e3)
                continue
            self.refe.post(new)
            with self._changed:
                self._linked.add((peer.worker_id, peer.epoch))
                self._changed.notify_all()
            if again:
                self._suspect(peer, "connected again", withdrawn=True)
            return

    def _connect(self, peer: Peer) -> NewLink:
        """Probe channel and data link to one expert worker.

        Raises ConnectionError, TimeoutError or ProtocolError, having closed everything.
        """
        boot, timeout_s = self.boot, self.boot.config.connect_timeout_s
        probes = open_channel(boot, peer, timeout_s=timeout_s)
        try:
            connection = dial(
                peer.address,
                boot.secret,
                timeout_s=timeout_s,
                frame_bytes_max=boot.config.control_frame_bytes_max,
            )
            offer = Offer(
                worker_id=boot.worker_id, epoch=boot.epoch, peer_epoch=peer.epoch, shape=self.region
            )
            return NewLink(peer, DataLink.offer(connection, offer), probes)
        except BaseException:
            probes.close()
            raise

    def _is_wanted(self, peer: Peer) -> bool:
        with self._changed:
            workers = [] if self._table is None else self._table.workers
        return any((w.worker_id, w.epoch) == (peer.worker_id, peer.epoch) for w in workers)

    def _all_linked(self) -> bool:
        table = self._table
        return (
            table is not None
            and bool(table.workers)
            and all((peer.worker_id, peer.epoch) in self._linked for peer in table.workers)
        )
