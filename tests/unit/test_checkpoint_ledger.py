"""Who gets a bucket, who waits, and when one goes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarragon.checkpoint import ledger as ledger_module
from tarragon.checkpoint.ledger import Fenced, Granted, Ledger, Waits

LINGER_S, LINGER_MIN_S = 30.0, 5.0


def make(bytes_max: int = 0) -> Ledger:
    return Ledger(bytes_max=bytes_max, linger_s=LINGER_S, linger_min_s=LINGER_MIN_S)


def test_an_incarnation_gets_one_bucket_and_the_same_one_when_it_asks_again() -> None:
    ledger = make()
    assert ledger.open("aw-0", 5, 1000) == Granted(is_new=True)
    assert ledger.open("aw-0", 5, 1000) == Granted(is_new=False)
    assert ledger.open("aw-0", 6, 1000) == Granted(is_new=True)
    assert set(ledger.entries) == {("aw-0", 5), ("aw-0", 6)}
    assert ledger.reserved_bytes == 2000


def test_an_older_incarnation_and_another_size_are_refused_and_counted() -> None:
    ledger = make()
    ledger.open("aw-0", 6, 1000)
    assert isinstance(ledger.open("aw-0", 5, 1000), Fenced)
    assert isinstance(ledger.open("aw-0", 6, 1001), Fenced)
    assert ledger.refused == {"stale_epoch": 1, "changed_size": 1}
    assert list(ledger.entries) == [("aw-0", 6)]


def test_an_incarnation_that_has_a_bucket_is_fenced_once_a_later_one_is_known() -> None:
    ledger = make()
    ledger.open("aw-0", 5, 1000)
    ledger.living([("aw-0", 6)], 0.0)
    assert isinstance(ledger.open("aw-0", 5, 1000), Fenced)
    returned = make()
    returned.returned("aw-0", 6, 1000)
    assert isinstance(returned.open("aw-0", 5, 1000), Fenced)


def test_who_finds_no_room_waits_and_the_reason_names_the_setting() -> None:
    ledger = make(bytes_max=2500)
    ledger.open("aw-0", 1, 1000)
    ledger.open("aw-1", 2, 1000)
    answer = ledger.open("aw-2", 3, 1000)
    assert isinstance(answer, Waits)
    assert "checkpoint_bytes_max (2500)" in answer.reason
    assert "500 are free" in answer.reason
    assert ledger.next_waiting() is None
    ledger.living([("aw-1", 2), ("aw-2", 3)], 0.0)
    assert ledger.due(LINGER_S) == [("aw-0", 1)]
    assert ledger.next_waiting() == (("aw-2", 3), 1000)
    assert ledger.open("aw-2", 3, 1000) == Granted(is_new=True)
    assert ledger.next_waiting() is None
    assert ledger.reserved_bytes == 2000
    assert ledger.refused == {"no_room": 1}


def test_who_waits_is_forgotten_with_its_connection_or_its_successor() -> None:
    ledger = make(bytes_max=10)
    ledger.open("aw-0", 1, 11)
    ledger.left("aw-0", 1)
    assert not ledger.waiting
    ledger.open("aw-0", 1, 11)
    ledger.open("aw-0", 2, 11)
    assert list(ledger.waiting) == [("aw-0", 2)]


def test_a_bucket_lingers_after_its_incarnation_is_missing_and_never_without_news() -> None:
    ledger = make()
    ledger.open("aw-0", 1, 1000)
    ledger.open("aw-1", 2, 1000)
    assert ledger.next_due_s() is None
    ledger.living([("aw-1", 2)], 100.0)
    ledger.living([("aw-1", 2)], 120.0)  # once more: the time runs from the first
    assert ledger.next_due_s() == 130.0
    assert ledger.dead == 1
    assert ledger.due(129.9) == []
    assert ledger.due(130.0) == [("aw-0", 1)]
    assert ledger.due(1e9) == []
    assert list(ledger.entries) == [("aw-1", 2)]


def test_who_waits_for_room_shortens_the_time_of_the_dead() -> None:
    ledger = make(2000)
    ledger.open("aw-0", 1, 1000)
    ledger.open("aw-1", 2, 1000)
    ledger.living([("aw-1", 2)], 100.0)
    assert isinstance(ledger.open("aw-0", 3, 1000), Waits)
    assert ledger.next_due_s() == 105.0
    assert ledger.due(104.9) == []
    assert ledger.due(105.0) == [("aw-0", 1)]
    assert ledger.next_waiting() == (("aw-0", 3), 1000)


def test_buckets_stay_while_nobody_lives_who_could_restore_from_them() -> None:
    ledger = make()
    ledger.open("aw-0", 1, 1000)
    ledger.living([], 100.0)
    assert ledger.next_due_s() is None
    assert ledger.due(1e9) == []
    ledger.living([("aw-0", 2)], 500.0)
    assert ledger.next_due_s() == 530.0
    assert ledger.due(529.0) == []
    assert ledger.due(530.0) == [("aw-0", 1)]


def test_an_incarnation_that_is_named_again_keeps_its_bucket() -> None:
    ledger = make()
    ledger.returned("aw-0", 1, 1000)
    ledger.living([], 0.0)  # a restarted orchestrator that has not yet heard of anybody
    ledger.living([("aw-0", 1)], 10.0)
    assert ledger.due(1e9) == []


def test_the_number_of_buckets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "BUCKETS_MAX", 2)
    ledger = make()
    ledger.open("aw-0", 1, 1)
    ledger.open("aw-1", 2, 1)
    assert isinstance(ledger.open("aw-2", 3, 1), Waits)


@settings(deadline=None)
@given(
    bytes_max=st.integers(1, 50),
    moves=st.lists(
        st.tuples(st.sampled_from(["open", "living", "time", "left"]), st.integers(0, 3), st.integers(1, 20))
    ),
)
def test_whatever_happens_the_budget_holds_and_the_living_keep_theirs(
    bytes_max: int, moves: list[tuple[str, int, int]]
) -> None:
    ledger, now_s = make(bytes_max), 0.0
    live: dict[str, int] = {}
    for number, (kind, index, size) in enumerate(moves, 1):
        worker_id = f"aw-{index}"
        if kind == "open":
            live[worker_id] = number
            ledger.open(worker_id, number, size)
        elif kind == "living":
            ledger.living(live.items(), now_s)
        elif kind == "left":
            ledger.left(worker_id, live.get(worker_id, 0))
        else:
            now_s += size
            gone = ledger.due(now_s)
            assert not set(gone) & set(live.items())
        while (found := ledger.next_waiting()) is not None:
            (waiting_id, epoch), total_bytes = found
            if not isinstance(ledger.open(waiting_id, epoch, total_bytes), Granted):
                ledger.left(waiting_id, epoch)
        assert ledger.reserved_bytes <= bytes_max
