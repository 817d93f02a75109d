"""Steps with and without checkpoints in turn: who is compared with whom, and what comes of it."""

from __future__ import annotations

import math
import statistics

import pytest

from tarragon.attention.comparison import PAIR_COST_MAX, Comparison, Spread
from tarragon.bench.checkpoint import conclude_steps


class Steps:
    """A comparison under made-up clocks."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0
        self.comparison = Comparison(lambda: self.wall_s, lambda: self.cpu_s)

    def step(self, tokens: int = 4, *, plain_s: float = 1.0, protected_s: float = 1.0) -> bool:
        protected = self.comparison.begin(tokens)
        took_s = protected_s if protected else plain_s
        self.wall_s += took_s
        self.cpu_s += took_s / 2
        self.comparison.end()
        return protected


def test_the_order_turns_with_each_pair() -> None:
    steps = Steps()
    assert [steps.step() for _ in range(8)] == [True, False, False, True] * 2


def test_costs_are_the_protected_steps() -> None:
    steps = Steps()
    for _ in range(12):
        steps.step(protected_s=1.1)
    found = steps.comparison.counters()
    assert (found["compared_pairs"], found["compared_tokens"]) == (6.0, 24.0)
    assert found["compared_wall_cost"] == pytest.approx(math.log(1.1))
    assert found["compared_cpu_s"] == pytest.approx(0.05)
    assert found["compared_wall_cost_error"] == pytest.approx(0.0, abs=1e-9)


def test_only_equal_neighbours_of_one_pair_are_compared() -> None:
    steps = Steps()
    for tokens in (4, 5, 0, 0, 3, 0, 0, 3):
        steps.step(tokens)
    assert steps.comparison.counters()["compared_pairs"] == 0.0
    steps.comparison.begin(4)  # a step that failed
    steps.step(4)
    assert steps.comparison.counters()["compared_pairs"] == 0.0
    steps.step(4)
    steps.step(4)
    assert steps.comparison.counters()["compared_pairs"] == 1.0


def test_a_machine_that_stands_still_says_no_more_than_the_bound() -> None:
    steps = Steps()
    steps.step()
    steps.step(plain_s=60.0)
    assert steps.comparison.counters()["compared_wall_cost"] == -PAIR_COST_MAX


def test_a_spread_is_mean_and_standard_error() -> None:
    values = [3.0, 5.0, 4.0, 8.0]
    spread = Spread()
    assert spread.error == 0.0
    for value in values:
        spread.add(value)
    assert spread.mean == pytest.approx(5.0)
    assert spread.error == pytest.approx(statistics.stdev(values) / 2)


def _worker(pairs: float, wall: float, error: float, cpu_s: float) -> dict[str, float]:
    return {
        "compared_pairs": pairs,
        "compared_tokens": 8 * pairs,
        "compared_wall_cost": wall,
        "compared_wall_cost_error": error,
        "compared_cpu_s": cpu_s,
        "compared_cpu_s_error": 1e-5,
    }


def test_workers_are_pooled_by_their_pairs() -> None:
    found = conclude_steps([_worker(300, 0.004, 0.001, 2e-4), _worker(100, 0.008, 0.001, 6e-4)], 0.01)
    assert found["step_pairs"] == 400
    assert found["step_cost"]["mean"] == pytest.approx(0.005)
    assert found["step_cost"]["verdict"] == "holds"
    assert found["step_cpu_cost"]["us_per_step"] == pytest.approx(300.0)
    assert found["step_cpu_cost"]["mean"] == pytest.approx(3e-4 / 8 / 0.01)
    assert conclude_steps([_worker(300, 0.02, 0.001, 0.0)], 0.01)["step_cost"]["verdict"] == "does not hold"
    assert conclude_steps([_worker(300, 0.009, 0.001, 0.0)], 0.01)["step_cost"]["verdict"] == "inconclusive"


def test_too_few_steps_say_nothing() -> None:
    assert conclude_steps([_worker(0, 0.0, 0.0, 0.0)], 0.01) == {}
