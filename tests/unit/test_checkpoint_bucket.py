"""Buckets: what is committed comes back bit for bit, and nothing else ever does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarragon.checkpoint.bucket import Bucket, BucketError, BucketShape
from tarragon.checkpoint.restore import Restorer, RowKind, Source
from tarragon.checkpoint.writer import Checkpointer, Fenced
from tarragon.config import SEGMENT_ROWS_PER_WRITE, SEGMENTS_PER_WRITE
from tarragon.gateway.wire import Origin
from tarragon.native.segments import SegmentWriter
from tarragon.transport.memory import create_sealed

SHAPE = BucketShape(
    layers=3,
    slots=64,
    row_bytes=2 * 2 * 8 * 2,
    records=4,
    blocks_max=8,
    block_sizes=(4,),
    layer_groups=(0, 0, 0),
    fingerprint="same",
)
KINDS = [RowKind(0, (2, 8), (2, 8), torch.bfloat16)] * 3


class Worker:
    """One attention worker's writing side over a fresh bucket, with made-up rows."""

    def __init__(self, shape: BucketShape = SHAPE) -> None:
        self.fd = create_sealed("bucket", shape.total_bytes)
        self.writer = Checkpointer()
        self.writer.attach(Bucket.map(self.fd, shape))
        self.tables = torch.zeros(4, 8, dtype=torch.int32)
        self.rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def write(self, row: int, start: int, stop: int) -> None:
        slots = torch.tensor(
            [int(self.tables[row, position // 4]) * 4 + position % 4 for position in range(start, stop)]
        )
        noted = self.writer.begin_step(len(slots))
        assert noted is not None
        for layer in range(SHAPE.layers):
            # As the engine has them: parts of one wider matrix.
            both = torch.randn(len(slots), 2, 2, 8).to(torch.bfloat16)
            key, value = both[:, 0], both[:, 1]
            noted.places.append(layer)
            noted.tensors += key, value, slots
            for i, slot in enumerate(slots.tolist()):
                self.rows[layer, slot] = key[i].clone(), value[i].clone()

    def commit(self, name: str, row: int, positions: int, attempt: int = 1) -> None:
        computed = torch.tensor([positions - 1], dtype=torch.int32)
        self.writer.commit([name], computed, None, lambda: [self.tables[row:]], {name: attempt}.get)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    made.tables[0, :3] = torch.tensor([5, 2, 9])
    yield made
    made.close()


@pytest.fixture
def reader(worker: Worker) -> Restorer:
    restorer = Restorer("same")
    restorer.add("aw-0", 7, worker.fd)
    return restorer


def found(reader: Restorer, name: str = "r", attempt: int = 1) -> Source | None:
    return next(iter(reader.find(name, [Origin("aw-0", 7, attempt)])), None)


def test_committed_rows_come_back_bit_for_bit(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 10)
    worker.commit("r", 0, 10)
    source = found(reader)
    assert source is not None
    assert source.record.positions == 10
    rows = reader.read(source, [2], 10, KINDS)
    assert rows is not None
    for layer, taken in enumerate(rows):
        assert taken.positions.tolist() == list(range(2, 10))
        for i, position in enumerate(range(2, 10)):
            slot = [5, 2, 9][position // 4] * 4 + position % 4
            key, value = worker.rows[layer, slot]
            assert torch.equal(taken.key[i], key)
            assert torch.equal(taken.value[i], value)


def test_what_is_not_committed_is_not_seen(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 6)
    worker.writer.flush()
    assert found(reader) is None


def test_gaps_are_used_for_several_layers_at_a_time_and_the_last_one_always() -> None:
    layers = SEGMENTS_PER_WRITE + 2
    worker = Worker(msgspec.structs.replace(SHAPE, layers=layers, layer_groups=(0,) * layers))
    row, slots = torch.randn(1, 2, 8).to(torch.bfloat16), torch.tensor([20])

    def written(tokens: int) -> list[int]:
        """Segments that are in the bucket after each layer's gap."""
        noted = worker.writer.begin_step(tokens)
        assert noted is not None
        worker.writer.use_gap()
        before, found = worker.writer.counters.checkpoint_segments, []
        for layer in range(layers):
            noted.places.append(layer)
            noted.tensors += row, row, slots
            worker.writer.use_gap()
            found.append(worker.writer.counters.checkpoint_segments - before)
        return found

    for _ in range(2):
        assert written(1) == [0] * (SEGMENTS_PER_WRITE - 1) + [SEGMENTS_PER_WRITE] * 2 + [layers]
    assert written(SEGMENT_ROWS_PER_WRITE) == list(range(1, layers + 1)), "a long prompt's rows pile up"
    worker.close()


def test_rows_of_many_restored_requests_are_written_at_once(worker: Worker, reader: Restorer) -> None:
    """They are noted before a step's own: more segments than there are layers."""
    for start in range(0, 10):
        worker.write(0, start, start + 1)
    worker.commit("r", 0, 10)
    source = found(reader)
    assert source is not None
    rows = reader.read(source, [0], 10, KINDS)
    assert rows is not None
    assert torch.equal(rows[2].key[9], worker.rows[2, 9 * 4 + 1][0])


def test_without_a_bucket_or_switched_off_nothing_is_noted(worker: Worker) -> None:
    assert Checkpointer().begin_step(1) is None
    worker.writer.enable(False)
    assert worker.writer.begin_step(1) is None
    worker.writer.enable(True)
    noted = worker.writer.begin_step(1)
    assert noted is not None
    assert noted.places == noted.tensors == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [3]}, "layer 3 of 3"),
        ({"layers": [-1]}, "layer -1 of 3"),
        ({"layers": [0, 1]}, "a segment is a layer"),
        ({"slots": torch.tensor([64])}, "slot 64 is beyond"),
        ({"slots": torch.tensor([1, 2])}, "one row for each slot"),
        ({"key": torch.zeros(1, 2, 9, dtype=torch.bfloat16)}, "do not fit"),
        ({"key": torch.zeros(1, 2, 16, dtype=torch.bfloat16)[:, :, ::2]}, "contiguous rows"),
        ({"key": torch.zeros(1, 8, 2, dtype=torch.bfloat16).transpose(1, 2)}, "contiguous rows"),
    ],
)
def test_a_segment_that_does_not_fit_writes_nothing(
    worker: Worker, change: dict[str, Any], message: str
) -> None:
    bucket, row = worker.writer.bucket, torch.ones(1, 2, 8, dtype=torch.bfloat16)
    assert bucket is not None
    parts: dict[str, Any] = {"layers": [0], "key": row, "value": row, "slots": torch.tensor([1])} | change
    tensors = [parts["key"], parts["value"], parts["slots"]]
    with pytest.raises(ValueError, match=message):
        SegmentWriter(bucket.rows, bucket.checks)(parts["layers"], tensors)
    assert not bucket.rows.any()
    assert not bucket.checks.any()


