"""When did a worker last do something? It writes the time into a page that it shares with who watches it.

So one that works need not be asked: its watcher reads a number, nobody is woken, nothing is sent. A probe
is for one whose pulse has stopped: only its answer tells a long computation from a hang (section 5).
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from tarragon.messages import ProtocolError
from tarragon.transport.memory import create_sealed, sealed_size


class Pulse:
    """The worker's side: two words of 8 bytes, beats so far and the time of the last one.

    Written by the computing thread alone.
    """

    def __init__(self) -> None:
        """Raises OSError if no memory file can be made."""
        self.fd = create_sealed("tarragon-pulse", mmap.PAGESIZE)
        self._memory = mmap.mmap(self.fd, mmap.PAGESIZE)
        self._words = memoryview(self._memory).cast("Q")
        self.beats: npt.NDArray[np.uint64] = np.frombuffer(self._memory, dtype=np.uint64, count=1)
        """uint64 [1], in the shared page."""

    def beat(self) -> None:
        """A unit of work is done. About 0.5 us."""
        words = self._words
        words[0] += 1
        words[1] = time.monotonic_ns() // 1_000

    def close(self) -> None:
        """Let go of the page, which stays as long as somebody maps it. Nobody may use ``beats`` any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            del self.beats
            self._words.release()
            with suppress(BufferError):  # a tensor over ``beats`` is still there: it goes with that
                self._memory.close()


class PulseView:
    """The watcher's side, of a process on the same host: both read one monotonic clock."""

    def __init__(self, fd: int) -> None:
        """Maps the page, and closes ``fd`` in any case. Raises ProtocolError if it is no such page."""
        try:
            size_bytes = sealed_size(fd)
            if size_bytes != mmap.PAGESIZE:
                raise ProtocolError(f"a pulse of {size_bytes} bytes, expected {mmap.PAGESIZE}")
            self._memory = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._words = memoryview(self._memory).cast("Q")

    @property
    def at_us(self) -> int:
        """Time of the last beat; 0 before the first."""
        return self._words[1]

    def close(self) -> None:
        self._words.release()
        self._memory.close()
