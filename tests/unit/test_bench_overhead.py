"""When does a measured cost of protection count as shown, and what is the pace of a window?"""

from __future__ import annotations

import random

import pytest

from tarragon.bench import overhead
from tarragon.bench.timeline import Trace
from tarragon.bench.windows import Window, cpu_by_process, cpu_cost, pace, tokens_within


@pytest.mark.parametrize(
    ("cost", "noise", "verdict"),
    [(0.0, 0.002, "holds"), (0.0, 0.2, "inconclusive"), (0.05, 0.005, "does not hold")],
)
def test_a_cost_is_found_through_a_drift_that_hits_both_sides(
    cost: float, noise: float, verdict: str
) -> None:
    rng = random.Random(3)
    windows: dict[str, list[Window]] = {"on": [], "off": []}
    for _ in range(20):
        speed = rng.uniform(50.0, 150.0)
        windows["off"].append(Window(speed, {}))
        windows["on"].append(Window(speed * (1.0 - cost) * (1.0 + rng.uniform(-noise, noise)), {}))
    metrics = overhead.conclude(windows)
    assert metrics["verdict"] == verdict
    assert metrics["cost"]["ci95"][0] <= metrics["cost"]["median"] <= metrics["cost"]["ci95"][1]


def test_a_table_is_shadowed_wholly_or_not() -> None:
    assert overhead.shadowed({"candidates": [[["a", "b"], ["b", "a"]]]}) is True
    assert overhead.shadowed({"candidates": [[["a"], ["b"]]]}) is False
    assert overhead.shadowed({"candidates": [[["a", "b"], ["b"]]]}) is None


def test_the_pace_counts_gaps_that_lie_in_the_window() -> None:
    traces = [
        Trace(0, 0.0, tokens=[1, 2, 3, 4], times_s=[0.5, 1.0, 1.5, 4.0]),
        Trace(1, 0.0, tokens=[1, 2], times_s=[1.2, 1.7]),
    ]
    assert pace(traces, 0.6, 2.0) == pytest.approx(2.0)
    assert pace(traces, 2.0, 3.0) == 0.0


def test_a_token_at_the_edge_counts_by_its_share() -> None:
    traces = [Trace(0, 0.0, tokens=[1, 2, 3], times_s=[0.0, 1.0, 3.0]), Trace(1, 0.0)]
    assert tokens_within(traces, 0.25, 2.0) == pytest.approx(0.75 + 0.5)
    assert tokens_within(traces, -5.0, 5.0) == pytest.approx(2.0)


def test_cpu_time_per_token_is_compared_pair_by_pair() -> None:
    found = cpu_cost([1.1, 2.2] * 3, [1.0, 2.0] * 3, at_most=0.01)
    assert found["median"] == pytest.approx(0.1)
    assert found["verdict"] == "does not hold"
    assert cpu_cost([1.001] * 6, [1.0] * 6, at_most=0.01)["verdict"] == "holds"
    assert cpu_cost([0.0], [0.0], at_most=0.01) == {}, "no account is no evidence"


def test_cpu_time_is_told_by_role() -> None:
    off = [Window(1.0, {"aw-0": 0.002 * n, "aw-1": 0.001, "gateway": 0.001}) for n in range(1, 7)]
    on = [Window(1.0, {**window.cpu_s, "gateway": 0.0015}) for window in off]
    assert off[0].cpu_s_per_token == pytest.approx(0.004)
    found = cpu_by_process(on, off)
    assert found["aw"]["more_ms"] == 0.0
    assert found["aw"]["off_ms"] == pytest.approx(8.0)
    assert found["gateway"]["more_ms"] == pytest.approx(0.5)
