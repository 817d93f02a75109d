"""draft"""

from __future__ import annotations

from collections.abc import Hashable
from operator import attrgetter
from typing import Final, NamedTuple

from tarragon.config import Config
from tarragon.messages import DataFlag, ProtocolError, RefusalReason


class BatchError(ProtocolError):
    def __init__(self, reason: RefusalReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Member(NamedTuple):
    key: Hashable
    layer: int
    first_pair: int
    pairs: int
    step: int
    last: bool


class RunBatch(NamedTuple):
    layer: int
    members: list[Member]
    pairs: int
    prefill: bool
    missed: tuple[Hashable, ...]


class WaitUntil(NamedTuple):
    deadline_us: int
    workers: tuple[Hashable, ...]


class Idle(NamedTuple):
    pass


IDLE: Final = Idle()
Action = RunBatch | WaitUntil | Idle

_UNKNOWN_US: Final = 1 << 60
_NONE, _QUEUED, _RUNNING = 0, 1, 2
_PREFILL: Final = int(DataFlag.PREFILL)
_PRIORITY: Final = int(DataFlag.PRIORITY)
_CONTINUES: Final = int(DataFlag.CONTINUES)
_ANYWHERE: Final = -1
_rank = attrgetter("rank")


class Stats:
    __slots__ = (
        "batches", "members", "pairs", "decode_batches", "decode_members", "prefill_slices", "waits",
        "waits_expired", "waits_dropped", "waited_us", "empty_frames",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)


class _Gap:
    __slots__ = ("deviation", "high", "mean")

    def __init__(self) -> None:
        self.mean = self.deviation = 0
        self.high = _UNKNOWN_US

    def add(self, sample: int) -> None:
        if self.high == _UNKNOWN_US:
            self.mean, self.deviation = sample, sample >> 1
        else:
            error = sample - self.mean
            self.mean += error >> 3
            self.deviation += (abs(error) - self.deviation) >> 2
        self.high = self.mean + Knobs.mult * self.deviation


class _Worker:
    __slots__ = (
        "answered_layer", "arrived", "base", "begun", "continues", "done", "first", "head", "in_step", "key",
        "gap", "last_pos", "next_layer", "overdue", "pairs", "prefill", "rank", "state", "step", "tail", "waited", "layer", "prefill_frame",
    )

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.state = _NONE
        self.in_step = False
        self.prefill = False
        self.next_layer = _ANYWHERE
        self.answered_layer = _ANYWHERE
        self.overdue = False
        self.continues = False
        self.begun = False
        self.waited = False
        self.base = 0
        self.gap, self.tail, self.head = _Gap(), _Gap(), _Gap()
        self.layer = self.pairs = self.done = self.first = self.step = self.rank = self.arrived = 0
        self.prefill_frame = False


class Knobs:
    wait = "pred"   # none | stated | pred
    end = "deadline"  # deadline | high
    prefill_stops = "queued"  # never | queued | step
    wrap = True
    piggy = False
    late = True
    mult = 4
    cap = 0.0   # wait at most cap * serve
    slices_every = 8


class Batcher:
    def __init__(self, layers: int, config: Config, knobs: type[Knobs] = Knobs) -> None:
        self.k = knobs
        self._layers = layers
        self._wait_max = config.batch_join_wait_us_max
        self._align = config.batch_align_layers_max
        self._pairs_min = config.batch_pairs_min
        self._pairs_max = config.batch_pairs_max
        self._decode_pairs_max = config.decode_pairs_max
        self._workers: dict[Hashable, _Worker] = {}
        self._queued: list[_Worker] = []
        self._running: RunBatch | None = None
        self._started = 0
        self._serve = 0
        self._passed = 0
        self._idle_from = 0
        self._prefills = 0
        self.stats = Stats()

    def worker_joined(self, key: Hashable, now: int) -> None:
        if key in self._workers:
            raise BatchError(RefusalReason.STALE_EPOCH, "twice")
        self._workers[key] = _Worker(key)

    def worker_left(self, key: Hashable, now: int) -> None:
        worker = self._workers.pop(key, None)
        if worker is not None and worker.state == _QUEUED:
            self._queued.remove(worker)

    def _worker(self, key: Hashable) -> _Worker:
        w = self._workers.get(key)
        if w is None:
            raise BatchError(RefusalReason.STALE_EPOCH, f"unknown {key}")
        return w

    def step_begin(self, key: Hashable, layer: int, now: int, prefill: bool) -> None:
        w = self._worker(key)
        if w.state != _NONE:
            raise BatchError(RefusalReason.BAD_LAYER, "step begins while frame")
        if not 0 <= layer < self._layers:
            raise BatchError(RefusalReason.BAD_LAYER, "layer")
        if w.in_step and not w.begun:
            w.tail.add(now - w.base)
        w.in_step = True
        w.begun = True
        w.base = now
        w.next_layer = layer
        w.answered_layer = _ANYWHERE
        w.prefill = prefill

    def step_end(self, key: Hashable, now: int) -> None:
        w = self._worker(key)
        if w.state != _NONE:
            raise BatchError(RefusalReason.BAD_LAYER, "step ends while frame")
        w.in_step = False
        w.answered_layer = _ANYWHERE

    def rows(self, key: Hashable, layer: int, pairs: int, step: int, flags: int, now: int, first: int = 0) -> bool:
        w = self._worker(key)
        if w.state != _NONE:
            raise BatchError(RefusalReason.BAD_LAYER, "two frames")
        priority = flags & _PRIORITY
        if not (layer == w.next_layer and w.in_step) and not (w.next_layer == _ANYWHERE and 0 <= layer < self._layers):
            if not (priority and layer == w.answered_layer):
                raise BatchError(RefusalReason.BAD_LAYER, f"layer {layer} != {w.next_layer}")
        elif not priority and w.next_layer != _ANYWHERE:
            (w.head if w.begun and layer == 0 else w.tail if layer == 0 else w.gap).add(now - w.base)
        if pairs < 0:
            raise BatchError(RefusalReason.BAD_COUNT, "negative")
        w.in_step = True
        w.layer = layer
        w.overdue = False
        w.continues = bool(flags & _CONTINUES)
        w.begun = False
        w.step = step
        prefill = bool(flags & _PREFILL) or pairs > self._decode_pairs_max
        w.prefill = prefill
        if pairs == 0:
            self.stats.empty_frames += 1
            self._answered(w, now)
            return True
        w.state = _QUEUED
        w.pairs = pairs
        w.first = first
        w.done = 0
        w.arrived = now
        w.waited = False
        w.prefill_frame = prefill
        w.rank = layer + (0 if priority else self._layers) + (2 * self._layers if prefill else 0)
        self._queued.append(w)
        if len(self._queued) > 1:
            self._queued.sort(key=_rank)
        return False

    def _answered(self, w: _Worker, now: int) -> None:
        w.state = _NONE
        w.base = now
        w.answered_layer = w.layer
        nxt = w.layer + 1
        if nxt < self._layers:
            w.next_layer = nxt
        else:
            w.next_layer = 0
            w.in_step = w.continues

    def batch_done(self, now: int) -> list[Member]:
        run = self._running
        assert run is not None
        self._running = None
        if not run.prefill:
            t = now - self._started
            self._serve += (t - self._serve) >> 3 if self._serve else t
        finished = []
        for m in run.members:
            w = self._workers.get(m.key)
            if w is None or w.state != _RUNNING:
                continue
            w.done += m.pairs
            if m.last:
                self._answered(w, now)
                finished.append(m)
            else:
                w.state = _QUEUED
                self._queued.append(w)
        if len(self._queued) > 1:
            self._queued.sort(key=_rank)
        return finished

    def next_action(self, now: int) -> Action:
        assert self._running is None
        queued = self._queued
        if not queued:
            return IDLE
        L = self._layers
        last = -1
        until = _UNKNOWN_US
        names: tuple[Hashable, ...] = ()
        prefill_waits = queued[-1].rank >= 2 * L
        if prefill_waits and self._passed >= self.k.slices_every:
            for w in queued:
                if w.rank >= 2 * L:
                    return self._run(w, now, ())
        for w in queued:
            rank = w.rank
            if rank == last:
                continue
            last = rank
            if rank < L or rank >= 2 * L:
                return self._run(w, now, ())
            if prefill_waits and self.k.prefill_stops != "never":
                return self._run(w, now, ())
            missing, end = self._missing(w.layer, now)
            if not missing:
                return self._run(w, now, ())
            if now >= end:
                if any(v.waited for v in queued if v.layer == w.layer):
                    self.stats.waits_expired += 1
                for y in missing:
                    y.overdue = True
                return self._run(w, now, tuple(y.key for y in missing))
            for v in queued:
                if v.layer == w.layer and not v.waited:
                    v.waited = True
                    self.stats.waits += 1
            if end < until:
                until = end
                names = tuple(y.key for y in missing)
        if not self._idle_from:
            self._idle_from = now
        return WaitUntil(until, names)

    def _missing(self, layer: int, now: int) -> tuple[list[_Worker], int]:
        k = self.k
        if k.wait == "none":
            return [], 0
        pairs = 0
        first = now
        for v in self._queued:
            if v.layer == layer and not v.prefill_frame:
                pairs += v.pairs
                if v.arrived < first:
                    first = v.arrived
        if pairs >= self._pairs_min:
            return [], 0
        bound = self._wait_max
        if k.cap and self._serve:
            bound = min(bound, int(k.cap * self._serve))
        deadline = first + bound
        missing = []
        end = 0
        for y in self._workers.values():
            if not y.in_step:
                continue
            if y.prefill:
                if k.prefill_stops == "step":
                    return [], 0
                continue
            if y.overdue or y.next_layer == _ANYWHERE:
                continue
            if k.wait == "stated":
                if y.state == _NONE and layer - self._align <= y.next_layer <= layer:
                    missing.append(y)
                    end = deadline
                continue
            expected = self._expected(y, layer)
            if (first <= expected or not k.late) and expected <= deadline:
                missing.append(y)
                end = deadline
        return missing, end

    def _expected(self, y: _Worker, layer: int) -> int:
        if y.state == _QUEUED:
            pos = y.layer
        else:
            pos = y.next_layer
        behind = layer - pos
        if y.state == _QUEUED:
            if layer or not y.continues or not self.k.wrap or behind == 0:
                return _UNKNOWN_US
            behind = self._layers - pos
            if behind > self._align:
                return _UNKNOWN_US
            return y.arrived + (behind) * self._serve + (behind - 1) * y.gap.high + y.tail.high + y.head.high
        if behind < 0:
            if layer or not y.continues or not self.k.wrap:
                return _UNKNOWN_US
            behind = self._layers - pos
            if behind > self._align:
                return _UNKNOWN_US
            return y.base + behind * (self._serve + y.gap.high) + y.tail.high + y.head.high
        if behind > self._align:
            return _UNKNOWN_US
        if pos == 0:
            e = y.base + (y.head.high if y.begun else y.tail.high + y.head.high if y.head.high != _UNKNOWN_US else y.tail.high)
        else:
            e = y.base + y.gap.high
        return e + behind * (self._serve + y.gap.high)

    def _run(self, w: _Worker, now: int, missed: tuple[Hashable, ...]) -> RunBatch:
        st = self.stats
        if self._idle_from:
            st.waited_us += now - self._idle_from
            self._idle_from = 0
        layer, prefill = w.layer, w.prefill_frame
        room = self._pairs_max
        members = []
        kept = []
        total = 0
        for v in self._queued:
            if v.layer != layer or v.prefill_frame != prefill:
                if not (self.k.piggy and not prefill and v.layer == layer and not v.done and v.pairs + total <= self._pairs_min):
                    kept.append(v)
                    continue
            left = v.pairs - v.done
            if left > room:
                if members:
                    kept.append(v)
                    continue
                left = room
            room -= left
            total += left
            v.state = _RUNNING
            members.append(Member(v.key, layer, v.first + v.done, left, v.step, v.done + left == v.pairs))
        self._queued = kept
        run = RunBatch(layer, members, total, prefill, missed)
        if prefill:
            self._passed = 0
            st.prefill_slices += 1
        else:
            st.decode_batches += 1
            st.decode_members += len(members)
            self._passed = self._passed + 1 if kept and kept[-1].prefill_frame else 0
        st.batches += 1
        st.members += len(members)
        st.pairs += total
        self._running = run
        self._started = now
        return run
