"""The control thread that every worker of the datapath has: its line to the orchestrator, and its listener.

It keeps the control plane off the thread that computes (4.1): what it learns goes
into mailboxes, and ``wake_fd`` becomes readable with each entry.
"""

from __future__ import annotations

import os
import select
import threading
from abc import abstractmethod

from tarragon.boot import Boot
from tarragon.messages import Control, Hello, ProtocolError, Refused, Stop
from tarragon.transport.local import Listener, dial


class WorkerControl(threading.Thread):
    """Says Hello, obeys the orchestrator, reports counters, and accepts connections in a thread beside it."""

    def __init__(self, boot: Boot, *, frame_bytes_max: int) -> None:
        super().__init__(name="control", daemon=True)
        self.boot = boot
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.stopping = threading.Event()
        config = boot.config
        self._listener = Listener(
            boot.address,
            boot.secret,
            frame_bytes_max=frame_bytes_max,
            handshake_timeout_s=config.handshake_timeout_s,
        )
        self._orchestrator = dial(
            boot.orchestrator_address,
            boot.secret,
            timeout_s=config.connect_timeout_s,
            frame_bytes_max=config.control_frame_bytes_max,
        )
        self._send_lock = threading.Lock()

    @abstractmethod
    def handle(self, message: Control) -> None:
        """Act on one message of the orchestrator; others than the worker's own are ignored."""

    @abstractmethod
    def report(self) -> None:
        """Send this worker's counters."""

    @abstractmethod
    def accept(self) -> bool:
        """Wait for one connection and put it into a mailbox; False if it was refused (and counted)."""

    def send(self, message: Control) -> None:
        """Send to the orchestrator; its absence is not this worker's failure."""
        with self._send_lock:
            try:
                self._orchestrator.send_control(message)
            except (ConnectionError, TimeoutError):
                return

    def wake(self) -> None:
        """Make the computing thread look into its mailboxes."""
        os.eventfd_write(self.wake_fd, 1)

    def run(self) -> None:
        boot = self.boot
        self.send(
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
            if poll.poll(boot.config.report_interval_ms):
                self._from_orchestrator()
            self.report()

    def _accept_forever(self) -> None:
        while not self.stopping.is_set():
            if self.accept():
                self.wake()

    def _from_orchestrator(self) -> None:
        try:
            message = self._orchestrator.recv_control()
        except (ConnectionError, ProtocolError):
            message = None
        if message is None or isinstance(message, (Stop, Refused)):
            self.stopping.set()
            self.wake()
        else:
            self.handle(message)
