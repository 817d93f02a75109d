"""The layer-wise batcher of an expert worker, as a pure state machine (5.2, 5.4).

Which frames run now, and which wait? Events and the time (integer us of one monotonic clock) come
in, actions go out; there is no socket, thread or clock here. ``key`` names one incarnation of an
attention worker: (worker id, epoch), or anything hashable. A frame is what one worker sends for one
MoE layer: ``pairs`` (token, expert) rows.

**Who is where.** A worker that is in a step sends a frame for every MoE layer in order, holding one
frame here at a time. An empty frame is answered at once, without compute, and still tells that its
worker has arrived. The answer to layer l moves the worker to l + 1; after the last layer it is at
layer 0 if its frame carried ``CONTINUES``, and else idle until ``step_begin``. The first message of a
new worker sets its position, whatever the layer (5.4). A replayed (``PRIORITY``) frame may repeat the
layer answered last: rows of a dead expert worker come to one that has already done its own (5.1).

**What runs first.** Replayed decodes, decodes, replayed prefills, prefills; among equals the lowest
layer, so that the one behind catches up. Prefills come last even when replayed: a failure costs its
own domain only. But after ``batch_decodes_before_prefill_max`` decode batches a waiting prefill has its
turn, unless a replayed decode is there.

**What runs together.** A batch is for one layer and takes all frames of its class waiting there, cut
to ``batch_pairs_max`` pairs, between frames where that is possible; a frame that was cut is finished
when its last slice is. A decode batch takes along prefill frames of its layer that fit whole within
``batch_pairs_min``: below it a kernel is bound by reading weights, so they are nearly free.

**What waits.** A decode batch at layer l waits for worker y if *all* of this holds:

* y is in a decode step, has no frame here, and its next layer lies in [l - ``batch_align_layers_max``, l].
  Plain order, no wrap-around; and a worker that has finished its last layer counts again only once it has
  begun its next step, for until then another expert worker may hold it. So whoever is held waits for one
  that is at a lower layer or held by nobody: waits form no cycle.
* y is expected before half of ``batch_join_wait_us_max`` has passed since the batch's first frame came,
  and is not late by its own habit already. Habits are learnt as TCP learns round-trip times; the other
  half of the bound is room for what cannot be foreseen (y held up at another expert worker).
* y keeps pace: its time between layers exceeds that of the fastest member by no more than one batch
  takes here. More than that a join does not save, and members would pay it at every layer.
* y has not let a wait reach its bound since its last frame: one that hangs costs one wait, not one a layer.
* The batch has fewer than ``batch_pairs_min`` pairs, is not a replay, and no prefill is waiting (then
  this worker is not idle, and frames gather behind the prefill's slices by themselves).

A wait ends when all of these y have come or can no longer; at ``batch_join_wait_us_max`` it is given
up, counted in ``waits_expired``, and the batch names the absent in ``missed``, to be probed.

**Why not simpler.** Simulations decided (``tarragon simulate`` shows what is left). Waiting for everyone
at most two layers behind, at most 2 ms: with heavy experts a quarter of the waits expired. With a longer
bound, one worker with five times the attention work slowed the others to 0.4 of their speed; with the
pace rule they are as fast as without waiting. Counting on the next step before it began: cycles, in models
of few layers. Holding early frames of layer 0 until others wrap around, as 5.4 has it: no better batches,
and 2 % slower with four layers; whoever begins within two layers of another is met there anyway.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tarragon.config import Config
from tarragon.experts.frontier import (
    ANYWHERE,
    FRAME_NONE,
    FRAME_QUEUED,
    FRAME_RUNNING,
    NEVER_US,
    Frontier,
    Habit,
    Key,
)
from tarragon.messages import DataFlag, ProtocolError, RefusalReason


class BatchError(ProtocolError):
    """A frame or announcement that its worker cannot have sent from where it is; the caller refuses it."""

    def __init__(self, reason: RefusalReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Member(NamedTuple):
    """Rows [first_pair, first_pair + pairs) of the region of ``key``; ``last``: its frame ends with them."""

    key: Key
    layer: int
    first_pair: int
    pairs: int
    step: int
    last: bool


class RunBatch(NamedTuple):
    """Run the kernels of ``layer`` on all members now, then call ``batch_done``."""

    layer: int
    members: list[Member]
    pairs: int
    prefill: bool
    missed: tuple[Key, ...]
    """Workers that this batch waited for in vain: probe them (5.2)."""


class WaitUntil(NamedTuple):
    """Nothing to run before the next event, or before ``deadline_us``."""

    deadline_us: int
    workers: tuple[Key, ...]


class Idle(NamedTuple):
    """Nothing to run before the next event."""


Action = RunBatch | WaitUntil | Idle
IDLE: Final = Idle()

_PREFILL, _PRIORITY, _CONTINUES = int(DataFlag.PREFILL), int(DataFlag.PRIORITY), int(DataFlag.CONTINUES)


class Stats:
    """Counters since the batcher was made; times in us."""

    __slots__ = (
        "batches",
        "decode_batches",
        "decode_members",
        "empty_frames",
        "pairs",
        "waited_us",
        "waits",
        "waits_expired",
    )

    def __init__(self) -> None:
        self.batches = self.pairs = self.empty_frames = 0
        self.decode_batches = self.decode_members = 0
        self.waits = self.waits_expired = self.waited_us = 0

    def as_dict(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in self.__slots__}


class Batcher:
    """Decides what one expert worker computes next; one batch runs at a time.

    Args:
        layers: MoE layers of the model.
        config: bounds of batches and waits, ``batch_*`` and ``decode_pairs_max``.
    """

    def __init__(self, layers: int, config: Config) -> None:
        assert layers > 0
        self.stats = Stats()
        self._layers = layers
        self._wait_us_max = config.batch_join_wait_us_max
        self._plan_us_max = config.batch_join_wait_us_max // 2
        self._align = config.batch_align_layers_max
        self._pairs_min = config.batch_pairs_min
        self._pairs_max = config.batch_pairs_max
        self._lock_step = config.batch_lock_step
        self._along_max = min(config.batch_pairs_min, config.batch_pairs_max)
        self._decode_pairs_max = config.decode_pairs_max
        self._passes_max = config.batch_decodes_before_prefill_max
        self._workers: dict[Key, Frontier] = {}
        # Sorted by rank, that is class of the frame and layer; among equals by arrival.
        self._queue: list[Frontier] = []
        self._running: RunBatch | None = None
        self._started_us = 0
        self._serving = Habit()
        self._passes = 0
        self._waiting_since_us = ANYWHERE

    def __contains__(self, key: Key) -> bool:
        return key in self._workers

    # ------------------------------------------------------------------ who is here

    def worker_joined(self, key: Key, now: int) -> None:
        """Its link was accepted; its first message tells where it is. Raises BatchError if it is known."""
        if key in self._workers:
            raise BatchError(RefusalReason.STALE_EPOCH, f"{key} is here already")
        self._workers[key] = Frontier(key)

    def worker_left(self, key: Key, now: int) -> None:
        """The worker is gone: nobody waits for it, and its frame is dropped. Unknown keys are left alone."""
        worker = self._workers.pop(key, None)
        if worker is not None and worker.frame == FRAME_QUEUED:
            self._queue.remove(worker)

    def step_begin(self, key: Key, layer: int, now: int, prefill: bool) -> None:
        """The worker is in a step and will send ``layer`` next. Raises BatchError, changing nothing."""
        worker = self._between_frames(key)
        if not 0 <= layer < self._layers:
            raise BatchError(RefusalReason.BAD_LAYER, f"{key} begins at layer {layer} of {self._layers}")
        worker.begin(layer, now, prefill)

    def step_end(self, key: Key, now: int) -> None:
        """The worker is idle: nobody waits for it any more. Raises BatchError, changing nothing."""
        self._between_frames(key).end()

    def _between_frames(self, key: Key) -> Frontier:
        worker = self._workers.get(key)
        if worker is None:
            raise BatchError(RefusalReason.STALE_EPOCH, f"unknown worker {key}")
        if worker.frame != FRAME_NONE:
            raise BatchError(RefusalReason.BAD_LAYER, f"{key} has its frame of layer {worker.layer} here")
        return worker

    # ------------------------------------------------------------------ frames

    def rows(self, key: Key, layer: int, pairs: int, step: int, flags: int, now: int, first: int = 0) -> bool:
        """A frame arrived: ``pairs`` rows of the worker's region, from row ``first`` on, with its DataFlags.

        Returns:
            True if the frame is empty and so finished: the caller answers it at once.

        Raises:
            BatchError: unknown worker, a second frame at once, or a layer it cannot be at; nothing changed.
        """
        worker = self._between_frames(key)
        if pairs < 0:
            raise BatchError(RefusalReason.BAD_COUNT, f"{key} sent {pairs} pairs")
        layers = self._layers
        if not (0 <= layer < layers and worker.may_be_at(layer, flags)):
            raise BatchError(RefusalReason.BAD_LAYER, f"{key} sent layer {layer}, not {worker.next_layer}")
        prefill = bool(flags & _PREFILL) or pairs > self._decode_pairs_max
        worker.arrive(layer, step, bool(flags & _CONTINUES), prefill, now)
        if pairs == 0:
            self.stats.empty_frames += 1
            worker.answered(now, layers)
            return True
        worker.frame, worker.frame_prefill, worker.waited = FRAME_QUEUED, prefill, False
        worker.first, worker.pairs, worker.done, worker.arrived_us = first, pairs, 0, now
        worker.rank = layer + (0 if flags & _PRIORITY else layers) + (2 * layers if prefill else 0)
        self._enqueue(worker, len(self._queue))
        return False

    def _enqueue(self, worker: Frontier, place: int) -> None:
        """Insert a frame at ``place`` or, to keep the order of ranks, before it."""
        queue, rank = self._queue, worker.rank
        while place and queue[place - 1].rank > rank:
            place -= 1
        queue.insert(place, worker)

    def batch_done(self, now: int) -> list[Member]:
        """The running batch is computed; returns the members whose frames are complete, to be answered.

        Workers that left meanwhile are not among them.
        """
        run = self._running
        assert run is not None, "no batch is running"
        self._running = None
        if not run.prefill:
            self._serving.add(now - self._started_us)
        finished = []
        for member in run.members:
            worker = self._workers.get(member.key)
            if worker is None or worker.frame != FRAME_RUNNING:
                continue
            if member.last:
                worker.answered(now, self._layers)
                finished.append(member)
            else:
                worker.done += member.pairs
                worker.frame = FRAME_QUEUED
                # What was begun is finished before its equals: it goes where the first of them is.
                ahead = sum(1 for other in self._queue if other.rank < worker.rank)
                self._enqueue(worker, ahead)
        return finished

    # ------------------------------------------------------------------ decisions

    def next_action(self, now: int) -> Action:
        """What to do now; asked after events and deadlines while no batch runs. It starts what it returns."""
        assert self._running is None, "one batch at a time"
        if self._waiting_since_us >= 0:
            self.stats.waited_us += now - self._waiting_since_us
            self._waiting_since_us = ANYWHERE
        queue = self._queue
        if not queue:
            return IDLE
        if self._lock_step:
            return self._in_lock_step(now)
        layers = self._layers
        head = queue[0]
        prefill_waits = queue[-1].frame_prefill
        if prefill_waits and self._passes >= self._passes_max and head.rank >= layers:
            head = next(worker for worker in queue if worker.frame_prefill)
        if prefill_waits or head.rank < layers:
            return self._run(head, (), now)
        rank = ANYWHERE
        wait = WaitUntil(NEVER_US, ())
        for worker in queue:
            if worker.rank == rank:
                continue
            rank = worker.rank
            deadline, absent = self._absent(worker.layer, now)
            if not absent:
                return self._run(worker, (), now)
            if now >= deadline:
                return self._give_up(worker, absent, now)
            if deadline < wait.deadline_us:
                wait = WaitUntil(deadline, tuple([y.key for y in absent]))
        self._waiting_since_us = now
        return wait

    def _absent(self, layer: int, now: int) -> tuple[int, list[Frontier]]:
        """Deadline of the decode batch at ``layer``, and the workers it waits for until then."""
        pairs, first_us, pace_us, waiting = 0, now, NEVER_US, False
        for member in self._queue:
            if member.layer == layer:
                pairs += member.pairs - member.done
                waiting |= member.waited
                if member.arrived_us < first_us:
                    first_us = member.arrived_us
                if member.between_layers.mean < pace_us:
                    pace_us = member.between_layers.mean
        absent: list[Frontier] = []
        if pairs >= self._pairs_min or not self._wait_us_max:
            return 0, absent
        serving_us = self._serving.mean
        earliest_us = first_us if waiting else now
        latest_us = first_us + self._plan_us_max
        for y in self._workers.values():
            if y.frame or not y.in_step or y.prefill or y.overdue:
                continue
            behind = layer - y.next_layer
            if not 0 <= behind <= self._align or y.between_layers.mean > pace_us + serving_us:
                continue
            due_us = y.due_us
            if behind:
                due_us += behind * (serving_us + y.between_layers.high)
            if earliest_us <= due_us <= latest_us:
                absent.append(y)
        if absent and not waiting:
            self.stats.waits += 1
        if absent:
            for member in self._queue:
                if member.layer == layer:
                    member.waited = True
        return first_us + self._wait_us_max, absent

    def _in_lock_step(self, now: int) -> Action:
        """The baseline of 2.2.1: the lowest layer, once all who are in a step and not beyond it have come.

        Decodes and prefills alike. One between two steps is not waited for, or two expert workers could hold
        two attention workers for each other; it joins at its next layer 0, where the others then wait for it.
        """
        head = min(self._queue, key=lambda worker: worker.layer)
        absent = [
            y
            for y in self._workers.values()
            if not (y.frame or y.overdue or y.clock is None) and y.next_layer <= head.layer
        ]
        if not absent:
            return self._run(head, (), now)
        deadline_us = self._wait_us_max + min(
            worker.arrived_us for worker in self._queue if worker.layer == head.layer
        )
        if now >= deadline_us:
            return self._give_up(head, absent, now)
        self._waiting_since_us = now
        return WaitUntil(deadline_us, tuple(y.key for y in absent))

    def _give_up(self, head: Frontier, absent: list[Frontier], now: int) -> RunBatch:
        self.stats.waits_expired += 1
        for y in absent:
            y.overdue = True
        return self._run(head, tuple(y.key for y in absent), now)

    def _run(self, head: Frontier, missed: tuple[Key, ...], now: int) -> RunBatch:
        """Start the batch of the layer and class of ``head``."""
        layer, prefill = head.layer, head.frame_prefill
        members: list[Member] = []
        kept: list[Frontier] = []
        total = 0
        for worker in self._queue:
            pairs = self._slice(worker, prefill, total) if worker.layer == layer else 0
            if not pairs:
                kept.append(worker)
                continue
            total += pairs
            done = worker.done
            worker.frame = FRAME_RUNNING
            members.append(
                Member(
                    worker.key, layer, worker.first + done, pairs, worker.step, done + pairs == worker.pairs
                )
            )
        self._queue = kept
        self._running = run = RunBatch(layer, members, total, prefill, missed)
        self._started_us = now
        self._count(run)
        return run

    def _slice(self, worker: Frontier, prefill: bool, total: int) -> int:
        """Pairs of this frame that a batch of its layer which has ``total`` pairs takes; 0 for none."""
        left = worker.pairs - worker.done
        if worker.frame_prefill != prefill:
            # A prefill batch takes no decode along: it would be answered later for it.
            return 0 if prefill or total + left > self._along_max else left
        if not total:
            return min(left, self._pairs_max)
        return left if total + left <= self._pairs_max else 0

    def _count(self, run: RunBatch) -> None:
        stats = self.stats
        stats.batches += 1
        stats.pairs += run.pairs
        if run.prefill:
            self._passes = 0
            return
        stats.decode_batches += 1
        stats.decode_members += len(run.members)
        self._passes = self._passes + 1 if self._queue and self._queue[-1].frame_prefill else 0