def test_a_commit_covers_no_more_than_it_says(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6)
    worker.write(0, 6, 7)
    worker.writer.flush()
    source = found(reader)
    assert source is not None
    assert source.record.positions == 6


def test_another_attempt_is_not_this_one(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6, attempt=3)
    assert found(reader, attempt=2) is None
    assert found(reader, attempt=3) is not None


def test_the_longest_commit_is_first(worker: Worker, reader: Restorer) -> None:
    other = Worker()
    other.write(1, 0, 3)
    other.commit("r", 1, 3, attempt=2)
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6, attempt=1)
    reader.add("aw-1", 9, other.fd)
    sources = reader.find("r", [Origin("aw-1", 9, 2), Origin("aw-0", 7, 1)])
    assert [source.record.positions for source in sources] == [6, 3]
    other.close()


@pytest.mark.parametrize("length", [190, 191, 192, 5_000])
def test_ids_of_any_length_have_records_of_their_own(length: int, worker: Worker, reader: Restorer) -> None:
    """Clients choose them (X-Request-Id); one that is too long for a record must not end the worker."""
    first, second = "a" * length, "a" * (length - 1) + "\u00e9"
    worker.write(0, 0, 6)
    worker.commit(first, 0, 6)
    worker.commit(second, 0, 5)
    for name, positions in ((first, 6), (second, 5)):
        source = found(reader, name)
        assert source is not None
        assert source.record.positions == positions
    assert found(reader, "a" * (length + 1)) is None


