"""Where do rows lie? In shared memory that the attention worker creates and the expert worker maps (4.1).

Layout, every part aligned to 64 bytes::

    expert_ids  int32  [pairs_max]          attention worker writes
    rows        dtype  [pairs_max, hidden]  attention worker writes
    results     dtype  [pairs_max, hidden]  expert worker writes

The memory file is sealed against shrinking and growing before it is passed on:
a mapping of it can never raise SIGBUS because the other side changed its size.
Pages come into being when they are first written, so a large ``pairs_max``
costs nothing until it is used.
"""

from __future__ import annotations

import mmap
import os
from typing import Final, Literal

import msgspec
import torch

from tarragon.config import REGION_HIDDEN_MAX, REGION_PAIRS_MAX
from tarragon.messages import ProtocolError
from tarragon.transport.memory import create_sealed, sealed_size

DType = Literal["bfloat16", "float16", "float32"]
_ALIGNMENT_BYTES: Final = 64
_ID_BYTES: Final = 4
_ELEMENT_BYTES: Final[dict[str, int]] = {"bfloat16": 2, "float16": 2, "float32": 4}
_TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class RegionError(ProtocolError):
    """A shape out of bounds, or shared memory that is not what its shape says."""


class RegionShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a region holds: ``pairs_max`` rows of ``hidden`` elements each way.

    Raises RegionError beyond REGION_HIDDEN_MAX or REGION_PAIRS_MAX, so that a shape that exists
    has sizes far from any overflow.
    """

    dtype: DType
    hidden: int
    pairs_max: int

    def __post_init__(self) -> None:
        if self.dtype not in _ELEMENT_BYTES:
            raise RegionError(f"region of dtype {self.dtype!r}, not one of {', '.join(_ELEMENT_BYTES)}")
        if not 1 <= self.hidden <= REGION_HIDDEN_MAX:
            raise RegionError(f"region of hidden size {self.hidden}, not in 1..{REGION_HIDDEN_MAX}")
        if not 1 <= self.pairs_max <= REGION_PAIRS_MAX:
            raise RegionError(f"region of {self.pairs_max} pairs, not in 1..{REGION_PAIRS_MAX}")

    @property
    def rows_offset(self) -> int:
        """Bytes from the start of the region to ``rows``."""
        return _aligned(_ID_BYTES * self.pairs_max)

    @property
    def results_offset(self) -> int:
        """Bytes from the start of the region to ``results``."""
        return self.rows_offset + _aligned(self._matrix_bytes)

    @property
    def total_bytes(self) -> int:
        return self.results_offset + _aligned(self._matrix_bytes)

    @property
    def _matrix_bytes(self) -> int:
        return self.pairs_max * self.hidden * _ELEMENT_BYTES[self.dtype]


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class Region:
    """One mapping of a region; the tensors are views of the shared memory.

    ``expert_ids`` int32 [pairs_max], ``rows`` and ``results`` dtype [pairs_max, hidden].
    """

    expert_ids: torch.Tensor
    rows: torch.Tensor
    results: torch.Tensor

    def __init__(self, memory: mmap.mmap, shape: RegionShape) -> None:
        self.shape = shape
        dtype = _TORCH_DTYPES[shape.dtype]
        pairs, elements = shape.pairs_max, shape.pairs_max * shape.hidden
        self.expert_ids = torch.frombuffer(memory, dtype=torch.int32, count=pairs)
        self.rows = torch.frombuffer(memory, dtype=dtype, count=elements, offset=shape.rows_offset).view(
            pairs, shape.hidden
        )
        self.results = torch.frombuffer(
            memory, dtype=dtype, count=elements, offset=shape.results_offset
        ).view(pairs, shape.hidden)

    @staticmethod
    def create(shape: RegionShape) -> tuple[Region, int]:
        """A new zeroed region and the descriptor to pass on, which the caller closes. Raises OSError."""
        fd = create_sealed("tarragon-region", shape.total_bytes)
        try:
            return Region(mmap.mmap(fd, shape.total_bytes), shape), fd
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def map(fd: int, shape: RegionShape) -> Region:
        """Map the region that a peer created; the caller closes ``fd``.

        Raises RegionError unless it is a writable memory file of exactly the size that ``shape``
        says and can neither shrink nor grow.
        """
        size_bytes = sealed_size(fd, RegionError)
        if size_bytes != shape.total_bytes:
            raise RegionError(f"the memory has {size_bytes} bytes, its shape needs {shape.total_bytes}")
        try:
            memory = mmap.mmap(fd, shape.total_bytes)
        except (OSError, ValueError) as error:
            raise RegionError(f"the memory cannot be mapped: {error}") from error
        return Region(memory, shape)

    def close(self) -> None:
        """Let go of the memory; closing twice is harmless.

        It is unmapped with the last tensor that views it. Unmapping earlier is out of the question:
        a tensor that somebody still holds would point to nowhere.
        """
        for name in ("expert_ids", "rows", "results"):
            self.__dict__.pop(name, None)
