"""The variants of appendix F: what their settings are, what static routing and lock-step do, the verdicts."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from tarragon.bench import ablation, modes
from tarragon.config import Config
from tarragon.config import load as load_config
from tarragon.experts.batcher import IDLE, Batcher, RunBatch, WaitUntil
from tarragon.messages import DataFlag, Peer, Table
from tarragon.orchestrator.residency import Residency
from tarragon.routing.placement import WorkerBudget, place
from tarragon.routing.static import StaticRoutes
from tarragon.routing.table import NOBODY, candidate_array
from tarragon.simulate import LOADS, run

CONTINUES, PREFILL = int(DataFlag.CONTINUES), int(DataFlag.PREFILL)
LAYERS = 3


# ---------------------------------------------------------------------- modes


def test_each_variant_takes_one_part_more_away() -> None:
    names = list(modes.MODES)
    assert names == [modes.TARRAGON, "alt-1", "alt-2", "alt-3"] == list(modes.WITHOUT)
    for less, more in itertools.pairwise(names):
        assert modes.MODES[less].items() < modes.MODES[more].items()


@pytest.mark.parametrize("settings", [*modes.MODES.values(), modes.COARSE])
def test_the_variants_are_settings_that_differ_from_the_defaults(settings: modes.Settings) -> None:
    config = load_config(environ={}, flags=settings)
    for name in settings:
        assert getattr(config, name) != getattr(Config(), name)


# ---------------------------------------------------------------------- static routing


def table(names: dict[str, int], row: list[list[int]]) -> Table:
    """One layer; ``names`` maps worker ids to epochs, ``row`` lists the candidates of each expert."""
    peers = [Peer(worker_id=i, role="expert", epoch=epoch, address="") for i, epoch in names.items()]
    return Table(version=1, workers=peers, candidates=[row])


def owners(routes: StaticRoutes, routed: Table, alive: list[bool]) -> list[int]:
    return np.ravel(routes.owners(routed, alive, candidate_array(routed))).tolist()


def test_an_expert_stays_with_the_name_that_had_it_first() -> None:
    routes = StaticRoutes()
    both = table({"ew-0": 1, "ew-1": 2}, [[0, 1], [1, 0]])
    assert owners(routes, both, [True, False]) == [0, 0]  # bound: both experts are reachable at ew-0
    assert owners(routes, both, [True, True]) == [0, 0]
    assert owners(routes, both, [False, True]) == [NOBODY, NOBODY]  # the other candidate is not taken


def test_the_binding_waits_until_all_experts_are_reachable() -> None:
    routes = StaticRoutes()
    half = table({"ew-0": 1}, [[0], []])
    assert owners(routes, half, [True]) == [0, NOBODY]
    both = table({"ew-1": 2, "ew-0": 1}, [[1], [0]])
    assert owners(routes, both, [True, True]) == [1, 0]


def test_the_next_incarnation_of_the_name_takes_over_once_it_holds_the_expert() -> None:
    routes = StaticRoutes()
    assert owners(routes, table({"ew-0": 1, "ew-1": 2}, [[0], [1]]), [True, True]) == [0, 1]
    gone = table({"ew-1": 2}, [[0], [0]])  # ew-1 has loaded what ew-0 had
    assert owners(routes, gone, [True]) == [NOBODY, 0]
    back = table({"ew-1": 2, "ew-0": 3}, [[0], [0]])  # it is back and has not loaded it
    assert owners(routes, back, [True, True]) == [NOBODY, 0]
    loaded = table({"ew-1": 2, "ew-0": 3}, [[1, 0], [0]])
    assert owners(routes, loaded, [True, True]) == [1, 0]


def test_no_worker_at_all() -> None:
    routes = StaticRoutes()
    assert owners(routes, table({"ew-0": 1}, [[0]]), [True]) == [0]
    assert owners(routes, table({}, [[]]), []) == [NOBODY]


@pytest.mark.parametrize("cold_loads", [True, False])
def test_survivors_load_nothing_for_a_static_binding(cold_loads: bool) -> None:
    workers = [WorkerBudget("ew-0"), WorkerBudget("ew-1")]
    target = place(layers=1, experts=4, workers=workers, expert_bytes=1, replicas=0)
    residency = Residency(target, version=0, cold_loads=cold_loads)
    for epoch, name in enumerate(target.workers):
        residency.join(Peer(worker_id=name, role="expert", epoch=epoch, address=""), None)
    for name, order in residency.step().orders.items():
        residency.holds(name, order.experts, order.number)
    assert residency.step().table is not None
    residency.leave("ew-0")
    assert bool(residency.step().orders) is cold_loads


# ---------------------------------------------------------------------- lock-step


def lock_step(*keys: str, wait_us: int = 1_000) -> Batcher:
    config = Config(batch_lock_step=True, batch_join_wait_us_max=wait_us, batch_pairs_min=100)
    batcher = Batcher(LAYERS, config)
    for key in keys:
        batcher.worker_joined(key, 0)
    return batcher


def run_all(batcher: Batcher, now: int) -> list[str]:
    action = batcher.next_action(now)
    assert isinstance(action, RunBatch)
    return sorted(member.key for member in batcher.batch_done(now))


def test_a_batch_waits_for_everybody_in_a_step_whatever_the_habits() -> None:
    batcher = lock_step("a", "b", "idle")
    for key in ("a", "b"):
        batcher.step_begin(key, 0, 0, False)
    batcher.rows("a", 0, 200, 1, CONTINUES, 10)  # more than batch_pairs_min: still no reason to start
    assert batcher.next_action(20) == WaitUntil(1_010, ("b",))
    batcher.rows("b", 0, 4, 1, CONTINUES, 30)
    assert run_all(batcher, 40) == ["a", "b"]
    assert batcher.next_action(50) is IDLE


def test_prefills_are_waited_for_as_well() -> None:
    batcher = lock_step("a", "b")
    batcher.step_begin("a", 0, 0, False)
    batcher.step_begin("b", 0, 0, True)
    batcher.rows("a", 0, 4, 1, CONTINUES, 10)
    assert isinstance(batcher.next_action(20), WaitUntil)
    batcher.rows("b", 0, 40, 1, CONTINUES | PREFILL, 30)
    assert isinstance(batcher.next_action(40), RunBatch)


def test_who_is_ahead_or_between_steps_is_not_waited_for() -> None:
    batcher = lock_step("a", "b")
    batcher.step_begin("a", 0, 0, False)
    batcher.step_begin("b", 1, 0, False)  # it will send layer 1 next
    batcher.rows("a", 0, 4, 1, CONTINUES, 10)
    assert run_all(batcher, 20) == ["a"]
    for layer in (1, 2):
        batcher.rows("b", layer, 4, 1, CONTINUES, 30)
        batcher.rows("a", layer, 4, 1, CONTINUES, 30)
        assert run_all(batcher, 40) == ["a", "b"]
    batcher.step_begin("a", 0, 50, False)
    batcher.rows("a", 0, 4, 2, CONTINUES, 60)  # b has not begun its next step
    assert run_all(batcher, 70) == ["a"]
    batcher.step_begin("b", 0, 80, False)
    batcher.rows("a", 1, 4, 2, CONTINUES, 90)  # now a waits for it
    assert isinstance(batcher.next_action(100), WaitUntil)


def test_a_worker_that_leaves_or_hangs_ends_the_wait() -> None:
    batcher = lock_step("a", "b", "c")
    for key in ("a", "b", "c"):
        batcher.step_begin(key, 0, 0, False)
    batcher.rows("a", 0, 4, 1, CONTINUES, 10)
    batcher.worker_left("b", 20)
    assert batcher.next_action(30) == WaitUntil(1_010, ("c",))
    action = batcher.next_action(1_010)
    assert isinstance(action, RunBatch)
    assert action.missed == ("c",)


@pytest.mark.parametrize("name", ["decode", "two layers", "uneven"])
def test_nobody_is_waited_for_in_vain(name: str) -> None:
    """The simulator's audit: no cycle of waits, everything is answered (2 to 3 of each role)."""
    config = Config(batch_lock_step=True, batch_join_wait_us_max=500_000)
    load = msgspec.structs.replace(LOADS[name], steps=8)
    reports = [run(seed, aws, ews, load, config) for seed in range(3) for aws in (2, 3) for ews in (2, 3)]
    assert [report.violations for report in reports if report.violations] == []