def test_a_living_worker_is_not_fenced(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6)
    [source] = reader.find("r", [Origin("aw-0", 7, 1, living=True)])
    worker.writer.check_seal()
    worker.commit("other", 1, 3)
    assert reader.read(source, [0], 6, KINDS) is not None, "others go on, and its own record stands"
    worker.commit("r", 0, 6)
    assert reader.read(source, [0], 6, KINDS) is None, "it has not held: what was read may be of two steps"
    assert (reader.counters.restore_changed, reader.counters.restore_corrupt) == (1, 0)


def test_a_released_record_is_gone(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6)
    worker.writer.release(["r", "unknown"])
    assert found(reader) is None


def test_records_come_back_when_requests_end(worker: Worker) -> None:
    for i in range(3 * SHAPE.records):
        worker.commit(f"r{i}", 0, 4)
        worker.writer.release([f"r{i}"])
    assert worker.writer.counters.checkpoint_records_short == 0


def test_more_requests_than_records_run_unprotected(worker: Worker, reader: Restorer) -> None:
    for i in range(SHAPE.records + 1):
        worker.commit(f"r{i}", 0, 4)
    assert worker.writer.counters.checkpoint_records_short == 1
    assert found(reader, f"r{SHAPE.records}") is None


def test_reading_seals_and_the_writer_stops(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6)
    before = worker.writer.bucket
    assert before is not None
    rows = before.rows.clone()
    found(reader)
    worker.write(0, 4, 6)
    with pytest.raises(Fenced):
        worker.writer.flush()
    assert torch.equal(rows, before.rows)


def test_a_seal_that_comes_after_the_last_row_stops_the_commit(worker: Worker, reader: Restorer) -> None:
    """The last layer's rows are written in its gap: at the step's end nothing is left to flush."""
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6)
    worker.write(0, 6, 7)
    worker.writer.flush()
    bucket = worker.writer.bucket
    assert bucket is not None
    assert found(reader) is not None
    records = bucket.records.clone()
    with pytest.raises(Fenced):
        worker.commit("r", 0, 7)
    with pytest.raises(Fenced):
        worker.commit("new", 1, 3)
    assert torch.equal(bucket.records, records)
    source = found(reader)
    assert source is not None
    assert source.record.positions == 6


def test_a_flipped_byte_in_a_row_is_found(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6)
    bucket = worker.writer.bucket
    assert bucket is not None
    bucket.rows[1, 5 * 4 + 2, 17] ^= 1
    source = found(reader)
    assert source is not None
    assert reader.read(source, [0], 2, KINDS) is not None, "the damage lies beyond"
    assert reader.read(source, [0], 6, KINDS) is None
    assert reader.counters.restore_corrupt == 1


def test_a_flipped_byte_in_a_record_is_found(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6)
    bucket = worker.writer.bucket
    assert bucket is not None
    index = next(iter(worker.writer._records.values()))
    bucket.records[index, 224] ^= 1  # the number of a block
    assert found(reader) is None
    assert reader.counters.restore_corrupt == 1


def test_rows_from_before_the_bucket_are_known_to_be_missing(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 4, 6)
    worker.commit("r", 0, 6)
    source = found(reader)
    assert source is not None
    assert reader.read(source, [0], 6, KINDS) is None
    assert reader.counters.restore_incomplete == 1
    assert reader.counters.restore_corrupt == 0


def test_a_writer_that_wakes_while_its_rows_are_read_is_noticed(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6)
    source = found(reader)
    assert source is not None
    worker.writer.release(["r"])  # it takes its record back before it overwrites anything
    assert reader.read(source, [0], 6, KINDS) is None


def test_another_fingerprint_is_not_read(worker: Worker) -> None:
    worker.write(0, 0, 6)
    worker.commit("r", 0, 6)
    stranger = Restorer("another model")
    stranger.add("aw-0", 7, worker.fd)
    assert found(stranger) is None


def test_blocks_that_a_window_has_passed_are_left_out(worker: Worker, reader: Restorer) -> None:
    worker.tables[0, 0] = 0
    worker.write(0, 4, 10)
    worker.commit("r", 0, 10)
    source = found(reader)
    assert source is not None
    rows = reader.read(source, [4], 10, KINDS)
    assert rows is not None
    assert rows[0].positions.tolist() == list(range(4, 10))
    assert reader.read(source, [0], 10, KINDS) is None, "block 0 is no block"
    assert reader.counters.restore_incomplete == 1


