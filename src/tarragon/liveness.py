"""Does a peer live (section 5, appendix E)? A pure state machine: observations and the time come in.

Whatever a peer sends is its heartbeat, and so is work that it is seen to do. While it owes something and is
silent, it is probed; probes in a row without an answer are fail-stop. Answers carry the peer's progress: one
that answers and does no work hangs just as well.

The watcher must not mistake its own absence for the peer's. It takes the time first, then takes up all
that has arrived, and only then asks ``next``. One question counts one miss at most and every miss has its
own interval after the question before, so that a watcher (or a machine) that was paused for seconds
accuses nobody.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from tarragon.config import Config

NEVER_US: Final = 1 << 62


class WaitUntil(NamedTuple):
    """Nothing to do before ``deadline_us``, unless something arrives."""

    deadline_us: int


class Probe(NamedTuple):
    """Send a probe of this sequence number now, and ask again at once."""

    sequence: int


class Failed(NamedTuple):
    """The peer is to be treated as dead; ``cause`` says why in one phrase."""

    cause: str


Verdict = WaitUntil | Probe | Failed


class Watch:
    """One watcher's view of one peer incarnation. Times are integer us of one monotonic clock.

    Args:
        config: ``probe_silence_ms``, ``probe_interval_ms``, ``probe_misses_max``.
        now_us: counts as the first sign of life.
        stall_ms_max: longest time of unchanged progress while something is owed; infinity: progress is not
            looked at.
        misses_max: instead of ``probe_misses_max``.
    """

    __slots__ = (
        "_answer_us",
        "_asked_us",
        "_interval_us",
        "_life_us",
        "_misses",
        "_misses_max",
        "_owed",
        "_progress",
        "_sequence",
        "_silence_us",
        "_stall_us_max",
        "_stalled_us",
        "probes",
    )

    def __init__(
        self, config: Config, now_us: int, stall_ms_max: float = math.inf, *, misses_max: int | None = None
    ) -> None:
        self._silence_us = int(config.probe_silence_ms * 1e3)
        self._interval_us = max(1, int(config.probe_interval_ms * 1e3))
        self._misses_max = config.probe_misses_max if misses_max is None else misses_max
        self._stall_us_max = stall_ms_max * 1e3
        self.probes = 0
        """Probes sent since the beginning."""
        self._sequence = 0
        self._life_us = now_us
        # The probe that waits for its answer: when it was sent (-1 for none), and how many before it missed.
        self._asked_us = -1
        self._misses = 0
        self._owed = True
        # Progress: its last value, when it was told, and for how long it has not changed.
        self._progress = -1
        self._answer_us = now_us
        self._stalled_us = 0

    @property
    def is_asking(self) -> bool:
        """Whether a probe waits for its answer."""
        return self._asked_us >= 0

    # ------------------------------------------------------------------ observations

    def heard(self, now_us: int) -> None:
        """The peer did what was expected of it, or began to owe something only now."""
        self._lives(now_us)
        self._progress, self._stalled_us = -1, 0

    def worked(self, at_us: int, now_us: int) -> None:
        """The peer says that it did something at ``at_us`` (transport/pulse.py)."""
        if self._life_us < at_us <= now_us + self._silence_us:  # else nothing new, or a time that cannot be
            self.heard(min(at_us, now_us))

    def answered(self, sequence: int, progress: int, now_us: int) -> None:
        """The answer to a probe; one that was never sent says nothing."""
        if not 0 < sequence <= self._sequence:
            return
        if progress != self._progress:
            self._progress, self._stalled_us = progress, 0
        else:
            # A gap longer than any between two answers means that somebody was paused: it does not count.
            gap_us = self._silence_us + (self._misses_max + 1) * self._interval_us
            self._stalled_us += min(now_us - self._answer_us, gap_us)
        self._answer_us = now_us
        self._lives(now_us)

    def _lives(self, now_us: int) -> None:
        self._life_us = max(self._life_us, now_us)
        self._asked_us, self._misses = -1, 0

    # ------------------------------------------------------------------ the question

    def next(self, now_us: int, owes: bool) -> Verdict:
        """What to do at ``now_us``, a time taken before the last look at what has arrived.

        ``owes``: the peer has something to answer. One that owes nothing is left in peace, and its silence
        until then is not held against it.
        """
        if not owes:
            self._owed = False
            return WaitUntil(NEVER_US)
        if not self._owed:
            self._owed = True
            if now_us - self._life_us > self._silence_us:
                self.heard(now_us)  # it had no reason to send anything until now
        if self._stalled_us >= self._stall_us_max:
            return Failed(f"no progress for {self._stalled_us / 1e3:.0f} ms, though it answers probes")
        if self._asked_us < 0:
            deadline_us = self._life_us + self._silence_us
            return self._probe(now_us) if now_us >= deadline_us else WaitUntil(deadline_us)
        deadline_us = self._asked_us + self._interval_us
        if now_us < deadline_us:
            return WaitUntil(deadline_us)
        self._misses += 1
        if self._misses < self._misses_max:
            return self._probe(now_us)
        return Failed(
            f"silent for {(now_us - self._life_us) / 1e3:.0f} ms, {self._misses} probes in a row unanswered"
        )

    def _probe(self, now_us: int) -> Probe:
        self._sequence += 1
        self.probes += 1
        self._asked_us = now_us
        return Probe(self._sequence)
