"""What is a frame? A header of 8 bytes (magic u32, length u32, little endian), then ``length`` bytes.

No I/O here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from tarragon.messages import ProtocolError

FRAME_MAGIC: Final = 0x46524754  # "TGRF"
_HEADER: Final = struct.Struct("<II")
HEADER_BYTES: Final = _HEADER.size
BUFFERS_PER_CALL_MAX: Final = 1_024
"""Most buffers that Linux takes in one call (IOV_MAX)."""

Buffer = bytes | bytearray | memoryview
Payload = Buffer | Sequence[Buffer]


def encode_header(payload_bytes: int, frame_bytes_max: int) -> bytes:
    """Header of a frame of ``payload_bytes`` bytes; ProtocolError if it exceeds ``frame_bytes_max``."""
    if payload_bytes > frame_bytes_max:
        raise ProtocolError(f"frame of {payload_bytes} bytes, at most {frame_bytes_max} are allowed")
    return _HEADER.pack(FRAME_MAGIC, payload_bytes)


def decode_header(header: Buffer, frame_bytes_max: int) -> int:
    """Payload length in bytes; ProtocolError on a wrong size, a wrong magic or a length beyond the bound."""
    if len(header) != HEADER_BYTES:
        raise ProtocolError(f"frame header of {len(header)} bytes, expected {HEADER_BYTES}")
    magic, payload_bytes = _HEADER.unpack(header)
    if magic != FRAME_MAGIC:
        raise ProtocolError(f"frame with magic {magic:#x}, expected {FRAME_MAGIC:#x}")
    if payload_bytes > frame_bytes_max:
        raise ProtocolError(f"frame of {payload_bytes} bytes, at most {frame_bytes_max} are allowed")
    return int(payload_bytes)


def encode_frame(payload: Payload, frame_bytes_max: int) -> list[memoryview]:
    """Header and payload as byte views, none of them copied or joined; empty buffers are left out."""
    parts = [payload] if isinstance(payload, (bytes, bytearray, memoryview)) else payload
    views = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
    header = encode_header(sum(view.nbytes for view in views), frame_bytes_max)
    return [memoryview(header), *views]


def unsent(views: list[memoryview], sent_bytes: int) -> list[memoryview]:
    """What remains of ``views`` after the first ``sent_bytes`` bytes went out."""
    for index, view in enumerate(views):
        if sent_bytes < view.nbytes:
            return [view[sent_bytes:], *views[index + 1 :]]
        sent_bytes -= view.nbytes
    return []


class FrameReader:
    """Assembles frames from a byte stream that arrives in any pieces.

    It asks for the bytes of the current frame and no more: what follows (file
    descriptors, data frames of another format) stays in the socket. State
    survives a time-out between two pieces.
    """

    def __init__(self, frame_bytes_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._in_header = True
        self._buffer = bytearray(HEADER_BYTES)
        self._filled = 0

    @property
    def is_torn(self) -> bool:
        """Whether an end of file now would cut a frame in two."""
        return self._filled > 0 or not self._in_header

    def space(self) -> memoryview:
        """Where the next bytes go: never empty, never beyond the current frame."""
        return memoryview(self._buffer)[self._filled :]

    def received(self, count: int) -> bytes | None:
        """Take note of ``count`` bytes written into ``space()``; return the payload if it is complete.

        A bad header raises ProtocolError, and again at every later call: the
        stream has lost its frame boundaries for good.
        """
        self._filled += count
        if self._filled < len(self._buffer):
            return None
        if self._in_header:
            # The length is checked here, before the payload's memory is asked for.
            try:
                payload_bytes = decode_header(self._buffer, self.frame_bytes_max)
            except ProtocolError:
                self._filled -= count
                raise
            self._begin(in_header=False, size=payload_bytes)
            if payload_bytes:
                return None
        payload = bytes(self._buffer)
        self._begin(in_header=True, size=HEADER_BYTES)
        return payload

    def _begin(self, *, in_header: bool, size: int) -> None:
        self._in_header = in_header
        self._buffer = bytearray(size)
        self._filled = 0
