"""Recovery: whatever dies, in whatever order, every expert ends up where it belongs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarragon.config import Config
from tarragon.messages import (
    Assign,
    Control,
    Drain,
    ExpertId,
    Hello,
    Peers,
    Ready,
    Refused,
    Report,
    Role,
    SignalWorker,
    StartWorker,
    Stop,
    Suspicion,
    Table,
    TableAck,
    TableUpdate,
    Welcome,
    WorkerExited,
    WorkerStarted,
)
from tarragon.orchestrator.actions import Action, Disconnect, Note, SendTo, ToAgent, Verify
from tarragon.orchestrator.adoption import Adoption
from tarragon.orchestrator.commands import Commands
from tarragon.orchestrator.membership import MembershipError
from tarragon.orchestrator.planning import ExpertShape
from tarragon.orchestrator.recovery import Recovery
from tarragon.orchestrator.snapshot import unprotected_reason
from tarragon.routing.placement import Placement, PlacementError

EXPERT_BYTES = 1_000
TICK_S = 0.25


@dataclass
class Process:
    """A fake worker: it obeys its inbox in order, whenever the test lets it."""

    worker_id: str
    role: Role
    epoch: int
    pid: int
    inbox: list[Control] = field(default_factory=list)
    booted: bool = False
    resident: set[ExpertId] = field(default_factory=set)
    table: Table | None = None


class Cluster:
    """Interprets actions as the node agent and the workers would; checks what must never be broken."""

    def __init__(self, config: Config, shape: ExpertShape, generation: int = 1) -> None:
        self.recovery = Recovery(config, shape, generation)
        self.commands = Commands(self.recovery)
        self.room = self.recovery.planner.room
        self.now_s = 100.0
        self.processes: dict[str, Process] = {}
        self.starts: list[StartWorker] = []
        self.exits: list[WorkerExited] = []
        self.notes: list[Note] = []
        self.stops: list[Stop] = []
        self._epochs: dict[str, int] = {}
        self._pids = 1000
        self.do(self.recovery.begin(self.now_s))

    # ------------------------------------------------------------------ actions

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Note):
                self.notes.append(action)
            elif isinstance(action, SendTo):
                process = self.processes.get(action.worker_id)
                if process is not None and process.epoch == action.epoch:
                    process.inbox.append(action.message)
            elif isinstance(action, ToAgent):
                self._agent(action.message)
            else:
                assert isinstance(action, Disconnect | Verify)
        self.check()

    def _agent(self, message: Control) -> None:
        if isinstance(message, StartWorker):
            assert message.epoch > self._epochs.get(message.worker_id, 0), "an epoch was given twice"
            self._epochs[message.worker_id] = message.epoch
            self.starts = [s for s in self.starts if s.worker_id != message.worker_id]
            self._end(message.worker_id, "killed by SIGTERM")
            self.starts.append(message)
        elif isinstance(message, SignalWorker):
            process = self.processes.get(message.worker_id)
            if process is not None and process.epoch == message.epoch:
                self._end(message.worker_id, f"killed by {signal.Signals(message.signal).name}")
        else:
            assert isinstance(message, Stop)
            self.stops.append(message)

    def _end(self, worker_id: str, status: str) -> Process | None:
        process = self.processes.pop(worker_id, None)
        if process is not None:
            exited = WorkerExited(worker_id=worker_id, epoch=process.epoch, pid=process.pid, status=status)
            self.exits.append(exited)
        return process

    # ------------------------------------------------------------------ events

    def fork(self, index: int) -> None:
        """The agent forks one worker, and it says hello."""
        if not self.starts:
            return
        order = self.starts.pop(index % len(self.starts))
        self._pids += 1
        process = Process(order.worker_id, order.role, order.epoch, self._pids)
        self.processes[order.worker_id] = process
        started = WorkerStarted(worker_id=order.worker_id, epoch=order.epoch, pid=process.pid)
        self.do(self.recovery.agent_says(started, self.now_s))
        answer = self.recovery.hello(hello_of(process), self.now_s)
        if isinstance(answer, Refused):  # it was given up in the meantime
            self._end(order.worker_id, "exit code 1")
        else:
            self.do(answer)

    def obey(self, index: int) -> None:
        """One worker takes the oldest message of its inbox."""
        busy = [p for p in self.live if p.inbox]
        if busy:
            process = busy[index % len(busy)]
            self._take(process, process.inbox.pop(0))

    def _take(self, process: Process, message: Control) -> None:
        if isinstance(message, Stop):
            self._end(process.worker_id, "exit code 0")
            self.hang_up(process)
        elif process.role == "expert" and isinstance(message, (Welcome, Assign)):
            wanted = message.assigned if isinstance(message, Welcome) else message.experts
            process.resident = set(wanted)
            self.check()
            self.say(process, ready_of(process, message.order))
        elif process.role == "attention" and isinstance(message, (Welcome, TableUpdate)):
            assert process.table is None or message.table.version > process.table.version
            process.table = message.table
            version = message.table.version
            self.say(process, TableAck(worker_id=process.worker_id, epoch=process.epoch, version=version))
        elif process.role == "gateway" and isinstance(message, Drain):
            self.say(process, message)

    def boot(self, index: int) -> None:
        """One attention worker or the gateway becomes ready."""
        ready = [p for p in self.live if p.role != "expert" and not p.booted and not p.inbox]
        if ready:
            process = ready[index % len(ready)]
            process.booted = True
            self.say(process, ready_of(process, 0))

    def say(self, process: Process, message: Control) -> None:
        self.do(self.recovery.receive(process.worker_id, process.epoch, message, self.now_s))

    def kill(self, index: int, *, agent_first: bool = False) -> None:
        """One process dies; the agent tells it before the orchestrator sees the end of file, or later."""
        if not self.live:
            return
        process = self.live[index % len(self.live)]
        self._end(process.worker_id, "killed by SIGKILL")
        if agent_first:
            self.reap(len(self.exits) - 1)
        self.hang_up(process)

    def hang_up(self, process: Process) -> None:
        lost = self.recovery.connection_lost(process.worker_id, process.epoch, "connection lost", self.now_s)
        self.do(lost)

    def reap(self, index: int) -> None:
        if self.exits:
            self.do(self.recovery.agent_says(self.exits.pop(index % len(self.exits)), self.now_s))

    def suspect(self, reporter: int, suspect: int) -> None:
        reporters = [p for p in self.live if p.booted or p.role == "expert"]
        if reporters:
            by, of = reporters[reporter % len(reporters)], self.live[suspect % len(self.live)]
            self.say(
                by,
                Suspicion(
                    reporter_id=by.worker_id, suspect_id=of.worker_id, suspect_epoch=of.epoch, cause="silence"
                ),
            )

    def report(self) -> None:
        for process in self.live:
            if process.worker_id in self.processes:
                report = Report(worker_id=process.worker_id, epoch=process.epoch, counters={"layers": 1.0})
                self.say(process, report)

    def stale(self, index: int) -> None:
        """A former incarnation of some worker wakes up and speaks."""
        ids = sorted(self._epochs)
        worker_id = ids[index % len(ids)]
        role: Role = "attention" if worker_id.startswith("aw") else "expert"
        ghost = Process(worker_id, role, self._epochs[worker_id] - 1, 1)
        assert isinstance(self.recovery.hello(hello_of(ghost), self.now_s), Refused)
        before = self.recovery.residency.table
        self.say(ghost, ready_of(ghost, 1))
        assert self.recovery.residency.table is before

    def tick(self, seconds: float = TICK_S) -> None:
        self.now_s += seconds
        self.do(self.recovery.tick(self.now_s))

    def settle(self) -> None:
        """Let everything that is under way come to its end."""
        for _ in range(2_000):
            for act in (self.fork, self.obey, self.boot, self.reap):
                act(0)
            self.report()
            self.tick()
            busy = self.starts or self.exits or any(p.inbox for p in self.live)
            if not busy and all(w.state == "healthy" for w in self.recovery.membership.workers.values()):
                return
        raise AssertionError(f"the cluster does not settle: {self.recovery.membership.workers}")

    # ------------------------------------------------------------------ what holds at any time

    @property
    def live(self) -> list[Process]:
        return [self.processes[i] for i in sorted(self.processes)]

    def check(self) -> None:
        for process in self.live:
            if self.room is not None:
                assert len(process.resident) <= self.room + 1, process
            if process.role == "attention" and process.table is not None:
                self._check_table(process.table)

    def _check_table(self, table: Table) -> None:
        """No attention worker uses a table that names a live worker for what it does not hold."""
        for layer, row in enumerate(table.candidates):
            for expert, candidates in enumerate(row):
                for peer in (table.workers[w] for w in candidates):
                    process = self.processes.get(peer.worker_id)
                    if process is not None and process.epoch == peer.epoch:
                        assert ExpertId(layer, expert) in process.resident, (peer, layer, expert)

    def check_complete(self) -> None:
        recovery = self.recovery
        assert recovery.ready
        assert recovery.full_capacity
        assert recovery.unreachable == 0
        for process in self.live:
            if process.role == "expert":
                assert process.resident == set(recovery.residency.target.assigned(process.worker_id))


def hello_of(process: Process) -> Hello:
    return Hello(
        was_ready=process.booted,
        resident=sorted(process.resident),
        worker_id=process.worker_id,
        role=process.role,
        epoch=process.epoch,
        pid=process.pid,
        address=f"\0{process.worker_id}.{process.epoch}",
    )


def ready_of(process: Process, order: int) -> Ready:
    return Ready(
        worker_id=process.worker_id,
        epoch=process.epoch,
        fingerprint="same",
        exact=True,
        resident=sorted(process.resident),
        order=order,
    )


def config_of(attention: int = 2, expert: int = 2, room: int = 0, **more: float) -> Config:
    settings_ = {"crash_loop_restarts_max": 1_000_000, "expert_memory_bytes_max": room * EXPERT_BYTES}
    settings_ |= {"replacement_pause_s": 0.0, **more}
    return Config(attention_workers=attention, expert_workers=expert, **settings_)  # type: ignore[arg-type]


def started(config: Config, layers: int = 2, experts: int = 4) -> Cluster:
    cluster = Cluster(config, ExpertShape(layers, experts, EXPERT_BYTES))
    cluster.settle()
    cluster.check_complete()
    return cluster


def index_of(cluster: Cluster, worker_id: str) -> int:
    return [p.worker_id for p in cluster.live].index(worker_id)


# ------------------------------------------------------------------ any sequence

OPERATIONS: dict[str, Callable[[Cluster, int, int], None]] = {
    "kill": lambda c, a, b: c.kill(a, agent_first=b % 2 == 0),
    "suspect": lambda c, a, b: c.suspect(a, b),
    "stale": lambda c, a, b: c.stale(a),
    "fork": lambda c, a, b: c.fork(a),
    "obey": lambda c, a, b: c.obey(a),
    "obey more": lambda c, a, b: [c.obey(a + i) for i in range(b)] and None,
    "boot": lambda c, a, b: c.boot(a),
    "reap": lambda c, a, b: c.reap(a),
    "report": lambda c, a, b: c.report(),
    "tick": lambda c, a, b: c.tick(),
}


def command(cluster: Cluster, kind: str, a: int) -> None:
    ids = sorted(cluster.recovery.membership.workers)
    target = ids[a % len(ids)]
    try:
        if kind == "add":
            if len(ids) < 9:
                cluster.do(cluster.commands.add("expert" if a % 2 else "attention", cluster.now_s)[1])
        elif kind == "drain":
            cluster.do(cluster.commands.drain(target, cluster.now_s))
        elif kind == "restart":
            cluster.do(cluster.commands.restart(target, cluster.now_s))
        else:
            cluster.do(cluster.commands.remove(target, cluster.now_s))
    except (MembershipError, PlacementError):
        cluster.check()


moves = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9)), max_size=60
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    attention=st.integers(1, 3),
    expert=st.integers(1, 4),
    replicas=st.integers(0, 2),
    spare=st.one_of(st.none(), st.integers(0, 6)),
    moves=moves,
)
def test_any_deaths_and_returns_end_in_full_placement(
    attention: int, expert: int, replicas: int, spare: int | None, moves: list[tuple[str, int, int]]
) -> None:
    room = 0 if spare is None else -(-8 // expert) + spare
    cluster = started(config_of(attention, expert, room, shadow_replicas=replicas))
    for kind, a, b in moves:
        OPERATIONS[kind](cluster, a, b)
    cluster.settle()
    cluster.check_complete()
    assert len(cluster.live) == 2 + attention + expert


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    replicas=st.integers(0, 2),
    spare=st.one_of(st.none(), st.integers(0, 6)),
    moves=st.lists(
        st.tuples(
            st.sampled_from([*sorted(OPERATIONS), "add", "drain", "restart", "remove"]),
            st.integers(0, 9),
            st.integers(0, 9),
        ),
        max_size=60,
    ),
)
def test_any_commands_among_deaths_end_in_full_placement(
    replicas: int, spare: int | None, moves: list[tuple[str, int, int]]
) -> None:
    room = 0 if spare is None else 4 + spare
    cluster = started(config_of(2, 3, room, shadow_replicas=replicas))
    for kind, a, b in moves:
        if kind in OPERATIONS:
            OPERATIONS[kind](cluster, a, b)
        else:
            command(cluster, kind, a)
    cluster.settle()
    cluster.check_complete()


# ------------------------------------------------------------------ one failure at a time


def test_the_gateway_is_started_first() -> None:
    cluster = Cluster(config_of(), ExpertShape(2, 4, EXPERT_BYTES))
    assert [s.worker_id for s in cluster.starts] == ["gateway", "aw-0", "aw-1", "ew-0", "ew-1", "store"]
    assert len({s.epoch for s in cluster.starts}) == 6
    assert all(s.epoch >> 20 == 1 for s in cluster.starts)


def test_a_shadow_is_first_in_line_as_soon_as_its_primary_dies() -> None:
    cluster = started(config_of())
    recovery = cluster.recovery
    before = recovery.residency.table
    old_epoch = recovery.membership.workers["ew-0"].epoch
    cluster.kill(index_of(cluster, "ew-0"))
    table = recovery.residency.table
    assert table.version > before.version
    assert [p.worker_id for p in table.workers] == ["ew-1"]
    assert all(found == [0] for row in table.candidates for found in row)
    for process in cluster.live:
        if process.role == "attention":
            assert process.inbox[0] == TableUpdate(table=table)
    assert [(s.worker_id, s.role) for s in cluster.starts] == [("ew-0", "expert")]
    assert cluster.starts[0].epoch > old_epoch
    assert recovery.ready
    assert not recovery.full_capacity

    cluster.settle()
    assert recovery.residency.table.candidates == before.candidates
    assert recovery.membership.workers["ew-0"].epoch > old_epoch


def test_without_shadows_survivors_load_what_was_lost_and_give_it_back() -> None:
    cluster = started(config_of(expert=3, shadow_replicas=0))
    recovery = cluster.recovery
    lost = set(recovery.residency.target.assigned("ew-0"))
    cluster.kill(index_of(cluster, "ew-0"))
    assert recovery.unreachable == len(lost)
    assert not recovery.ready
    loads = {p.worker_id: m for p in cluster.live for m in p.inbox if isinstance(m, Assign)}
    assert sorted(loads) == ["ew-1", "ew-2"]
    extra = [set(loads[i].experts) - set(recovery.residency.target.assigned(i)) for i in sorted(loads)]
    assert set.union(*extra) == lost
    assert abs(len(extra[0]) - len(extra[1])) <= 1
    for _ in range(10):
        cluster.obey(0)
    assert recovery.unreachable == 0  # before any replacement is there
    cluster.settle()
    cluster.check_complete()


def test_a_cold_load_displaces_a_shadow_when_memory_is_full() -> None:
    cluster = started(config_of(expert=3, room=4), layers=1, experts=6)  # 2 primaries and 2 shadows each
    recovery = cluster.recovery
    cluster.kill(index_of(cluster, "ew-0"))
    cluster.kill(index_of(cluster, "ew-1"))
    lost = recovery.unreachable
    assert lost > 0
    for _ in range(20):
        cluster.obey(0)
    assert recovery.unreachable == max(0, 6 - 4)
    assert recovery.residency.table.workers[0].worker_id == "ew-2"
    cluster.settle()
    cluster.check_complete()


def test_a_shadow_that_became_the_last_copy_makes_way_for_no_cold_load() -> None:
    cluster = started(config_of(expert=3, room=16), layers=4, experts=8)  # shadows of half of them
    table = cluster.recovery.residency.table
    lost = [p.worker_id for p in table.workers].index("ew-2")
    uncovered = sum(found == [lost] for row in table.candidates for found in row)
    cluster.kill(index_of(cluster, "ew-2"))
    assert uncovered > 0
    for _ in range(20):
        assert cluster.recovery.unreachable <= uncovered
        cluster.obey(0)
    assert cluster.recovery.unreachable == 0  # before any replacement is there
    cluster.settle()
    cluster.check_complete()


def test_what_waits_to_be_taken_over_leaves_no_room_for_cold_loads() -> None:
    """Two workers share twelve experts, a third one is added, and one of the two dies before it is there."""
    cluster = started(config_of(expert=2, room=6, shadow_replicas=0), layers=3, experts=4)
    cluster.do(cluster.commands.add("expert", cluster.now_s)[1])
    lost = len(cluster.processes["ew-1"].resident)
    cluster.kill(index_of(cluster, "ew-1"))
    for step in range(20):
        assert cluster.recovery.unreachable <= lost
        cluster.obey(step)
    cluster.settle()
    cluster.check_complete()


def test_a_cold_load_goes_elsewhere_once_its_host_is_full() -> None:
    """The second death leaves the host with last copies: what it was chosen for finds room with another."""
    cluster = started(config_of(expert=5, room=3), layers=1, experts=9)
    cluster.kill(index_of(cluster, "ew-1"))
    cluster.kill(index_of(cluster, "ew-0"))
    for _ in range(80):
        cluster.obey(0)
    assert cluster.recovery.unreachable == 0  # before any replacement is there: three have room for nine
    cluster.settle()
    cluster.check_complete()


def test_two_full_workers_exchange_what_each_has_loaded_in_an_emergency() -> None:
    cluster = started(config_of(expert=3, room=4, shadow_replicas=0), layers=2, experts=4)
    cluster.kill(index_of(cluster, "ew-2"))
    while cluster.recovery.unreachable:
        cluster.obey(0)
    cluster.do(cluster.commands.remove("ew-2", cluster.now_s))
    for step in range(200):
        cluster.obey(step)
        assert cluster.recovery.unreachable == 0
    cluster.check_complete()


def test_a_copy_is_not_dropped_before_every_attention_worker_has_the_new_table() -> None:
    cluster = started(config_of(expert=2, shadow_replicas=0))
    recovery = cluster.recovery
    cluster.kill(index_of(cluster, "ew-0"))
    survivor = cluster.processes["ew-1"]
    while recovery.unreachable:
        cluster.obey(0)
    cluster.fork(0)
    for _ in range(10):  # everybody but aw-1 goes on
        for process in cluster.live:
            if process.worker_id != "aw-1" and process.inbox:
                cluster._take(process, process.inbox.pop(0))
    assert recovery.full_capacity
    assert len(survivor.resident) == 8
    laggard = cluster.processes["aw-1"]
    while laggard.inbox:
        cluster._take(laggard, laggard.inbox.pop(0))
    cluster.settle()
    assert len(survivor.resident) == 4


def test_what_an_order_under_way_will_drop_is_not_routable() -> None:
    """A Ready that was sent before an order to drop arrives after the order to load again."""
    cluster = started(config_of(attention=1, expert=2, shadow_replicas=0), layers=1, experts=2)
    survivor = cluster.processes["ew-1"]
    holder = cluster.recovery.residency.holders["ew-1"]
    cluster.kill(index_of(cluster, "ew-0"))
    cluster.obey(index_of(cluster, "ew-1"))
    number, everything = holder.order, ready_of(survivor, holder.order)
    assert cluster.recovery.unreachable == 0
    for _ in range(20):
        if holder.order > number:
            break
        cluster.fork(0)
        # ew-1's own inbox is left alone: the order to drop its copy is under way.
        for process in cluster.live:
            if process is not survivor and process.inbox:
                cluster._take(process, process.inbox.pop(0))
    cluster.kill(index_of(cluster, "ew-0"))
    assert holder.order == number + 2  # drop it, and load it again
    cluster.say(survivor, everything)
    assert cluster.recovery.unreachable == 1
    cluster.settle()
    cluster.check_complete()


def test_an_attention_worker_is_replaced_and_the_gateway_hears_of_it_when_it_is_ready() -> None:
    cluster = started(config_of())
    gateway = cluster.processes["gateway"]
    cluster.kill(index_of(cluster, "aw-0"))
    assert [p.worker_id for p in gateway.inbox[-1].peers] == ["aw-1"]  # type: ignore[union-attr]
    cluster.fork(0)
    while any(p.inbox for p in cluster.live if p is not gateway):
        for process in cluster.live:
            if process is not gateway and process.inbox:
                cluster._take(process, process.inbox.pop(0))
    assert [p.worker_id for p in gateway.inbox[-1].peers] == ["aw-1"]  # type: ignore[union-attr]
    cluster.boot(0)
    assert [p.worker_id for p in gateway.inbox[-1].peers] == ["aw-0", "aw-1"]  # type: ignore[union-attr]


def test_one_suspicion_is_a_cut_link_and_all_of_them_are_a_death() -> None:
    cluster = started(config_of(attention=2))
    workers = cluster.recovery.membership.workers
    ew_0, aw_0, aw_1 = (index_of(cluster, i) for i in ("ew-0", "aw-0", "aw-1"))
    epoch = workers["ew-0"].epoch
    cluster.suspect(aw_0, ew_0)
    assert workers["ew-0"].state == "suspect"
    cluster.report()
    assert workers["ew-0"].state == "healthy"
    assert workers["ew-0"].epoch == epoch
    cluster.suspect(aw_1, ew_0)
    assert workers["ew-0"].state == "starting"
    assert workers["ew-0"].epoch > epoch


def test_a_suspect_that_stays_silent_is_dead() -> None:
    cluster = started(config_of(attention=2, report_interval_ms=1_000.0, probe_misses_max=3))
    workers = cluster.recovery.membership.workers
    epoch = workers["ew-0"].epoch
    cluster.suspect(index_of(cluster, "aw-0"), index_of(cluster, "ew-0"))
    for _ in range(int(2.9 / TICK_S)):
        cluster.tick()
    assert workers["ew-0"].state == "suspect"
    for _ in range(int(0.6 / TICK_S)):
        cluster.tick()
    assert workers["ew-0"].epoch > epoch


def test_what_is_declared_dead_while_it_runs_is_ended_and_cut_off() -> None:
    cluster = started(config_of(attention=1))
    aw_0, ew_0 = cluster.processes["aw-0"], cluster.processes["ew-0"]
    suspicion = Suspicion(
        reporter_id="aw-0", suspect_id="ew-0", suspect_epoch=ew_0.epoch, cause="no progress"
    )
    actions = cluster.recovery.receive("aw-0", aw_0.epoch, suspicion, cluster.now_s)
    assert Disconnect("ew-0", ew_0.epoch) in actions
    end = SignalWorker(worker_id="ew-0", epoch=ew_0.epoch, signal=signal.SIGTERM)
    assert ToAgent(end) in actions


def test_silence_alone_is_no_failure() -> None:
    cluster = started(config_of())
    for _ in range(100):
        cluster.tick(1.0)
    assert all(w.state == "healthy" for w in cluster.recovery.membership.workers.values())


def test_the_gateway_alone_condemns_an_attention_worker() -> None:
    cluster = started(config_of())
    epoch = cluster.recovery.membership.workers["aw-1"].epoch
    gateway = index_of(cluster, "gateway")
    cluster.suspect(gateway, index_of(cluster, "aw-1"))
    assert cluster.recovery.membership.workers["aw-1"].epoch > epoch


def test_a_worker_that_never_becomes_ready_is_replaced() -> None:
    cluster = started(config_of(worker_ready_timeout_s=5.0))
    cluster.kill(index_of(cluster, "ew-0"))
    cluster.fork(0)
    epoch = cluster.recovery.membership.workers["ew-0"].epoch
    cluster.tick(5.5)
    assert cluster.recovery.membership.workers["ew-0"].epoch > epoch


# ------------------------------------------------------------------ when a replacement starts


def test_a_replacement_waits_while_others_go_on() -> None:
    cluster = started(config_of(replacement_pause_s=0.5))
    for worker_id in ("ew-1", "aw-0"):
        cluster.kill(index_of(cluster, worker_id))
        assert not cluster.starts
        assert cluster.recovery.ready
        cluster.tick(0.4)
        assert not cluster.starts
        cluster.tick(0.2)
        assert cluster.starts
        cluster.settle()
    assert cluster.recovery.full_capacity


@pytest.mark.parametrize("worker_id", ["aw-0", "gateway"])
def test_a_worker_without_whom_nothing_goes_on_is_replaced_at_once(worker_id: str) -> None:
    cluster = started(config_of(attention=1, replacement_pause_s=0.5))
    cluster.kill(index_of(cluster, worker_id))
    assert cluster.starts


def test_a_worker_that_was_the_last_to_host_an_expert_is_replaced_at_once() -> None:
    cluster = started(config_of(room=4, replacement_pause_s=0.5))  # no room for shadows
    cluster.kill(index_of(cluster, "ew-0"))
    assert cluster.recovery.unreachable
    assert cluster.starts


def test_a_replacement_waits_while_others_load_what_was_lost() -> None:
    """Its own start would slow down just what the streams are waiting for."""
    cluster = started(config_of(expert=3, room=3, replacement_pause_s=0.5), layers=1, experts=6)
    cluster.kill(index_of(cluster, "ew-0"))
    assert cluster.recovery.unreachable
    assert not cluster.starts
    while cluster.recovery.unreachable:
        cluster.obey(0)
    cluster.tick(0.6)
    assert cluster.starts


# ------------------------------------------------------------------ crash loops


def test_a_crash_loop_is_slowed_down_and_then_given_up() -> None:
    config = config_of(crash_loop_restarts_max=3, restart_backoff_s=1.0, restart_backoff_s_max=8.0)
    cluster = started(config)
    cluster.tick(60.0)
    pauses_s = []
    for _ in range(5):
        cluster.kill(index_of(cluster, "ew-0"))
        begin_s = cluster.now_s
        while not cluster.starts and cluster.now_s < begin_s + 30:
            cluster.tick()
        pauses_s.append(cluster.now_s - begin_s)
        if not cluster.starts:
            break
        cluster.fork(0)
    # The first death came after a long life; then three early ones; the fourth early one is the last.
    assert pauses_s[:4] == [0.0, 0.0, 1.0, 2.0]
    assert pauses_s[4] >= 30
    recovery = cluster.recovery
    assert recovery.restarts.given_up("ew-0")
    assert recovery.residency.target.workers == ("ew-1",)
    assert not cluster.stops
    while any(p.inbox for p in cluster.live):
        cluster.obey(0)
    assert recovery.ready
    assert not recovery.full_capacity
    cluster.do(cluster.commands.restart("ew-0", cluster.now_s))
    cluster.settle()
    cluster.check_complete()
    assert recovery.residency.target.workers == ("ew-0", "ew-1")


def test_a_cluster_that_cannot_start_says_so_and_stops() -> None:
    cluster = Cluster(config_of(crash_loop_restarts_max=2, restart_backoff_s=0.0), ExpertShape(2, 4, 1))
    for _ in range(3):
        assert not cluster.stops
        order = next(s for s in cluster.starts if s.worker_id == "ew-0")
        cluster.starts.remove(order)
        exited = WorkerExited(
            worker_id="ew-0",
            epoch=order.epoch,
            pid=7,
            status="exit code 2",
            detail="ValueError: no such file",
        )
        cluster.do(cluster.recovery.agent_says(exited, cluster.now_s))
        cluster.tick()
    assert "ew-0 ended 3 times in a row: exit code 2 (ValueError: no such file)" in cluster.stops[0].reason


def test_deaths_that_a_person_asked_for_are_no_crash_loop() -> None:
    cluster = started(config_of(crash_loop_restarts_max=1))
    for _ in range(5):
        _, actions = cluster.commands.kill("ew-0", signal.SIGKILL)
        process = cluster.processes["ew-0"]
        cluster.do(actions)
        assert "ew-0" not in cluster.processes
        cluster.hang_up(process)
        cluster.settle()
    cluster.check_complete()


# ------------------------------------------------------------------ commands


def test_draining_an_expert_worker_moves_its_experts_before_it_stops() -> None:
    cluster = started(config_of(expert=3, shadow_replicas=0))
    cluster.do(cluster.commands.drain("ew-1", cluster.now_s))
    recovery = cluster.recovery
    while "ew-1" in cluster.processes:
        assert recovery.unreachable == 0
        cluster.obey(1)
        cluster.obey(0)
    cluster.settle()
    cluster.check_complete()
    assert sorted(recovery.membership.workers) == ["aw-0", "aw-1", "ew-0", "ew-2", "gateway", "store"]
    assert not cluster.starts
    kinds = [note.kind for note in cluster.notes if note.worker_id == "ew-1"]
    assert "dead" not in kinds[kinds.index("draining") :], "nobody is alarmed by what was asked for"


def test_a_planned_move_never_lowers_the_number_of_copies() -> None:
    cluster = started(config_of(expert=3, shadow_replicas=1))
    cluster.do(cluster.commands.drain("ew-1", cluster.now_s))
    cluster.do(cluster.commands.add("expert", cluster.now_s)[1])
    for step in range(200):
        copies = cluster.recovery.residency.table.candidates
        assert min(len(found) for row in copies for found in row) >= 2
        (cluster.obey, cluster.fork, cluster.obey)[step % 3](step)
    cluster.settle()
    cluster.check_complete()


def test_two_full_workers_exchange_experts_without_losing_any() -> None:
    cluster = started(config_of(expert=2, room=4, shadow_replicas=0))
    residency = cluster.recovery.residency
    swapped = tuple(tuple((1 - holder,) for (holder,) in row) for row in residency.target.holders)
    residency.aim(Placement(residency.target.workers, swapped))
    cluster.do(cluster.recovery.settle(cluster.now_s))
    for step in range(100):
        cluster.obey(step)
        assert cluster.recovery.unreachable == 0
    cluster.check_complete()


def test_draining_an_attention_worker_waits_for_the_gateways_word() -> None:
    cluster = started(config_of())
    cluster.do(cluster.commands.drain("aw-0", cluster.now_s))
    assert cluster.recovery.membership.workers["aw-0"].state == "draining"
    assert Drain(worker_id="aw-0") in cluster.processes["gateway"].inbox
    assert not any(isinstance(m, Stop) for m in cluster.processes["aw-0"].inbox)
    cluster.settle()
    assert "aw-0" not in cluster.recovery.membership.workers
    cluster.check_complete()


def test_a_drain_that_takes_too_long_is_ended() -> None:
    cluster = started(config_of(drain_timeout_s=5.0, shutdown_grace_s=1.0))
    cluster.do(cluster.commands.drain("aw-0", cluster.now_s))
    cluster.tick(6.0)
    assert isinstance(cluster.processes["aw-0"].inbox[-1], Stop)
    cluster.tick(2.0)  # it does not obey
    assert "aw-0" not in cluster.processes
    cluster.settle()
    texts = {note.kind: note.text for note in cluster.notes if note.worker_id == "aw-0"}
    assert texts["stop"] == "not drained in 5 s"
    assert "dead" in texts, "its work was cut off: that is told"


@pytest.mark.parametrize(
    ("worker_id", "words"),
    [
        ("ew-7", "no worker ew-7"),
        ("gateway", "only attention and expert workers"),
        ("aw-0", "the last healthy"),
    ],
)
def test_a_drain_that_makes_no_sense_is_refused(worker_id: str, words: str) -> None:
    cluster = started(config_of(attention=1))
    with pytest.raises(MembershipError, match=words):
        cluster.commands.drain(worker_id, cluster.now_s)
    cluster.check_complete()


def test_a_drain_that_the_survivors_have_no_memory_for_is_refused_and_changes_nothing() -> None:
    cluster = started(config_of(expert=2, room=6))
    with pytest.raises(PlacementError, match="8 experts of 1,000 bytes each do not fit on 1 expert worker"):
        cluster.commands.drain("ew-0", cluster.now_s)
    cluster.check_complete()


def test_an_added_worker_takes_its_share() -> None:
    cluster = started(config_of())
    worker_id, actions = cluster.commands.add("expert", cluster.now_s)
    assert worker_id == "ew-2"
    cluster.do(actions)
    cluster.settle()
    cluster.check_complete()
    primaries = [
        cluster.recovery.residency.target.holder_ids(layer, e)[0] for layer in (0, 1) for e in range(4)
    ]
    assert sorted(primaries.count(i) for i in ("ew-0", "ew-1", "ew-2")) == [2, 3, 3]
    assert cluster.commands.add("attention", cluster.now_s)[0] == "aw-2"


def test_the_number_of_workers_is_bounded() -> None:
    cluster = started(config_of(workers_per_role_max=2))
    with pytest.raises(MembershipError, match="no more are allowed"):
        cluster.commands.add("expert", cluster.now_s)


def test_an_attention_worker_without_room_for_checkpoints_is_not_added() -> None:
    cluster = started(config_of(attention=2, checkpoint_bytes_max=1 << 30))
    cluster.do(cluster.commands.add("attention", cluster.now_s)[1])
    with pytest.raises(MembershipError, match="checkpoint_bytes_max has no room"):
        cluster.commands.add("attention", cluster.now_s)
    cluster.do(cluster.commands.add("expert", cluster.now_s)[1])
    unbounded = started(config_of(attention=2))
    for _ in range(2):
        unbounded.do(unbounded.commands.add("attention", unbounded.now_s)[1])


def test_a_signal_changes_nothing_by_itself() -> None:
    cluster = started(config_of())
    worker, actions = cluster.commands.kill("ew-0", signal.SIGSTOP)
    assert worker.state == "healthy"
    sent = [a.message for a in actions if isinstance(a, ToAgent)]
    assert sent == [SignalWorker(worker_id="ew-0", epoch=worker.epoch, signal=signal.SIGSTOP)]


# ------------------------------------------------------------------ what is not believed


def test_messages_in_anothers_name_are_refused() -> None:
    cluster = started(config_of())
    ew_1 = cluster.processes["ew-1"]
    before = cluster.recovery.residency.table
    empty = Ready(worker_id="ew-1", epoch=ew_1.epoch, fingerprint="same", exact=True)
    cluster.say(cluster.processes["ew-0"], empty)
    assert cluster.recovery.residency.table is before
    assert cluster.recovery.membership.refused["message_of_another_worker"] == 1


def test_malformed_reports_and_odd_messages_are_counted_not_used() -> None:
    cluster = started(config_of())
    ew_0 = cluster.processes["ew-0"]
    cluster.say(ew_0, Report(worker_id="ew-0", epoch=ew_0.epoch, counters={}, expert_pairs=[[1]]))
    cluster.say(ew_0, Report(worker_id="ew-0", epoch=ew_0.epoch, counters={}, expert_pairs=[[-1] * 4] * 2))
    assert cluster.recovery.planner.usage.totals() is None
    cluster.say(ew_0, Stop())
    cluster.say(ew_0, Drain(worker_id="ew-1"))
    refused = cluster.recovery.membership.refused
    assert refused["malformed_report"] == 2
    assert refused["unexpected_message"] == 2


def covered(cluster: Cluster) -> list[list[bool]]:
    """Which experts the table in force has a shadow of, by layer."""
    return [[len(holders) > 1 for holders in row] for row in cluster.recovery.residency.table.candidates]


def test_shadows_follow_what_is_used() -> None:
    # Room for the four primaries of each worker and two shadows: half of the experts.
    cluster = started(config_of(expert_memory_bytes_max=6 * EXPERT_BYTES, shadow_review_s=1.0))
    assert covered(cluster) == [[True] * 4, [False] * 4]

    def use(*rows: list[int]) -> None:
        ew_0 = cluster.processes["ew-0"]
        report = Report(worker_id="ew-0", epoch=ew_0.epoch, counters={}, expert_pairs=[*rows])
        cluster.say(ew_0, report)
        for _ in range(int(1.5 / TICK_S)):
            cluster.tick()
        cluster.settle()

    use([50] * 4, [52] * 4)
    assert covered(cluster) == [[True] * 4, [False] * 4], "too little to move anything for"
    use([100, 100, 0, 0], [0, 0, 300, 900])
    assert covered(cluster) == [[True, True, False, False], [False, False, True, True]]
    assert [note.text for note in cluster.notes if note.kind == "placement"] == [
        "shadows follow what is used"
    ]
    assert cluster.recovery.full_capacity


def test_shadows_stay_where_all_have_one_or_nobody_looks() -> None:
    for settings_ in ({}, {"expert_memory_bytes_max": 6 * EXPERT_BYTES, "shadow_review_s": 0.0}):
        cluster = started(config_of(**settings_))
        before = covered(cluster)
        ew_0 = cluster.processes["ew-0"]
        rows = [[0] * 4, [900] * 4]
        cluster.say(ew_0, Report(worker_id="ew-0", epoch=ew_0.epoch, counters={}, expert_pairs=rows))
        for _ in range(200):
            cluster.tick()
        assert covered(cluster) == before


def test_a_gateway_that_reports_no_more_is_killed_and_replaced() -> None:
    cluster = started(config_of(gateway_silence_s=10.0))
    gateway = cluster.recovery.membership.workers["gateway"]
    epoch = gateway.epoch
    for _ in range(3):  # it reports now and then
        for _ in range(int(9.0 / TICK_S)):
            cluster.tick()
        cluster.report()
    cluster.tick(3600.0)  # the machine stood still
    assert [note for note in cluster.notes if note.kind == "hung"] == []
    cluster.report()
    orders: list[Action] = []
    for _ in range(int(10.5 / TICK_S)):
        cluster.now_s += TICK_S
        orders += [action for action in cluster.recovery.tick(cluster.now_s) if isinstance(action, ToAgent)]
    end = SignalWorker(worker_id="gateway", epoch=epoch, signal=signal.SIGKILL)
    assert orders == [ToAgent(end)]
    cluster.kill(index_of(cluster, "gateway"))
    cluster.settle()
    assert cluster.recovery.membership.workers["gateway"].epoch > epoch


def test_usage_adds_up_over_incarnations() -> None:
    cluster = started(config_of())

    def report(pairs: int) -> None:
        ew_0 = cluster.processes["ew-0"]
        rows = [[pairs] * 4] * 2
        cluster.say(ew_0, Report(worker_id="ew-0", epoch=ew_0.epoch, counters={}, expert_pairs=rows))

    report(5)
    report(7)
    cluster.kill(index_of(cluster, "ew-0"))
    cluster.settle()
    report(2)
    assert cluster.recovery.planner.usage.totals() == [[9.0] * 4] * 2


def test_versions_and_epochs_of_a_later_generation_are_newer() -> None:
    config, shape = config_of(), ExpertShape(2, 4, EXPERT_BYTES)
    first, second = Cluster(config, shape, generation=1), Cluster(config, shape, generation=2)
    first.settle()
    assert second.recovery.residency.table.version > first.recovery.residency.table.version
    assert min(s.epoch for s in second.starts) > max(p.epoch for p in first.live)


# ------------------------------------------------------------------ a restarted orchestrator


def restarted(cluster: Cluster, gone: tuple[str, ...] = ()) -> Cluster:
    """A second generation that finds the workers of the first, but for ``gone``."""
    second = Cluster.__new__(Cluster)
    vars(second).update(vars(cluster))
    config, shape = cluster.recovery.config, ExpertShape(2, 4, EXPERT_BYTES)
    second.recovery = Recovery(config, shape, generation=2)
    second.commands = Commands(second.recovery)
    second.processes = {i: p for i, p in cluster.processes.items() if i not in gone}
    adoption = Adoption(2)
    for process in cluster.live:
        adoption.hello(hello_of(process))
        if process.worker_id not in gone:
            adoption.agent_says(
                WorkerStarted(worker_id=process.worker_id, epoch=process.epoch, pid=process.pid)
            )
    second.do(second.recovery.begin(second.now_s, adoption.result()))
    return second


def test_a_restarted_orchestrator_takes_over_what_runs() -> None:
    first = started(config_of(expert=3))
    epochs = {p.worker_id: p.epoch for p in first.live}
    before = first.recovery.residency.table
    second = restarted(first)
    assert not second.starts
    for process in second.live:
        welcome = next(m for m in process.inbox if isinstance(m, Welcome))
        assert welcome.table.version > before.version
        assert welcome.table.workers == before.workers
        assert welcome.table.candidates == before.candidates
    for process in second.live:
        process.booted = False
    second.settle()
    second.check_complete()
    assert {p.worker_id: p.epoch for p in second.live} == epochs


def test_a_restarted_orchestrator_takes_no_serving_attention_worker_from_the_gateway() -> None:
    first = started(config_of(attention=3))
    first.processes["aw-2"].booted = False  # this one has not been ready yet: the gateway does not know it
    second = restarted(first)
    gateway = second.processes["gateway"]
    for worker_id in ("aw-1", "aw-0", "aw-2"):
        process = second.processes[worker_id]
        second.say(process, ready_of(process, 0))
    told = [m.peers for m in gateway.inbox if isinstance(m, (Welcome, Peers)) and m.peers]
    assert [[p.worker_id for p in peers] for peers in told[-2:]] == [
        ["aw-0", "aw-1"],
        ["aw-0", "aw-1", "aw-2"],
    ]


def test_a_restarted_orchestrator_replaces_what_is_gone() -> None:
    first = started(config_of(expert=2))
    second = restarted(first, gone=("ew-0", "gateway"))
    assert sorted(s.worker_id for s in second.starts) == ["ew-0", "gateway"]
    assert second.recovery.unreachable == 0
    for process in second.live:
        process.booted = False
    second.settle()
    second.check_complete()


def test_a_restarted_orchestrator_drops_nothing_that_old_tables_may_name() -> None:
    first = started(config_of(attention=1, expert=2))
    first.do(first.commands.add("expert", first.now_s)[1])
    first.settle()  # experts have moved to ew-2, which the configuration does not know
    second = restarted(first)
    for worker_id in ("ew-0", "ew-1", "ew-2"):
        welcome = second.processes[worker_id].inbox[0]
        assert isinstance(welcome, Welcome)
        assert set(welcome.assigned) >= second.processes[worker_id].resident
    for process in second.live:
        process.booted = False
    second.settle()
    second.check_complete()


def test_only_vouched_former_incarnations_are_adopted() -> None:
    adoption = Adoption(generation=2)
    old, new = 1 << 20 | 1, 2 << 20 | 1

    def hello(worker_id: str, epoch: int) -> None:
        adoption.hello(hello_of(Process(worker_id, "expert", epoch, 1)))

    for worker_id, epoch in (("ew-0", old), ("ew-1", old), ("ew-2", new), ("ew-3", old), ("ew-4", old + 1)):
        hello(worker_id, epoch)
    hello("ew-4", old)
    for worker_id, epoch in (("ew-0", old), ("ew-2", new), ("ew-3", old), ("ew-4", old + 1), ("ew-5", old)):
        adoption.agent_says(WorkerStarted(worker_id=worker_id, epoch=epoch, pid=1))
    adoption.agent_says(WorkerExited(worker_id="ew-3", epoch=old, pid=1, status="exit code 0"))
    assert [(h.worker_id, h.epoch) for h in adoption.result()] == [("ew-0", old), ("ew-4", old + 1)]


def test_experts_that_the_model_does_not_have_are_ignored() -> None:
    cluster = started(config_of())
    ew_0 = cluster.processes["ew-0"]
    before = cluster.recovery.residency.table
    odd = {ExpertId(-1, 0), ExpertId(0, 99), ExpertId(99, 0)}
    report = Ready(
        worker_id="ew-0",
        epoch=ew_0.epoch,
        fingerprint="same",
        exact=True,
        resident=sorted(odd | ew_0.resident),
    )
    cluster.say(ew_0, report)
    assert cluster.recovery.residency.table is before
    cluster.kill(index_of(cluster, "ew-1"))
    cluster.settle()
    cluster.check_complete()


# ------------------------------------------------------------------ the checkpoint store


def protection(cluster: Cluster) -> str:
    return unprotected_reason(cluster.recovery)


def report_bucket(cluster: Cluster, worker_id: str, value: float) -> None:
    process = cluster.processes[worker_id]
    report = Report(worker_id=worker_id, epoch=process.epoch, counters={"bucket": value})
    cluster.say(process, report)


def test_a_cluster_is_protected_while_the_store_and_every_bucket_are_there() -> None:
    cluster = started(config_of())
    assert protection(cluster) == "without checkpoints: aw-0, aw-1"
    report_bucket(cluster, "aw-0", 1.0)
    report_bucket(cluster, "aw-1", 0.0)
    assert protection(cluster) == "without checkpoints: aw-1"
    report_bucket(cluster, "aw-1", 1.0)
    assert protection(cluster) == ""
    cluster.kill(index_of(cluster, "aw-1"))
    assert protection(cluster) == "", "who is dead holds no request"
    cluster.settle()
    assert "aw-1" in protection(cluster), "a new incarnation has not reported yet"


def test_the_store_is_replaced_at_once_and_hears_of_the_attention_workers() -> None:
    cluster = started(config_of())
    for worker_id in ("aw-0", "aw-1"):
        report_bucket(cluster, worker_id, 1.0)
    others = {p.worker_id: p.epoch for p in cluster.live if p.worker_id != "store"}
    cluster.kill(index_of(cluster, "store"))
    assert [s.worker_id for s in cluster.starts] == ["store"]
    assert protection(cluster).startswith("no checkpoint store runs")
    assert cluster.recovery.ready
    cluster.fork(0)
    store = cluster.processes["store"]
    welcome = store.inbox[0]
    assert isinstance(welcome, Welcome)
    assert sorted(p.worker_id for p in welcome.peers) == ["aw-0", "aw-1"]
    cluster.say(store, ready_of(store, 0))
    assert protection(cluster) == ""
    assert {p.worker_id: p.epoch for p in cluster.live if p.worker_id != "store"} == others


def test_the_store_hears_of_deaths_among_attention_workers() -> None:
    cluster = started(config_of())
    store = cluster.processes["store"]
    cluster.kill(index_of(cluster, "aw-0"))
    named = [m.peers for m in store.inbox if isinstance(m, Peers)]
    assert [p.worker_id for p in named[-1]] == ["aw-1"]
