"""How many rows does an expert get at once? Counted by layer from the ids of each batch (appendix B).

The compute thread only copies a batch's ids into a log that was allocated beforehand; whoever reports (once a
second, in another thread) makes a histogram of what has gathered. What does not fit until then is counted as
skipped, so that a busy worker is sampled and never slowed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

BOUNDS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""A call of an expert falls under the first bound that is not below its rows, or beyond them all."""
BEYOND: Final = "more"
SKIPPED: Final = "batches_not_counted"
LOG_PAIRS_MAX: Final = 1 << 18
LOG_BATCHES_MAX: Final = 1 << 12
_NAME: Final = re.compile(r"expert_calls_layer_(\d+)_rows_(\w+)")

IntArray = npt.NDArray[Any]
Histogram = dict[int, list[float]]
"""By layer: calls under each of BOUNDS, and beyond them."""


class _Log:
    """Batches one after the other; linear, filled once."""

    def __init__(self) -> None:
        self.ids = np.empty(LOG_PAIRS_MAX, dtype=np.int32)
        self.layers = np.empty(LOG_BATCHES_MAX, dtype=np.int32)
        self.pairs = np.empty(LOG_BATCHES_MAX, dtype=np.int64)
        self.batches = self.end = self.skipped = 0


class BatchSizes:
    """Counts of one expert worker."""

    def __init__(self, layers: int, experts: int) -> None:
        self._experts = experts
        self._calls = np.zeros((layers, len(BOUNDS) + 1), dtype=np.int64)
        self._skipped = 0
        self._log, self._spare = _Log(), _Log()
        self._lock = threading.Lock()

    def note(self, layer: int, ids: IntArray) -> None:
        """A batch of ``layer`` was run on rows of these experts, int [pairs]; for the compute thread."""
        with self._lock:
            log, pairs = self._log, len(ids)
            if log.batches == LOG_BATCHES_MAX or log.end + pairs > LOG_PAIRS_MAX:
                log.skipped += 1
                return
            log.ids[log.end : log.end + pairs] = ids
            log.layers[log.batches], log.pairs[log.batches] = layer, pairs
            log.end += pairs
            log.batches += 1

    def counters(self) -> dict[str, float]:
        """Everything so far, by name; for one reporting thread."""
        with self._lock:
            self._log, self._spare = self._spare, self._log
        full = self._spare
        self._take_up(full)
        full.batches = full.end = full.skipped = 0
        found = {SKIPPED: float(self._skipped)}
        for layer, row in enumerate(self._calls.tolist()):
            for bound, calls in zip([*BOUNDS, BEYOND], row, strict=True):
                found[f"expert_calls_layer_{layer}_rows_{bound}"] = float(calls)
        return found

    def _take_up(self, log: _Log) -> None:
        self._skipped += log.skipped
        batch = np.repeat(np.arange(log.batches), log.pairs[: log.batches])
        cells = batch * self._experts + log.ids[: log.end]
        rows = np.bincount(cells, minlength=log.batches * self._experts).reshape(log.batches, self._experts)
        called = rows.nonzero()
        layers = log.layers[called[0]]
        np.add.at(self._calls, (layers, np.searchsorted(BOUNDS, rows[called])), 1)


def histogram(counters: Mapping[str, float]) -> Histogram:
    """The counts in a report's counters, by layer."""
    found: Histogram = {}
    for name, calls in counters.items():
        match = _NAME.fullmatch(name)
        if match is not None:
            row = found.setdefault(int(match[1]), [0.0] * (len(BOUNDS) + 1))
            row[len(BOUNDS) if match[2] == BEYOND else BOUNDS.index(int(match[2]))] = calls
    return found
