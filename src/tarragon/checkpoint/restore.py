"""How does a request go on elsewhere? Its committed rows are read from the bucket of who had it before (6.2).

The reader seals a dead worker's bucket first, then reads the record, then the rows, checking the checksum of
each, and looks at last whether the record still stands: a worker that wakes in between can only take its
record back before it overwrites anything but blocks that a sliding window has passed. Whatever fails, the
caller computes the rows anew: never wrong text.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tarragon.checkpoint.bucket import Bucket, BucketError, Committed, slots_at
from tarragon.counters import Counters
from tarragon.gateway.wire import Origin
from tarragon.native.segments import segment_read


class RowKind(NamedTuple):
    """What one row of a layer is: shapes without the leading dimension."""

    group: int
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    dtype: torch.dtype


class Source(NamedTuple):
    """Where a request's committed rows lie."""

    bucket: Bucket
    record: Committed


class LayerRows(NamedTuple):
    """Rows of one layer for the positions (int64 [n]) that its cache group still holds."""

    positions: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def beyond(self, start: int) -> LayerRows:
        """Those of positions from ``start`` on."""
        kept = self.positions >= start
        return LayerRows(self.positions[kept], self.key[kept], self.value[kept])


class RestoreCounters(Counters):
    """Cumulative since the worker started."""

    def __init__(self) -> None:
        self.restored_requests = 0
        self.restored_positions = 0
        self.restored_bytes = 0
        self.restore_s = 0.0
        """Spent finding, reading and loading rows."""
        self.restore_misses = 0
        """Requests that came from elsewhere without a usable commit: computed anew."""
        self.restore_incomplete = 0
        """Commits whose rows are not all there: written while the worker had no bucket, or given back by a
        sliding window."""
        self.restore_changed = 0
        """Commits that changed while they were read: a newer or a shorter one is read instead."""
        self.restore_corrupt = 0
        """Records or rows with a wrong checksum."""


class Restorer:
    """The buckets of other incarnations, and what may be taken from them.

    ``add`` and ``drop`` come from the store client's thread, ``read`` from threads beside the engine's, and
    ``find`` from both.
    """

    def __init__(self, fingerprint: str) -> None:
        self.counters = RestoreCounters()
        self._fingerprint = fingerprint
        self._files: dict[tuple[str, int], int] = {}
        self._buckets: dict[tuple[str, int], Bucket] = {}
        self._lock = threading.Lock()

    def add(self, worker_id: str, epoch: int, fd: int) -> None:
        """Another incarnation has a bucket; the caller closes ``fd``. It is mapped when it is needed."""
        with self._lock:
            self._files[worker_id, epoch] = os.dup(fd)

    def drop(self, worker_id: str, epoch: int) -> None:
        """That bucket is gone; what is being read of it stays mapped until it is read."""
        with self._lock:
            self._buckets.pop((worker_id, epoch), None)
            fd = self._files.pop((worker_id, epoch), None)
            if fd is not None:
                os.close(fd)

    def _bucket(self, worker_id: str, epoch: int) -> Bucket | None:
        with self._lock:
            bucket = self._buckets.get((worker_id, epoch))
            fd = self._files.get((worker_id, epoch))
            if bucket is not None or fd is None:
                return bucket
            try:
                bucket = self._buckets[worker_id, epoch] = Bucket.map(fd)
            except (BucketError, OSError, ValueError) as error:
                print(f"the bucket of {worker_id} is of no use: {error}", file=sys.stderr)
            return bucket

    def spent(self, seconds: float) -> None:
        """Count time of finding, reading or loading rows, from whichever thread."""
        with self._lock:
            self.counters.restore_s += seconds

    def count_unusable(self, *, absent: bool) -> None:
        """Count a commit that nothing could be taken from: rows are ``absent``, or else damaged."""
        with self._lock:
            self.counters.restore_incomplete += absent
            self.counters.restore_corrupt += not absent

    def find(self, request_id: str, origins: Sequence[Origin]) -> list[Source]:
        """Commits in the buckets of ``origins``, the longest first; those of the dead are sealed before."""
        found: list[Source] = []
        for origin in origins:
            bucket = self._bucket(origin.worker_id, origin.epoch)
            if bucket is None:
                continue
            if not origin.living:
                bucket.seal()
            if bucket.shape.fingerprint != self._fingerprint:
                continue
            try:
                record = bucket.find(request_id, origin.attempt)
            except BucketError as error:
                self.count_unusable(absent=False)
                print(f"WARNING request {request_id}: {error}", file=sys.stderr)
                continue
            if record is not None:
                found.append(Source(bucket, record))
        return sorted(found, key=lambda source: source.record.positions, reverse=True)

    def read(
        self, source: Source, starts: Sequence[int], stop: int, kinds: Sequence[RowKind]
    ) -> list[LayerRows] | None:
        """The rows of every layer before position ``stop``, or None if any is absent, damaged or has changed.

        Args:
            starts: per cache group, its first position that is wanted. A sliding window has passed those
                before it, and their blocks may hold other rows by now.
            kinds: per layer.
        """
        places = self._places(source, starts, stop)
        if places is None:
            return None
        rows = []
        for layer, kind in enumerate(kinds):
            taken = self._read_layer(source.bucket, layer, kind, *places[kind.group])
            if taken is None:
                return None
            rows.append(taken)
        if not source.bucket.unchanged(source.record):
            with self._lock:
                self.counters.restore_changed += 1
            return None
        return rows

    def _places(
        self, source: Source, starts: Sequence[int], stop: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Per cache group: positions from its start on, and their slots; None if any has none."""
        places = []
        sizes = source.bucket.shape.block_sizes
        for start, blocks, size in zip(starts, source.record.blocks, sizes, strict=True):
            positions = torch.arange(start, stop)
            slots = slots_at(blocks, size, positions.numpy())
            if len(slots) and int(slots.min()) < size:  # block 0 is no block
                self.count_unusable(absent=True)
                return None
            places.append((positions, slots))
        return places

    def _read_layer(
        self, bucket: Bucket, layer: int, kind: RowKind, positions: torch.Tensor, slots: torch.Tensor
    ) -> LayerRows | None:
        key = torch.empty(len(slots), *kind.key_shape, dtype=kind.dtype)
        value = torch.empty(len(slots), *kind.value_shape, dtype=kind.dtype)
        bad = segment_read(bucket.rows[layer], bucket.checks[layer], slots, key.flatten(1), value.flatten(1))
        if bad >= 0:
            absent = int(bucket.checks[layer, int(slots[bad])]) == 0
            self.count_unusable(absent=absent)
            return None
        return LayerRows(positions, key, value)
