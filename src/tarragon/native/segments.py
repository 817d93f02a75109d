"""Typed entrances to the native code that writes rows into checkpoint buckets and reads them (6.1).

Both release the interpreter lock while they run.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import torch

from tarragon.native.build import library_path
from tarragon.native.ops import load, op
from tarragon.native.populated import Populated

_ERROR_BYTES: Final = 512


class _Target(ctypes.Structure):
    """``struct Target`` of csrc/segments.cpp."""

    _fields_: ClassVar = [
        ("rows", ctypes.c_void_p),
        ("checks", ctypes.c_void_p),
        ("layers", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("pages", ctypes.c_void_p),
    ]


@functools.cache
def _native_write() -> Any:
    load()
    function = ctypes.CDLL(str(library_path())).tarragon_segment_write
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes, function.restype = (pointer, number, pointer, pointer, pointer, number), number
    return function


class SegmentWriter:
    """Copies rows of several layers into a bucket, each with its checksum.

    As ``records.Commit``, it is called with cold caches, so that it hands over addresses and goes round
    torch's dispatcher.

    Args:
        rows: uint8 [layers of the bucket, slots of a layer, row bytes], contiguous.
        checks: int32 [layers of the bucket, slots of a layer], contiguous.
    """

    def __init__(self, rows: torch.Tensor, checks: torch.Tensor) -> None:
        self._owners = rows, checks
        self.pages = Populated(rows)
        self._target = _Target(rows.data_ptr(), checks.data_ptr(), *rows.shape, self.pages.address)
        self._error = ctypes.create_string_buffer(_ERROR_BYTES)
        self._to, self._why = ctypes.addressof(self._target), ctypes.addressof(self._error)
        self._native = _native_write()
        self._make_room(rows.shape[0])

    def _make_room(self, segments: int) -> None:
        """For a step's layers; those of restored requests come all at once."""
        self._room = segments
        self._layers = (ctypes.c_int64 * segments)()
        self._tensors = (ctypes.c_void_p * (3 * segments))()
        self._layers_at, self._tensors_at = ctypes.addressof(self._layers), ctypes.addressof(self._tensors)

    def __call__(self, layers: Sequence[int], tensors: Sequence[torch.Tensor]) -> int:
        """Write.

        Args:
            layers: of each segment.
            tensors: of each segment three: key and value [T, ...] of any dtype, whose rows may be strided,
                and slots int64 [S], S <= T. Row i of the two goes into slot ``slots[i]``; negative ones are
                padding.

        Returns:
            How many rows were copied.

        Raises:
            ValueError: a segment does not fit the bucket; nothing was written.
        """
        count = len(layers)
        if len(tensors) != 3 * count:
            raise ValueError("a segment is a layer, its keys, its values and their slots")
        if count > self._room:
            self._make_room(count)
        self._layers[:count] = list(layers)
        self._tensors[: 3 * count] = [tensor._cdata for tensor in tensors]
        written: int = self._native(
            self._to, count, self._layers_at, self._tensors_at, self._why, _ERROR_BYTES
        )
        if written < 0:
            raise ValueError(self._error.value.decode(errors="replace"))
        return written


def segment_read(
    rows: torch.Tensor, checks: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> int:
    """Copy slot ``slots[i]`` of one layer into row i of key and value, for all i.

    Args:
        rows: uint8 [slots of the layer, row bytes].
        checks: int32 [slots of the layer].
        slots: int64 [S].
        key, value: [T, ...], S <= T; written.

    Returns:
        The first i whose row is absent or damaged, or -1.
    """
    return int(op("segment_read")(rows, checks, slots, key, value))
