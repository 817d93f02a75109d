"""Placement: who shall hold which expert."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarragon.messages import ExpertId
from tarragon.routing.placement import Placement, PlacementError, WorkerBudget, place
from tarragon.routing.quotas import layer_quotas

EXPERT_BYTES = 1_000
seeded = settings(deadline=None, derandomize=True)


def workers(*budgets: int) -> list[WorkerBudget]:
    """ew-0, ew-1, ... with budgets counted in experts; 0 is no limit."""
    return [WorkerBudget(f"ew-{w}", budget * EXPERT_BYTES) for w, budget in enumerate(budgets)]


def primary_counts(placement: Placement) -> list[list[int]]:
    """Primaries per [layer][worker]."""
    return [
        [sum(holders[0] == w for holders in row) for w in range(len(placement.workers))]
        for row in placement.holders
    ]


def bytes_held(placement: Placement) -> list[int]:
    return [len(placement.assigned(worker_id)) * EXPERT_BYTES for worker_id in placement.workers]


def primaries_of(placement: Placement) -> dict[ExpertId, str]:
    return {
        ExpertId(layer, expert): placement.holder_ids(layer, expert)[0]
        for layer, row in enumerate(placement.holders)
        for expert in range(len(row))
    }


def moved(before: Placement, after: Placement) -> dict[ExpertId, tuple[str, str]]:
    old, new = primaries_of(before), primaries_of(after)
    return {expert: (old[expert], new[expert]) for expert in old if old[expert] != new[expert]}


def random_usage(layers: int, experts: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[int(1_000 * draw.paretovariate(1.2)) for _ in range(experts)] for _ in range(layers)]


shapes = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 6), st.integers(0, 3))


@seeded
@given(shape=shapes, seed=st.one_of(st.none(), st.integers(0, 99)))
def test_primaries_are_balanced_and_shadows_live_elsewhere(
    shape: tuple[int, int, int, int], seed: int | None
) -> None:
    layers, experts, count, replicas = shape
    usage = None if seed is None else random_usage(layers, experts, seed)
    placement = place(
        layers=layers,
        experts=experts,
        workers=workers(*[0] * count),
        expert_bytes=EXPERT_BYTES,
        replicas=replicas,
        usage=usage,
    )
    counts = primary_counts(placement)
    for row in counts:
        assert max(row) - min(row) <= 1
    totals = [sum(row[w] for row in counts) for w in range(count)]
    assert max(totals) - min(totals) <= 1
    for row in placement.holders:
        for holders in row:
            assert len(set(holders)) == len(holders) == 1 + min(replicas, count - 1)


@seeded
@given(
    layers=st.integers(1, 4),
    experts=st.integers(1, 8),
    budgets=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    replicas=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_budgets_are_held_or_the_error_says_what_would_fit(
    layers: int, experts: int, budgets: list[int], replicas: int, seed: int
) -> None:
    total = layers * experts

    def attempt(pool: list[WorkerBudget]) -> Placement:
        return place(
            layers=layers,
            experts=experts,
            workers=pool,
            expert_bytes=EXPERT_BYTES,
            replicas=replicas,
            usage=random_usage(layers, experts, seed),
        )

    if sum(budgets) < total:
        with pytest.raises(PlacementError) as caught:
            attempt(workers(*budgets))
        enough = math.ceil(total / len(budgets))
        assert f"{enough * EXPERT_BYTES:,} bytes" in str(caught.value)
        assert f"{math.ceil(total / min(budgets))} workers" in str(caught.value)
        attempt(workers(*[enough] * len(budgets)))
        attempt(workers(*[min(budgets)] * math.ceil(total / min(budgets))))
        return
    placement = attempt(workers(*budgets))
    for held, budget in zip(bytes_held(placement), budgets, strict=True):
        assert held <= budget * EXPERT_BYTES
    for row in placement.holders:
        for holders in row:
            assert len(set(holders)) == len(holders) >= 1


@settings(seeded, max_examples=400)
@given(
    layers=st.integers(1, 4),
    experts=st.integers(1, 8),
    spare=st.lists(st.integers(0, 6), min_size=2, max_size=5),
    seed=st.integers(0, 99),
    again=st.booleans(),
)
def test_scarce_memory_covers_the_most_used_experts_first(
    layers: int, experts: int, spare: list[int], seed: int, again: bool
) -> None:
    rooms = [math.ceil(layers * experts / len(spare)) + more for more in spare]

    def attempt(seed: int, current: Placement | None) -> Placement:
        return place(
            layers=layers,
            experts=experts,
            workers=workers(*rooms),
            expert_bytes=EXPERT_BYTES,
            replicas=1,
            usage=random_usage(layers, experts, seed),
            current=current,
            load_ratio_max=2.0,
        )

    placement = attempt(seed, attempt(seed + 1, None) if again else None)
    usage = random_usage(layers, experts, seed)
    held = bytes_held(placement)
    free = {w for w, room in enumerate(rooms) if held[w] < room * EXPERT_BYTES}
    every = [
        (usage[layer][expert], placement.holders[layer][expert])
        for layer in range(layers)
        for expert in range(experts)
    ]
    for used, (primary, *shadow) in every:
        if shadow:
            continue
        # It has none: room is left, if at all, only beside its own primary, and no exchange would help ...
        assert free <= {primary}
        for other_used, (other_primary, *other_shadow) in every:
            if other_shadow and other_shadow[0] != primary:
                assert other_used >= used  # ... nor does a less used one sit in a place that it could take
                assert not free or other_primary == primary


def test_usage_is_evened_out_within_a_layer() -> None:
    usage = [[900, 800, 100, 90, 80, 70, 60, 50]]
    by_count = place(layers=1, experts=8, workers=workers(0, 0), expert_bytes=1, replicas=0)
    by_usage = place(layers=1, experts=8, workers=workers(0, 0), expert_bytes=1, replicas=0, usage=usage)

    def peak(placement: Placement) -> int:
        return max(
            sum(used for used, holders in zip(usage[0], placement.holders[0], strict=True) if holders[0] == w)
            for w in (0, 1)
        )

    assert peak(by_usage) < peak(by_count)
    assert peak(by_usage) <= 1.05 * sum(usage[0]) / 2
    assert primary_counts(by_usage) == [[4, 4]]


@seeded
@given(shape=shapes, seed=st.one_of(st.none(), st.integers(0, 99)))
def test_placing_again_moves_nothing_and_is_deterministic(
    shape: tuple[int, int, int, int], seed: int | None
) -> None:
    layers, experts, count, replicas = shape
    usage = None if seed is None else random_usage(layers, experts, seed)

    def again(current: Placement | None) -> Placement:
        return place(
            layers=layers,
            experts=experts,
            workers=workers(*[0] * count),
            expert_bytes=EXPERT_BYTES,
            replicas=replicas,
            usage=usage,
            current=current,
            load_ratio_max=1.1,
        )

    first = again(None)
    assert again(None) == first
    second = again(first)
    assert not moved(first, second)
    assert [set(second.assigned(w)) for w in second.workers] == [
        set(first.assigned(w)) for w in first.workers
    ]


def place_evenly(
    layers: int, experts: int, members: list[WorkerBudget], current: Placement | None
) -> Placement:
    return place(
        layers=layers,
        experts=experts,
        workers=members,
        expert_bytes=EXPERT_BYTES,
        replicas=1,
        current=current,
    )


@seeded
@given(layers=st.integers(1, 5), each=st.integers(1, 4), count=st.integers(2, 6), gone=st.integers(0, 5))
def test_when_a_worker_leaves_only_its_experts_move_and_to_their_shadows(
    layers: int, each: int, count: int, gone: int
) -> None:
    pool, leaver = workers(*[0] * count), f"ew-{gone % count}"
    rest = [worker for worker in pool if worker.worker_id != leaver]
    experts = each * len(rest)
    before = place_evenly(layers, experts, pool, None)
    after = place_evenly(layers, experts, rest, before)
    changes = moved(before, after)
    assert {source for source, _ in changes.values()} <= {leaver}
    if count == 2:  # the only survivor had every shadow
        assert all(before.holder_ids(e.layer, e.expert)[1] == target for e, (_, target) in changes.items())


@seeded
@given(layers=st.integers(1, 5), each=st.integers(1, 4), count=st.integers(1, 5))
def test_when_a_worker_joins_experts_move_only_to_it(layers: int, each: int, count: int) -> None:
    experts = each * (count + 1)
    before = place_evenly(layers, experts, workers(*[0] * count), None)
    after = place_evenly(layers, experts, workers(*[0] * (count + 1)), before)
    assert {target for _, target in moved(before, after).values()} == {f"ew-{count}"}
    assert len(moved(before, after)) == layers * each


@seeded
@given(
    had=st.integers(2, 3).flatmap(
        lambda count: st.lists(
            st.lists(st.integers(0, 3), min_size=count, max_size=count), min_size=1, max_size=3
        )
    ),
    experts=st.integers(2, 5),
    spare=st.lists(st.integers(0, 3), min_size=3, max_size=3),
)
def test_no_balanced_choice_of_quotas_keeps_more(
    had: list[list[int]], experts: int, spare: list[int]
) -> None:
    layers, count = len(had), len(had[0])
    total = layers * experts
    rooms = [math.ceil(total / count) + spare[w] - (w == 0) for w in range(count)]
    if sum(rooms) < total:
        return
    quotas = layer_quotas(had, experts, rooms)

    def kept(candidate: Sequence[Sequence[int]]) -> int:
        pairs = zip((h for row in had for h in row), (q for row in candidate for q in row), strict=True)
        return sum(min(h, q) for h, q in pairs)

    def totals(candidate: Sequence[Sequence[int]]) -> list[int]:
        return [sum(row[w] for row in candidate) for w in range(count)]

    spread = max(totals(quotas)) - min(totals(quotas))
    assert spread <= 1 or any(held == room for held, room in zip(totals(quotas), rooms, strict=True))
    rows = [row for row in itertools.product(range(experts + 1), repeat=count) if sum(row) == experts]
    best = max(
        kept(candidate)
        for candidate in itertools.product(rows, repeat=layers)
        if sorted(totals(candidate)) == sorted(totals(quotas))
        and all(held <= room for held, room in zip(totals(candidate), rooms, strict=True))
        and all(max(column) - min(column) <= 1 for column in zip(*candidate, strict=True))
    )
    assert kept(quotas) == best
    assert all(sum(row) == experts for row in quotas)


def test_experts_of_a_worker_that_leaves_move_to_where_a_copy_is_loaded() -> None:
    row = ((0, 2), (0, 1), (1, 2), (1, 0), (2, 0), (2, 1))
    before = Placement(("ew-0", "ew-1", "ew-2"), (row, row[::-1]))
    after = place_evenly(2, 6, workers(0, 0, 0)[1:], before)
    changes = moved(before, after)
    assert len(changes) == 4
    for expert, (_, target) in changes.items():
        assert target in before.holder_ids(expert.layer, expert.expert)


@pytest.mark.parametrize("joins", [True, False])
def test_shadows_stay_where_they_can_when_membership_changes(joins: bool) -> None:
    small, large = workers(0, 0, 0), workers(0, 0, 0, 0)
    before = place_evenly(3, 12, small if joins else large, None)
    after = place_evenly(3, 12, large if joins else small, before)
    loads = sum(
        len(set(after.assigned(worker_id)) - set(before.assigned(worker_id))) for worker_id in after.workers
    )
    # 72 copies in all: a joiner loads its quarter, survivors what the leaver had, and a few for balance.
    assert loads <= 18 + 4
    held = bytes_held(after)
    assert max(held) - min(held) <= 4 * EXPERT_BYTES


def test_mild_imbalance_moves_nothing_and_strong_imbalance_does() -> None:
    def attempt(usage: list[list[int]], current: Placement) -> Placement:
        return place(
            layers=1,
            experts=4,
            workers=workers(0, 0),
            expert_bytes=1,
            replicas=0,
            usage=usage,
            current=current,
            load_ratio_max=1.2,
        )

    current = Placement(("ew-0", "ew-1"), (((0,), (0,), (1,), (1,)),))
    assert attempt([[11, 11, 10, 10]], current) == current
    strong = attempt([[50, 50, 10, 10]], current)
    assert primary_counts(strong) == [[2, 2]]
    assert strong.holders[0][0] != strong.holders[0][1]


def test_the_failure_of_one_worker_is_shared_by_all_others() -> None:
    placement = place(layers=6, experts=8, workers=workers(0, 0, 0, 0), expert_bytes=1, replicas=1)
    for dead in range(4):
        shadows = [h[1] for row in placement.holders for h in row if h[0] == dead]
        counts = [shadows.count(w) for w in range(4) if w != dead]
        assert max(counts) - min(counts) <= 1


def test_assigned_lists_primaries_first_and_unknown_workers_hold_nothing() -> None:
    placement = place(layers=2, experts=4, workers=workers(0, 0), expert_bytes=1, replicas=1)
    mine = placement.assigned("ew-1")
    primary = [placement.holder_ids(e.layer, e.expert)[0] == "ew-1" for e in mine]
    assert primary == [True] * 4 + [False] * 4
    assert placement.assigned("ew-9") == []


def test_no_worker_at_all_is_the_users_fault() -> None:
    with pytest.raises(PlacementError, match="at least one expert worker"):
        place(layers=1, experts=1, workers=[], expert_bytes=1, replicas=0)


def test_a_large_model_is_placed_in_a_few_seconds() -> None:
    layers, experts = 58, 256
    start_s = time.process_time()
    placement = place(
        layers=layers,
        experts=experts,
        workers=workers(*[0] * 16),
        expert_bytes=1,
        replicas=1,
        usage=random_usage(layers, experts, 1),
    )
    assert time.process_time() - start_s < 10
    assert all(max(row) == min(row) == 16 for row in primary_counts(placement))
