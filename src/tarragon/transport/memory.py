"""Memory files that processes share: sealed against any change of size before they are passed on.

A mapping of a sealed file can never raise SIGBUS because the other side shrank it. Files are sparse: a page
takes memory from its first write on.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

from tarragon.messages import ProtocolError

_SIZE_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def create_sealed(name: str, size_bytes: int) -> int:
    """A new zeroed memory file of this size for good; the caller closes the descriptor. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sealed_size(fd: int, error: type[ProtocolError] = ProtocolError) -> int:
    """Bytes of a memory file that can neither shrink nor grow; raises ``error`` if ``fd`` is none."""
    try:
        # Seals first, size second: once sealed, the size cannot change between check and use.
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size_bytes = os.fstat(fd).st_size
    except OSError as cause:
        raise error(f"the descriptor is not a memory file: {cause}") from cause
    if seals & _SIZE_SEALS != _SIZE_SEALS:
        raise error("the memory is not sealed: the other side could shrink it under us")
    return size_bytes
