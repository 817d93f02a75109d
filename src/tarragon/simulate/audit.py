"""Watches every frame of a simulated cluster and notes each promise that is broken (5.2)."""

from __future__ import annotations

from tarragon.experts.batcher import RunBatch
from tarragon.simulate.report import VIOLATIONS_MAX

WorkerKey = tuple[str, int]
"""(worker id, epoch)"""


class Frame:
    """A frame on its way or in work."""

    __slots__ = ("computed", "first", "layer", "pairs", "step")

    def __init__(self, layer: int, pairs: int, step: int, first: int) -> None:
        self.layer, self.pairs, self.step, self.first = layer, pairs, step, first
        self.computed = 0


class Audit:
    """Frames by (attention worker, expert worker), and what went wrong."""

    def __init__(self, pairs_max: int) -> None:
        self.violations: list[str] = []
        self.frames = 0
        self.answers = 0
        self._pairs_max = pairs_max
        self._outstanding: dict[tuple[WorkerKey, WorkerKey], Frame] = {}
        self._dead: set[WorkerKey] = set()

    def demand(self, holds: bool, what: str) -> None:
        """Note ``what`` if it does not hold, up to VIOLATIONS_MAX times."""
        if not holds and len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(what)

    def died(self, key: WorkerKey) -> None:
        """Nothing is expected of it or for it any more."""
        self._dead.add(key)
        for link in [link for link in self._outstanding if key in link]:
            del self._outstanding[link]

    def sent(self, attention: WorkerKey, expert: WorkerKey, frame: Frame) -> None:
        self.frames += 1
        if expert in self._dead:
            return
        link = (attention, expert)
        self.demand(link not in self._outstanding, f"{attention} sent {expert} a second frame at once")
        self._outstanding[link] = frame

    def running(self, expert: WorkerKey, batch: RunBatch) -> None:
        """A batch starts: one layer, no worker twice, every slice behind the one before it, none too big."""
        self.demand(
            len({member.key for member in batch.members}) == len(batch.members),
            "a worker is twice in one batch",
        )
        self.demand(
            sum(member.pairs for member in batch.members) == batch.pairs, "the pairs of a batch do not add up"
        )
        self.demand(0 < batch.pairs <= self._pairs_max, f"a batch of {batch.pairs} pairs")
        for member in batch.members:
            frame = self._outstanding.get((member.key, expert))
            if frame is None:
                self.demand(member.key in self._dead, f"{expert} runs a frame that {member.key} did not send")
                continue
            self.demand(frame.layer == member.layer == batch.layer, "a batch of several layers")
            self.demand(
                frame.first + frame.computed == member.first_pair,
                f"{expert} left out or repeated rows of a frame",
            )
            frame.computed += member.pairs
            self.demand(
                member.last == (frame.computed == frame.pairs), f"{expert} mistakes the end of a frame"
            )

    def answered(self, attention: WorkerKey, expert: WorkerKey, layer: int) -> None:
        if attention in self._dead:
            return
        self.answers += 1
        frame = self._outstanding.pop((attention, expert), None)
        if frame is None:
            self.demand(False, f"{expert} answered {attention} twice")
            return
        self.demand(
            frame.layer == layer and frame.computed == frame.pairs,
            f"{expert} answered what it did not compute",
        )

    def finished(self, all_steps_done: bool) -> None:
        """Nothing happens any more."""
        if not all_steps_done:
            self.violations.append("the cluster stands still before its work is done")
        for attention, expert in list(self._outstanding)[:VIOLATIONS_MAX]:
            self.violations.append(f"{expert} never answered {attention}")
