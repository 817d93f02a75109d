"""What happened lately? A bounded list of events for people, and for programs that follow it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tarragon.orchestrator.actions import Note


class Events:
    """The last notes with their time (seconds since 1970) and a number that counts up from 1."""

    def __init__(self, events_max: int, clock: Callable[[], float] = time.time) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=events_max)
        self._clock = clock
        self._number = 0

    def add(self, note: Note) -> None:
        self._number += 1
        self._events.append(
            {
                "number": self._number,
                "time_s": round(self._clock(), 6),
                "kind": note.kind,
                "worker_id": note.worker_id,
                "epoch": note.epoch,
                "text": note.text,
            }
        )

    def latest(self, limit: int, after: int = 0) -> list[dict[str, Any]]:
        """At most ``limit`` of the newest events whose number is above ``after``, oldest first."""
        newer = [event for event in self._events if event["number"] > after]
        return newer[-limit:] if limit else []
