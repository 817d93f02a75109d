"""Typed entrances to the native ops that write and read checkpoint buckets (6.1).

They check their arguments (ValueError, TypeError), release the interpreter lock while they run, and
never allocate.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tarragon.native.ops import load


@functools.cache
def _op(name: str) -> Any:
    """The op itself: looking it up each time would cost more than some calls do."""
    load()
    return getattr(torch.ops.tarragon, name).default


def segment_write(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
    layers: Sequence[int],
    rows: torch.Tensor,
    checks: torch.Tensor,
) -> None:
    """Copy rows of several layers into a bucket, each with its checksum.

    Row i of ``keys[n]`` and ``values[n]`` goes into slot ``slots[n][i]`` of layer ``layers[n]``.

    Args:
        keys, values: per segment [T, ...], any dtype; rows may be strided.
        slots: per segment int64 [S], S <= T; negative ones are padding.
        rows: uint8 [layers of the bucket, slots of a layer, row bytes].
        checks: int32 [layers of the bucket, slots of a layer].
    """
    _op("segment_write")(keys, values, slots, layers, rows, checks)


def segment_read(
    rows: torch.Tensor, checks: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> int:
    """The inverse of ``segment_write``; returns the first i whose row is absent or damaged, or -1."""
    return int(_op("segment_read")(rows, checks, slots, key, value))


def commit_records(
    records: torch.Tensor,
    indices: torch.Tensor,
    committed: torch.Tensor,
    table_rows: torch.Tensor,
    tables: Sequence[torch.Tensor],
    block_sizes: Sequence[int],
) -> None:
    """Make ``committed[i]`` positions of record ``indices[i]`` visible, all int32 [R].

    Args:
        records: uint8 [records, record bytes].
        table_rows: row of each record's request in the block tables.
        tables: per cache group int32 [requests, blocks].
        block_sizes: per cache group, tokens in a block.
    """
    _op("commit_records")(records, indices, committed, table_rows, list(tables), list(block_sizes))


def release_record(records: torch.Tensor, index: int) -> None:
    """Record ``index`` says nothing any more; its blocks may be overwritten from now on."""
    _op("release_record")(records, index)


def record_whole(copy: torch.Tensor, block_sizes: Sequence[int]) -> bool:
    """Whether the copy of one record, uint8 [1, record bytes], fits its own checksum."""
    return bool(_op("record_whole")(copy, list(block_sizes)))
