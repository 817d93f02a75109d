"""The arithmetic behind benchmarks' verdicts: a benchmark that computes its figure wrongly proves nothing."""

from __future__ import annotations

import pytest

from tarragon.bench import fidelity, interference, profile, sametext
from tarragon.bench.fidelity import OURS, OURS_ALONE, REFERENCE, Text
from tarragon.bench.timeline import Trace


def _text(
    *logprobs: float, likeliest: tuple[int, ...] = (1, 2), continued: tuple[int, ...] = (1, 2, 3)
) -> Text:
    return Text(logprobs, likeliest, continued)


def test_the_distance_of_two_runs() -> None:
    a = [_text(-1.0, -2.0), _text(-1.0, -1.0)]
    b = [_text(-1.5, -2.0, likeliest=(1, 9), continued=(1, 5, 3)), _text(-1.0, -1.0)]
    found = fidelity.distance(a, b)
    assert found["mean"] == pytest.approx(0.125)
    assert found["max"] == pytest.approx(0.5)
    assert found["likeliest_equal"] == pytest.approx(0.75)
    assert found["texts_equal"] == pytest.approx(0.5)
    assert found["tokens_before_difference"] == pytest.approx(2.0)


TEXTS = 5
"""Fewer are no evidence."""


@pytest.mark.parametrize(("ours", "within"), [(-1.1, True), (-1.5, False)])
def test_the_verdict_measures_ours_by_the_peer_s_own_spread(ours: float, within: bool) -> None:
    """The first position moves with the batch; that the second never does is no merit."""
    runs = {
        OURS: [_text(ours, -2.05)] * TEXTS,
        OURS_ALONE: [_text(ours, -2.05)] * TEXTS,
        "vLLM, one by one": [_text(-1.0, -2.0)] * TEXTS,
        "vLLM, all at once": [_text(-1.1, -2.0)] * TEXTS,
        REFERENCE: [_text(-1.1, -2.1)] * TEXTS,
    }
    found = fidelity.compare(runs)
    own = found["vllm_with_itself"]["vLLM, one by one | vLLM, all at once"]
    assert (own["moved"], own["moved_mean"]) == (0.5, pytest.approx(0.1))
    assert found["verdict"]["moved_mean_within_vllm_spread"] is within
    assert found["verdict"]["as_near_to_float32"] is within
    assert found["verdict"]["all"] is within


def test_a_text_that_depends_on_its_batch_is_found() -> None:
    runs = {
        OURS: [_text(-1.0, -2.0)] * TEXTS,
        OURS_ALONE: [_text(-1.0, -2.001)] * TEXTS,
        "vLLM, one by one": [_text(-1.0, -2.0)] * TEXTS,
        "vLLM, all at once": [_text(-1.1, -2.0)] * TEXTS,
    }
    assert not fidelity.compare(runs)["verdict"]["the_same_in_every_batching"]


def test_greedy_text_that_leaves_float32_sooner_than_the_peer_s_is_found() -> None:
    runs = {
        OURS: [_text(-1.0, -2.0, continued=(9, 9, 9))],
        OURS_ALONE: [_text(-1.0, -2.0)],
        "vLLM, one by one": [_text(-1.1, -2.0)],
        "vLLM, all at once": [_text(-1.1, -2.0, continued=(1, 2, 9))],
        REFERENCE: [_text(-1.0, -2.0)],
    }
    assert not fidelity.compare(runs)["verdict"]["greedy_agrees_with_float32_no_less"]


def test_what_a_server_says_of_a_prompt() -> None:
    answer = [
        None,
        {"7": {"logprob": -0.5, "rank": 1}},
        {"8": {"logprob": -3.0, "rank": 4}, "5": {"logprob": -0.1, "rank": 1}},
    ]
    assert fidelity.prompt_judgement(answer, [3, 7, 8]) == ((-0.5, -3.0), (7, 5))


def test_gaps_count_where_they_overlap_a_prompt() -> None:
    stream = Trace(0, 0.0, times_s=[0.0, 1.0, 2.0, 5.0, 6.0])
    found = interference.gaps_in(stream, [interference.Span(2.5, 4.0)])
    assert found == [3.0]
    assert interference.gap_figures(found)["max_ms"] == pytest.approx(3_000.0)


def test_an_attention_worker_s_seconds_add_up_to_its_clock() -> None:
    counters = {
        "clock_s": 10.0,
        "steps": 5.0,
        "step_s": 9.0,
        "forward_s": 7.0,
        "sample_s": 1.0,
        "intake_s": 0.25,
        "deliver_s": 0.25,
        "experts_dispatch_s": 1.0,
        "experts_wait_s": 3.0,
        "experts_combine_s": 0.5,
    }
    found = profile.attention_split(counters)
    assert sum(found.values()) == pytest.approx(10.0)
    assert found["attention and dense layers"] == pytest.approx(2.5)
    assert found["scheduling"] == pytest.approx(1.0)


def test_an_expert_worker_s_seconds_add_up_to_its_clock() -> None:
    found = profile.expert_split({"clock_s": 10.0, "compute_s": 6.0, "copy_s": 1.0, "idle_s": 3.0})
    assert sum(found.values()) == pytest.approx(10.0)
    assert found["expert kernels"] == pytest.approx(5.0)
    assert found["doorbells and batching"] == pytest.approx(1.0)


def test_a_process_without_counters_is_accounted_by_the_kernel() -> None:
    before = {"role": "gateway", "at_s": 1.0, "on_a_core_s": 1.0, "waiting_for_a_core_s": 0.0, "counters": {}}
    after = {**before, "at_s": 3.0, "on_a_core_s": 2.0, "waiting_for_a_core_s": 0.5}
    found = profile.account(before, after)
    assert found["seconds_per_second"] == pytest.approx(
        {"on a core": 0.5, "waiting for a core": 0.25, "asleep": 0.25}
    )


def test_a_worker_has_the_kernel_s_account_beside_its_own() -> None:
    counters = dict.fromkeys(("clock_s", "compute_s", "copy_s", "idle_s"), 0.0)
    before = {
        "role": "expert",
        "at_s": 1.0,
        "on_a_core_s": 1.0,
        "waiting_for_a_core_s": 0.0,
        "counters": counters,
    }
    spent = {"clock_s": 2.0, "compute_s": 1.5, "copy_s": 0.0, "idle_s": 0.5}
    after = {**before, "at_s": 3.0, "on_a_core_s": 2.0, "waiting_for_a_core_s": 0.5, "counters": spent}
    found = profile.account(before, after)
    assert found["seconds_per_second"]["expert kernels"] == pytest.approx(0.75)
    assert found["process_seconds_per_second"] == pytest.approx(
        {"on a core": 0.5, "waiting for a core": 0.25, "asleep": 0.25}
    )


def test_answers_differ_if_anything_of_them_does() -> None:
    a = {"tokens": [1, 2], "logprobs": [-0.5, -0.25]}
    assert sametext.differing([a, a], [a, a]) == []
    assert sametext.differing([a, {**a, "logprobs": [-0.5, -0.2500001]}], [a, a]) == [1]
    assert sametext.differing([a], [a, a]) == [1]


def test_the_workload_has_every_kind_of_request() -> None:
    bodies = sametext.requests(64, 64, seed=1)
    assert bodies == sametext.requests(64, 64, seed=1)
    assert sum(len(body["prompt"]) > sametext.CHUNK_TOKENS for body in bodies) == 4
    assert {body["temperature"] for body in bodies} == {0, 0.8}
    assert any("repetition_penalty" in body for body in bodies)
