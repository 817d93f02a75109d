"""The proof's arithmetic: pauses, equality, and what is said of them."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from tarragon.observability.proof import Answer, Kill, median_gap_s, report, stall_s


def answer(times_s: list[float], text: str = "", finish_reason: str = "stop") -> Answer:
    made = Answer(finish_reason=finish_reason)
    for index, time_s in enumerate(times_s):
        made.take(text[index] if text else "x", time_s)
    return made


def shown(disturbed: Answer, undisturbed: Answer, kills: list[Kill], back_s: list[float]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(report(disturbed, undisturbed, kills, back_s))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_stall_is_the_longest_pause_that_ended_after_the_kill() -> None:
    times_s = [0.0, 0.9, 1.0, 1.1, 1.4, 1.5, 2.5, 2.6]
    made = answer(times_s)
    assert stall_s(made, Kill("ew-0", 1.12, 4), until_s=2.0) == pytest.approx(0.3)
    assert stall_s(made, Kill("ew-0", 1.12, 4), until_s=1.3) == pytest.approx(0.3), "nothing until the next"
    assert stall_s(made, Kill("aw-0", 1.6, 6), until_s=9.0) == pytest.approx(1.0)
    assert median_gap_s(made) == pytest.approx(0.1)


def test_a_stream_that_ended_has_no_stall() -> None:
    assert stall_s(answer([0.0, 0.1]), Kill("aw-0", 0.2, 2), until_s=9.0) is None
    assert median_gap_s(answer([1.0])) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (answer([0, 1], "ab"), answer([0, 9], "ab"), True),
        (answer([0, 1], "ab"), answer([0, 1], "aB"), False),
        (answer([0, 1], "ab"), answer([0], "a"), False),
        (answer([0], "a"), answer([0], "a", finish_reason="length"), False),
        (answer([0], "é"), answer([0, 1], "e\u0301"), False),
    ],
)
def test_equal_means_every_byte_and_the_same_end(one: Answer, other: Answer, same: bool) -> None:
    assert one.same_as(other) is same
    text = shown(one, other, [], [])
    assert ("Equal, byte for byte (2 bytes): yes" in text) is same
    assert ("NO" in text) is not same


def test_the_report_says_what_each_death_cost() -> None:
    made = answer([0.0, 0.1, 0.5, 0.6, 0.7, 1.9, 2.0], "tarragon"[:7])
    kills = [Kill("ew-0", 0.15, 2), Kill("aw-1", 0.75, 5)]
    text = shown(made, made, kills, [2.31, math.nan])
    [ew] = [line for line in text.splitlines() if "ew-0" in line]
    [aw] = [line for line in text.splitlines() if "aw-1" in line]
    assert ew.split() == "ew-0 2 pieces 400 ms 100 ms 2.3 s".split()  # noqa: SIM905
    assert "1,200 ms" in aw
    assert "not yet" in aw


def test_a_broken_stream_is_told_with_the_place_where_it_broke() -> None:
    broken = answer([0.0, 0.1], "ab", finish_reason="")
    text = shown(broken, answer([0, 1, 2], "abc"), [Kill("aw-0", 0.2, 2)], [1.0])
    assert "the stream ended" in text
    assert "the first 2 characters are; ended by an error and by stop" in text
