"""Who is a member, in which incarnation and state? A state machine without sockets, threads or clocks.

::

    start            hello, ready           suspected            heard of again
    -----> starting -------------> healthy -----------> suspect ----------------> healthy
              |                       |  drain              | silent, or suspected by all
              |                       +--------> draining --|--> left (exited as planned)
              +--- exited, connection lost, too late -------+--> dead ---- start --> starting

Every incarnation has an **epoch**: ``generation << 20 | counter``. The generation
is the orchestrator's own, so that a restarted one never repeats an epoch. An
event that carries an older epoch changes nothing; it is counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from tarragon.messages import Hello, Peer, Ready, Role, WorkerState

EPOCH_COUNTER_BITS: Final = 20
EPOCH_MAX: Final = (1 << 32) - 1
"""Data frames carry epochs in 32 bits."""
GENERATION_MAX: Final = EPOCH_MAX >> EPOCH_COUNTER_BITS

SERVING: Final = frozenset[WorkerState]({"healthy", "suspect", "draining"})
"""States of a worker that has been ready and not been declared dead."""


class MembershipError(ValueError):
    """A person asked for something that the cluster's state does not allow; the message says why."""


class UnknownWorkerError(MembershipError):
    """A person named a worker that there is not."""


Incarnation = tuple[str, int]
"""Worker id and epoch."""


@dataclass
class Worker:
    """What is known about the current incarnation of one worker. Times are seconds of one steady clock."""

    worker_id: str
    role: Role
    epoch: int
    started_s: float
    state: WorkerState = "starting"
    connected: bool = False
    """Said hello, and its connection still stands."""
    pid: int = 0
    address: str = ""
    served: bool = False
    """Adopted, and ready already under a former orchestrator."""
    ready: Ready | None = None
    ready_s: float | None = None
    """When it became ready first."""
    heard_s: float = 0.0
    probes_missed: int = 0
    suspected_by: set[Incarnation] = field(default_factory=set)
    cause: str = ""
    """Why it is suspect or dead."""

    @property
    def serving(self) -> bool:
        return self.state in SERVING

    @property
    def peer(self) -> Peer:
        return Peer(
            worker_id=self.worker_id, role=self.role, epoch=self.epoch, address=self.address, pid=self.pid
        )


@dataclass(frozen=True)
class Transition:
    """One change of state."""

    worker_id: str
    role: Role
    epoch: int
    before: WorkerState
    after: WorkerState
    cause: str
    kind: str = ""
    """Why it is dead, in one word: closed, exited, hung, silent, suspected, late, removed."""


