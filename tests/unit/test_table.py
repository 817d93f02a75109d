"""The expert routing table: which live workers can compute an expert, best first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarragon.messages import ExpertId, Peer, ProtocolError, Table
from tarragon.routing.placement import Placement
from tarragon.routing.table import (
    Located,
    build_table,
    candidate_array,
    empty_table,
    listed,
    owner_array,
    same_routes,
    unreachable,
    with_shadow,
)


def peer(worker_id: str, epoch: int = 1) -> Peer:
    return Peer(worker_id=worker_id, role="expert", epoch=epoch, address=f"\0{worker_id}.{epoch}")


PLACEMENT = Placement(("a", "b", "c"), (((0, 1), (1, 0), (2, 1)),))


def holding(worker_id: str, *experts: int) -> Located:
    return Located(peer(worker_id), {ExpertId(0, e) for e in experts})


def test_candidates_are_the_primary_then_the_shadows() -> None:
    table = build_table(7, PLACEMENT, [holding("a", 0, 1), holding("b", 0, 1, 2), holding("c", 2)])
    assert table.version == 7
    assert table.candidates == [[[0, 1], [1, 0], [2, 1]]]
    assert unreachable(table) == []
    assert with_shadow(table) == 3


def test_a_dead_primary_promotes_the_shadow_at_once() -> None:
    table = build_table(1, PLACEMENT, [holding("b", 0, 1, 2), holding("c", 2)])
    assert table.candidates == [[[0], [0], [1, 0]]]
    assert with_shadow(table) == 1


def test_a_worker_that_lists_nothing_yet_is_still_one_to_connect_to() -> None:
    table = build_table(1, PLACEMENT, [holding("a"), holding("b", 0, 1, 2)])
    assert [w.worker_id for w in table.workers] == ["a", "b"]
    assert table.candidates == [[[1], [1], [1]]]


def test_an_unwanted_copy_serves_only_while_a_wanted_one_is_missing() -> None:
    c_helps = holding("c", 0, 2)
    missing = build_table(1, PLACEMENT, [holding("a", 1), holding("b", 0, 1, 2), c_helps])
    assert missing.candidates[0][0] == [1, 2]
    complete = build_table(2, PLACEMENT, [holding("a", 0, 1), holding("b", 0, 1, 2), c_helps])
    assert complete.candidates[0][0] == [0, 1]
    assert listed(complete)["c"] == {ExpertId(0, 2)}


def test_an_expert_without_a_live_host_is_unreachable() -> None:
    table = build_table(1, PLACEMENT, [holding("a", 0, 1)])
    assert unreachable(table) == [ExpertId(0, 2)]
    assert unreachable(empty_table(0, 2, 3)) == [ExpertId(layer, e) for layer in (0, 1) for e in range(3)]


def test_same_routes_ignores_the_version_but_not_the_epoch() -> None:
    a = build_table(1, PLACEMENT, [holding("a", 0, 1)])
    assert same_routes(a, build_table(2, PLACEMENT, [holding("a", 0, 1)]))
    assert not same_routes(a, build_table(2, PLACEMENT, [holding("a", 0)]))
    assert not same_routes(
        a, build_table(2, PLACEMENT, [Located(peer("a", 2), {ExpertId(0, 0), ExpertId(0, 1)})])
    )


tables = st.integers(1, 5).flatmap(
    lambda workers: st.tuples(
        st.lists(
            st.lists(st.permutations(range(workers)), min_size=3, max_size=3).map(
                lambda rows: [row[: i % (workers + 1)] for i, row in enumerate(rows)]
            ),
            min_size=1,
            max_size=4,
        ),
        st.lists(st.booleans(), min_size=workers, max_size=workers),
    )
)


@settings(deadline=None, derandomize=True)
@given(tables)
def test_owner_array_is_the_first_live_candidate(case: tuple[list[list[list[int]]], list[bool]]) -> None:
    candidates, alive = case
    table = Table(version=1, workers=[peer(f"w{i}") for i in range(len(alive))], candidates=candidates)
    owner = owner_array(table, alive)
    assert owner.dtype == np.int32
    assert owner.shape == (len(candidates), 3)
    for layer, row in enumerate(candidates):
        for expert, workers in enumerate(row):
            assert owner[layer, expert] == next((w for w in workers if alive[w]), -1)
    kept = candidate_array(table)
    assert np.array_equal(owner_array(table, np.array(alive), kept), owner)


def test_owner_array_of_an_empty_table_names_nobody() -> None:
    assert np.array_equal(owner_array(empty_table(0, 2, 3), []), np.full((2, 3), -1))


@pytest.mark.parametrize("candidates", [[[[0], [1]], [[0]]], [[[2]]], [[[-1]]]])
def test_a_malformed_table_is_refused(candidates: list[list[list[int]]]) -> None:
    table = Table(version=3, workers=[peer("a"), peer("b")], candidates=candidates)
    with pytest.raises(ProtocolError, match="version 3"):
        owner_array(table, [True, True])
