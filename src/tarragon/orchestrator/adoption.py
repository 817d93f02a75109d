"""Which workers of its predecessor does a restarted orchestrator take over? Pure.

Those that dial again within a time, and for which the node agent vouches that the very incarnation still
runs. The others are replaced.
"""

from __future__ import annotations

from tarragon.messages import Hello, WorkerExited, WorkerStarted
from tarragon.orchestrator.membership import EPOCH_COUNTER_BITS, Incarnation


class Adoption:
    """Collects what is said before the restarted orchestrator begins."""

    def __init__(self, generation: int) -> None:
        self._generation = generation
        self._running: set[Incarnation] = set()
        self._hellos: dict[str, Hello] = {}

    def agent_says(self, message: WorkerStarted | WorkerExited) -> None:
        """The node agent tells which processes it has, and which have ended."""
        incarnation = (message.worker_id, message.epoch)
        if isinstance(message, WorkerStarted):
            self._running.add(incarnation)
        else:
            self._running.discard(incarnation)

    def hello(self, hello: Hello) -> None:
        """A worker dialled; of two incarnations the later one counts."""
        known = self._hellos.get(hello.worker_id)
        if hello.epoch >> EPOCH_COUNTER_BITS < self._generation and (
            known is None or known.epoch <= hello.epoch
        ):
            self._hellos[hello.worker_id] = hello

    def result(self) -> list[Hello]:
        """Whom to adopt, by id."""
        hellos = (self._hellos[worker_id] for worker_id in sorted(self._hellos))
        return [hello for hello in hellos if (hello.worker_id, hello.epoch) in self._running]
