"""What an attention worker sends, gets and checkpoints, and when: a recorder for fig. 8, off by default.

Times are seconds on the monotonic clock. One thread records; any other may read.
"""

from __future__ import annotations

from typing import Final, NamedTuple

TO_EXPERTS: Final = 0
"""Rows of a layer placed in the memory that its expert workers read, from the first byte to the last."""
FROM_EXPERTS: Final = 1
"""One expert worker's answer: noticed at that moment, it lies in this side's memory."""
SEGMENTS: Final = 2
"""K and V rows written to the checkpoint's bucket, from the first byte to the last."""
FLOWS: Final = ("AW to EW", "EW to AW", "checkpoint segments")


class Movement(NamedTuple):
    """So many bytes of one flow between two moments; a list of these numbers on the wire."""

    flow: float
    layer: float
    """Position among the model's MoE layers; for SEGMENTS that of the first cached layer in them."""
    start_s: float
    end_s: float
    bytes: float


class TrafficRing:
    """The last ``events_max`` movements; its memory is there from the start, and nothing in it waits."""

    def __init__(self, events_max: int, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        """Of one (token, expert) pair, in either direction."""
        self._events: list[Movement | None] = [None] * events_max
        self._next = 0

    def add(self, flow: int, layer: int, start_s: float, end_s: float, size: int) -> None:
        self._events[self._next] = Movement(flow, layer, start_s, end_s, size)
        self._next = (self._next + 1) % len(self._events)

    def latest(self) -> list[Movement]:
        """What is remembered, in order of its end."""
        return sorted((event for event in list(self._events) if event is not None), key=lambda e: e.end_s)
