"""Liveness: a peer that hangs is found in time, and nobody else is accused (section 5, appendix E)."""

from __future__ import annotations

import math
import random

import pytest

from tarragon.config import Config
from tarragon.liveness import Failed, Probe, Verdict, WaitUntil, Watch

CONFIG = Config(probe_silence_ms=50.0, probe_interval_ms=20.0, probe_misses_max=3)
MS = 1_000


def watch(stall_ms_max: float = math.inf, now_us: int = 0) -> Watch:
    return Watch(CONFIG, now_us, stall_ms_max)


def probe(watched: Watch, now_us: int) -> int:
    verdict = watched.next(now_us, True)
    assert isinstance(verdict, Probe), verdict
    return verdict.sequence


def test_nothing_happens_before_the_silence_is_over() -> None:
    watched = watch()
    assert watched.next(0, True) == WaitUntil(50 * MS)
    assert watched.next(49_999, True) == WaitUntil(50 * MS)
    assert watched.next(50 * MS, True) == Probe(1)


def test_data_is_a_heartbeat() -> None:
    watched = watch()
    watched.heard(40 * MS)
    assert watched.next(60 * MS, True) == WaitUntil(90 * MS)


def test_a_set_number_of_missed_probes_is_fail_stop() -> None:
    watched = watch()
    assert [watched.next(at * MS, True) for at in (50, 70, 90)] == [Probe(1), Probe(2), Probe(3)]
    assert watched.next(109 * MS, True) == WaitUntil(110 * MS)
    verdict = watched.next(110 * MS, True)
    assert verdict == Failed("silent for 110 ms, 3 probes in a row unanswered")


@pytest.mark.parametrize("answered", [1, 2, 3])
def test_any_answer_begins_anew(answered: int) -> None:
    watched = watch()
    for at in (50, 70, 90):
        probe(watched, at * MS)
    watched.answered(answered, 7, 100 * MS)
    assert watched.next(110 * MS, True) == WaitUntil(150 * MS)
    assert [watched.next(at * MS, True) for at in (150, 170, 190)] == [Probe(4), Probe(5), Probe(6)]
    assert isinstance(watched.next(210 * MS, True), Failed)


def test_an_answer_to_a_probe_that_was_never_sent_says_nothing() -> None:
    watched = watch()
    probe(watched, 50 * MS)
    for sequence in (0, 2, -1, 1 << 63):
        watched.answered(sequence, 1, 60 * MS)
    assert watched.next(60 * MS, True) == WaitUntil(70 * MS)


def test_who_owes_nothing_is_left_in_peace_and_its_silence_does_not_count() -> None:
    watched = watch()
    assert isinstance(watched.next(10_000 * MS, False), WaitUntil)
    assert watched.next(20_000 * MS, True) == WaitUntil(20_050 * MS)
    assert watched.next(20_050 * MS, True) == Probe(1)


def test_a_watcher_that_was_away_accuses_nobody() -> None:
    watched = watch()
    probe(watched, 50 * MS)
    assert watched.next(9_000 * MS, True) == Probe(2), "one miss at most after a pause"
    assert watched.next(9_001 * MS, True) == WaitUntil(9_020 * MS), "every probe has its own interval"
    watched.answered(2, 1, 9_002 * MS)
    assert watched.next(9_020 * MS, True) == WaitUntil(9_052 * MS)


def test_answers_without_progress_are_a_failure() -> None:
    watched = watch(stall_ms_max=200.0)
    now_us, verdict = 0, watched.next(0, True)
    while not isinstance(verdict, Failed):
        now_us = verdict.deadline_us if isinstance(verdict, WaitUntil) else now_us
        if isinstance(verdict, Probe):
            watched.answered(verdict.sequence, 5, now_us)
        assert now_us < 1_000 * MS
        verdict = watched.next(now_us, True)
    assert verdict.cause == "no progress for 200 ms, though it answers probes"
    assert now_us == 250 * MS, "the clock starts with the first answer"


