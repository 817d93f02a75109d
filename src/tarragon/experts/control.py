"""The expert worker's control thread: orchestrator, loading of experts, links of attention workers."""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable

from tarragon.boot import Boot
from tarragon.control import WorkerControl
from tarragon.experts.kernels import ResidentExperts, kernel_isa
from tarragon.messages import Assign, Control, ExpertId, Failpoint, Peers, Ready, Report, Welcome
from tarragon.transport.link import DataLink
from tarragon.transport.local import Connection


class ControlThread(WorkerControl):
    """Loads experts in a thread beside it and accepts data links, which ``links`` delivers."""

    def __init__(
        self,
        boot: Boot,
        experts: ResidentExperts,
        fingerprint: str,
        counters: Callable[[], tuple[dict[str, float], list[list[int]]]],
    ) -> None:
        super().__init__(boot, frame_bytes_max=boot.config.control_frame_bytes_max)
        self.experts = experts
        self.links: queue.SimpleQueue[DataLink] = queue.SimpleQueue()
        self._counters = counters
        self.on_colleagues: Callable[[int], None] = lambda _count: None
        """Called with the number of expert workers that work, this one included, when it changes."""
        self.on_failpoint: Callable[[Failpoint], None] = lambda _order: None
        self._fingerprint = f"{fingerprint}, experts {kernel_isa(experts.model.dtype)}"
        self._resident: dict[ExpertId, int] = {}
        self._assignments: queue.SimpleQueue[tuple[int, int, list[ExpertId]]] = queue.SimpleQueue()
        self._connections = 0
        """To an orchestrator, so far: what a former one has ordered is void."""
        self._resident_lock = threading.Lock()

    def run(self) -> None:
        threading.Thread(target=self._load, name="loader", daemon=True).start()
        super().run()

    def handle(self, message: Control) -> None:
        match message:
            case Welcome(assigned=wanted, order=order) | Assign(experts=wanted, order=order):
                self._assignments.put((self._connections, order, wanted))
            case Peers(peers=peers):
                self.on_colleagues(sum(peer.role == "expert" for peer in peers))
            case Failpoint() if self.boot.config.failpoints:
                self.on_failpoint(message)
            case _:
                pass

    def resident(self) -> list[ExpertId]:
        """What it holds, and goes on holding until the orchestrator that is told so orders otherwise."""
        with self._resident_lock:
            self._connections += 1
            return sorted(self._resident)

    def _load(self) -> None:
        """Load until the process ends; what cannot be loaded ends it, so that another one takes its place."""
        try:
            self._load_forever()
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _load_forever(self) -> None:
        """Obey assignments one after the other: load what is missing, drop what is not named, report."""
        while not self.stopping.is_set():
            connection, order, wanted = self._assignments.get()
            for expert in wanted:
                if expert not in self._resident and connection == self._connections:
                    loaded_bytes = self.experts.load(expert)
                    with self._resident_lock:
                        self._resident[expert] = loaded_bytes
            self.experts.settle()
            with self._resident_lock:
                if connection == self._connections:
                    self._carry_out(order, wanted)

    def _carry_out(self, order: int, wanted: list[ExpertId]) -> None:
        for expert in set(self._resident) - set(wanted):
            # The orchestrator names it no longer once no attention worker's table lists it here.
            self.experts.unload(expert)
            del self._resident[expert]
        self.send(
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

    def admit(self, connection: Connection, first: bytes, descriptors: list[int]) -> bool:
        if len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            DataLink.refuse(connection, f"a first frame with {len(descriptors)} descriptors, expected 1")
            connection.close()
            return False
        model = self.experts.model
        try:
            link = DataLink.accept(
                connection,
                epoch=self.boot.epoch,
                hidden=model.hidden,
                dtype=model.dtype,
                first=(first, descriptors[0]),
            )
        except (ConnectionError, TimeoutError, ValueError):
            return False  # whoever raised has closed the connection
        self.links.put(link)
        return True

    def report(self) -> None:
        counters, pairs = self._counters()
        self.send(
            Report(
                worker_id=self.boot.worker_id,
                epoch=self.boot.epoch,
                counters={
                    **counters,
                    **self.responder.counters,
                    "links_refused": float(DataLink.refused),
                },
                expert_pairs=pairs,
            )
        )
