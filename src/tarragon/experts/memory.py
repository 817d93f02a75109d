"""Where do the packed experts of a host lie? Once, in memory that all its expert workers map.

The node agent makes it before it forks anybody; it has no name, outlives every worker and ends with the
agent. Whoever needs an expert first packs it there; for all others it is a matter of mapping pages. So a
worker that dies has no weights to free, its replacement has none to load, and a shadow costs no memory.

It is one more thing that the expert workers of a host have in common, so none can write to it by mistake: it
is mapped read-only, except for the pages of a slot while that is filled, and what is written then is the
same whoever writes it. The other processes have not even that. Workers that each have a device's memory of
their own cannot share: there, and with ``share_expert_memory`` off, every worker holds copies (5.3).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from tarragon.messages import ExpertId
from tarragon.models.shape import DTYPE_BYTES, MoeModel

_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
_MADV_COLLAPSE: Final = 25
_MAP_FIXED: Final = 0x10
_HUGE_BYTES: Final = 2 << 20
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)


def part_shapes(model: MoeModel) -> list[tuple[int, ...]]:
    """Shapes of one expert's w13 and w2, and of b13 and b2 if it has biases."""
    hidden, intermediate = model.hidden, model.intermediate
    weights: list[tuple[int, ...]] = [(2 * intermediate, hidden), (hidden, intermediate)]
    return weights + ([(2 * intermediate,), (hidden,)] if model.has_bias else [])


class HostMemory:
    """Room for every expert of a model; sparse, so what nobody packed takes no memory.

    Raises OSError if the system does not grant that much.
    """

    def __init__(self, model: MoeModel) -> None:
        self.model = model
        item = DTYPE_BYTES[model.dtype]
        self._slot_bytes = [math.prod(shape) * item for shape in part_shapes(model)]
        sizes = [slot_bytes * model.experts for slot_bytes in self._slot_bytes]
        self._part_bytes = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]
        self._mapping = _AlignedMapping(len(model.moe_layers) * sum(self._part_bytes))
        self.slots = self._mapping.buffer
        self._packed = mmap.mmap(-1, model.experts_total)
        protect(address_of(self._packed), len(self._packed), mmap.PROT_READ)

    def offset(self, layer: int, part: int) -> int:
        """Where in ``slots`` a layer's tensor [E, ...] of this part begins; parts as in ``part_shapes``."""
        return layer * sum(self._part_bytes) + sum(self._part_bytes[:part])

    def is_packed(self, expert: ExpertId) -> bool:
        """Whether all of its parts are there, complete."""
        return bool(self._packed[expert.layer * self.model.experts + expert.expert])

    def set_packed(self, expert: ExpertId) -> None:
        """To be called after its last byte was written: it stays so for good."""
        with writable(address_of(self._packed), len(self._packed)):
            self._packed[expert.layer * self.model.experts + expert.expert] = 1

    def compact(self, experts: Iterable[ExpertId]) -> None:
        """Put what is packed into huge pages, so that mapping and unmapping it cost next to nothing.

        It takes milliseconds for each 2 MiB, in which nobody can read there: not to be called while others
        compute. Kernels before 6.1 refuse, then the pages stay small.
        """
        found: set[int] = set()
        for expert in experts:
            for part, slot_bytes in enumerate(self._slot_bytes):
                start = self.offset(expert.layer, part) + expert.expert * slot_bytes
                found.update(range(start // _HUGE_BYTES, (start + slot_bytes) // _HUGE_BYTES + 1))
        for index in sorted(found):
            self._mapping.collapse(index)

    def close(self) -> None:
        """Unmap it in this process. No tensor over it may be used any more: that would be a crash."""
        self._mapping.close()
        self._packed.close()


class _AlignedMapping:
    """Shared memory at an address at which it can be in huge pages; read-only at first. Raises OSError."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = -(-size_bytes // _HUGE_BYTES) * _HUGE_BYTES
        room = self._map(None, self._size_bytes + _HUGE_BYTES, 0, mmap.MAP_PRIVATE)
        self._address = -(-room // _HUGE_BYTES) * _HUGE_BYTES
        try:
            self._map(self._address, self._size_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED)
        except BaseException:
            _unmap(room, self._size_bytes + _HUGE_BYTES)
            raise
        _unmap(room, self._address - room)
        _unmap(self._address + self._size_bytes, room + _HUGE_BYTES - self._address)
        # Where the system gives huge pages to who asks (shmem_enabled), there is nothing to collapse later.
        _libc.madvise(ctypes.c_void_p(self._address), ctypes.c_size_t(self._size_bytes), _MADV_HUGEPAGE)
        self.buffer = (ctypes.c_char * self._size_bytes).from_address(self._address)

    @staticmethod
    def _map(address: int | None, size_bytes: int, protection: int, flags: int) -> int:
        found = _libc.mmap(address, size_bytes, protection, flags | mmap.MAP_ANONYMOUS, -1, 0)
        if found == ctypes.c_void_p(-1).value:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        assert isinstance(found, int)
        return found

    def collapse(self, index: int) -> None:
        """Have the huge page of this number, if the system can spare one."""
        address = self._address + index * _HUGE_BYTES
        if index < self._size_bytes // _HUGE_BYTES:
            _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(_HUGE_BYTES), _MADV_COLLAPSE)

    def close(self) -> None:
        if self._size_bytes:
            _unmap(self._address, self._size_bytes)
            self._size_bytes = 0


def _unmap(address: int, size_bytes: int) -> None:
    if size_bytes:
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes))


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def pages(address: int, size_bytes: int) -> tuple[int, int]:
    """Address and length of the pages that hold these bytes."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    return start, address + size_bytes - start


def discard(address: int, size_bytes: int) -> None:
    """Give the whole pages within these bytes back; shared ones are only unmapped here."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def populate(address: int, size_bytes: int, *, write: bool) -> None:
    """Have the pages at once, to be written to or as they are: a fault for each costs more than filling them.

    Not by ``mmap.madvise``, which keeps the interpreter's lock. Kernels before 5.14 refuse, then every page
    has its fault.
    """
    start, length = pages(address, size_bytes)
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def protect(address: int, size_bytes: int, protection: int) -> None:
    """Let this process's pages with these bytes be read, or written to as well. Raises OSError."""
    start, length = pages(address, size_bytes)
    if _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), protection):
        raise OSError(ctypes.get_errno(), "the protection of expert memory cannot be changed")


@contextmanager
def writable(address: int, size_bytes: int) -> Iterator[None]:
    """Let this process write to these bytes during the block."""
    protect(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        yield
    finally:
        protect(address, size_bytes, mmap.PROT_READ)
