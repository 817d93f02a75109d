"""For how long has a worker said nothing, as far as anybody was there to hear it? Pure."""

from __future__ import annotations

from tarragon.config import TICK_COUNTED_S_MAX


class Silence:
    """Adds up the time between looks at which nothing new was heard."""

    def __init__(self) -> None:
        self._looked_s = 0.0
        self._heard_s: float | None = None
        self._silent_s = 0.0

    def look(self, heard_s: float | None, now_s: float) -> float:
        """Seconds of silence until now.

        Args:
            heard_s: when the worker was heard last; None if there is nobody to be heard.
        """
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        if heard_s is None or heard_s != self._heard_s:
            self._heard_s, self._silent_s = heard_s, 0.0
        else:
            self._silent_s += min(passed_s, TICK_COUNTED_S_MAX)
        return self._silent_s

    def begin_anew(self) -> None:
        """Something was done about it."""
        self._silent_s = 0.0
