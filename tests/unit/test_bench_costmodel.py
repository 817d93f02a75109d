"""Equations 1 to 4 (2.2.2), the paper's observations as checks that can fail, and the predictions here."""

from __future__ import annotations

import pytest

from tarragon import costmodel
from tarragon.bench import costmodel as bench
from tarragon.costmodel import (
    PAPER_DECOUPLED,
    PAPER_LAYERS,
    PAPER_MONOLITHIC,
    PAPER_TOKENS,
    PAPER_WORKERS,
    Profile,
)

LAYERS = 4
SMALL = Profile(10.0, 0.5, 0.1, 2.0, 0.25)
"""Constants whose sums can be done by hand."""


def test_the_equations() -> None:
    # Layer 2 of token 3: 2 whole tokens of 4 layers, and 2 layers.
    assert costmodel.layers_decoded(LAYERS, 2, 3) == 10
    assert costmodel.replay_s(SMALL, LAYERS, 2, 3) == pytest.approx(2.0 + 1.0)
    assert costmodel.stall_of_replay_s(SMALL, LAYERS, 2, 3) == pytest.approx(13.0)
    assert costmodel.stall_of_expert_worker_s(SMALL) == pytest.approx(10.1)
    assert costmodel.cost_of_replay(SMALL, 3, LAYERS, 2, 3) == pytest.approx(3 * (8.0 + 2.5))
    assert costmodel.cost_of_expert_worker(SMALL) == 0.25


@pytest.mark.parametrize(("layer", "token"), [(0, 1), (LAYERS + 1, 1), (1, 0)])
def test_a_point_that_does_not_exist_is_refused(layer: int, token: int) -> None:
    with pytest.raises(ValueError, match="there is no layer"):
        costmodel.layers_decoded(LAYERS, layer, token)


def test_self_healing_leaves_neither_the_start_nor_the_replay() -> None:
    assert costmodel.stall_of_restore_s(SMALL, LAYERS, 100, 0.001, 0.2) == pytest.approx(0.2 + 0.1 + 0.4)
    assert costmodel.stall_of_reroute_s(SMALL, 0.2) == pytest.approx(0.3)


def test_the_paper_s_observations_follow_from_its_constants() -> None:
    found = bench.paper()
    assert [check for check in found["checks"] if not check["holds"]] == []
    stalls = found["curves"]["stall_s"]
    assert stalls["MO"][0] > stalls["AW"][0]  # the start decides at first,
    assert stalls["MO"][-1] < stalls["AW"][-1]  # the slower decode step in the end
    assert len(set(stalls["EW"])) == 1


def test_about_19_times() -> None:
    ratio = costmodel.decode_over_prefill(PAPER_MONOLITHIC, PAPER_WORKERS, PAPER_LAYERS, 64)
    assert ratio == pytest.approx(18.92)


def test_other_constants_fail_the_checks() -> None:
    slow_start = PAPER_MONOLITHIC._replace(worker_start_s=1e4)
    growth = costmodel.observation_growth(slow_start, PAPER_WORKERS, PAPER_LAYERS, PAPER_TOKENS)
    assert [check.holds for check in growth] == [False, True]
    dear_prefill = PAPER_MONOLITHIC._replace(prefill_layer_cost=1.0)
    growth = costmodel.observation_growth(dear_prefill, PAPER_WORKERS, PAPER_LAYERS, PAPER_TOKENS)
    assert [check.holds for check in growth] == [True, False]
    for expected in (None, 19.0):
        check = costmodel.observation_decoding(dear_prefill, PAPER_WORKERS, PAPER_LAYERS, expected=expected)
        assert not check.holds
    quick_start = PAPER_DECOUPLED._replace(worker_start_s=0.01, decode_layer_cost=1.0)
    constant = costmodel.observation_constant(quick_start, PAPER_LAYERS, PAPER_TOKENS)
    assert [check.holds for check in constant] == [False, False]


def test_predictions_of_kills() -> None:
    constants = {"attention": SMALL, "expert": SMALL._replace(worker_start_s=5.0)}
    trial = {"token": 2.0, "rows": 12.0}

    def predicted(name: str, role: str) -> float:
        return bench.predict(name, LAYERS, constants, {**trial, "role": role}, 0.01)

    # Two tokens were read: the first layer of the third failed.
    assert predicted("coarse", "attention") == pytest.approx(10.0 + 2.0 + 0.9)
    assert predicted("coarse", "expert") == pytest.approx(5.1)
    assert predicted("tarragon", "attention") == pytest.approx(0.12 + 0.4)
    assert predicted("tarragon", "expert") == pytest.approx(0.1)


def test_trials_are_grouped_by_role_and_point() -> None:
    constants = {"attention": SMALL, "expert": SMALL}
    trial = {"role": "attention", "point": 2, "token": 2.0, "rows": 12.0, "stall_s": 1.04}
    found = bench.conclude("tarragon", LAYERS, constants, [dict(trial), dict(trial)], 0.01)
    group = found["by_point"]["attention, token 2"]
    assert group["measured_over_predicted"]["median"] == pytest.approx(2.0)
    assert found["checks"] == []  # the equations are about the system without self-healing
    text = bench.table({"paper": bench.paper(), "here": {"tarragon": found}, "carries_over": ""})
    assert "tarragon: attention, token 2" in text
    assert "does not hold" not in text
