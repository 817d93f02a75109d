"""What benchmarks ask: the same whenever it is asked for, with the lengths that the rules say."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tarragon.bench import workloads
from tarragon.bench.workloads import Lengths, TraceWorkload, Workload


class Shape(NamedTuple):
    """What workloads ask of a model."""

    vocab: int = 300
    positions_max: int = 64


def test_the_excerpt_of_the_trace_is_there_and_varies() -> None:
    lengths = workloads.azure_lengths()
    assert len(lengths) == 1_020
    assert lengths[0] == Lengths(374, 44)
    assert min(one.output for one in lengths) > 0
    assert len({one.prompt for one in lengths}) > 300


@pytest.mark.parametrize(
    ("recorded", "context", "asked"),
    [
        ((80, 17), 8_192, (10, 3)),
        ((1, 1), 8_192, (1, 1)),
        ((14_050, 1_000), 8_192, (512, 125)),
        ((800, 2_000), 8_192, (100, 128)),
        ((14_050, 1_000), 64, (32, 32)),
    ],
)
def test_lengths_are_scaled_by_one_rule(
    recorded: tuple[int, int], context: int, asked: tuple[int, int]
) -> None:
    assert workloads.scaled(Lengths(*recorded), context) == asked


def test_a_trace_is_taken_in_its_order_and_begins_anew() -> None:
    load = TraceWorkload(0, 300, trace=(Lengths(3, 5), Lengths(4, 6)))
    assert [load.lengths(index) for index in range(3)] == [(3, 5), (4, 6), (3, 5)]
    body = load.body(1)
    assert (len(body["prompt"]), body["max_tokens"]) == (4, 6)
    assert load.mean == (3.5, 5.5)


def test_other_seeds_are_other_requests() -> None:
    load, other = (TraceWorkload(seed, 300, trace=workloads.azure_lengths()) for seed in (0, 1))
    assert [load.lengths(i) for i in range(9)] != [other.lengths(i) for i in range(9)]
    assert load.body(4) == load.body(4) != other.body(4)


def test_greedy_means_no_sampling_at_all() -> None:
    assert {Workload(0, 300, greedy=True).body(index)["temperature"] for index in range(4)} == {0}
    assert {Workload(0, 300).body(index)["temperature"] for index in range(4)} == {0, 0.8}


def test_workloads_fit_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "read_model", lambda _folder: Shape())
    for make in workloads.WORKLOADS.values():
        load = make(Path())
        bodies = [load.body(index) for index in range(50)]
        assert max(max(body["prompt"]) for body in bodies) < 300
        if isinstance(load, TraceWorkload):
            assert all(len(body["prompt"]) + body["max_tokens"] <= 64 for body in bodies)
