"""What does an attention worker write of its KV cache, and when is it complete? (6.1)

``begin_step`` takes the new rows as the engine makes them, ``use_gap`` copies them into the bucket while the
worker waits for its experts (the gaps of AW-EW traffic), and ``commit`` makes a step's rows visible at its
end, in one record per request. One-sided: no other process runs on behalf of a write. Called by the engine
thread alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, KeysView, Sequence
from typing import Final

import torch

from tarragon.checkpoint.bucket import Bucket
from tarragon.config import SEGMENT_ROWS_PER_WRITE, SEGMENTS_PER_WRITE
from tarragon.counters import Counters
from tarragon.native.records import Commit, release_record
from tarragon.native.segments import SegmentWriter
from tarragon.refe.traffic import SEGMENTS, TrafficRing

UNRESTORABLE: Final = 0xFFFF_FFFF
"""The attempt of records that nobody may go on from: no request is tried so often."""


class Fenced(RuntimeError):
    """This worker's requests have been given to others; nothing it computes is wanted any more."""


class Noted:
    """New rows of some layers that are not written yet. Two flat lists, as a native call takes them."""

    __slots__ = ("places", "tensors")

    def __init__(self) -> None:
        self.places: list[int] = []
        """Of each layer: its place in the order in which layers run."""
        self.tensors: list[torch.Tensor] = []
        """Of each layer: key and value [T, ...], and their slots, int64 [S], S <= T."""

    def clear(self) -> None:
        self.places.clear()
        self.tensors.clear()


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
        self._pending = Noted()
        self._per_write = SEGMENTS_PER_WRITE
        """As soon as so many layers are noted, they are written."""
        self._write: SegmentWriter | None = None
        self._ahead_before_s = 0.0
        """Of the writers before it."""
        self._last_place = 0
        """After the last layer no gap follows."""
        self._records: dict[str, int] = {}
        self._free: list[int] = []
        self._roster: list[str] = []
        """Requests of the last step, in its order; empty if ``_commit`` is not for the next one."""
        self._commit: Commit | None = None
        self._computed: torch.Tensor | None = None
        """What ``_commit`` reads."""

    def attach(self, bucket: Bucket) -> None:
        """Protect what is written from now on."""
        self.bucket = bucket
        self._last_place = bucket.shape.layers - 1
        self._ahead_before_s = self.ahead_s
        self._write = SegmentWriter(bucket.rows, bucket.checks)
        self._free = list(range(bucket.shape.records))
        self._records.clear()
        self._roster.clear()

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
    def recorded(self) -> KeysView[str]:
        """Requests that have a record."""
        return self._records.keys()

    @property
    def ahead_s(self) -> float:
        """CPU time that went into having the bucket's pages before they were needed, beside the steps."""
        return self._ahead_before_s + (self._write.pages.ahead_s if self._write else 0.0)

    # ------------------------------------------------------------------ segments

    def begin_step(self, tokens: int) -> Noted | None:
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
        places = self._pending.places
        if places and (len(places) >= self._per_write or places[-1] == self._last_place):
            self.flush()

    def flush(self) -> None:
        """Copy what was noted into the bucket."""
        places, bucket, counters = self._pending.places, self.bucket, self.counters
        if not places:
            return
        start = time.perf_counter()
        assert self._write is not None
        assert bucket is not None
        self.check_seal()
        written = self._write(places, self._pending.tensors)
        size = written * bucket.shape.row_bytes
        counters.checkpoint_segments += len(places)
        counters.checkpoint_bytes += size
        end = time.perf_counter()
        if self.traffic is not None:
            self.traffic.add(SEGMENTS, places[0], start, end, size)
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
                self._roster.clear()

    def commit(
        self,
        requests: Sequence[str],
        computed: torch.Tensor,
        added: Sequence[int] | None,
        tables: Callable[[], Sequence[torch.Tensor]],
        attempt_of: Callable[[str], int | None],
    ) -> None:
        """End a step: its rows are in, and every record says how far its request is complete.

        Args:
            requests: of the step; row i of all that follows is about the i-th.
            computed: int32 [requests or more], positions that were complete before the step.
            added: positions that the step completed; None for one each.
            tables: per cache group int32 [requests or more, blocks]; asked again when the requests, or the
                memory of ``computed``, are others than in the step before.
            attempt_of: the attempt of a request; of one that has none, no record is made.

        Raises:
            Fenced: another worker restores from this bucket; no record was touched.
        """
        self.flush()
        bucket = self.bucket
        if bucket is None or not requests:
            return
        start = time.perf_counter()
        if self._commit is None or requests != self._roster or computed is not self._computed:
            self.check_seal()
            self._commit = self._enroll(bucket, requests, computed, tables(), attempt_of)
        if not self._commit(added):
            self.check_seal()
        self.counters.checkpoint_commits += len(requests)
        self.counters.checkpoint_s += time.perf_counter() - start

    def _enroll(
        self,
        bucket: Bucket,
        requests: Sequence[str],
        computed: torch.Tensor,
        tables: Sequence[torch.Tensor],
        attempt_of: Callable[[str], int | None],
    ) -> Commit:
        """Find a record for each of these requests; who finds none asks again in the next step."""
        indices = [self._record_of(bucket, request_id, attempt_of) for request_id in requests]
        self._roster = [] if -1 in indices else list(requests)
        self._computed = computed
        return Commit(bucket.records, bucket.seal_word, indices, computed, tables, bucket.shape.block_sizes)

    def _record_of(self, bucket: Bucket, request_id: str, attempt_of: Callable[[str], int | None]) -> int:
        """Index of the request's record, which is made if need be; -1 if there is none for it."""
        known = self._records.get(request_id)
        if known is not None:
            return known
        attempt = attempt_of(request_id)
        if not self._free or attempt is None:
            self.counters.checkpoint_records_short += 1
            return -1
        index = self._records[request_id] = self._free.pop()
        bucket.open_record(index, request_id, attempt)
        return index
