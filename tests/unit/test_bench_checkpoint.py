"""The verdicts of the checkpoint and restore benchmarks, and the names of the ways to checkpoint."""

from __future__ import annotations

import pytest

from tarragon.bench import checkpoint, restore
from tarragon.bench.windows import Window
from tarragon.checkpoint.mode import ALTERNATE, NONE, SEGMENTS, Mode, parse
from tarragon.config import Config, ConfigError

FORMULA = {"checkpoint_bytes_per_token": 100.0, "experts_bytes_per_token": 400.0, "pairs_per_token": 8.0}


def verdict(on: list[float], off: list[float]) -> str:
    rates = {"none": [Window(rate, {}) for rate in off], "segments": [Window(rate, {}) for rate in on]}
    found = checkpoint.conclude(rates, {"none": [], "segments": []}, {}, FORMULA)
    return str(found["cost"]["verdict"])


def test_a_claim_holds_only_if_its_whole_interval_does() -> None:
    assert verdict([99.9] * 9, [100.0] * 9) == "holds"
    assert verdict([95.0] * 9, [100.0] * 9) == "does not hold"
    assert verdict([90.0, 110.0] * 4, [100.0] * 8) == "inconclusive"


def test_bytes_are_compared_with_the_formula() -> None:
    account = {"checkpoint_s": 0.5, "step_s": 100.0, "checkpoint_bytes": 1_000.0, "pairs": 80.0}
    rates = {"none": [Window(1.0, {})], "segments": [Window(1.0, {})]}
    found = checkpoint.conclude(rates, {"none": [], "segments": []}, account, FORMULA)
    assert found["writing_share_of_steps"] == 0.005
    assert found["bytes"]["written_over_formula"] == 1.0
    assert found["bytes"]["formula_over_experts_traffic"] == 0.25


def test_what_is_spent_beside_the_steps_is_told_apart() -> None:
    assert checkpoint.ahead_share({"checkpoint_ahead_s": 0.5, "step_s": 100.0}) == {
        "ahead_share_of_steps": 0.005
    }
    assert checkpoint.ahead_share({"checkpoint_ahead_s": 0.0, "step_s": 0.0}) == {}


def test_restoring_is_compared_trial_by_trial() -> None:
    trial = {"restore_s": 0.01, "sequential_s": 10.0, "parallel_s": 0.5}
    found = restore.conclude([trial, trial | {"restore_s": 0.02}])
    assert found["sequential_over_restore"]["max"] == pytest.approx(1_000.0)
    assert found["parallel_over_restore"]["min"] == pytest.approx(25.0)


def test_counters_of_workers_that_died_do_not_count() -> None:
    zero = dict.fromkeys(restore.COUNTERS, 0.0)
    before = {1: zero | {"restored_requests": 5.0}, 2: zero | {"restored_requests": 2.0}}
    after = {2: zero | {"restored_requests": 3.0}, 3: zero}
    assert restore._difference(before, after)["restored_requests"] == 1.0


def test_modes() -> None:
    assert parse("segments") == SEGMENTS
    assert parse("none") == NONE
    assert parse("alternate") == ALTERNATE
    assert [mode.writes for mode in (SEGMENTS, NONE, ALTERNATE, parse("pause-8"))] == [
        True,
        False,
        True,
        False,
    ]
    assert parse("pause-8") == Mode(pause_steps=8)
    for wrong in ("", "pause", "pause-0", "pause--1", "pause-99999", "all"):
        with pytest.raises(ValueError, match="a checkpoint mode is"):
            parse(wrong)
    with pytest.raises(ConfigError, match="checkpoint_mode"):
        Config(checkpoint_mode="sometimes").checked()


def test_the_cache_is_no_larger_than_what_the_store_can_mirror() -> None:
    assert Config(kv_cache_bytes=1 << 30).kv_cache_bytes_granted == 1 << 30
    tight = Config(kv_cache_bytes=1 << 30, checkpoint_bytes_max=300 << 20, attention_workers=2)
    assert tight.kv_cache_bytes_granted == int((100 << 20) * 0.9)
    off = Config(kv_cache_bytes=1 << 30, checkpoint_bytes_max=300 << 20, checkpoint_mode="none")
    assert off.kv_cache_bytes_granted == 1 << 30
