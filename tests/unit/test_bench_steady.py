"""The arithmetic behind figs. 10 and 11: windows, ratios, verdicts; and what a peer's log is read for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tarragon.bench import peer, steady, steady_open, steady_report
from tarragon.bench.sides import DECOUPLED, OURS
from tarragon.bench.stats import judge
from tarragon.bench.timeline import Trace


def _windows(rates: list[float]) -> list[dict[str, float]]:
    return [dict.fromkeys(steady_report.FIGURES, rate) for rate in rates]


def test_a_window_counts_what_came_after_its_ramp() -> None:
    trace = Trace(0, due_s=10.0, tokens=list(range(6)), times_s=[10.5, 11.0, 12.0, 13.0, 14.0, 15.5])
    trace.ended_s = 15.5
    waiting = Trace(1, due_s=13.0)
    found = steady_open.figures([trace, waiting], start_s=10.0, end_s=15.0, cut_s=16.0)
    assert found["tokens_per_s"] == pytest.approx(3 / (5.0 * 2 / 3))
    assert found["ttft_median_ms"] == pytest.approx((500 + 3_000) / 2)
    assert found["tbt_median_ms"] == pytest.approx(1_000.0)
    assert (found["requests"], found["cut_off"]) == (2.0, 1.0)


def test_ratios_are_taken_pair_by_pair_over_all_rates() -> None:
    ours, theirs = _windows([10.0, 20.0, 10.0]), _windows([10.0, 20.0, 10.0])
    windows = {"random": {"0.5": {DECOUPLED: {OURS: ours, DECOUPLED: theirs}}}}
    windows["azure"] = {"0.7": {DECOUPLED: {OURS: ours, DECOUPLED: theirs}}}
    metrics = {"windows": windows, "sides": {DECOUPLED: {"startup_s": 1.0}}}
    steady_report.conclude(metrics)
    assert metrics["ratios"][DECOUPLED]["tokens_per_s"]["n"] == 6
    (claim,) = metrics["claims"]
    assert (claim["at_least"], claim["verdict"]) == (pytest.approx(0.972), "holds")
    assert "holds" in steady_report.report(metrics)


def test_windows_without_a_token_are_no_pair() -> None:
    windows = {"random": {"0.5": {"vllm": {OURS: _windows([10.0, 0.0]), "vllm": _windows([5.0, 5.0])}}}}
    metrics = {"windows": windows, "sides": {"vllm-tp2": {"error": "9 heads"}}}
    steady_report.conclude(metrics)
    assert metrics["ratios"]["vllm"]["tokens_per_s"]["pairs"] == [2.0]
    assert metrics["claims"][0]["verdict"] == "inconclusive"
    assert "vLLM, TP=2 did not run: 9 heads" in steady_report.report(metrics)


def test_the_picture_is_drawn_from_the_windows(tmp_path: Path) -> None:
    windows = {"random": {"0.5": {"vllm": {OURS: _windows([10.0]), "vllm": _windows([5.0])}}}}
    steady_report.picture({"windows": windows}, tmp_path / "steady.png")
    assert (tmp_path / "steady.png").stat().st_size > 1_000


@pytest.mark.parametrize(
    ("ci95", "pairs", "verdict"),
    [
        ((0.98, 1.2), 6, "holds"),
        ((0.98, 1.2), 4, "inconclusive"),
        ((0.90, 1.2), 6, "inconclusive"),
        ((0.80, 0.9), 6, "does not hold"),
    ],
)
def test_a_claim_holds_only_if_its_whole_interval_does(
    ci95: tuple[float, float], pairs: int, verdict: str
) -> None:
    assert judge(ci95, pairs, at_least=0.972) == verdict


def test_the_closed_loop_s_gate_is_at_its_number_of_streams() -> None:
    measured = [
        {
            "tokens_per_s": 9.0,
            "tbt_median_ms": 1.0,
            "tbt_p95_ms": 2.0,
            "ttft_median_ms": 3.0,
            "ttft_p95_ms": 4.0,
        }
    ] * 5
    found = steady.compare(measured, measured, 32)
    assert found["gate"]["verdict"] == "holds"
    assert found["ttft_ms"]["vllm"]["median"] == 3.0
    assert "gate" not in steady.compare(measured, measured, 8)
    text = steady.table({"metrics": {"by_concurrency": {"32": found}}})
    assert "1.00 (1.00 to 1.00)" in text
    assert "gate" in text


def test_why_a_peer_does_not_come_up_is_one_sentence() -> None:
    log = """
    (EngineCore) File "x.py", line 1
    pydantic_core.ValidationError: 1 validation error for VllmConfig
      Value error, Total number of attention heads (9) must be divisible by 2. [type=value_error, input=1]
        For further information visit https://errors.pydantic.dev
    """
    assert peer.cause(log) == "Total number of attention heads (9) must be divisible by 2."
    parent = "ValueError: no such layer\nRuntimeError: Engine core initialization failed. See root cause."
    assert peer.cause(parent) == "no such layer"
    assert peer.cause("something\nKilled\n") == "Killed"
    assert peer.cause("") == "its log is empty"
