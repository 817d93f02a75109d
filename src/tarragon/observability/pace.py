"""How evenly do tokens arrive? Times between tokens over the last moments, and tokens in all. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Final

GAPS_MAX: Final = 8_192
"""Gaps that are remembered; beyond it the oldest go, whatever the window."""


class Pace:
    """Fed by the gateway with every output that leaves for a client; times are of one steady clock."""

    def __init__(self, window_s: float) -> None:
        self.tokens_total = 0
        self._window_s = window_s
        self._last_s: dict[str, float] = {}
        """When the newest token of each live request came."""
        self._gaps: deque[tuple[float, float]] = deque(maxlen=GAPS_MAX)
        """(when it ended, its length), seconds."""

    def sent(self, request_id: str, tokens: int, now_s: float) -> None:
        """``tokens`` more tokens of a request leave together."""
        if tokens <= 0:
            return
        self.tokens_total += tokens
        before_s = self._last_s.get(request_id)
        if before_s is not None:
            self._gaps.append((now_s, now_s - before_s))
        self._last_s[request_id] = now_s

    def gauges(self, live: Collection[str], now_s: float) -> dict[str, float]:
        """What a report says. ``live`` are the requests in progress: the others are forgotten.

        A stream that waits for its next token right now counts in ``tbt_ms_max`` with its wait so far, or a
        stall would show only when it is over. Without a token in the window there is neither median nor P95.
        """
        self._last_s = {request_id: s for request_id, s in self._last_s.items() if request_id in live}
        while self._gaps and self._gaps[0][0] < now_s - self._window_s:
            self._gaps.popleft()
        gaps = sorted(gap for _, gap in self._gaps)
        result = {"tokens_total": float(self.tokens_total), "streams_live": float(len(live))}
        if gaps:
            result["tbt_ms_median"] = 1e3 * gaps[len(gaps) // 2]
            result["tbt_ms_p95"] = 1e3 * gaps[min(len(gaps) - 1, int(0.95 * len(gaps)))]
        longest = [*gaps[-1:], *(now_s - s for s in self._last_s.values())]
        if longest:
            result["tbt_ms_max"] = 1e3 * max(longest)
        return result
