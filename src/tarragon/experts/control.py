"""The expert worker's control thread: orchestrator, loading of experts, links of attention workers."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable

from tarragon.boot import Boot
from tarragon.experts.kernels import ResidentExperts, kernel_isa
from tarragon.messages import (
    Assign,
    Control,
    ExpertId,
    Hello,
    Message,
    ProtocolError,
    Ready,
    Refused,
    Report,
    Stop,
    Welcome,
)
from tarragon.transport.link import DataLink, LinkRefused
from tarragon.transport.local import Connection, Listener, dial


class ControlThread(threading.Thread):
    """Keeps the control plane off the compute thread.

    ``links`` delivers accepted data links; ``wake_fd`` becomes readable with each.
    """

    def __init__(
        self,
        boot: Boot,
        experts: ResidentExperts,
        fingerprint: str,
        counters: Callable[[], tuple[dict[str, float], list[list[int]]]],
    ) -> None:
        super().__init__(name="control", daemon=True)
        self.boot, self.experts = boot, experts
        self.links: queue.SimpleQueue[DataLink] = queue.SimpleQueue()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.stopping = threading.Event()
        self._counters = counters
        self._fingerprint = f"{fingerprint}, experts {kernel_isa()}"
        self._resident: dict[ExpertId, int] = {}
        self._assignments: queue.SimpleQueue[tuple[int, list[ExpertId]]] = queue.SimpleQueue()
        config = boot.config
        self._listener = Listener(
            boot.address,
            boot.secret,
            frame_bytes_max=config.control_frame_bytes_max,
            handshake_timeout_s=config.handshake_timeout_s,
        )
        self._orchestrator = dial(
            boot.orchestrator_address,
            boot.secret,
            timeout_s=config.connect_timeout_s,
            frame_bytes_max=config.control_frame_bytes_max,
        )
        self._send_lock = threading.Lock()

    def run(self) -> None:
        boot = self.boot
        self._send(
            Hello(
                worker_id=boot.worker_id,
                role=boot.role,
                epoch=boot.epoch,
                pid=os.getpid(),
                address=boot.address,
            )
        )
        threading.Thread(target=self._accept_forever, name="acceptor", daemon=True).start()
        threading.Thread(target=self._load_forever, name="loader", daemon=True).start()
        poll = select.poll()
        poll.register(self._orchestrator.fileno(), select.POLLIN)
        while not self.stopping.is_set():
            if poll.poll(self.boot.config.report_interval_ms):
                self._from_orchestrator()
            self._report()

    def _send(self, message: Control) -> None:
        with self._send_lock:
            try:
                self._orchestrator.send_control(message)
            except (ConnectionError, TimeoutError):
                return  # its absence is not this worker's failure

    def _from_orchestrator(self) -> None:
        try:
            message = self._orchestrator.recv_control()
        except (ConnectionError, ProtocolError):
            message = None
        match message:
            case Welcome(assigned=wanted, order=order) | Assign(experts=wanted, order=order):
                self._assignments.put((order, wanted))
            case None | Stop() | Refused():
                self.stopping.set()
                os.eventfd_write(self.wake_fd, 1)
            case Message():
                pass

    def _load_forever(self) -> None:
        """Obey assignments one after the other: load what is missing, drop what is not named, report."""
        while not self.stopping.is_set():
            order, wanted = self._assignments.get()
            for expert in wanted:
                if expert not in self._resident:
                    self._resident[expert] = self.experts.load(expert)
            for expert in set(self._resident) - set(wanted):
                # The orchestrator names it no longer once no attention worker's table lists it here.
                self.experts.unload(expert)
                del self._resident[expert]
            self._send(
                Ready(
                    worker_id=self.boot.worker_id,
                    epoch=self.boot.epoch,
                    fingerprint=self._fingerprint,
                    exact=True,
                    resident=sorted(self._resident),
                    resident_bytes=sum(self._resident.values()),
                    order=order,
                )
            )

    def _accept_forever(self) -> None:
        while not self.stopping.is_set():
            link = self._accept()
            if link is not None:
                self.links.put(link)
                os.eventfd_write(self.wake_fd, 1)

    def _accept(self) -> DataLink | None:
        """Accept one data link; None when the dialler was refused (the transport counts it)."""
        model = self.experts.model
        connection: Connection | None = None
        try:
            connection = self._listener.accept()
            return DataLink.accept(
                connection,
                epoch=self.boot.epoch,
                hidden=model.hidden,
                dtype=model.dtype,
                timeout_s=self.boot.config.handshake_timeout_s,
            )
        except (ConnectionError, TimeoutError, LinkRefused, ValueError):
            if connection is not None:
                connection.close()
            return None

    def _report(self) -> None:
        counters, pairs = self._counters()
        self._send(
            Report(
                worker_id=self.boot.worker_id,
                epoch=self.boot.epoch,
                counters=counters,
                expert_pairs=pairs,
            )
        )
