"""What has happened to workers since this orchestrator started: failures, and new ones. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Any, Final

from tarragon.messages import Role

PROVISIONING_BUCKETS_S: Final = (1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the histogram of the time that a worker takes from its start to being ready."""


class Tally:
    """Counts; never forgets."""

    def __init__(self) -> None:
        self._failures: dict[Role, Counter[str]] = {}
        self._times: dict[Role, tuple[list[int], list[float]]] = {}

    def failed(self, role: Role, kind: str) -> None:
        """A worker that served is lost; ``kind`` is the cause in one word."""
        self._failures.setdefault(role, Counter())[kind] += 1

    def provisioned(self, role: Role, seconds: float) -> None:
        """A worker became ready so long after it was started."""
        counts, total = self._times.setdefault(role, ([0] * (len(PROVISIONING_BUCKETS_S) + 1), [0.0]))
        counts[bisect_left(PROVISIONING_BUCKETS_S, seconds)] += 1
        total[0] += seconds

    def as_dict(self) -> dict[str, Any]:
        """For the status: failures by role and cause; per role how many workers came up, and how fast."""
        return {
            "failures": {role: dict(kinds) for role, kinds in self._failures.items()},
            "provisioning": {
                role: {
                    "count": sum(counts),
                    "sum_s": round(total, 3),
                    "counts": dict(zip([*map(str, PROVISIONING_BUCKETS_S), "+Inf"], counts, strict=True)),
                }
                for role, (counts, [total]) in self._times.items()
            },
        }
