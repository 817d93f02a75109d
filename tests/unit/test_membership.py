"""Membership: who is a member, in which incarnation and state."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarragon.messages import Hello, Ready
from tarragon.orchestrator.membership import (
    Membership,
    MembershipError,
    Transition,
    UnknownWorkerError,
    Worker,
)

JUDGES = {("aw-0", 1), ("aw-1", 2)}


def hello(worker_id: str, epoch: int, role: str = "expert") -> Hello:
    return Hello(worker_id=worker_id, role=role, epoch=epoch, pid=epoch, address=f"\0{worker_id}")  # type: ignore[arg-type]


def ready(worker_id: str, epoch: int) -> Ready:
    return Ready(worker_id=worker_id, epoch=epoch, fingerprint="f", exact=True)


def running(*worker_ids: str) -> Membership:
    """All of them healthy."""
    membership = Membership(1)
    for worker_id in worker_ids:
        worker = membership.start(worker_id, "expert", 0.0)
        assert membership.hello(hello(worker_id, worker.epoch), 1.0) == ""
        moved = membership.ready(ready(worker_id, worker.epoch), 2.0)
        assert moved is not None
        assert (moved.before, moved.after) == ("starting", "healthy")
    return membership


EVENTS: dict[str, Callable[[Membership, str, int], object]] = {
    "started": lambda m, i, e: m.started(i, e, 77),
    "hello": lambda m, i, e: m.hello(hello(i, e), 5.0),
    "ready": lambda m, i, e: m.ready(ready(i, e), 5.0),
    "heard": lambda m, i, e: m.heard(i, e, 5.0),
    "suspected": lambda m, i, e: m.suspected(i, e, ("aw-0", 1), "silence", JUDGES),
    "condemned": lambda m, i, e: m.suspected(i, e, ("aw-0", 1), "silence", {("aw-0", 1)}),
    "probe missed": lambda m, i, e: m.probe_missed(i, e),
    "too late": lambda m, i, e: m.too_late(i, e, "not ready"),
    "connection lost": lambda m, i, e: m.connection_lost(i, e, "connection lost"),
    "exited": lambda m, i, e: m.exited(i, e, "killed by SIGKILL"),
}
COMMANDS: dict[str, Callable[[Membership, str], object]] = {
    "drain": lambda m, i: m.drain(i),
    "retire": lambda m, i: m.retire(i, "asked"),
    "running": lambda m, i: m.running(i),
}
LEGAL = {
    ("starting", "healthy"),
    ("starting", "dead"),
    ("healthy", "suspect"),
    ("healthy", "dead"),
    ("healthy", "draining"),
    ("suspect", "healthy"),
    ("suspect", "dead"),
    ("draining", "dead"),
}
steps = st.lists(
    st.tuples(
        st.sampled_from([*EVENTS, *COMMANDS, "start"]),
        st.sampled_from(["ew-0", "ew-1", "ew-2"]),
        st.integers(-1, 1),
    ),
    max_size=40,
)


def snapshot(membership: Membership) -> dict[str, Worker]:
    return copy.deepcopy(membership.workers)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(steps)
def test_no_epoch_but_the_current_one_ever_changes_anything(steps: list[tuple[str, str, int]]) -> None:
    membership = running("ew-0", "ew-1")
    for name, worker_id, offset in steps:
        worker = membership.workers.get(worker_id)
        before = snapshot(membership)
        if name == "start":
            if worker is None or worker.state == "dead":
                epoch = membership.start(worker_id, "expert", 3.0).epoch
                assert all(epoch > old.epoch for old in before.values())
        elif name in COMMANDS:
            try:
                outcome = COMMANDS[name](membership, worker_id)
            except MembershipError:
                assert snapshot(membership) == before
            else:
                check(outcome, before, membership)
        else:
            epoch = (worker.epoch if worker else 0) + offset
            outcome = EVENTS[name](membership, worker_id, epoch)
            check(outcome, before, membership)
            if worker is None or offset != 0:
                assert snapshot(membership) == before
                assert not isinstance(outcome, Transition)


def check(outcome: object, before: dict[str, Worker], membership: Membership) -> None:
    """Only the transition that is announced took place, and it is a legal one."""
    changed = {
        i: (before[i].state, w.state) for i, w in membership.workers.items() if before[i].state != w.state
    }
    if isinstance(outcome, Transition):
        assert changed == {outcome.worker_id: (outcome.before, outcome.after)}
        assert (outcome.before, outcome.after) in LEGAL
    else:
        assert changed == {}


def test_epochs_carry_the_generation_and_count_up() -> None:
    membership = Membership(3)
    epochs = [membership.start(f"ew-{i}", "expert", 0.0).epoch for i in range(3)]
    assert epochs == [3 << 20 | 1, 3 << 20 | 2, 3 << 20 | 3]


@pytest.mark.parametrize(
    ("offset", "reason"), [(-1, "stale_epoch"), (1, "epoch_never_given")], ids=["older", "newer"]
)
def test_other_epochs_are_counted_by_reason(offset: int, reason: str) -> None:
    membership = running("ew-0")
    epoch = membership.workers["ew-0"].epoch
    assert membership.ready(ready("ew-0", epoch + offset), 9.0) is None
    assert membership.heard("ew-9", 1, 9.0) is None
    assert membership.refused == {reason: 1, "unknown_worker": 1}


def test_a_returning_incarnation_is_told_that_it_was_replaced() -> None:
    membership = running("ew-0")
    old = membership.workers["ew-0"].epoch
    membership.connection_lost("ew-0", old, "connection lost")
    assert "has been replaced" in membership.hello(hello("ew-0", old), 3.0)
    new = membership.start("ew-0", "expert", 3.0).epoch
    assert "has been replaced" in membership.hello(hello("ew-0", old), 4.0)
    assert membership.hello(hello("ew-0", new), 5.0) == ""
    assert membership.refused["stale_epoch"] == 1


def test_a_second_connection_or_another_role_is_refused() -> None:
    membership = running("ew-0")
    epoch = membership.workers["ew-0"].epoch
    assert membership.hello(hello("ew-0", epoch), 3.0)
    other = membership.start("ew-1", "expert", 0.0)
    assert membership.hello(hello("ew-1", other.epoch, role="attention"), 3.0)
    assert membership.hello(hello("ew-9", 1), 3.0) == "no worker ew-9 belongs to this cluster"
    assert membership.refused["bad_hello"] == 2


def test_ready_before_hello_counts_for_nothing() -> None:
    membership = Membership(1)
    worker = membership.start("ew-0", "expert", 0.0)
    assert membership.ready(ready("ew-0", worker.epoch), 1.0) is None
    assert worker.state == "starting"


def test_suspicion_is_cleared_by_any_message_and_confirmed_by_silence() -> None:
    membership = running("ew-0")
    epoch = membership.workers["ew-0"].epoch

    def suspect() -> Transition | None:
        return membership.suspected("ew-0", epoch, ("aw-0", 1), "silence", JUDGES)

    first = suspect()
    assert first is not None
    assert first.after == "suspect"
    assert suspect() is None
    assert membership.probe_missed("ew-0", epoch) is None
    assert membership.probe_missed("ew-0", epoch) is None
    cleared = membership.heard("ew-0", epoch, 4.0)
    assert cleared is not None
    assert cleared.after == "healthy"
    assert membership.probe_missed("ew-0", epoch) is None
    suspect()
    outcomes = [membership.probe_missed("ew-0", epoch) for _ in range(3)]
    assert [o.after if o else None for o in outcomes] == [None, None, "dead"]


def test_the_suspicions_of_all_judges_are_a_verdict_even_if_they_come_apart() -> None:
    membership = running("ew-0")
    epoch = membership.workers["ew-0"].epoch
    membership.suspected("ew-0", epoch, ("aw-0", 1), "no progress", JUDGES)
    membership.heard("ew-0", epoch, 4.0)
    verdict = membership.suspected("ew-0", epoch, ("aw-1", 2), "no progress", JUDGES)
    assert verdict is not None
    assert verdict.after == "dead"
    assert verdict.cause == "suspected by aw-0, aw-1: no progress"


def test_a_suspicion_of_a_dead_judge_weighs_nothing() -> None:
    membership = running("ew-0")
    epoch = membership.workers["ew-0"].epoch
    membership.suspected("ew-0", epoch, ("aw-0", 1), "silence", JUDGES)
    verdict = membership.suspected("ew-0", epoch, ("aw-1", 2), "silence", {("aw-0", 9), ("aw-1", 2)})
    assert verdict is None
    assert membership.workers["ew-0"].state == "suspect"


def test_the_agents_words_replace_a_lost_connection() -> None:
    membership = running("ew-0")
    worker = membership.workers["ew-0"]
    membership.connection_lost("ew-0", worker.epoch, "connection lost")
    assert membership.exited("ew-0", worker.epoch, "killed by SIGSEGV") is None
    assert worker.cause == "killed by SIGSEGV"
    membership.start("ew-0", "expert", 5.0)
    assert membership.exited("ew-0", worker.epoch, "again") is None
    assert membership.workers["ew-0"].state == "starting"
    assert not membership.refused


def test_drain_needs_another_healthy_worker_of_the_role() -> None:
    membership = running("ew-0", "ew-1")
    assert membership.drain("ew-0").after == "draining"
    with pytest.raises(MembershipError, match="ew-1 is the last healthy expert worker"):
        membership.drain("ew-1")
    with pytest.raises(MembershipError, match="ew-0 is draining"):
        membership.drain("ew-0")
    with pytest.raises(UnknownWorkerError, match="there is no worker ew-7"):
        membership.drain("ew-7")


def test_kill_names_the_incarnation_and_changes_no_state() -> None:
    membership = running("ew-0")
    worker = membership.running("ew-0")
    assert worker.state == "healthy"
    membership.connection_lost("ew-0", worker.epoch, "connection lost")
    with pytest.raises(MembershipError, match="no running process"):
        membership.running("ew-0")
    with pytest.raises(MembershipError, match="is dead already"):
        membership.retire("ew-0", "asked")
