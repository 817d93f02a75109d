"""What the kernel is asked about pages of experts: to have them, to give them back, who may write, how large.

Python's mmap knows some of it; but it keeps the interpreter's lock in calls that take milliseconds.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

HUGE_BYTES: Final = 2 << 20
"""A huge page on x86-64."""
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
_MADV_COLLAPSE: Final = 25
_MAP_FIXED: Final = 0x10
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


class AlignedMapping:
    """Shared memory at an address at which it can be in huge pages; read-only at first. Raises OSError."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = -(-size_bytes // HUGE_BYTES) * HUGE_BYTES
        room = self._map(None, self._size_bytes + HUGE_BYTES, 0, mmap.MAP_PRIVATE)
        self._address = -(-room // HUGE_BYTES) * HUGE_BYTES
        try:
            self._map(self._address, self._size_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED)
        except BaseException:
            _unmap(room, self._size_bytes + HUGE_BYTES)
            raise
        _unmap(room, self._address - room)
        _unmap(self._address + self._size_bytes, room + HUGE_BYTES - self._address)
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
        address = self._address + index * HUGE_BYTES
        if index < self._size_bytes // HUGE_BYTES:
            _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(HUGE_BYTES), _MADV_COLLAPSE)

    def close(self) -> None:
        if self._size_bytes:
            _unmap(self._address, self._size_bytes)
            self._size_bytes = 0


def _unmap(address: int, size_bytes: int) -> None:
    if size_bytes:
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes))


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _pages(address: int, size_bytes: int) -> tuple[int, int]:
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
    start, length = _pages(address, size_bytes)
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def protect(address: int, size_bytes: int, protection: int) -> None:
    """Let this process's pages with these bytes be read, or written to as well. Raises OSError."""
    start, length = _pages(address, size_bytes)
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
