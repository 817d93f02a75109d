"""Garbage: every decoder refuses with ProtocolError, within its bounds, and leaks nothing."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import tracemalloc
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarragon.config import REGION_HIDDEN_MAX, REGION_PAIRS_MAX
from tarragon.messages import (
    DATA_FRAME_BYTES,
    DataFrame,
    DataKind,
    Hello,
    ProtocolError,
    decode_control,
    encode_control,
    pack_data,
    unpack_data,
)
from tarragon.testing.ends import (
    WAIT_S,
    connection_pair,
    frame_bytes,
    no_leak,
    raw_pair,
)
from tarragon.transport.frames import FRAME_MAGIC, HEADER_BYTES, FrameReader, decode_header
from tarragon.transport.link import Accepted, Offer, decode_answer, decode_offer
from tarragon.transport.local import Connection
from tarragon.transport.region import RegionShape

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")

quick = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

# ------------------------------------------------------------------ frames

BOUND = 4_096


def header(length: int, magic: int = FRAME_MAGIC) -> bytes:
    return struct.pack("<II", magic, length)


@no_leak()
@pytest.mark.parametrize("raw", [header(BOUND + 1), header(0xFFFFFFFF), header(5, magic=1), b"GET / HT"])
def test_a_bad_header_is_refused_before_any_memory_is_taken(raw: bytes) -> None:
    bare, connection = raw_pair(frame_bytes_max=BOUND)
    with bare, connection:
        bare.sendall(raw + b"x" * 100)
        tracemalloc.start()
        for _ in range(2):  # and again: the stream has lost its boundaries for good
            with pytest.raises(ProtocolError):
                connection.recv(WAIT_S)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 1 << 20
    with pytest.raises(ProtocolError):
        decode_header(raw, BOUND)


def test_a_frame_of_exactly_the_bound_passes() -> None:
    bare, connection = raw_pair(frame_bytes_max=BOUND)
    with bare, connection:
        bare.sendall(header(BOUND) + b"x" * BOUND)
        assert connection.recv(WAIT_S) == b"x" * BOUND


def read_all(reader: FrameReader, stream: bytes, cut: Callable[[], int]) -> list[bytes]:
    """Feed ``stream`` in pieces of ``cut()`` bytes, as a socket would."""
    frames = []
    while stream:
        space = reader.space()
        assert 0 < space.nbytes <= max(HEADER_BYTES, reader.frame_bytes_max)
        count = min(len(stream), space.nbytes, cut())
        space[:count] = stream[:count]
        stream = stream[count:]
        frame = reader.received(count)
        if frame is not None:
            frames.append(frame)
    return frames


@quick
@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(0, 1 << 32))
def test_frames_survive_any_cutting(payloads: list[bytes], seed: int) -> None:
    chance = random.Random(seed)
    stream = b"".join(header(len(payload)) + payload for payload in payloads)
    reader = FrameReader(300)
    assert read_all(reader, stream, lambda: chance.randint(1, 50)) == payloads
    assert not reader.is_torn


@quick
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(header, st.integers(0, 0xFFFFFFFF)),
            st.builds(header, st.integers(0, 70)),
        ),
        max_size=8,
    )
)
def test_garbage_frames_raise_protocol_errors_only(pieces: list[bytes]) -> None:
    with contextlib.suppress(ProtocolError):
        read_all(FrameReader(64), b"".join(pieces), lambda: 1_000)


# ------------------------------------------------------------------ messages

FRAMES = st.builds(
    DataFrame,
    kind=st.sampled_from(list(map(int, DataKind))),
    layer=st.integers(0, 2**16 - 1),
    sender_epoch=st.integers(0, 2**32 - 1),
    receiver_epoch=st.integers(0, 2**32 - 1),
    pairs=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**64 - 1),
    flags=st.integers(0, 2**32 - 1),
    first=st.integers(0, 2**32 - 1),
)
OFFER = Offer(worker_id="aw-0", epoch=1, peer_epoch=2, shape=RegionShape("bfloat16", hidden=64, pairs_max=8))
HELLO = Hello(worker_id="ew-1", role="expert", epoch=3, pid=4, address="\0a")
MSGPACK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(["type", "worker_id", "epoch", "peer_epoch", "shape", "reason"]),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
).map(msgspec.msgpack.encode)


def mutated(valid: bytes) -> st.SearchStrategy[bytes]:
    """``valid`` with some bytes overwritten, cut off or appended."""
    edits = st.lists(st.tuples(st.integers(0, len(valid) - 1), st.integers(0, 255)), max_size=4)

    def edit(changes: list[tuple[int, int]], keep: int, tail: bytes) -> bytes:
        raw = bytearray(valid)
        for place, value in changes:
            raw[place] = value
        return bytes(raw[: len(raw) - keep]) + tail

    return st.builds(edit, edits, st.integers(0, len(valid)), st.binary(max_size=4))


@quick
@given(FRAMES)
def test_data_frames_come_back_equal(frame: DataFrame) -> None:
    assert unpack_data(pack_data(frame)) == frame


@quick
@given(
    st.binary(max_size=2 * DATA_FRAME_BYTES)
    | st.binary(min_size=DATA_FRAME_BYTES, max_size=DATA_FRAME_BYTES)
    | mutated(pack_data(DataFrame(DataKind.ROWS, 1, 2, 3, 4, 5)))
)
def test_garbage_data_frames_raise_protocol_errors_only(raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        frame = unpack_data(raw)
        assert frame.kind in list(DataKind)


@quick
@given(st.binary(max_size=200) | MSGPACK | mutated(encode_control(HELLO)))
def test_garbage_control_messages_raise_protocol_errors_only(raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_control(raw)


@quick
@given(
    st.binary(max_size=200)
    | MSGPACK
    | mutated(msgspec.msgpack.encode(OFFER))
    | mutated(msgspec.msgpack.encode(Accepted(epoch=1)))
)
def test_garbage_offers_raise_protocol_errors_only(raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        shape = decode_offer(raw).shape
        assert 1 <= shape.hidden <= REGION_HIDDEN_MAX
        assert 1 <= shape.pairs_max <= REGION_PAIRS_MAX
        assert shape.total_bytes < 1 << 42
    with contextlib.suppress(ProtocolError):
        decode_answer(raw)


@pytest.mark.parametrize(
    "shape",
    [
        {"dtype": "float32", "hidden": 1 << 62, "pairs_max": 8},
        {"dtype": "float32", "hidden": 8, "pairs_max": 1 << 62},
        {"dtype": "float32", "hidden": -8, "pairs_max": -8},
        {"dtype": "float32", "hidden": 8.0, "pairs_max": True},
        {"dtype": "object", "hidden": 8, "pairs_max": 8},
        {"dtype": "float32", "hidden": 8},
        {"dtype": "float32", "hidden": 8, "pairs_max": 8, "more": 1},
    ],
)
def test_an_offer_of_an_impossible_region_is_malformed(shape: dict[str, object]) -> None:
    valid = msgspec.msgpack.decode(msgspec.msgpack.encode(OFFER))
    decode_offer(msgspec.msgpack.encode(valid))
    with pytest.raises(ProtocolError, match="malformed offer"):
        decode_offer(msgspec.msgpack.encode({**valid, "shape": shape}))


@pytest.mark.parametrize(
    "raw",
    [
        b"\x91" * 100_000,  # deep nesting, and the same where the decoder only looks for a tag
        b"\x82\xa1x" + b"\x91" * 100_000 + b"\xc0\xa4type\xa4Stop",
        b"\x82\xa1x" + b"\x91" * 100_000 + b"\xc0\xa4type\xa5Offer",
        b"\x82\xa4type\xa5\x00\x00\x00\x00\x80",  # no UTF-8
        b"\xdd\xff\xff\xff\xff",  # an array that claims four thousand million elements
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x82\xa4type\xa5Hello\xa4type\xa4Stop",
    ],
)
def test_messages_that_claim_much_take_little(raw: bytes) -> None:
    decoders: list[Callable[[bytes], object]] = [decode_control, decode_offer, decode_answer]
    for decode in decoders:
        tracemalloc.start()
        with pytest.raises(ProtocolError):
            decode(raw)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 1 << 20


@no_leak()
def test_a_flood_of_descriptors_is_refused_without_a_leak() -> None:
    one, two = connection_pair()
    with one, two:
        descriptor = os.eventfd(0)
        wire = frame_bytes(b"x" * 64)
        for place in range(0, len(wire), 8):  # some with every piece
            socket.send_fds(one.sock, [wire[place : place + 8]], [descriptor] * 2)
        os.close(descriptor)
        with pytest.raises(ProtocolError):
            two.recv_with_fd(WAIT_S)
        assert isinstance(two, Connection)
