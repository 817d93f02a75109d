"""The control thread that every worker of the datapath has: its line to the orchestrator, and its listener.

It keeps the control plane off the thread that computes (4.1): what it learns goes
into mailboxes, and ``wake_fd`` becomes readable with each entry.

The orchestrator's absence is not the worker's failure: it serves on with what it knows, and this thread
dials until the orchestrator is back. A worker ends when it is told to, when it is refused because it was
replaced, and with its node agent.
"""

from __future__ import annotations

import os
import threading
import time
from abc import abstractmethod

import msgspec

from tarragon.agent import priority
from tarragon.boot import Boot
from tarragon.config import CONTROL_REDIAL_PAUSE_S, EXHAUSTED_PAUSE_S, SEND_TIMEOUT_S
from tarragon.messages import Control, ExpertId, Hello, ProtocolError, Ready, Refused, Report, Stop
from tarragon.transport.local import Connection, Listener, dial
from tarragon.transport.probe import ProbeChannel, probe_open
from tarragon.transport.responder import ProbeResponder


class WorkerControl(threading.Thread):
    """Says Hello, obeys the orchestrator, reports counters, and accepts connections in a thread beside it.

    ``responder`` answers probes; the computing thread beats its ``pulse``.
    """

    def __init__(
        self,
        boot: Boot,
        *,
        frame_bytes_max: int,
        address: str | None = None,
        send_timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        """Listen at ``address``, by default the incarnation's own. Raises OSError if that is taken."""
        super().__init__(name="control", daemon=True)
        self.boot = boot
        self.address = address or boot.address
        self._listener = Listener(
            self.address,
            boot.secret,
            frame_bytes_max=frame_bytes_max,
            handshake_timeout_s=boot.config.handshake_timeout_s,
            send_timeout_s=send_timeout_s,
        )
        self.responder = ProbeResponder(boot.epoch)
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.stopping = threading.Event()
        self._orchestrator: Connection | None = None
        self._ready: Ready | None = None
        self._send_lock = threading.Lock()
        self._first_frames_refused = 0
        """Connections whose first frame was malformed or did not come; counted by the acceptor."""
        self._frames_malformed = 0
        """Of the orchestrator; counted by this thread."""

    @abstractmethod
    def handle(self, message: Control) -> None:
        """Act on one message of the orchestrator; others than the worker's own are ignored."""

    @abstractmethod
    def report(self) -> None:
        """Send this worker's counters."""

    @abstractmethod
    def admit(self, connection: Connection, first: bytes, descriptors: list[int]) -> bool:
        """Put a connection into a mailbox, with its first frame and what came with it; False if refused.

        The callee owns the connection and the descriptors.
        """

    def resident(self) -> list[ExpertId]:
        """What an expert worker holds, for another orchestrator than the one that had it loaded."""
        return []

    def send(self, message: Control) -> None:
        """Send to the orchestrator; what it misses while away it learns from Hello, Ready and reports."""
        with self._send_lock:
            if isinstance(message, Ready):
                if self._ready is None:
                    priority.restore()  # a replacement starts politely
                self._ready = message
            if isinstance(message, Report):
                message = self._with_refusals(message)
            self._send(message)

    def wake(self) -> None:
        """Make the computing thread look into its mailboxes."""
        os.eventfd_write(self.wake_fd, 1)

    def run(self) -> None:
        threading.Thread(target=self._accept_forever, name="acceptor", daemon=True).start()
        while not self.stopping.is_set():
            try:
                self._talk(self._dial())
            except (OSError, ProtocolError):  # it restarts, or is not up yet
                self.stopping.wait(CONTROL_REDIAL_PAUSE_S)

    # ------------------------------------------------------------------ the orchestrator

    def _dial(self) -> Connection:
        config = self.boot.config
        return dial(
            self.boot.orchestrator_address,
            self.boot.secret,
            timeout_s=config.connect_timeout_s,
            frame_bytes_max=config.control_frame_bytes_max,
        )

    def _talk(self, connection: Connection) -> None:
        """One connection, from Hello to its end."""
        boot, resident = self.boot, self.resident()
        with self._send_lock:
            self._orchestrator = connection
            self._send(
                Hello(
                    worker_id=boot.worker_id,
                    role=boot.role,
                    epoch=boot.epoch,
                    pid=os.getpid(),
                    address=self.address,
                    resident=resident,
                    was_ready=self._ready is not None,
                )
            )
            # An expert worker's Ready answers an order: the new orchestrator's first one is in its Welcome.
            if self._ready is not None and boot.role != "expert":
                self._send(self._ready)
        interval_s = boot.config.report_interval_ms / 1e3
        report_s = time.monotonic()
        try:
            while not self.stopping.is_set():
                if (now_s := time.monotonic()) >= report_s:
                    report_s = now_s + interval_s
                    self.report()
                try:
                    message = connection.recv_control(report_s - now_s)
                except TimeoutError:
                    continue
                except ProtocolError:
                    self._frames_malformed += 1
                    raise
                if message is None:
                    self._frames_malformed += connection.torn
                    return
                self._obey(message)
        finally:
            with self._send_lock:
                self._orchestrator = None
                connection.close()

    def _send(self, message: Control) -> None:
        if self._orchestrator is not None:
            try:
                self._orchestrator.send_control(message)
            except (ConnectionError, TimeoutError):
                self._orchestrator = None  # the thread that receives meets the end of the connection too

    def _with_refusals(self, report: Report) -> Report:
        """The report, with what this thread and the acceptor refused beside what the worker counts itself.

        Here and not in each ``report``, so that it is missing from no role's.
        """
        refused = {
            "connections_refused": float(self._listener.refused + self._first_frames_refused),
            "frames_malformed": report.counters.get("frames_malformed", 0.0)
            + float(self._frames_malformed + ProbeChannel.malformed),
        }
        return msgspec.structs.replace(report, counters=report.counters | refused)

    def _obey(self, message: Control) -> None:
        if isinstance(message, (Stop, Refused)):
            self.stopping.set()
            self.wake()
        else:
            self.handle(message)

    # ------------------------------------------------------------------ connections of peers

    def _accept_forever(self) -> None:
        while not self.stopping.is_set():
            try:
                if self._accept():
                    self.wake()
            except (ConnectionError, TimeoutError, ProtocolError):
                continue  # refused and counted, by the listener or in _accept
            except OSError:
                time.sleep(EXHAUSTED_PAUSE_S)  # no descriptor is left, for now

    def _accept(self) -> bool:
        """Wait for one connection and its first frame; True if it went into a mailbox."""
        connection = self._listener.accept()
        try:
            first, descriptors = connection.recv_with_fds(self.boot.config.handshake_timeout_s)
        except BaseException:
            self._first_frames_refused += 1
            connection.close()
            raise
        opened = None if descriptors else probe_open(first)
        if opened is not None:
            self.responder.adopt(connection, opened)
            return False
        return self.admit(connection, first, descriptors)
