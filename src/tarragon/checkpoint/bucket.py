"""What does a bucket look like? The memory of one attention worker's checkpoints, written one-sidedly (6.1).

A bucket mirrors the worker's paged KV cache slot by slot, but holds raw K,V rows where the cache holds
whatever layout its kernels like: slot s of layer l has its row and its checksum here at (l, s). So nothing
is allocated on the per-layer path, a prefix that requests share is stored once, and room comes back with
the cache's own blocks. A **record** for every running request names its blocks and how many positions of
it are complete in every layer; only what a record commits is ever read.

Layout, parts aligned to 4,096 bytes::

    header    magic, version, seal, shape as msgpack
    records   uint8  [records, record_bytes]           struct Record in native/csrc/records.cpp
    checks    int32  [layers, slots]                   CRC-32C of each row, 0 where none was written
    rows      uint8  [layers, slots, row_bytes]        K row, then V row

The file is sparse: pages come into being when they are first written.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import struct
from typing import Final, NamedTuple

import msgspec
import numpy as np
import torch

from tarragon.config import BUCKET_BYTES_MAX, RECORD_READ_ATTEMPTS_MAX
from tarragon.messages import DECODE_ERRORS, ProtocolError
from tarragon.native.records import record_whole, release_record
from tarragon.transport.memory import sealed_size

_MAGIC: Final = 0x54454B4355424754  # "TGBUCKET"
_VERSION: Final = 1
_PAGE_BYTES: Final = 4096
_HEADER: Final = struct.Struct("<QIII")  # magic, version, seal, bytes of the shape
_SEAL_OFFSET: Final = 12
_SHAPE_OFFSET: Final = 64
_HEADER_BYTES: Final = 4 * _PAGE_BYTES
_RECORD_HEADER_BYTES: Final = 224
_ID_BYTES_MAX: Final = 192


class BucketError(ProtocolError):
    """Memory that is not the bucket it should be, or a shape out of bounds."""


class BucketShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bucket mirrors. Raises BucketError beyond the bounds."""

    layers: int
    """Layers that write a KV cache."""
    slots: int
    """Token slots of each layer: blocks times tokens in a block."""
    row_bytes: int
    """Bytes of the widest layer's K row and V row together."""
    records: int
    """Requests that may run at once."""
    blocks_max: int
    """Most blocks of one request in one cache group."""
    block_sizes: tuple[int, ...]
    """Per cache group: tokens in a block."""
    layer_groups: tuple[int, ...]
    """Per layer: its cache group."""
    fingerprint: str
    """Engine, model and arithmetic; only an equal worker may go on from these rows (exactness)."""

    def __post_init__(self) -> None:
        counts = (self.layers, self.slots, self.row_bytes, self.records, self.blocks_max)
        if min(*counts, *self.block_sizes, len(self.block_sizes)) < 1:
            raise BucketError("every size of a bucket must be at least 1")
        groups = range(len(self.block_sizes))
        if len(self.layer_groups) != self.layers or any(g not in groups for g in self.layer_groups):
            raise BucketError("every layer of a bucket needs one of its cache groups")
        if self.total_bytes > BUCKET_BYTES_MAX:
            raise BucketError(f"a bucket of {self.total_bytes} bytes exceeds {BUCKET_BYTES_MAX}")

    @property
    def record_bytes(self) -> int:
        size = _RECORD_HEADER_BYTES + 4 * self.blocks_max * len(self.block_sizes)
        return -(-size // 64) * 64

    @property
    def blocks_room(self) -> int:
        """Blocks of each group that a record has room for, padding included: native code lays it out so."""
        return (self.record_bytes - _RECORD_HEADER_BYTES) // (4 * len(self.block_sizes))

    @property
    def records_offset(self) -> int:
        return _HEADER_BYTES

    @property
    def checks_offset(self) -> int:
        return self.records_offset + _aligned(self.records * self.record_bytes)

    @property
    def rows_offset(self) -> int:
        return self.checks_offset + _aligned(4 * self.layers * self.slots)

    @property
    def total_bytes(self) -> int:
        return self.rows_offset + _aligned(self.layers * self.slots * self.row_bytes)


class Committed(NamedTuple):
    """A copy of one record: what may be restored of a request."""

    place: int
    """Index of the record in the bucket."""
    version: int
    attempt: int
    positions: int
    blocks: tuple[np.ndarray, ...]
    """Per cache group int32 [blocks]; those that a sliding window has passed are another's by now."""


class Bucket:
    """One mapping of a bucket; the tensors are views of the shared memory.

    ``records`` uint8 [records, record_bytes], ``checks`` int32 [layers, slots],
    ``rows`` uint8 [layers, slots, row_bytes].
    """

    def __init__(self, memory: mmap.mmap, shape: BucketShape) -> None:
        self.shape = shape
        self.records = torch.frombuffer(
            memory, dtype=torch.uint8, count=shape.records * shape.record_bytes, offset=shape.records_offset
        ).view(shape.records, shape.record_bytes)
        cells = shape.layers * shape.slots
        self.checks = torch.frombuffer(
            memory, dtype=torch.int32, count=cells, offset=shape.checks_offset
        ).view(shape.layers, shape.slots)
        self.rows = torch.frombuffer(
            memory, dtype=torch.uint8, count=cells * shape.row_bytes, offset=shape.rows_offset
        ).view(shape.layers, shape.slots, shape.row_bytes)
        self.seal_word = ctypes.c_uint32.from_buffer(memory, _SEAL_OFFSET)
        fixed = self.records.numpy()[:, :_RECORD_HEADER_BYTES]
        self._versions = fixed[:, 0:8].view(np.uint64)[:, 0]
        self._words = fixed[:, 8:32].view(np.uint32)  # live, attempt, committed, id_bytes, check, reserved
        self._ids = fixed[:, 32:]

    # ------------------------------------------------------------------ made and mapped

    @staticmethod
    def map(fd: int, shape: BucketShape | None = None) -> Bucket:
        """Map a bucket: as its writer with ``shape``, which is written down; as a reader without.

        The caller closes ``fd``. Raises BucketError unless it is a sealed memory file of the right
        size with a sound header.
        """
        size = sealed_size(fd, BucketError)
        if size < _HEADER_BYTES:
            raise BucketError(f"{size} bytes are no bucket")
        memory = mmap.mmap(fd, size)
        if shape is None:
            shape = _read_shape(memory)
        else:
            _write_shape(memory, shape)
        if shape.total_bytes != size:
            raise BucketError(f"the memory has {size} bytes, its shape needs {shape.total_bytes}")
        return Bucket(memory, shape)

    # ------------------------------------------------------------------ the seal

    @property
    def sealed(self) -> bool:
        """Whether its requests have been given to others: its writer must stop (fencing)."""
        return bool(self.seal_word.value)

    def seal(self) -> None:
        """Fence the writer: it looks before it overwrites anything that a record names, but for blocks that a
        sliding window has passed."""
        self.seal_word.value = 1

    # ------------------------------------------------------------------ records

    def open_record(self, index: int, request_id: str, attempt: int) -> None:
        """Prepare a free record for a request; a commit makes it visible."""
        name = _name_of(request_id)
        release_record(self.records, index)
        self._words[index, 1] = attempt
        self._words[index, 3] = len(name)
        self._ids[index] = 0
        self._ids[index, : len(name)] = np.frombuffer(name, dtype=np.uint8)

    def find(self, request_id: str, attempt: int) -> Committed | None:
        """A whole copy of the record of this attempt, or None if there is none that may be trusted.

        Raises BucketError if there is one but its checksum is wrong.
        """
        name = np.zeros(_ID_BYTES_MAX, dtype=np.uint8)
        raw = _name_of(request_id)
        name[: len(raw)] = np.frombuffer(raw, dtype=np.uint8)
        matches = (self._words[:, 1] == attempt) & (self._ids == name).all(axis=1)
        for index in np.flatnonzero(matches).tolist():
            found = self._copy(index)
            if found is not None:
                return found
        return None

    def unchanged(self, record: Committed) -> bool:
        """Whether what was read under this record was still committed when the reading ended."""
        return int(self._versions[record.place]) == record.version

    def _copy(self, index: int) -> Committed | None:
        shape = self.shape
        for _ in range(RECORD_READ_ATTEMPTS_MAX):
            version = int(self._versions[index])
            copy = self.records[index : index + 1].clone()
            if version % 2 == 0 and int(self._versions[index]) == version:
                break
        else:
            return None
        live, attempt, positions, *_ = copy.numpy()[0, 8:32].view(np.uint32).tolist()
        if not live:
            return None
        if not record_whole(copy, shape.block_sizes):
            raise BucketError("a commit record is damaged: its checksum is wrong")
        tables = (
            copy.numpy()[0, _RECORD_HEADER_BYTES:][: 4 * shape.blocks_room * len(shape.block_sizes)]
            .view(np.int32)
            .reshape(len(shape.block_sizes), shape.blocks_room)
        )
        blocks = tuple(tables[group, : -(-positions // size)] for group, size in enumerate(shape.block_sizes))
        return Committed(index, version, attempt, positions, blocks)


def slots_at(blocks: np.ndarray, block_size: int, positions: np.ndarray) -> torch.Tensor:
    """Cache slots of a request's positions, int64 [P], if these are its blocks: int64 [P]."""
    return torch.from_numpy(
        blocks[positions // block_size].astype(np.int64) * block_size + positions % block_size
    )


def _aligned(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES


def _name_of(request_id: str) -> bytes:
    """What a record calls a request: its id, or a digest of one that is too long; no two are the same.

    Clients choose a part of the id (``X-Request-Id``), of any length.
    """
    raw = b"i" + request_id.encode("utf-8", "surrogatepass")
    return raw if len(raw) <= _ID_BYTES_MAX else b"d" + hashlib.blake2b(raw).digest()


def _write_shape(memory: mmap.mmap, shape: BucketShape) -> None:
    raw = msgspec.msgpack.encode(shape)
    if _SHAPE_OFFSET + len(raw) > _HEADER_BYTES:
        raise BucketError(f"a shape of {len(raw)} bytes does not fit a bucket's header")
    memory[_SHAPE_OFFSET : _SHAPE_OFFSET + len(raw)] = raw
    memory[: _HEADER.size] = _HEADER.pack(_MAGIC, _VERSION, 0, len(raw))


def _read_shape(memory: mmap.mmap) -> BucketShape:
    magic, version, _, size = _HEADER.unpack_from(memory)
    if magic != _MAGIC or version != _VERSION or _SHAPE_OFFSET + size > _HEADER_BYTES:
        raise BucketError("the memory does not begin like a bucket")
    try:
        return msgspec.msgpack.decode(memory[_SHAPE_OFFSET : _SHAPE_OFFSET + size], type=BucketShape)
    except DECODE_ERRORS as error:
        raise BucketError(f"malformed shape of a bucket: {error}") from error
