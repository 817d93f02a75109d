"""How much is each expert used? Sums of what expert workers report, across their incarnations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class ExpertUsage:
    """Rows computed per [layer][expert] by all workers since the orchestrator started."""

    def __init__(self, layers: int, experts: int) -> None:
        self._shape = (layers, experts)
        self._former: npt.NDArray[np.float64] = np.zeros(self._shape, dtype=np.float64)
        self._latest: dict[str, tuple[int, npt.NDArray[np.float64]]] = {}

    def report(self, worker_id: str, epoch: int, pairs: Sequence[Sequence[int]]) -> bool:
        """Take up what one incarnation has computed since it started; False if the counts are malformed."""
        layers, experts = self._shape
        if len(pairs) != layers or any(len(row) != experts for row in pairs):
            return False
        counts = np.array(pairs, dtype=np.float64)
        if (counts < 0).any():
            return False
        known_epoch, known = self._latest.get(worker_id, (epoch, None))
        if known_epoch != epoch and known is not None:
            self._former += known
        self._latest[worker_id] = (epoch, counts)
        return True

    def totals(self) -> list[list[float]] | None:
        """Rows per [layer][expert], or None while nothing was computed yet."""
        total = self._former + sum(counts for _, counts in self._latest.values())
        result: list[list[float]] = total.tolist()
        return result if total.any() else None
