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
        self._resident: list[ExpertId] = []
        self._resident_bytes = 0
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
            case Welcome(assigned=wanted) | Assign(experts=wanted):
                threading.Thread(target=self._load, args=(wanted,), daemon=True).start()
            case None | Stop() | Refused():
                self.stopping.set()
                os.eventfd_write(self.wake_fd, 1)
            case Message():
                pass

    def _load(self, wanted: list[ExpertId]) -> None:
        """Load what is missing, primaries first, then say what is resident."""
        for expert in wanted:
            size = self.experts.load(expert)
            if size:
                self._resident.append(expert)
                self._resident_bytes += size
        self._send(
            Ready(
                worker_id=self.boot.worker_id,
                epoch=self.boot.epoch,
                fingerprint=self._fingerprint,
                exact=True,
                resident=list(self._resident),
                resident_bytes=self._resident_bytes,
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
