"""Where one attention worker is, as an expert worker sees it: frontier, habits and frame (2.2, 5.4)."""

from __future__ import annotations

from typing import Any, Final

from tarragon.messages import DataFlag

Key = Any
"""Names one incarnation of an attention worker, (worker id, epoch) or what stands for it; hashable."""

ANYWHERE: Final = -1
NEVER_US: Final = 1 << 60
FRAME_NONE, FRAME_QUEUED, FRAME_RUNNING = range(3)


class Habit:
    """How long something usually takes: mean and mean deviation, in us, as RFC 6298 keeps them."""

    __slots__ = ("deviation", "high", "mean")

    def __init__(self) -> None:
        self.mean = self.deviation = 0
        self.high = NEVER_US
        """Seldom exceeded; what is not known yet counts as never."""

    def add(self, sample_us: int) -> None:
        if self.high == NEVER_US:
            self.mean, self.deviation = sample_us, sample_us >> 1
        else:
            error = sample_us - self.mean
            self.mean += error >> 3
            self.deviation += (abs(error) - self.deviation) >> 2
        self.high = self.mean + 4 * self.deviation


class Frontier:
    """One attention worker's position. Methods trust their arguments; the batcher checks them."""

    __slots__ = (
        "answered_layer",
        "arrived_us",
        "between_layers",
        "clock",
        "continues",
        "done",
        "due_us",
        "first",
        "frame",
        "frame_prefill",
        "from_begin",
        "in_step",
        "key",
        "layer",
        "next_layer",
        "overdue",
        "pairs",
        "prefill",
        "rank",
        "since_us",
        "step",
        "waited",
    )

    def __init__(self, key: Key) -> None:
        self.key = key
        self.in_step = self.prefill = False
        self.next_layer = self.answered_layer = ANYWHERE
        self.overdue = False
        """It let a wait reach its bound and has sent nothing since."""
        # Habits: the one measured since since_us, and when the next frame is due by it.
        self.between_layers, self.from_begin = Habit(), Habit()
        self.clock: Habit | None = None
        self.since_us = 0
        self.due_us = NEVER_US
        # The frame: rows [first, first + pairs) of the region, of which `done` are computed.
        self.frame = FRAME_NONE
        self.layer = self.first = self.pairs = self.done = self.step = 0
        self.rank = self.arrived_us = 0
        self.frame_prefill = self.continues = False
        self.waited = False
        """A wait was begun for the batch that this frame belongs to."""

    def begin(self, layer: int, now: int, prefill: bool) -> None:
        """A step begins and will send ``layer`` first."""
        self.in_step, self.prefill = True, prefill
        self.next_layer, self.answered_layer = layer, ANYWHERE
        self.clock, self.since_us = self.from_begin, now
        self.due_us = now + self.from_begin.high

    def end(self) -> None:
        self.in_step, self.answered_layer, self.clock = False, ANYWHERE, None

    def may_be_at(self, layer: int, flags: int) -> bool:
        """Whether a frame of ``layer`` makes sense: the next one, a replay of the last, or the first ever."""
        if self.next_layer == ANYWHERE or (self.in_step and layer == self.next_layer):
            return True
        return bool(flags & DataFlag.PRIORITY) and layer == self.answered_layer

    def arrive(self, layer: int, step: int, continues: bool, prefill: bool, now: int) -> None:
        """A frame, possibly empty, came."""
        if layer == self.next_layer and not prefill:  # a replay says nothing about habits, nor does a prefill
            self._stop_clock(now)
        self.in_step, self.prefill, self.overdue = True, prefill, False
        self.layer, self.step, self.continues = layer, step, continues

    def answered(self, now: int, layers: int) -> None:
        """The frame is finished, and the frontier moves on in a model of ``layers`` MoE layers."""
        self.frame = FRAME_NONE
        self.answered_layer, self.since_us = self.layer, now
        if self.layer + 1 < layers:
            self.next_layer, self.clock = self.layer + 1, self.between_layers
            self.due_us = now + self.between_layers.high
        else:
            self.next_layer, self.in_step, self.clock = 0, self.continues, None
            # Another expert worker may still hold this very frame back, for one who would wait here for the
            # next step: a cycle. So nobody counts on the next step before it is announced.
            self.due_us = NEVER_US

    def _stop_clock(self, now: int) -> None:
        if self.clock is not None:
            self.clock.add(now - self.since_us)
            self.clock = None
