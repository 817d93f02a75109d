"""What do attention workers, the checkpoint store and the node agent say to each other about buckets?

Tagged msgspec structs in msgpack, never pickle; every count is bounded before it is used. A message that
hands a bucket over is followed by a frame of its own that carries the descriptor and no bytes, so that
whoever does not expect a descriptor never gets one.
"""

from __future__ import annotations

import os
from typing import Annotated, Final

import msgspec

from tarragon.config import BUCKET_BYTES_MAX
from tarragon.messages import DECODE_ERRORS, ProtocolError
from tarragon.transport.local import Connection
from tarragon.transport.memory import create_sealed, sealed_size

FRAME_BYTES_MAX: Final = 4_096
"""No message about a bucket is longer."""
_TEXT_MAX: Final = 1_024

WorkerId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Epoch = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Size = Annotated[int, msgspec.Meta(ge=1, le=BUCKET_BYTES_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=_TEXT_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages of this file; the struct's name is its tag."""


# attention worker -> store
class OpenBucket(Message, frozen=True):
    """My bucket, please: a new one of ``total_bytes``, or the one that I have already."""

    worker_id: WorkerId
    epoch: Epoch
    total_bytes: Size


# store -> attention worker, store <-> node agent
class Bucket(Message, frozen=True):
    """The descriptor of this incarnation's bucket is in the next frame."""

    worker_id: WorkerId
    epoch: Epoch
    total_bytes: Size


class Listed(Message, frozen=True):
    """All buckets that exist were handed over; what is not among them is gone. New ones follow."""


class Dropped(Message, frozen=True):
    """This incarnation's bucket is gone: its memory comes back once nobody maps it."""

    worker_id: WorkerId
    epoch: Epoch


class NoRoom(Message, frozen=True):
    """No bucket for now: the worker goes on unprotected. It gets one, unasked, when there is room again."""

    reason: Text


class Stale(Message, frozen=True):
    """The sender has been replaced; the connection is closed after it."""

    reason: Text


# store -> node agent
class Deposit(Message, frozen=True):
    """First message: I am this incarnation of the store. Give me what you keep, and keep what I send."""

    worker_id: WorkerId
    epoch: Epoch


# node agent -> store
class Returned(Message, frozen=True):
    """All kept buckets were handed over; this is the store's incarnation number ``starts`` on this host."""

    starts: Count


StoreMessage = OpenBucket | Bucket | Listed | Dropped | NoRoom | Stale | Deposit | Returned

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[StoreMessage] = msgspec.msgpack.Decoder(StoreMessage)


def encode(message: StoreMessage) -> bytes:
    return _encoder.encode(message)


def decode(raw: bytes) -> StoreMessage:
    """Decode one message; raises ProtocolError if it is not one, or says something out of bounds."""
    try:
        return _decoder.decode(raw)
    except DECODE_ERRORS as error:
        raise ProtocolError(f"malformed message about a bucket: {error}") from error


def send(connection: Connection, message: StoreMessage) -> None:
    """Send a message that comes without a descriptor. Raises ConnectionError."""
    connection.send(encode(message))


def receive(connection: Connection, timeout_s: float | None = None) -> StoreMessage | None:
    """Next message; None once the other end is gone. Raises TimeoutError and ProtocolError.

    A Bucket is followed by ``take_bucket``.
    """
    raw = connection.recv(timeout_s)
    return None if raw is None else decode(raw)


def hand_over(connection: Connection, bucket: Bucket, fd: int) -> None:
    """Send a bucket with a duplicate of ``fd``. Raises ConnectionError."""
    connection.send(encode(bucket))
    connection.send_with_fd(b"", fd)


def take_bucket(connection: Connection, bucket: Bucket, timeout_s: float | None = None) -> int:
    """The descriptor that belongs to the message ``bucket``; the caller owns it.

    Raises ProtocolError unless it is a memory file of the size it should have, sealed against any change of
    it (so that no mapping can ever raise SIGBUS); TimeoutError; ConnectionError.
    """
    payload, fd = connection.recv_with_fd(timeout_s)
    try:
        if payload:
            raise ProtocolError("a descriptor came with bytes that nobody expects")
        check_bucket(fd, bucket.total_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


# ------------------------------------------------------------------ the memory itself


def make_bucket(worker_id: str, total_bytes: int) -> int:
    """A new zeroed bucket; the caller owns the descriptor. Raises OSError.

    The file is sparse: a page takes memory from its first write on.
    """
    assert 1 <= total_bytes <= BUCKET_BYTES_MAX
    return create_sealed(f"tarragon-bucket-{worker_id}", total_bytes)


def check_bucket(fd: int, total_bytes: int) -> None:
    """Raise ProtocolError unless ``fd`` is a sealed memory file of exactly ``total_bytes``."""
    size_bytes = sealed_size(fd)
    if size_bytes != total_bytes:
        raise ProtocolError(f"a bucket of {size_bytes} bytes, announced as {total_bytes}")


def touched_bytes(fd: int) -> int:
    """Memory that a bucket takes: the pages that were written so far."""
    return os.fstat(fd).st_blocks * 512
