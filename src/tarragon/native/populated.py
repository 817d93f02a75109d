"""The pages of a checkpoint bucket: who writes them wants them to be there (6.1).

A bucket's memory comes page by page, as it is written; the thread here has the next ones made while the
writer computes.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import Any, ClassVar, Final

import torch

from tarragon.config import SEGMENT_POPULATED_BYTES
from tarragon.native.build import library_path
from tarragon.native.ops import load

_STOP: Final = 1 << 32
"""``kStop`` of csrc/populated.h."""


class _Pages(ctypes.Structure):
    """``struct Populated`` of csrc/populated.h."""

    _fields_: ClassVar = [
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("chunk_bytes", ctypes.c_int64),
        ("states", ctypes.c_void_p),
        ("wake_fd", ctypes.c_int64),
        ("ahead_ns", ctypes.c_int64),
    ]


class Populated:
    """Which pages of ``rows`` are there, and a thread that makes more; it ends when this is collected.

    Args:
        rows: uint8, contiguous.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        load()
        self._rows = rows
        chunks = -(-rows.nbytes // SEGMENT_POPULATED_BYTES)
        self.states = (ctypes.c_uint8 * chunks)()
        """Of each chunk: 0 absent, 1 wanted, 2 there."""
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._pages = _Pages(
            rows.data_ptr(),
            rows.nbytes,
            SEGMENT_POPULATED_BYTES,
            ctypes.addressof(self.states),
            wake_fd,
            0,
        )
        self.address = ctypes.addressof(self._pages)
        """Of the native structure."""
        self.thread = threading.Thread(
            target=_run, args=(self._pages, (rows, self.states)), name="checkpoint-pages", daemon=True
        )
        self.thread.start()
        weakref.finalize(self, os.eventfd_write, wake_fd, _STOP)

    @property
    def ahead_s(self) -> float:
        """CPU time of the thread so far."""
        return 1e-9 * float(self._pages.ahead_ns)


def _run(pages: _Pages, owned: Any) -> None:
    """``owned`` is memory that the native code works with, which must not go before it returns."""
    function = ctypes.CDLL(str(library_path())).tarragon_populate_ahead
    function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_int64
    if function(ctypes.addressof(pages)) == 0:
        os.close(pages.wake_fd)
    del owned
