"""One layer's exchange with the expert workers, as a pure state machine (4.2, 5.1).

Every live link gets a frame per layer, empty if need be, so that an expert
worker knows that this attention worker has arrived. The exchange ends when
every link that owes an answer has given it. When a link dies, the rows it owed
are replayed to whoever hosts their experts next; a link that still owes an
answer gets its replay after that answer, because it holds one frame of a
worker at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Send(NamedTuple):
    """Send ``pairs`` rows that lie in the region of ``slot`` from row ``first`` on."""

    slot: int
    first: int
    pairs: int
    replay: bool


class Exchange:
    """Who owes what. Slots are small integers that name links; reused for every layer."""

    __slots__ = ("_next_row", "_owing", "_waiting")

    def __init__(self) -> None:
        self._owing: set[int] = set()
        self._next_row: dict[int, int] = {}
        self._waiting: dict[int, Send] = {}

    @property
    def done(self) -> bool:
        """No link owes an answer and no replay waits to be sent."""
        return not self._owing

    @property
    def owing(self) -> frozenset[int]:
        return frozenset(self._owing)

    def rows_of(self, slot: int) -> int:
        """Rows that were placed in the region of ``slot`` for this layer so far."""
        return self._next_row.get(slot, 0)

    def begin(self, slots: Sequence[int], counts: Sequence[int]) -> list[Send]:
        """Start a layer: one frame for every live slot; ``counts[slot]`` rows lie ready in its region."""
        assert not self._owing, "the previous layer's exchange is still under way"
        self._waiting.clear()
        self._owing.update(slots)
        self._next_row = {slot: counts[slot] for slot in slots}
        return [Send(slot, 0, counts[slot], False) for slot in slots]

    def abandon(self) -> None:
        """The layer is given up: answers are still awaited, but no replay follows them."""
        self._waiting.clear()

    def answered(self, slot: int) -> Send | None:
        """An answer came in; returns the replay that was waiting for it, if any."""
        if slot not in self._owing:
            return None
        follow_up = self._waiting.pop(slot, None)
        if follow_up is None:
            self._owing.discard(slot)
        return follow_up

    def lost(self, slot: int) -> bool:
        """The link died. True if rows of this layer were in its hands and must be replayed.

        Rows that it answered before it died are safe: they lie in this side's memory.
        """
        self._waiting.pop(slot, None)
        owed = slot in self._owing
        self._owing.discard(slot)
        return owed and self._next_row.pop(slot, 0) > 0

    def replay(self, counts: Sequence[int]) -> list[Send]:
        """Rows of a lost link were appended: ``counts[slot]`` more rows in the region of each slot."""
        sends = []
        for slot, count in enumerate(counts):
            if not count:
                continue
            first = self._next_row.get(slot, 0)
            self._next_row[slot] = first + count
            waiting = self._waiting.pop(slot, None)
            send = Send(
                slot, waiting.first if waiting else first, count + (waiting.pairs if waiting else 0), True
            )
            if slot in self._owing:
                self._waiting[slot] = send
            else:
                self._owing.add(slot)
                sends.append(send)
        return sends
