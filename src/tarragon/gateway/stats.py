"""Which of vLLM's per-engine metrics an attention worker's statistics go to: pure bookkeeping.

vLLM's loggers know a fixed number of engines from the start; attention workers come and go. Worker ``aw-3``
is engine 3 while there are that many; others share the engines there are.
"""

from __future__ import annotations

import dataclasses
import re

from vllm.v1.metrics.stats import SchedulerStats

_GAUGES = ("num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs")


class EngineSlots:
    """Maps workers to engine indexes in ``range(count)`` and adds up the gauges of those that share one."""

    def __init__(self, count: int) -> None:
        assert count > 0
        self._latest: list[dict[str, SchedulerStats]] = [{} for _ in range(count)]

    def slot(self, worker_id: str) -> int:
        """Return the engine index of a worker; it does not change."""
        number = re.search(r"\d+$", worker_id)
        return int(number.group()) % len(self._latest) if number else 0

    def merged(self, worker_id: str, stats: SchedulerStats) -> SchedulerStats:
        """Return the engine's statistics now that ``worker_id`` reported ``stats``.

        Gauges are summed over the workers of the engine (of the cache's fill, the highest counts);
        everything else is an increment and stays as reported.
        """
        latest = self._latest[self.slot(worker_id)]
        latest[worker_id] = stats
        if len(latest) == 1:
            return stats
        return self._add_up(latest, stats)

    def gone(self, worker_id: str) -> SchedulerStats:
        """Return the engine's statistics without ``worker_id``: gauges of a dead worker must not stay."""
        latest = self._latest[self.slot(worker_id)]
        latest.pop(worker_id, None)
        return self._add_up(latest, SchedulerStats())

    @staticmethod
    def _add_up(latest: dict[str, SchedulerStats], increment: SchedulerStats) -> SchedulerStats:
        sums = {name: sum(getattr(stats, name) for stats in latest.values()) for name in _GAUGES}
        usage = max((stats.kv_cache_usage for stats in latest.values()), default=0.0)
        return dataclasses.replace(increment, kv_cache_usage=usage, **sums)