# ---------------------------------------------------------------------- verdicts


def windows(rates: list[float]) -> dict[str, list[float]]:
    return {"tokens_per_s": rates, "tbt_median_ms": [10.0] * len(rates)}


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [([101.0] * 6, "holds"), ([90.0] * 6, "does not hold"), ([90.0, 110.0] * 3, "inconclusive")],
)
def test_a_claim_holds_only_if_its_whole_interval_does(theirs: list[float], expected: str) -> None:
    found = ablation.conclude({modes.TARRAGON: windows([100.0] * 6), "alt-1": windows(theirs)})
    assert found["alt-1"]["verdict"] == expected


def test_few_pairs_prove_nothing() -> None:
    found = ablation.conclude({modes.TARRAGON: windows([100.0] * 4), "alt-1": windows([100.0] * 4)})
    assert found["alt-1"]["verdict"] == "inconclusive"
    metrics = {"rates": {"random": {"2": found}}, "carries_over": ""}
    assert "random, 2/s: alt-1" in ablation.table(metrics)


def test_a_round_without_tokens_is_left_out() -> None:
    found: dict[str, dict[str, list[float]]] = {name: windows([]) for name in ("tarragon", "alt-1")}
    ablation.take(found, {name: {"tokens_per_s": 5.0, "tbt_median_ms": 2.0} for name in found})
    empty = {"tokens_per_s": 0.0, "tbt_median_ms": 0.0}
    ablation.take(found, {"tarragon": {"tokens_per_s": 5.0, "tbt_median_ms": 2.0}, "alt-1": empty})
    assert found["tarragon"]["tokens_per_s"] == found["alt-1"]["tokens_per_s"] == [5.0]
