"""How did the last minutes go? A bounded list of samples made of the workers' reports. Pure.

Reports carry counters that only grow; a rate is the growth between two reports of one incarnation, so a
sample never depends on when it is taken, and a restarted worker never shows a negative rate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

STALE_REPORTS: Final = 2.5
"""A worker that has not reported for so many intervals has no rate any more."""
GATEWAY: Final = "gateway"


@dataclass
class _Reported:
    """The last report of one incarnation, and the rates (per second) since the one before."""

    epoch: int
    time_s: float
    counters: Mapping[str, float]
    rates: dict[str, float] = field(default_factory=dict)


class History:
    """The last samples, with a number that counts up from 1."""

    def __init__(self, *, samples_max: int, report_interval_s: float, layers: int, top_k: int) -> None:
        """``layers`` (MoE) and ``top_k`` of the model turn (token, expert) pairs into tokens."""
        assert samples_max > 0
        assert layers > 0
        assert top_k > 0
        self._samples: deque[dict[str, Any]] = deque(maxlen=samples_max)
        self._stale_s = STALE_REPORTS * report_interval_s
        self._layers, self._top_k = layers, top_k
        self._reported: dict[str, _Reported] = {}
        self._number = 0

    def report(self, worker_id: str, epoch: int, counters: Mapping[str, float], now_s: float) -> None:
        """Take up a report of a live incarnation; ``now_s`` is of a steady clock."""
        reported = _Reported(epoch, now_s, counters)
        before = self._reported.get(worker_id)
        if before is not None and before.epoch == epoch and now_s > before.time_s:
            passed_s = now_s - before.time_s
            reported.rates = {
                name: max(0.0, value - before.counters[name]) / passed_s
                for name, value in counters.items()
                if name in before.counters
            }
        self._reported[worker_id] = reported

    def sample(
        self, attention: Collection[str], expert: Collection[str], now_s: float, time_s: float
    ) -> None:
        """Add a sample; the ids are those of live workers. ``time_s`` counts from 1970."""
        fresh = {i: r for i, r in self._reported.items() if now_s - r.time_s <= self._stale_s}
        self._reported = fresh
        rows = {
            i: round(fresh[i].rates["pairs"], 1)
            for i in [*attention, *expert]
            if i in fresh and "pairs" in fresh[i].rates
        }
        gateway = fresh.get(GATEWAY)
        said = {} if gateway is None else gateway.counters
        lags = [lag for i in attention if i in fresh and (lag := self._lag_ms(fresh[i])) is not None]
        self._number += 1
        self._samples.append(
            {
                "number": self._number,
                "time_s": round(time_s, 3),
                "tokens_per_s": None if gateway is None else _rounded(gateway.rates.get("tokens_total")),
                "tokens_computed_per_s": self._computed([rows[i] for i in attention if i in rows]),
                "tbt_ms": {name: _rounded(said.get(f"tbt_ms_{name}")) for name in ("median", "p95", "max")},
                "streams": said.get("streams_live"),
                "checkpoint_lag_ms": _rounded(max(lags, default=None)),
                "rows_per_s": rows,
            }
        )

    def latest(self, after: int = 0) -> list[dict[str, Any]]:
        """All samples whose number is above ``after``, oldest first."""
        return [sample for sample in self._samples if sample["number"] > after]

    def _computed(self, rates: list[float]) -> float | None:
        """Tokens per second that attention workers computed, those of prompts included."""
        return round(sum(rates) / (self._layers * self._top_k), 1) if rates else None

    def _lag_ms(self, reported: _Reported) -> float | None:
        """How long a step's tokens wait until the state behind them is committed.

        A token leaves only when it is (output commit), so this is the time that a step spends on writing
        and committing its rows; None while no step was run, or nothing is written.
        """
        steps = reported.rates.get("layers", 0.0) / self._layers
        spent_s = reported.rates.get("checkpoint_s")
        return (
            None
            if not steps or not reported.counters.get("bucket") or spent_s is None
            else 1e3 * spent_s / steps
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
