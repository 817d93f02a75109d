"""Gaps, stalls and equality of streams, on streams made by hand."""

from __future__ import annotations

import pytest

from tarragon.bench import timeline
from tarragon.bench.timeline import Gap, Trace


def trace(index: int, times_s: list[float], *, ended: bool = True, due_s: float | None = None) -> Trace:
    made = Trace(index, times_s[0] - 0.01 if due_s is None else due_s)
    for position, at in enumerate(times_s):
        made.take(position, 100 + position, at)
    made.finish_reason = "length"
    made.ended_s = times_s[-1] if ended else None
    return made


def steady(start_s: float, count: int, gap_s: float = 0.01) -> list[float]:
    return [start_s + i * gap_s for i in range(count)]


def test_gaps_of_several_streams_come_by_their_end_and_open_ones_count() -> None:
    found = timeline.gaps([trace(1, [0.0, 0.3, 0.4]), trace(2, [0.1, 0.2], ended=False)], now_s=1.0)
    assert found == [Gap(2, 0.1, 0.2), Gap(1, 0.0, 0.3), Gap(1, 0.3, 0.4), Gap(2, 0.2, 1.0)]


def test_a_gap_that_spans_the_fault_counts_whole_and_one_that_ended_before_does_not() -> None:
    found = [Gap(0, 0.0, 0.9), Gap(0, 0.9, 1.2), Gap(0, 2.1, 9.0)]
    assert timeline.open_between(found, 1.0, 2.0) == [Gap(0, 0.9, 1.2)]
    assert timeline.ended_between(found, 0.0, 1.2) == found[:2]


def test_the_stall_is_the_largest_gap_less_the_median_before() -> None:
    times = [*steady(0.0, 101), *steady(1.08, 100)]  # 1.00, then 1.08
    around = timeline.around_fault([trace(0, times)], fault_s=1.005, end_s=2.0, before_s=0.9)
    assert around["before"]["median_ms"] == pytest.approx(10.0)
    assert around["after"]["largest_ms"] == pytest.approx(80.0)
    assert around["stall_ms"] == pytest.approx(70.0)
    assert around["stall_began_s"] == pytest.approx(-0.005)
    assert around["resume_ms"]["max"] == pytest.approx(75.0)
    assert around["streams_live"] == 1
    assert around["before"]["tokens_per_s"] == pytest.approx(100.0, rel=0.03)


def test_a_stall_of_the_recovery_is_told_apart_from_that_of_the_fault() -> None:
    times = [*steady(0.0, 301), *steady(3.5, 100)]  # it stands still from 3.0 to 3.5
    around = timeline.around_fault([trace(0, times)], fault_s=1.0, end_s=4.0, before_s=0.9)
    assert around["stall_ms"] == pytest.approx(490.0)
    assert around["stall_began_s"] == pytest.approx(2.0)
    assert around["stall_first_second_ms"] == pytest.approx(0.0, abs=0.01)


def test_a_stream_that_never_goes_on_is_a_stall_as_long_as_the_window() -> None:
    around = timeline.around_fault([trace(0, steady(0.0, 101), ended=False)], 1.005, 6.0, before_s=0.9)
    assert around["after"]["largest_ms"] == pytest.approx(5_000.0)
    assert around["resume_ms"]["median"] == pytest.approx(4_995.0)


def test_streams_of_the_lost_worker_are_told_from_the_others() -> None:
    theirs = trace(7, [*steady(0.0, 101), *steady(1.2, 100)])
    other = trace(8, steady(0.0, 201))
    around = timeline.around_fault([theirs, other], fault_s=1.005, end_s=2.0, before_s=0.9, held=[7])
    assert around["held"]["stall_ms"] == pytest.approx(190.0)
    assert around["held"]["streams"] == 1
    assert around["others"]["stall_ms"] == pytest.approx(0.0, abs=0.01)
    assert "held" not in timeline.around_fault([theirs, other], 1.005, 2.0, before_s=0.9)


def test_a_request_that_waits_for_its_first_token_has_no_gap_but_is_seen() -> None:
    late = trace(1, [3.0, 3.01], due_s=1.1)
    around = timeline.around_fault([trace(0, steady(0.0, 201)), late], 1.0, 2.5, before_s=0.9)
    assert around["first_token_ms"]["max"] == pytest.approx(1_400.0)
    assert around["stall_ms"] == pytest.approx(0.0, abs=0.01)


def test_a_replay_adds_only_what_was_not_read_and_must_agree() -> None:
    replayed = trace(0, [0.0, 0.1], ended=False)
    for position, token in enumerate([100, 101, 102]):
        replayed.take(position, token, 5.0 + position)
    assert (replayed.tokens, replayed.times_s, replayed.error) == ([100, 101, 102], [0.0, 0.1, 7.0], "")
    replayed.take(0, 99, 9.0)
    assert "another token at position 0" in replayed.error


def test_the_series_bins_tokens_and_gaps() -> None:
    series = timeline.series([trace(0, [0.0, 0.05, 0.32])], fault_s=0.1, start_s=0.0, end_s=0.4)
    assert series["after_fault_s"] == [-0.05, 0.05, 0.15, 0.25]
    assert series["tokens_per_s"] == [20.0, 0.0, 0.0, 10.0]
    assert series["gap_largest_ms"] == [50.0, 0.0, 0.0, 270.0]


def test_windows_without_a_fault_are_as_long_as_asked() -> None:
    found = timeline.windows([trace(0, steady(0.0, 301))], 0.0, 3.0, 1.0)
    assert len(found) == 3
    assert [round(window["largest_ms"]) for window in found] == [10, 10, 10]


def test_any_difference_between_streams_is_found() -> None:
    ours = [trace(i, steady(0.0, 5)) for i in range(4)]
    undisturbed = [trace(i, steady(9.0, 5)) for i in range(4)]
    assert timeline.differing(ours, undisturbed) == []
    ours[1].tokens[2] += 1
    ours[2].text = "x"
    ours[3].finish_reason = "stop"
    assert timeline.differing(ours, undisturbed) == [1, 2, 3]


def test_a_failed_request_says_why() -> None:
    good, short, broken = (trace(i, steady(0.0, 5)) for i in range(3))
    short.tokens.pop()
    broken.error = "HTTP 503"
    faults = timeline.failed([good, short, broken], output_tokens=5)
    assert faults == {1: "4 tokens, finish reason length", 2: "HTTP 503"}
