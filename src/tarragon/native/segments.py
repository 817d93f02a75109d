"""Typed entrances to the native ops that write rows into checkpoint buckets and read them (6.1).

They check their arguments (ValueError, TypeError), release the interpreter lock while they run, and
never allocate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tarragon.native.ops import op


def segment_write(
    layers: Sequence[int], tensors: Sequence[torch.Tensor], rows: torch.Tensor, checks: torch.Tensor
) -> int:
    """Copy rows of several layers into a bucket, each with its checksum.

    Args:
        layers: of each segment.
        tensors: of each segment three: key and value [T, ...] of any dtype, whose rows may be strided, and
            slots int64 [S], S <= T. Row i of the two goes into slot ``slots[i]``; negative ones are padding.
        rows: uint8 [layers of the bucket, slots of a layer, row bytes].
        checks: int32 [layers of the bucket, slots of a layer].

    Returns:
        How many rows were copied.

    Raises:
        ValueError: a segment does not fit the bucket; nothing was written.
    """
    written: int = op("segment_write")(layers, tensors, rows, checks)
    return written


def segment_read(
    rows: torch.Tensor, checks: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> int:
    """The inverse of ``segment_write``; returns the first i whose row is absent or damaged, or -1."""
    return int(op("segment_read")(rows, checks, slots, key, value))
