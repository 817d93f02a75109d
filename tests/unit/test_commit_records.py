"""The native commit of a batch: what it refuses, and that nothing is touched then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from tests.unit.test_checkpoint_bucket import SHAPE

from tarragon.checkpoint.bucket import Bucket
from tarragon.native.records import Commit
from tarragon.transport.memory import create_sealed

TABLE = torch.arange(1, 17, dtype=torch.int32).reshape(2, 8)
"""Blocks of two requests."""
COMPUTED = torch.tensor([4, 9], dtype=torch.int32)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    shape = msgspec.structs.replace(SHAPE, blocks_max=8)
    fd = create_sealed("bucket", shape.total_bytes)
    made = Bucket.map(fd, shape)
    for index, name in enumerate("ab"):
        made.open_record(index, name, 1)
    yield made
    os.close(fd)


def commit_of(bucket: Bucket, **changes: Any) -> Commit:
    parts: dict[str, Any] = {
        "indices": [0, 1],
        "computed": COMPUTED,
        "tables": [TABLE],
        "sizes": (4,),
    } | changes
    return Commit(
        bucket.records, bucket.seal_word, parts["indices"], parts["computed"], parts["tables"], parts["sizes"]
    )


def positions(bucket: Bucket) -> list[int | None]:
    records = [bucket.find(name, 1) for name in "ab"]
    return [None if record is None else record.positions for record in records]


def test_it_follows_the_memory_that_it_was_given(bucket: Bucket) -> None:
    computed, table = COMPUTED.clone(), TABLE.clone()
    commit = commit_of(bucket, computed=computed, tables=[table])
    assert commit()
    assert positions(bucket) == [5, 10]
    computed += 1
    table[0, 0] = 7
    assert commit([3, 1])
    assert positions(bucket) == [8, 11]
    record = bucket.find("a", 1)
    assert record is not None
    assert record.blocks[0].tolist() == [7, 2]


def test_who_has_no_record_is_left_out(bucket: Bucket) -> None:
    assert commit_of(bucket, indices=[-1, 1])()
    assert positions(bucket) == [None, 10]


@pytest.mark.parametrize(
    ("changes", "added"),
    [({}, [1, 24]), ({"tables": [TABLE[:, :2]]}, None), ({"indices": [0, 99]}, None), ({}, [1, -10])],
)
def test_what_does_not_fit_touches_no_record(
    bucket: Bucket, changes: dict[str, Any], added: list[int] | None
) -> None:
    before = bucket.records.clone()
    with pytest.raises(ValueError, match="cannot hold so many blocks"):
        commit_of(bucket, **changes)(added)
    assert torch.equal(bucket.records, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"computed": COMPUTED.long()}, "computed is torch.int64"),
        ({"computed": COMPUTED[:1]}, "computed is torch.int32"),
        ({"tables": [TABLE[:1]]}, "a table is"),
        ({"tables": [TABLE.t()]}, "a table is"),
        ({"sizes": (0,)}, "block size"),
        ({"sizes": (4, 4)}, "block size"),
    ],
)
def test_a_batch_that_is_not_as_described_is_refused(
    bucket: Bucket, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        commit_of(bucket, **changes)


def test_a_number_for_each_request(bucket: Bucket) -> None:
    with pytest.raises(ValueError, match="1 numbers for 2 requests"):
        commit_of(bucket)([1])


def test_a_sealed_bucket_stays_as_it_is(bucket: Bucket) -> None:
    commit = commit_of(bucket)
    bucket.seal()
    before = bucket.records.clone()
    assert not commit()
    assert torch.equal(bucket.records, before)
