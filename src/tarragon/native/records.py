"""Typed entrances to the native code that writes a bucket's commit records, and checks them (6.1)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import torch

from tarragon.native.build import library_path
from tarragon.native.ops import load, op

_COMMITTED: Final = 0
_SEALED: Final = 1


class _Group(ctypes.Structure):
    """``struct Group`` of csrc/records.cpp."""

    _fields_: ClassVar = [
        ("table", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    ]


class _Batch(ctypes.Structure):
    """``struct Batch`` of csrc/records.cpp."""

    _fields_: ClassVar = [
        ("records", ctypes.c_void_p),
        ("record_count", ctypes.c_int64),
        ("record_bytes", ctypes.c_int64),
        ("seal", ctypes.c_void_p),
        ("computed", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("requests", ctypes.c_int64),
        ("groups", ctypes.c_void_p),
        ("group_count", ctypes.c_int64),
    ]


@functools.cache
def _native_commit() -> Any:
    load()
    # It takes microseconds: giving up the interpreter lock for it could cost a thread's whole turn.
    function = ctypes.PyDLL(str(library_path())).tarragon_commit
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_int32
    return function


class Commit:
    """The commit of one batch, to be called after every step of it: all but the numbers stays where it is.

    It runs with cold caches, where an op of torch's takes some 60 us and each object made or looked at its
    share; so the batch is described once, by addresses, whose owners this holds.
    """

    def __init__(
        self,
        records: torch.Tensor,
        seal: ctypes.c_uint32,
        indices: Sequence[int],
        computed: torch.Tensor,
        tables: Sequence[torch.Tensor],
        block_sizes: Sequence[int],
    ) -> None:
        """Describe the batch.

        Args:
            records: uint8 [records, record bytes], contiguous.
            seal: anything but 0 forbids to write.
            indices: per request its record; a negative one is left out.
            computed: int32 [requests or more], positions complete before the step; read at each commit.
            tables: per cache group int32 [requests or more, blocks], row i the i-th request's; likewise.
            block_sizes: per cache group, tokens in a block.

        Raises:
            ValueError: a tensor is not as described.
        """
        count = len(indices)
        _check("records", records, torch.uint8, 2, records.shape[0])
        _check("computed", computed, torch.int32, 1, count)
        for table in tables:
            _check("a table", table, torch.int32, 2, count)
        if len(tables) != len(block_sizes) or min(block_sizes, default=0) < 1:
            raise ValueError("each table needs a block size of at least 1")
        self._indices = (ctypes.c_int32 * count)(*indices)
        self._groups = (_Group * len(tables))(
            *(
                _Group(table.data_ptr(), table.stride(0), table.shape[1], size)
                for table, size in zip(tables, block_sizes, strict=True)
            )
        )
        self._owners = records, seal, computed, tuple(tables)
        self._batch = _Batch(
            records=records.data_ptr(),
            record_count=records.shape[0],
            record_bytes=records.shape[1],
            seal=ctypes.addressof(seal),
            computed=computed.data_ptr(),
            indices=ctypes.addressof(self._indices),
            requests=count,
            groups=ctypes.addressof(self._groups),
            group_count=len(tables),
        )
        self._address = ctypes.addressof(self._batch)
        self._native = _native_commit()

    def __call__(self, added: Sequence[int] | None = None) -> bool:
        """Make ``added[i]`` positions more of every request visible, or one more of each.

        Returns:
            Whether that was done; False if the bucket is sealed: no record was touched.

        Raises:
            ValueError: a record or a table has no room for so many blocks; no record was touched.
        """
        if added is None:
            outcome = self._native(self._address, None)
        else:
            if len(added) != len(self._indices):
                raise ValueError(f"{len(added)} numbers for {len(self._indices)} requests")
            outcome = self._native(self._address, (ctypes.c_int32 * len(added))(*added))
        if outcome not in (_COMMITTED, _SEALED):
            raise ValueError("a record cannot hold so many blocks, or is none of the bucket's")
        return bool(outcome == _COMMITTED)


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, dimensions: int, rows: int) -> None:
    fits = tensor.dtype == dtype and tensor.dim() == dimensions and tensor.shape[0] >= rows
    if not fits or tensor.stride(-1) != 1:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, which is not as it should be")


def release_record(records: torch.Tensor, index: int) -> None:
    """Record ``index`` says nothing any more; its blocks may be overwritten from now on."""
    op("release_record")(records, index)


def record_whole(copy: torch.Tensor, block_sizes: Sequence[int]) -> bool:
    """Whether the copy of one record, uint8 [1, record bytes], fits its own checksum."""
    return bool(op("record_whole")(copy, list(block_sizes)))
