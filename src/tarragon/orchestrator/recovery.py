"""What to do about a death, a return, a drain (5.3, 5.4)? Events and the time come in, actions go out.

A death takes one path, whatever its cause: the table loses the incarnation (so a shadow is first in line
at once), experts without any copy are loaded on survivors, and the node agent is asked for a replacement
under the same id with a new epoch. When that one is ready it is primary again for what it had, and what
stood in for it is undone. A drain is the same path with the order turned round: first the copies, then
the table, then the stop.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tarragon.config import Config
from tarragon.messages import (
    Assign,
    Control,
    Drain,
    Hello,
    Peer,
    Peers,
    Ready,
    Refused,
    Report,
    Role,
    SignalWorker,
    StartWorker,
    Stop,
    Suspicion,
    TableAck,
    TableUpdate,
    Welcome,
    WorkerExited,
    WorkerStarted,
)
from tarragon.orchestrator.actions import Action, Disconnect, Note, SendTo, ToAgent
from tarragon.orchestrator.membership import (
    EPOCH_COUNTER_BITS,
    Incarnation,
    Membership,
    Transition,
    Worker,
)
from tarragon.orchestrator.planning import ExpertShape, Planner
from tarragon.orchestrator.relations import peers_of
from tarragon.orchestrator.residency import NO_VERSION, Order, Residency, Step
from tarragon.orchestrator.restarts import Restarts
from tarragon.orchestrator.silence import Silence
from tarragon.orchestrator.suspicions import judge
from tarragon.orchestrator.tally import Tally
from tarragon.routing.placement import Placement, PlacementError
from tarragon.routing.table import unreachable

WorkerRole = Literal["attention", "expert"]
PREFIXES: Final[dict[WorkerRole, str]] = {"attention": "aw", "expert": "ew"}
GATEWAY: Final = "gateway"
STORE: Final = "store"


@dataclass
class Leave:
    """A drain in progress."""

    deadline_s: float
    empty: bool = False
    """Attention workers: the gateway, or the worker itself, said that no request is left."""
    stopping: bool = False
    forced: bool = False
    """It was told to stop because its time was up, and not because it had nothing left to do."""


class Recovery:
    """The orchestrator's decisions. Every method that takes ``now_s`` is an event and returns actions."""

    def __init__(self, config: Config, shape: ExpertShape, generation: int) -> None:
        """Raises PlacementError if the experts do not fit on the configured workers."""
        self.config = config
        self.planner = Planner(config, shape)
        self.membership = Membership(generation, probe_misses_max=config.probe_misses_max)
        # Table versions carry the generation too: a restarted orchestrator's tables are newer ones.
        self.residency = Residency(
            self.planner.first(),
            version=generation << EPOCH_COUNTER_BITS,
            cold_loads=not config.static_routing,
        )
        self.acked: dict[str, int] = {}
        """Table version in use at each attention worker."""
        self.counters: dict[str, dict[str, float]] = {}
        """Last report of each worker."""
        self.traffic: dict[str, list[list[float]]] = {}
        """Of workers that record it: see refe/traffic.py."""
        self.restarts = Restarts(config)
        self.tally = Tally()
        self.was_ready = False
        self.meant: set[Incarnation] = set()
        self.leaving: dict[str, Leave] = {}
        self._probe_at_s: dict[str, float] = {}
        self._review_at_s = 0.0
        self._gateway_silence = Silence()
        self._peers_sent: dict[str, list[Peer]] = {}
        self._unreachable: tuple[int, int] = (-1, 0)

    # ------------------------------------------------------------------ questions

    @property
    def unreachable(self) -> int:
        """Experts that no live worker hosts."""
        table = self.residency.table
        if self._unreachable[0] != table.version:
            self._unreachable = table.version, len(unreachable(table))
        return self._unreachable[1]

    @property
    def ready(self) -> bool:
        """Whether requests are served: an attention worker, the gateway, and every expert."""
        return self._have("attention", "gateway") and self.unreachable == 0

    def _have(self, *roles: Role) -> bool:
        """Whether each of the roles has a healthy process."""
        return {w.role for w in self.membership.workers.values() if w.state == "healthy"}.issuperset(roles)

    @property
    def full_capacity(self) -> bool:
        """Whether every worker is healthy and every wanted copy of every expert is there."""
        workers = self.membership.workers.values()
        table, target = self.residency.table, self.residency.target
        return all(w.state == "healthy" for w in workers) and all(
            tuple(table.workers[i].worker_id for i in found) == target.holder_ids(layer, expert)
            for layer, row in enumerate(table.candidates)
            for expert, found in enumerate(row)
        )

    # ------------------------------------------------------------------ events: workers

    def begin(self, now_s: float, adopted: Sequence[Hello] = ()) -> list[Action]:
        """The node agent is there: start everything, the gateway first, as it takes longest.

        ``adopted`` are workers of a former generation that run on; they are welcomed together, so that
        no attention worker gets a table that lacks an expert worker it is connected to.
        """
        for hello in adopted:
            worker = self.membership.adopt(hello, now_s)
            self.acked[worker.worker_id] = NO_VERSION
        actions: list[Action] = []
        for worker in self.membership.by_role("expert"):
            actions += self._join(worker, next(h for h in adopted if h.worker_id == worker.worker_id))
        wanted: list[tuple[str, Role]] = [(GATEWAY, "gateway")]
        wanted += [(f"aw-{i}", "attention") for i in range(self.config.attention_workers)]
        wanted += [(f"ew-{i}", "expert") for i in range(self.config.expert_workers)]
        wanted.append((STORE, "store"))  # last: it is up long before anybody else is ready
        step = self.residency.step()
        for worker in list(self.membership.workers.values()):
            actions += [note(worker, "adopted", f"pid {worker.pid}"), self._welcome(worker, step)]
        for worker_id, role in wanted:
            if worker_id not in self.membership.workers:
                actions += self.start(worker_id, role, now_s)
        return actions + self.settle(now_s)

    def hello(self, hello: Hello, now_s: float) -> list[Action] | Refused:
        """A worker dialled: its Welcome, or why it gets none."""
        reason = self.membership.hello(hello, now_s)
        if reason:
            return Refused(reason=reason)
        worker = self.membership.workers[hello.worker_id]
        actions: list[Action] = [note(worker, "connected", f"pid {hello.pid}")]
        if worker.role == "expert":
            actions += self._join(worker, hello)
        step = self.residency.step()
        if worker.role == "attention":
            self.acked[worker.worker_id] = self.residency.table.version
        actions.append(self._welcome(worker, step))
        return [*actions, *self._tell(step, but=worker), *self.settle(now_s)]

    def receive(self, worker_id: str, epoch: int, message: Control, now_s: float) -> list[Action]:
        """A message on the connection of this incarnation."""
        worker = self.membership.current(worker_id, epoch)
        if worker is None:
            return []
        if _sender(message) not in ((worker_id, epoch), None):
            self.membership.refused["message_of_another_worker"] += 1
            return []
        actions = self.moved(self.membership.heard(worker_id, epoch, now_s))
        match message:
            case Ready():
                return actions + self._on_ready(worker, message, now_s)
            case TableAck(version=version) if version <= self.residency.table.version:
                self.acked[worker_id] = max(version, self.acked.get(worker_id, NO_VERSION))
                return actions + (self.settle(now_s) if self._supersede() else [])
            case Report():
                self.counters[worker_id] = message.counters
                if message.traffic:
                    self.traffic[worker_id] = message.traffic
                if message.expert_pairs and not self.planner.usage.report(
                    worker_id, epoch, message.expert_pairs
                ):
                    self.membership.refused["malformed_report"] += 1
                return actions
            case Suspicion(reporter_id=reporter) if reporter == worker_id:
                return actions + self._on_suspicion(worker, message, now_s)
            case Drain(worker_id=drained) if worker.role == "gateway" or drained == worker_id:
                return actions + self._on_empty(drained, now_s)
            case _:
                self.membership.refused["unexpected_message"] += 1
                return actions

    def connection_lost(self, worker_id: str, epoch: int, cause: str, now_s: float) -> list[Action]:
        """The control connection of this incarnation ended."""
        return self.died(self.membership.connection_lost(worker_id, epoch, cause), now_s)

    def agent_says(self, message: WorkerStarted | WorkerExited, now_s: float) -> list[Action]:
        """The node agent forked or reaped a process."""
        if isinstance(message, WorkerStarted):
            self.membership.started(message.worker_id, message.epoch, message.pid)
            return []
        words = message.status + (f" ({message.detail})" if message.detail else "")
        told = Note("exited", message.worker_id, message.epoch, words)
        moved = self.membership.exited(message.worker_id, message.epoch, words)
        return [told, *self.died(moved, now_s, exited=True)]

    def tick(self, now_s: float) -> list[Action]:
        """Time passed."""
        actions: list[Action] = []
        for worker_id in self.restarts.due(now_s):
            actions += self.start(worker_id, self.membership.workers[worker_id].role, now_s)
        for worker in list(self.membership.workers.values()):
            if worker.state == "starting":
                if now_s - worker.started_s > self.config.worker_ready_timeout_s:
                    cause = f"not ready after {self.config.worker_ready_timeout_s:.0f} s"
                    moved = self.membership.too_late(worker.worker_id, worker.epoch, cause)
                    actions += self.died(moved, now_s)
            elif worker.state == "suspect":
                actions += self._probe(worker, now_s)
            elif worker.state == "draining" and now_s >= self.leaving[worker.worker_id].deadline_s:
                actions += self._stop(worker, now_s, forced=True)
        return actions + self._watch_gateway(now_s) + self._review(now_s)

    def _watch_gateway(self, now_s: float) -> list[Action]:
        """A gateway that hangs is killed: its streams are lost, as with its death, and service returns."""
        gateway = self.membership.workers.get(GATEWAY)
        serving = gateway if gateway is not None and gateway.state == "healthy" else None
        silent_s = self._gateway_silence.look(None if serving is None else serving.heard_s, now_s)
        limit_s = max(self.config.gateway_silence_s, 3 * self.config.report_interval_ms / 1e3)
        if serving is None or silent_s < limit_s:
            return []
        self._gateway_silence.begin_anew()
        order = SignalWorker(worker_id=GATEWAY, epoch=serving.epoch, signal=signal.SIGKILL)
        text = f"it has not reported for {limit_s:.0f} s"
        return [note(serving, "hung", text), ToAgent(order)]

    def _review(self, now_s: float) -> list[Action]:
        """Let shadows follow what is used, if there is no room for all (5.3), once nothing is missing."""
        interval_s = self.config.shadow_review_s
        if not interval_s or now_s < self._review_at_s or not self.full_capacity:
            return []
        self._review_at_s = now_s + interval_s
        better = self.planner.better(self.residency.target)
        if better is None:
            return []
        self.residency.aim(better)
        return [Note("placement", "orchestrator", 0, "shadows follow what is used"), *self.settle(now_s)]

    # ------------------------------------------------------------------ reactions

    def _on_ready(self, worker: Worker, message: Ready, now_s: float) -> list[Action]:
        moved = self.membership.ready(message, now_s)
        if moved is not None and not worker.served:
            self.tally.provisioned(worker.role, now_s - worker.started_s)
        if worker.worker_id in self.residency.holders:
            self.residency.holds(worker.worker_id, message.resident, message.order)
        return self.moved(moved, f"after {now_s - worker.started_s:.1f} s") + self.settle(now_s)

    def _on_suspicion(self, reporter: Worker, message: Suspicion, now_s: float) -> list[Action]:
        moved, verify = judge(message, reporter, self.membership)
        return [*self.died(moved, now_s), *verify]

    def _on_empty(self, worker_id: str, now_s: float) -> list[Action]:
        leave = self.leaving.get(worker_id)
        if leave is None:
            self.membership.refused["drain_of_nobody"] += 1
            return []
        leave.empty = True
        return self.settle(now_s)

    def _probe(self, worker: Worker, now_s: float) -> list[Action]:
        """A suspect that sends nothing for some report intervals is dead: anything it says clears it."""
        interval_s = self.config.report_interval_ms / 1e3
        due_s = self._probe_at_s.setdefault(worker.worker_id, now_s + interval_s)
        if now_s < due_s:
            return []
        self._probe_at_s[worker.worker_id] = now_s + interval_s
        return self.died(self.membership.probe_missed(worker.worker_id, worker.epoch), now_s)

    def died(
        self, moved: Transition | None, now_s: float, *, exited: bool = False, replace: bool = True
    ) -> list[Action]:
        """Note a change of state, and if it was the last one of an incarnation, do what follows from it."""
        if moved is None or moved.after != "dead":
            return self.moved(moved)
        worker = self.membership.workers[moved.worker_id]
        if moved.before in ("healthy", "suspect"):
            self.tally.failed(worker.role, moved.kind)
        planned = self._ends_as_planned(worker)
        actions: list[Action] = [] if planned else self.moved(moved)
        actions.append(Disconnect(worker.worker_id, worker.epoch))
        if not exited:  # whatever is left of it ends: SIGTERM, and the node agent's SIGKILL after its grace
            order = SignalWorker(worker_id=worker.worker_id, epoch=worker.epoch, signal=signal.SIGTERM)
            actions.append(ToAgent(order))
        self.acked.pop(worker.worker_id, None)
        self._peers_sent.pop(worker.worker_id, None)
        self.residency.leave(worker.worker_id)
        if moved.before == "draining":
            actions.append(note(worker, "left", "drained" if planned else "before it was drained"))
            self.forget(worker.worker_id)
        actions += self.settle(now_s)  # first: whether the others can go on shows in the table without it
        if replace and moved.before != "draining":
            actions += self._replace(worker, now_s)
        self.meant.discard((moved.worker_id, moved.epoch))
        return actions

    def _ends_as_planned(self, worker: Worker) -> bool:
        """Whether nobody is to be alarmed: it had nothing left to do, and was told to stop."""
        leave = self.leaving.get(worker.worker_id)
        return leave is not None and leave.stopping and not leave.forced

    def _replace(self, worker: Worker, now_s: float) -> list[Action]:
        healthy_for_s = None if worker.ready_s is None else now_s - worker.ready_s
        meant = (worker.worker_id, worker.epoch) in self.meant
        due_s = self.restarts.died(
            worker.worker_id, healthy_for_s, now_s, meant=meant, others_go_on=self._others_go_on(worker.role)
        )
        if due_s is None:
            return self._give_up(worker, now_s)
        if due_s <= now_s:
            return self.start(worker.worker_id, worker.role, now_s)
        kind = "backoff" if self.restarts.crashes(worker.worker_id) > 1 else "pause"
        return [note(worker, kind, f"starts again in {due_s - now_s:.1f} s")]

    def _others_go_on(self, role: Role) -> bool:
        """Whether requests are served without another one of the role, or will be after cold loads."""
        lost = unreachable(self.residency.table)
        return self._have("attention", "gateway", role) and all(map(self.residency.is_being_loaded, lost))

    def _give_up(self, worker: Worker, now_s: float) -> list[Action]:
        times = self.restarts.crashes(worker.worker_id)
        text = f"{worker.worker_id} ended {times} times in a row: {worker.cause}"
        if not self.was_ready:
            # A cluster that never served is a mistake to be told, one that did goes on with what it has.
            return [note(worker, "given up", text), ToAgent(Stop(reason=text))]
        actions: list[Action] = [note(worker, "given up", text)]
        if worker.role == "expert":
            actions += self._retarget(self.planner.without, worker.worker_id)
        return actions + self.settle(now_s)

    # ------------------------------------------------------------------ parts of a reaction

    def _join(self, worker: Worker, hello: Hello) -> list[Action]:
        actions: list[Action] = []
        if worker.worker_id not in self.residency.target.workers:
            actions = self._retarget(self.planner.having, worker.worker_id)
        self.residency.join(worker.peer, self.planner.room, hello.resident)
        return actions

    def _welcome(self, worker: Worker, step: Step) -> SendTo:
        """The answer to Hello; takes the worker's order out of ``step``."""
        order = step.orders.pop(worker.worker_id, Order(0, []))
        peers = self._peers_sent[worker.worker_id] = peers_of(worker, self.membership)
        table = self.residency.table
        return send(worker, Welcome(table=table, assigned=order.experts, order=order.number, peers=peers))

    def start(self, worker_id: str, role: Role, now_s: float) -> list[Action]:
        worker = self.membership.start(worker_id, role, now_s)
        self.restarts.started(worker_id)
        self.counters.pop(worker_id, None)
        order = StartWorker(worker_id=worker_id, role=role, epoch=worker.epoch)
        return [note(worker, "start", role), ToAgent(order)]

    def _stop(self, worker: Worker, now_s: float, *, forced: bool = False) -> list[Action]:
        """End a worker that is drained, or whose time is up (``forced``): told first, killed if need be."""
        leave = self.leaving[worker.worker_id]
        leave.deadline_s = now_s + self.config.shutdown_grace_s
        if leave.stopping:
            order = SignalWorker(worker_id=worker.worker_id, epoch=worker.epoch, signal=signal.SIGTERM)
            return [ToAgent(order)]
        leave.stopping, leave.forced = True, forced
        text = f"not drained in {self.config.drain_timeout_s:.0f} s" if forced else "drained"
        return [note(worker, "stop", text), send(worker, Stop(reason=text))]

    def forget(self, worker_id: str) -> None:
        self.membership.forget(worker_id)
        self.restarts.forget(worker_id)
        self.counters.pop(worker_id, None)
        self.traffic.pop(worker_id, None)
        self.leaving.pop(worker_id, None)
        self._probe_at_s.pop(worker_id, None)

    def settle(self, now_s: float) -> list[Action]:
        """After any event: bring tables, orders, peers and drains up to date."""
        self._supersede()
        actions = self._tell(self.residency.step())
        self._supersede()
        for worker_id, leave in self.leaving.items():
            worker = self.membership.workers[worker_id]
            empty = self.residency.is_drained(worker_id) if worker.role == "expert" else leave.empty
            if empty and not leave.stopping:
                actions += self._stop(worker, now_s)
        for worker in self.membership.workers.values():
            peers = peers_of(worker, self.membership)
            if worker.connected and peers != self._peers_sent.get(worker.worker_id):
                self._peers_sent[worker.worker_id] = peers
                actions.append(send(worker, Peers(peers=peers)))
        self.was_ready = self.was_ready or self.ready
        return actions

    def _supersede(self) -> bool:
        in_use = [self.acked[w.worker_id] for w in self.membership.by_role("attention") if w.connected]
        return self.residency.superseded(min(in_use, default=self.residency.table.version))

    def _tell(self, step: Step, but: Worker | None = None) -> list[Action]:
        actions: list[Action] = []
        if step.table is not None:
            update = TableUpdate(table=step.table)
            workers = [w for w in self.membership.by_role("attention") if w.connected and w is not but]
            actions += [send(worker, update) for worker in workers]
        for worker_id, order in step.orders.items():
            assign = Assign(experts=order.experts, order=order.number)
            actions.append(send(self.membership.workers[worker_id], assign))
        return actions

    def _retarget(self, plan: Callable[[str, Placement], Placement], worker_id: str) -> list[Action]:
        try:
            self.residency.aim(plan(worker_id, self.residency.target))
        except PlacementError as error:
            return [Note("placement", worker_id, 0, f"the placement stays as it is: {error}")]
        return []

    def moved(self, moved: Transition | None, text: str = "") -> list[Action]:
        if moved is None:
            return []
        if moved.after != "suspect":
            self._probe_at_s.pop(moved.worker_id, None)
        return [Note(moved.after, moved.worker_id, moved.epoch, moved.cause or text)]


def _sender(message: Control) -> Incarnation | None:
    if isinstance(message, (Ready, TableAck, Report)):
        return message.worker_id, message.epoch
    return None


def send(worker: Worker, message: Control) -> SendTo:
    return SendTo(worker.worker_id, worker.epoch, message)


def note(worker: Worker, kind: str, text: str) -> Note:
    return Note(kind, worker.worker_id, worker.epoch, text)