def test_progress_is_taken_for_what_it_is() -> None:
    watched = watch(stall_ms_max=200.0)
    for step in range(1, 50):
        watched.answered(probe(watched, step * 50 * MS), step // 3, step * 50 * MS)


def test_data_is_progress_too() -> None:
    watched = watch(stall_ms_max=100.0)
    for step in range(1, 20):
        watched.answered(probe(watched, step * 100 * MS), 5, step * 100 * MS)
        watched.heard(step * 100 * MS + 50 * MS)


def test_a_pause_of_the_whole_machine_is_no_lack_of_progress() -> None:
    watched = watch(stall_ms_max=500.0)
    watched.answered(probe(watched, 50 * MS), 5, 50 * MS)
    watched.answered(probe(watched, 60_000 * MS), 5, 60_000 * MS)
    assert isinstance(watched.next(60_000 * MS, True), WaitUntil)


class Peer:
    """A simulated peer: answers each probe after a delay, unless it hangs from some time on."""

    def __init__(self, rng: random.Random, hangs_us: float) -> None:
        self.rng, self.hangs_us = rng, hangs_us
        self.answers: list[tuple[int, int]] = []  # arrives at, sequence

    def probed(self, sequence: int, now_us: int, delay_us_max: int) -> None:
        arrives_us = now_us + self.rng.randrange(delay_us_max)
        if arrives_us < self.hangs_us:
            self.answers.append((arrives_us, sequence))

    def arrived(self, now_us: int) -> list[int]:
        here = [sequence for arrives_us, sequence in self.answers if arrives_us <= now_us]
        self.answers = [answer for answer in self.answers if answer[0] > now_us]
        return here


def run(seed: int, *, hangs_us: float, until_us: int, pauses: bool) -> tuple[int, Verdict]:
    """Watch a peer that owes all the time; returns when and with what it ended."""
    rng = random.Random(seed)
    peer, watched = Peer(rng, hangs_us), watch(stall_ms_max=1_000.0)
    now_us = progress = 0
    while now_us < until_us:
        for sequence in peer.arrived(now_us):
            progress += rng.random() < 0.9
            watched.answered(sequence, progress, now_us)
        verdict = watched.next(now_us, True)
        if isinstance(verdict, Failed):
            return now_us, verdict
        if isinstance(verdict, Probe):
            # Any delay below the patience of all probes together is that of a busy machine.
            peer.probed(verdict.sequence, now_us, 3 * 20 * MS)
            continue
        wake_us = min([verdict.deadline_us, *(at for at, _ in peer.answers)])
        now_us = max(wake_us, now_us) + rng.randrange(1 * MS)
        if pauses and rng.random() < 0.1:
            now_us += rng.randrange(5_000 * MS)
    return now_us, verdict


@pytest.mark.parametrize("seed", range(30))
def test_no_live_peer_is_ever_accused_however_busy_both_sides_are(seed: int) -> None:
    _, verdict = run(seed, hangs_us=math.inf, until_us=600_000 * MS, pauses=True)
    assert not isinstance(verdict, Failed), verdict


@pytest.mark.parametrize("seed", range(100))
def test_a_hang_is_always_found_within_the_bound(seed: int) -> None:
    hangs_us = random.Random(seed).randrange(2_000 * MS)
    found_us, verdict = run(seed, hangs_us=hangs_us, until_us=10_000 * MS, pauses=False)
    assert isinstance(verdict, Failed)
    # The last answer may just have left; then silence, three intervals, and a late wake-up each.
    assert hangs_us < found_us <= hangs_us + (50 + 3 * 20 + 4) * MS


def test_work_that_is_seen_is_a_sign_of_life_of_its_own_time() -> None:
    watched = watch()
    watched.worked(30 * MS, 50 * MS)
    assert watched.next(50 * MS, True) == WaitUntil(80 * MS)
    watched.worked(30 * MS, 80 * MS)
    assert watched.next(80 * MS, True) == Probe(1), "nothing new"
    assert watched.is_asking
    watched.worked(30 * MS, 100 * MS)
    assert watched.next(100 * MS, True) == Probe(2), "old work is no answer"
    watched.worked(101 * MS, 102 * MS)
    assert not watched.is_asking
    assert watched.next(102 * MS, True) == WaitUntil(151 * MS)


def test_work_after_the_look_counts_for_no_more_than_that() -> None:
    watched = watch()
    watched.worked(41 * MS, 40 * MS)
    assert watched.next(40 * MS, True) == WaitUntil(90 * MS)


def test_work_of_a_time_to_come_says_nothing() -> None:
    watched = watch()
    watched.worked(1 << 60, 40 * MS)
    assert watched.next(50 * MS, True) == Probe(1)
