"""What does an attention worker write of its KV cache, and when is it complete? (6.1)

``begin_step`` takes the new rows as the engine makes them, ``use_gap`` copies them into the bucket while the
worker waits for its experts (the gaps of AW-EW traffic), and ``commit`` makes a step's rows visible at its
end, in one record per request. One-sided: no other process runs on behalf of a write. Called by the engine
thread alone.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

import torch

from tarragon.checkpoint.bucket import Bucket
from tarragon.config import SEGMENT_ROWS_PER_WRITE, SEGMENTS_PER_WRITE
from tarragon.counters import Counters
from tarragon.native.segments import commit_records, release_record, segment_write
from tarragon.refe.traffic import SEGMENTS, TrafficRing

UNRESTORABLE: Final = 0xFFFF_FFFF
"""The attempt of records that nobody may go on from: no request is tried so often."""


class Fenced(RuntimeError):
    """This worker's requests have been given to others; nothing it computes is wanted any more."""


Segment = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]
"""New rows of one layer: its place in the order in which layers run, key and value [T, ...], and their slots,
int64 [S], S <= T."""


class Scheduled(NamedTuple):
    """One request of a step: its row in the block tables and the positions that are complete after it."""

    request_id: str
    table_row: int
    positions: int


class WriterCounters(Counters):
    """Cumulative since the worker started."""

    def __init__(self) -> None:
        self.checkpoint_segments = 0
        self.checkpoint_bytes = 0
        self.checkpoint_commits = 0
        self.checkpoint_s = 0.0
        """Spent writing rows and records, the gaps of AW-EW traffic included."""
        self.checkpoint_records_short = 0
        """Requests of a step that found no free record: they run unprotected."""


class Checkpointer:
    """Writes one worker's bucket. Without a bucket it takes nothing: tokens flow, unprotected."""

    def __init__(self) -> None:
        self.counters = WriterCounters()
        self.bucket: Bucket | None = None
        self.enabled = True
        self.traffic: TrafficRing | None = None
        self._pending: list[Segment] = []
        self._per_write = SEGMENTS_PER_WRITE
        """As soon as so many layers are noted, they are written."""
        self._records: dict[str, int] = {}
        self._free: list[int] = []

    def attach(self, bucket: Bucket) -> None:
        """Protect what is written from now on."""
        self.bucket = bucket
        self._free = list(range(bucket.shape.records))
        self._records.clear()

    def enable(self, enabled: bool) -> None:
        """Stop or resume writing. What the bucket missed meanwhile is made known as missing: a slot may have
        been given to other tokens, whose rows are not those that lie here."""
        if enabled and not self.enabled and self.bucket is not None:
            self.bucket.checks.zero_()
        if not enabled:
            self._pending.clear()
            self.release(list(self._records))
        self.enabled = enabled

    @property
    def recorded(self) -> Collection[str]:
        """Requests that have a record."""
        return self._records.keys()

    # ------------------------------------------------------------------ segments

    def begin_step(self, tokens: int) -> list[Segment] | None:
        """What the rows of this step's layers are to be noted in, or None if nothing is written.

        A write costs its call as much as the rows of some decoding streams, so several layers share one; the
        rows of a long prompt are not piled up.
        """
        if self.bucket is None or not self.enabled:
            return None
        self._per_write = 1 if tokens >= SEGMENT_ROWS_PER_WRITE else SEGMENTS_PER_WRITE
        return self._pending

    def use_gap(self) -> None:
        """The worker waits for its experts: copy what was noted, if it is worth a call or no gap follows."""
        pending = self._pending
        if not pending or self.bucket is None:
            return
        latest = pending[-1][0]
        if len(pending) >= self._per_write or latest == self.bucket.shape.layers - 1:
            self.flush()

    def flush(self) -> None:
        """Copy what was noted into the bucket."""
        if not self._pending:
            return
        start = time.perf_counter()
        bucket, counters = self.bucket, self.counters
        assert bucket is not None
        self.check_seal()
        layers, keys, values, slots = zip(*self._pending, strict=True)
        segment_write(keys, values, slots, layers, bucket.rows, bucket.checks)
        size = sum(each.shape[0] for each in slots) * bucket.shape.row_bytes
        counters.checkpoint_segments += len(layers)
        counters.checkpoint_bytes += size
        end = time.perf_counter()
        if self.traffic is not None:
            self.traffic.add(SEGMENTS, layers[0], start, end, size)
        self._pending.clear()
        counters.checkpoint_s += end - start

    def check_seal(self) -> None:
        """Raise Fenced if another worker restores from this bucket: nothing in it may change any more."""
        if self.bucket is not None and self.bucket.sealed:
            raise Fenced("its requests were given to other workers")

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], block_size: int) -> None:
        """The engine copies whole blocks (source, target) within its cache: so does the bucket."""
        if self.bucket is None:
            return
        for source, target in pairs:
            at, to = source * block_size, target * block_size
            self.bucket.rows[:, to : to + block_size] = self.bucket.rows[:, at : at + block_size]
            self.bucket.checks[:, to : to + block_size] = self.bucket.checks[:, at : at + block_size]

    # ------------------------------------------------------------------ records

    def release(self, request_ids: Collection[str]) -> None:
        """These requests hold no block any longer; must come before anything overwrites theirs."""
        for request_id in request_ids:
            index = self._records.pop(request_id, None)
            if index is not None and self.bucket is not None:
                release_record(self.bucket.records, index)
                self._free.append(index)

    def commit(
        self, scheduled: Sequence[Scheduled], tables: Sequence[torch.Tensor], attempts: Mapping[str, int]
    ) -> None:
        """End a step: its rows are in, and every record says how far its request is complete.

        Args:
            tables: per cache group int32 [requests, blocks].

        Raises:
            Fenced: another worker restores from this bucket; no record was touched.
        """
        self.flush()
        self.check_seal()  # mostly nothing is left to flush, and a seal may have come since the last row
        bucket = self.bucket
        if bucket is None or not scheduled:
            return
        start = time.perf_counter()
        known = [entry for entry in scheduled if self._has_record(bucket, entry.request_id, attempts)]
        commit_records(
            bucket.records,
            torch.tensor([self._records[entry.request_id] for entry in known], dtype=torch.int32),
            torch.tensor([entry.positions for entry in known], dtype=torch.int32),
            torch.tensor([entry.table_row for entry in known], dtype=torch.int32),
            tables,
            bucket.shape.block_sizes,
        )
        self.counters.checkpoint_commits += len(known)
        self.counters.checkpoint_s += time.perf_counter() - start

    def _has_record(self, bucket: Bucket, request_id: str, attempts: Mapping[str, int]) -> bool:
        if request_id in self._records:
            return True
        if not self._free or request_id not in attempts:
            self.counters.checkpoint_records_short += 1
            return False
        index = self._free.pop()
        bucket.open_record(index, request_id, attempts[request_id])
        self._records[request_id] = index
        return True
