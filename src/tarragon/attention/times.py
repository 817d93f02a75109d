"""Where an attention worker's engine thread spends its time: taken at step boundaries, read by reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

PARTS: Final = ("step_s", "forward_s", "sample_s", "intake_s", "deliver_s")


class StepTimes:
    """Sums since the start, in seconds; ``forward_s`` and ``sample_s`` lie within ``step_s``.

    What is reported is the state at the end of the last step: parts of a step under way would not add up.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._reported: dict[str, float] = {}

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``name``, one of PARTS."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def end_step(self, experts: Mapping[str, float]) -> None:
        """A step and its output are done; ``experts`` are REFE's counters, which lie within ``forward_s``."""
        self.steps += 1
        self._reported = {
            "steps": float(self.steps),
            **self._seconds,
            **{f"experts_{name}": experts[name] for name in ("dispatch_s", "wait_s", "combine_s")},
            "clock_s": time.perf_counter(),
        }

    def as_dict(self) -> dict[str, float]:
        return self._reported


TIMES: Final = StepTimes()
"""Of this process: it runs one engine."""