@pytest.mark.parametrize("blocks_max", [3, 8, 16])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_every_cache_group_has_blocks_of_its_own(groups: int, blocks_max: int) -> None:
    """Whatever room a record's padding leaves behind them."""
    change = {"blocks_max": blocks_max, "block_sizes": (4,) * groups, "layer_groups": (groups - 1,) * 3}
    shape = msgspec.structs.replace(SHAPE, **change)
    fd = create_sealed("bucket", shape.total_bytes)
    writer = Checkpointer()
    writer.attach(Bucket.map(fd, shape))
    blocks = torch.arange(1, 1 + blocks_max, dtype=torch.int32)[None]
    tables = [blocks + 20 * group for group in range(groups)]
    writer.commit(["r"], torch.zeros(1, dtype=torch.int32), [10], lambda: tables, {"r": 1}.get)
    record = Bucket.map(fd, shape).find("r", 1)
    assert record is not None
    assert [found.tolist() for found in record.blocks] == [table[0, :3].tolist() for table in tables]
    os.close(fd)


def test_copied_blocks_are_copied(worker: Worker, reader: Restorer) -> None:
    worker.write(0, 0, 8)
    worker.writer.flush()
    worker.writer.copy_blocks([(5, 11)], 4)
    worker.tables[1, :2] = torch.tensor([11, 2])
    worker.commit("twin", 1, 8)
    source = found(reader, "twin")
    assert source is not None
    rows = reader.read(source, [0], 8, KINDS)
    assert rows is not None
    assert torch.equal(rows[2].key[1], worker.rows[2, 5 * 4 + 1][0])


def test_what_is_no_bucket_is_refused() -> None:
    plain = os.memfd_create("x")
    with pytest.raises(BucketError, match="not sealed"):
        Bucket.map(plain)
    os.close(plain)
    fd = create_sealed("bucket", SHAPE.total_bytes)
    with pytest.raises(BucketError, match="does not begin"):
        Bucket.map(fd)
    larger = BucketShape(
        **{f: getattr(SHAPE, f) for f in SHAPE.__struct_fields__ if f != "slots"}, slots=4096
    )
    with pytest.raises(BucketError, match="its shape needs"):
        Bucket.map(fd, larger)
    os.close(fd)


@pytest.mark.parametrize(
    "change", [{"slots": 0}, {"layer_groups": (0, 1, 0)}, {"layer_groups": (0,)}, {"slots": 1 << 40}]
)
def test_shapes_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    fields = {name: getattr(SHAPE, name) for name in SHAPE.__struct_fields__} | change
    with pytest.raises(BucketError):
        BucketShape(**fields)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_history_restores_exactly_what_was_committed(data: st.DataObject) -> None:
    """Requests come, grow, shrink (preemption) and end in any order, sharing the blocks of a small cache."""
    worker = Worker()
    reader = Restorer("same")
    reader.add("aw-0", 7, worker.fd)
    free = list(range(1, 16))
    live: dict[str, tuple[int, int]] = {}
    for step in range(data.draw(st.integers(1, 12))):
        name = data.draw(st.sampled_from(["a", "b", "c"]), label=f"step {step}")
        if name in live and data.draw(st.booleans(), label="ends"):
            row, positions = live.pop(name)
            worker.writer.release([name])
            free.extend(worker.tables[row, : -(-positions // 4)].tolist())
            continue
        row, start = live.get(name, ("abc".index(name), 0))
        stop = min(start + data.draw(st.integers(1, 6), label="tokens"), 20)
        held, wanted = -(-start // 4), -(-stop // 4)
        if wanted - held > len(free) or stop == start:
            continue
        for block in range(held, wanted):
            worker.tables[row, block] = free.pop(0)
        worker.write(row, start, stop)
        worker.commit(name, row, stop)
        live[name] = (row, stop)
    for name in "abc":
        source = found(reader, name)
        if name not in live:
            assert source is None
            continue
        row, positions = live[name]
        assert source is not None
        assert source.record.positions == positions
        rows = reader.read(source, [0], positions, KINDS)
        assert rows is not None
        slots = np.array(
            [int(worker.tables[row, p // 4]) * 4 + p % 4 for p in range(positions)], dtype=np.int64
        )
        for layer, taken in enumerate(rows):
            for i, slot in enumerate(slots.tolist()):
                assert torch.equal(taken.key[i], worker.rows[layer, slot][0])
                assert torch.equal(taken.value[i], worker.rows[layer, slot][1])
    worker.close()