class Membership:
    """All workers of one cluster. Events return the transition they cause, or None if they cause none."""

    def __init__(self, generation: int, *, probe_misses_max: int = 3) -> None:
        assert 0 <= generation <= GENERATION_MAX
        self.generation = generation
        self.workers: dict[str, Worker] = {}
        self.refused: Counter[str] = Counter()
        """Events that were not accepted, by reason."""
        self._probe_misses_max = probe_misses_max
        self._epochs = 0

    # ------------------------------------------------------------------ questions

    def by_role(self, *roles: Role) -> list[Worker]:
        """Workers of ``roles``, by id, dead ones included."""
        return [self.workers[i] for i in sorted(self.workers) if self.workers[i].role in roles]

    def is_connected(self, worker_id: str, epoch: int) -> bool:
        """Whether this incarnation is admitted and its connection stands."""
        worker = self.workers.get(worker_id)
        return worker is not None and worker.epoch == epoch and worker.connected

    def known(self, worker_id: str) -> Worker:
        """The worker that a person named; raises UnknownWorkerError."""
        worker = self.workers.get(worker_id)
        if worker is None:
            raise UnknownWorkerError(f"there is no worker {worker_id}")
        return worker

    def current(self, worker_id: str, epoch: int) -> Worker | None:
        """The worker, if ``epoch`` is its present incarnation and alive; otherwise None, and counted."""
        worker = self.workers.get(worker_id)
        if worker is None:
            self.refused["unknown_worker"] += 1
        elif epoch < worker.epoch:
            self.refused["stale_epoch"] += 1
        elif epoch > worker.epoch:
            self.refused["epoch_never_given"] += 1
        elif worker.state == "dead":
            self.refused["declared_dead"] += 1
        else:
            return worker
        return None

    # ------------------------------------------------------------------ events

    def start(self, worker_id: str, role: Role, now_s: float) -> Worker:
        """Begin a new incarnation of ``worker_id``, with the next epoch."""
        old = self.workers.get(worker_id)
        assert old is None or (old.state == "dead" and old.role == role)
        self._epochs += 1
        assert self._epochs < 1 << EPOCH_COUNTER_BITS
        epoch = self.generation << EPOCH_COUNTER_BITS | self._epochs
        self.workers[worker_id] = Worker(worker_id, role, epoch, started_s=now_s)
        return self.workers[worker_id]

    def adopt(self, hello: Hello, now_s: float) -> Worker:
        """Take over an incarnation that an earlier generation started."""
        assert hello.worker_id not in self.workers
        assert hello.epoch >> EPOCH_COUNTER_BITS < self.generation
        worker = Worker(hello.worker_id, hello.role, hello.epoch, started_s=now_s, connected=True)
        worker.pid, worker.address, worker.heard_s = hello.pid, hello.address, now_s
        worker.served = hello.was_ready
        self.workers[hello.worker_id] = worker
        return worker

    def started(self, worker_id: str, epoch: int, pid: int) -> None:
        """The node agent forked the incarnation."""
        worker = self.current(worker_id, epoch)
        if worker is not None:
            worker.pid = pid

    def hello(self, hello: Hello, now_s: float) -> str:
        """A worker dialled; return "" if it is admitted, otherwise one sentence that says why not."""
        worker = self.current(hello.worker_id, hello.epoch)
        if worker is None:
            known = self.workers.get(hello.worker_id)
            if known is None:
                return f"no worker {hello.worker_id} belongs to this cluster"
            return f"{hello.worker_id} has been replaced: epoch {hello.epoch} is not admitted any more"
        if hello.role != worker.role or worker.connected:
            self.refused["bad_hello"] += 1
            return f"{hello.worker_id} is known as a connected or different worker"
        worker.connected = True
        worker.pid, worker.address, worker.heard_s = hello.pid, hello.address, now_s
        return ""

    def ready(self, message: Ready, now_s: float) -> Transition | None:
        """Weights are in and links stand; again, whenever what is resident changed."""
        worker = self.current(message.worker_id, message.epoch)
        if worker is None or not worker.connected:
            return None
        self.heard(worker.worker_id, worker.epoch, now_s)
        worker.ready = message
        if worker.state != "starting":
            return None
        worker.ready_s = now_s
        return self._move(worker, "healthy", "")

    def heard(self, worker_id: str, epoch: int, now_s: float) -> Transition | None:
        """Any message of the worker: it lives. A suspect is cleared once it answers after the suspicion."""
        worker = self.current(worker_id, epoch)
        if worker is None:
            return None
        worker.heard_s, worker.probes_missed = now_s, 0
        return self._move(worker, "healthy", "") if worker.state == "suspect" else None

    def suspected(
        self, worker_id: str, epoch: int, by: Incarnation, cause: str, judges: set[Incarnation]
    ) -> Transition | None:
        """One peer's local view; when all ``judges`` (its live peers) share it, the worker is dead.

        A single suspicion may be a cut link between two workers who are both well: that pair goes on
        without each other. It stands for as long as both incarnations live.
        """
        worker = self.current(worker_id, epoch)
        if worker is None or worker.state == "draining":
            return None
        worker.suspected_by.add(by)
        if judges and judges <= worker.suspected_by:
            return self._die(
                worker, f"suspected by {', '.join(sorted(i for i, _ in judges))}: {cause}", "suspected"
            )
        if worker.state == "starting":
            return None
        return self._move(worker, "suspect", f"{by[0]}: {cause}")

    def probe_missed(self, worker_id: str, epoch: int) -> Transition | None:
        """A suspect said nothing for one more probe interval."""
        worker = self.current(worker_id, epoch)
        if worker is None or worker.state != "suspect":
            return None
        worker.probes_missed += 1
        if worker.probes_missed < self._probe_misses_max:
            return None
        return self._die(worker, f"suspected ({worker.cause}) and silent", "silent")

    def withdrawn(self, worker_id: str, epoch: int, by: Incarnation) -> None:
        """That peer is connected to the worker again."""
        worker = self.current(worker_id, epoch)
        if worker is not None:
            worker.suspected_by.discard(by)

    def unresponsive(self, worker_id: str, epoch: int, cause: str) -> Transition | None:
        """The worker's process is there, but does not answer the orchestrator, or does no work."""
        worker = self.current(worker_id, epoch)
        return None if worker is None or not worker.serving else self._die(worker, cause, "hung")

    def too_late(self, worker_id: str, epoch: int, cause: str) -> Transition | None:
        """The worker did not become ready in time."""
        worker = self.current(worker_id, epoch)
        return None if worker is None or worker.state != "starting" else self._die(worker, cause, "late")

    def connection_lost(
        self, worker_id: str, epoch: int, cause: str = "connection lost"
    ) -> Transition | None:
        """The control connection ended: at once on one host, where nothing but its end closes it."""
        known = self.workers.get(worker_id)
        if known is not None and (epoch < known.epoch or known.state == "dead"):
            return None  # we closed it ourselves, when that incarnation was declared dead
        worker = self.current(worker_id, epoch)
        return None if worker is None else self._die(worker, cause, "closed")

    def exited(self, worker_id: str, epoch: int, cause: str) -> Transition | None:
        """The node agent reaped the process. News of a former incarnation is expected, and no refusal."""
        worker = self.workers.get(worker_id)
        if worker is None or epoch < worker.epoch:
            return None
        if epoch == worker.epoch and worker.state == "dead":
            worker.cause = cause  # the words of the node agent say more than "connection lost"
            return None
        worker = self.current(worker_id, epoch)
        return None if worker is None else self._die(worker, cause, "exited")

    def drain(self, worker_id: str) -> Transition:
        """Planned leave; raises MembershipError if the worker cannot be spared or is not healthy."""
        worker = self.known(worker_id)
        if worker.role not in ("attention", "expert"):
            raise MembershipError(f"{worker_id} cannot be drained: only attention and expert workers can")
        if worker.state != "healthy":
            raise MembershipError(f"{worker_id} is {worker.state}, and only a healthy worker can be drained")
        others = [w for w in self.by_role(worker.role) if w.state == "healthy" and w is not worker]
        if not others:
            raise MembershipError(f"{worker_id} is the last healthy {worker.role} worker")
        moved = self._move(worker, "draining", "asked to drain")
        assert moved is not None
        return moved

    def retire(self, worker_id: str, cause: str) -> Transition:
        """Declare a live worker dead at a person's word; raises MembershipError if there is none."""
        worker = self.known(worker_id)
        if worker.state == "dead":
            raise MembershipError(f"{worker_id} is dead already")
        return self._die(worker, cause, "removed")

    def running(self, worker_id: str) -> Worker:
        """The incarnation that a signal is meant for. The signal itself changes no state: its effect will.

        Raises MembershipError if there is no such worker or no process of it.
        """
        worker = self.known(worker_id)
        if worker.state == "dead" or not worker.pid:
            raise MembershipError(f"{worker_id} has no running process to signal")
        return worker

    def forget(self, worker_id: str) -> None:
        """Remove a worker that left as planned, or one that is not wanted back."""
        assert self.workers[worker_id].state == "dead"
        del self.workers[worker_id]

    # ------------------------------------------------------------------ inside

    def _die(self, worker: Worker, cause: str, kind: str) -> Transition:
        worker.connected = False
        moved = self._move(worker, "dead", cause, kind)
        assert moved is not None
        return moved

    def _move(self, worker: Worker, after: WorkerState, cause: str, kind: str = "") -> Transition | None:
        before, worker.state, worker.cause = worker.state, after, cause
        if before == after:
            return None
        return Transition(worker.worker_id, worker.role, worker.epoch, before, after, cause, kind)
