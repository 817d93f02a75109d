"""What do checkpoints cost a step? Steps with and without them, in turn, on the same streams (7.4).

Neighbouring steps compute the same but one token, on the same machine in the same moment: what drifts in
seconds is in both. So thousands of pairs can tell what windows of seconds cannot.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final, NamedTuple

PAIR_COST_MAX: Final = 0.5
"""Bound of what one pair may say of the wall time: beyond it the machine stood still in one of the two."""


class Spread:
    """Mean of numbers as they come, and its standard error."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0
        """Sum of the squared distances from the mean (Welford)."""

    def add(self, value: float) -> None:
        self.count += 1
        distance = value - self.mean
        self.mean += distance / self.count
        self._squares += distance * (value - self.mean)

    @property
    def error(self) -> float:
        """Standard error of the mean; 0.0 for fewer than two numbers."""
        if self.count < 2:
            return 0.0
        return math.sqrt(self._squares / (self.count - 1) / self.count)


class _Step(NamedTuple):
    protected: bool
    tokens: int
    wall_s: float
    cpu_s: float


class Comparison:
    """Says of each step whether it is to have checkpoints, in the order on, off, off, on, and compares.

    Args:
        wall_clock, cpu_clock: seconds; the second of this process on a core.
    """

    def __init__(
        self,
        wall_clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._wall_clock, self._cpu_clock = wall_clock, cpu_clock
        self._wall, self._cpu = Spread(), Spread()
        self._tokens = 0
        self._begun = 0
        self._running: _Step | None = None
        self._first: _Step | None = None

    def begin(self, tokens: int) -> bool:
        """Whether the step that begins now has checkpoints. ``tokens`` of 0: it is compared with no other."""
        pair, second = divmod(self._begun, 2)
        self._begun += 1
        if not second:
            self._first = None
        protected = (pair + second) % 2 == 0
        self._running = _Step(protected, tokens, self._wall_clock(), self._cpu_clock())
        return protected

    def end(self) -> None:
        """The step that began last is done."""
        wall_s, cpu_s, running = self._wall_clock(), self._cpu_clock(), self._running
        if running is None:
            return
        done = running._replace(wall_s=wall_s - running.wall_s, cpu_s=cpu_s - running.cpu_s)
        self._running = None
        if self._begun % 2:
            self._first = done
        elif self._first is not None and self._first.tokens == done.tokens != 0:
            self._compare(*((self._first, done) if self._first.protected else (done, self._first)))

    def _compare(self, protected: _Step, plain: _Step) -> None:
        cost = math.log(protected.wall_s / plain.wall_s)
        self._wall.add(min(PAIR_COST_MAX, max(-PAIR_COST_MAX, cost)))
        self._cpu.add(protected.cpu_s - plain.cpu_s)
        self._tokens += plain.tokens

    def counters(self) -> dict[str, float]:
        """Means over the pairs so far with their standard errors; the costs are logarithms of a ratio."""
        return {
            "compared_pairs": float(self._wall.count),
            "compared_tokens": float(self._tokens),
            "compared_wall_cost": self._wall.mean,
            "compared_wall_cost_error": self._wall.error,
            "compared_cpu_s": self._cpu.mean,
            "compared_cpu_s_error": self._cpu.error,
        }
