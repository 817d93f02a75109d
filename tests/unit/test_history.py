"""What /history is made of: rates from cumulative reports, and the times between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarragon.observability.history import History
from tarragon.observability.pace import GAPS_MAX, Pace


def history(**changes: Any) -> History:
    return History(**{"samples_max": 3, "report_interval_s": 1.0, "layers": 4, "top_k": 2, **changes})


def sampled(
    what: History, now_s: float, attention: Sequence[str] = ("aw-0",), expert: Sequence[str] = ("ew-0",)
) -> Any:
    what.sample(attention, expert, now_s, 1e9 + now_s)
    return what.latest()[-1]


def test_a_rate_is_the_growth_between_two_reports() -> None:
    h = history()
    h.report("aw-0", 1, {"pairs": 1_000.0}, 10.0)
    assert sampled(h, 10.1)["rows_per_s"] == {}
    h.report("aw-0", 1, {"pairs": 1_800.0}, 12.0)
    h.report("ew-0", 2, {"pairs": 0.0}, 11.0)
    h.report("ew-0", 2, {"pairs": 160.0}, 12.0)
    sample = sampled(h, 12.1)
    assert sample["rows_per_s"] == {"aw-0": 400.0, "ew-0": 160.0}
    assert sample["tokens_computed_per_s"] == 50.0
    assert sample["tokens_per_s"] is None
    assert sample["time_s"] == 1e9 + 12.1


def test_a_new_incarnation_starts_from_nothing_and_the_dead_have_no_rate() -> None:
    h = history()
    h.report("aw-0", 1, {"pairs": 1_000.0}, 1.0)
    h.report("aw-0", 2, {"pairs": 10.0}, 2.0)
    assert sampled(h, 2.0)["rows_per_s"] == {}
    h.report("aw-0", 2, {"pairs": 30.0}, 3.0)
    assert sampled(h, 3.0)["rows_per_s"] == {"aw-0": 20.0}
    assert sampled(h, 3.0, attention=[])["rows_per_s"] == {}


def test_a_worker_that_reports_no_more_has_no_rate() -> None:
    h = history()
    for s in (1.0, 2.0):
        h.report("ew-0", 1, {"pairs": 100 * s}, s)
    assert sampled(h, 4.4)["rows_per_s"] == {"ew-0": 100.0}
    assert sampled(h, 4.6)["rows_per_s"] == {}


def test_what_the_gateway_says_is_taken_as_it_is() -> None:
    h = history()
    said = {"tbt_ms_median": 21.0, "tbt_ms_p95": 30.004, "tbt_ms_max": 250.0, "streams_live": 4.0}
    h.report("gateway", 1, {"tokens_total": 100.0, **said}, 1.0)
    h.report("gateway", 1, {"tokens_total": 160.0, **said}, 2.0)
    sample = sampled(h, 2.0, attention=["aw-0", "aw-1"])
    assert sample["tokens_per_s"] == 60.0
    assert sample["tbt_ms"] == {"median": 21.0, "p95": 30.0, "max": 250.0}
    assert (sample["streams"], sample["checkpoint_lag_ms"]) == (4.0, None)


def test_checkpoint_lag_is_the_time_of_a_step_until_its_rows_are_committed() -> None:
    h = history()
    for s, layers, spent_s in ((1.0, 0.0, 0.0), (2.0, 80.0, 0.04)):
        h.report("aw-0", 1, {"layers": layers, "checkpoint_s": spent_s, "bucket": 1.0}, s)
        h.report("aw-1", 2, {"layers": layers, "checkpoint_s": 2 * spent_s, "bucket": 0.0}, s)
    assert sampled(h, 2.0, attention=["aw-0", "aw-1"])["checkpoint_lag_ms"] == 2.0, "aw-1 writes nothing"
    h.report("aw-0", 1, {"layers": 80.0, "checkpoint_s": 0.04, "bucket": 1.0}, 3.0)
    assert sampled(h, 3.0)["checkpoint_lag_ms"] is None, "no step, no lag"


def test_it_remembers_so_many_samples_and_no_more() -> None:
    h = history()
    for s in range(1, 6):
        h.sample([], [], float(s), float(s))
    assert [sample["number"] for sample in h.latest()] == [3, 4, 5]
    assert [sample["number"] for sample in h.latest(after=4)] == [5]
    assert h.latest(after=9) == []


# ------------------------------------------------------------------ times between tokens


def test_gaps_are_within_a_stream_never_between_streams() -> None:
    pace = Pace(window_s=1.0)
    for request_id, s in (("a", 0.0), ("b", 0.5), ("a", 0.02), ("b", 0.51)):
        pace.sent(request_id, 1, s)
    gauges = pace.gauges({"a", "b"}, 0.51)
    assert gauges["tokens_total"] == 4
    assert gauges["streams_live"] == 2
    assert gauges["tbt_ms_median"] == pytest.approx(20.0)
    assert gauges["tbt_ms_p95"] == pytest.approx(20.0)
    assert gauges["tbt_ms_max"] == pytest.approx(490.0), "a waits since 0.02"


def test_a_stall_shows_while_it_lasts() -> None:
    pace = Pace(window_s=1.0)
    pace.sent("a", 1, 0.0)
    assert pace.gauges({"a"}, 5.0)["tbt_ms_max"] == pytest.approx(5_000.0)
    assert "tbt_ms_max" not in pace.gauges({"b"}, 5.0), "a has ended"
    pace.sent("a", 1, 6.0)
    assert "tbt_ms_median" not in pace.gauges({"a"}, 6.0), "its former token was forgotten"


def test_the_window_moves_on_and_nothing_is_not_a_token() -> None:
    pace = Pace(window_s=1.0)
    for s in (0.0, 0.9, 1.0):
        pace.sent("a", 1, s)
    pace.sent("a", 0, 9.0)
    assert pace.gauges({"a"}, 1.95)["tbt_ms_median"] == pytest.approx(100.0)
    assert pace.tokens_total == 3


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 10.0), min_size=1, max_size=50))
def test_median_p95_and_max_are_in_order(gaps: list[float]) -> None:
    pace, now_s = Pace(window_s=1e9), 0.0
    pace.sent("a", 1, now_s)
    for gap in gaps:
        now_s += gap
        pace.sent("a", 1, now_s)
    gauges = pace.gauges({"a"}, now_s)
    assert gauges["tbt_ms_median"] <= gauges["tbt_ms_p95"] <= gauges["tbt_ms_max"]
    assert gauges["tbt_ms_max"] == pytest.approx(1e3 * max(gaps))


def test_memory_is_bounded() -> None:
    pace = Pace(window_s=1e9)
    for index in range(GAPS_MAX + 100):
        pace.sent("a", 1, float(index))
    assert len(pace._gaps) == GAPS_MAX
