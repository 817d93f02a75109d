"""Simulated time: what happens when, in us; the same seed gives the same order."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """Runs what was put on it in the order of time, and of putting among equals."""

    def __init__(self) -> None:
        self.now = 0
        self._sequence = 0
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []

    def after(self, delay_us: int, action: Callable[..., None], *args: Any) -> None:
        """Call ``action(*args)`` in ``delay_us``."""
        self.at(self.now + delay_us, action, *args)

    def at(self, time_us: int, action: Callable[..., None], *args: Any) -> None:
        """Call ``action(*args)`` at ``time_us``."""
        assert time_us >= self.now, "the past cannot be changed"
        self._sequence += 1
        heapq.heappush(self._events, (time_us, self._sequence, action, args))

    def run(self, until_us: int) -> bool:
        """Run until nothing is left (True) or ``until_us`` has passed (False)."""
        events = self._events
        while events:
            if events[0][0] > until_us:
                return False
            self.now, _, action, args = heapq.heappop(events)
            action(*args)
        return True
