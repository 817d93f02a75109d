"""What does a running cluster say, again and again? A reader of the admin API that keeps what views need."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from tarragon.admin import AdminClient

SAMPLES_MAX: Final = 900
EVENTS_MAX: Final = 400


class Poller:
    """After each ``poll``: the newest status and table, the last samples, and the events that are new."""

    def __init__(self, admin: AdminClient) -> None:
        self.admin = admin
        self.status: dict[str, Any] = {}
        self.table: dict[str, Any] = {"version": None, "workers": [], "candidates": []}
        self.samples: deque[dict[str, Any]] = deque(maxlen=SAMPLES_MAX)
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._orchestrator: int | None = None
        self._event = 0
        self._sample = 0

    def poll(self) -> list[dict[str, Any]]:
        """Ask once; return the new events. Raises AdminError."""
        status = self.admin.status()
        self._notice_restart(status)
        events: list[dict[str, Any]] = self._get(f"/events?after={self._event}")["events"]
        samples: list[dict[str, Any]] = self._get(f"/history?after={self._sample}")["samples"]
        if status["ert_version"] != self.table["version"]:
            self.table = self._get("/table")
        self.status = status
        self.events.extend(events)
        self.samples.extend(samples)
        if events:
            self._event = events[-1]["number"]
        if samples:
            self._sample = samples[-1]["number"]
        return events

    @property
    def rates(self) -> dict[str, float]:
        """Rows per second of each worker, as of the newest sample."""
        rates: dict[str, float] = self.samples[-1]["rows_per_s"] if self.samples else {}
        return rates

    def _notice_restart(self, status: dict[str, Any]) -> None:
        """A restarted orchestrator counts its events and samples from 1 again."""
        epochs = [worker["epoch"] for worker in status["workers"] if worker["role"] == "orchestrator"]
        epoch = epochs[0] if epochs else None
        if self._orchestrator not in (None, epoch):
            self._event = self._sample = 0
            self.table = {**self.table, "version": None}
        self._orchestrator = epoch

    def _get(self, path: str) -> dict[str, Any]:
        return self.admin.request("GET", path)
