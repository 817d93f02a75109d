"""Strangers, forgers, garbage: every decoder refuses with ProtocolError, within its bounds, no leak."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarragon.config import REGION_HIDDEN_MAX, REGION_PAIRS_MAX
from tarragon.messages import (
    DATA_FRAME_BYTES,
    PROTOCOL_VERSION,
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
    AT_ONCE_S,
    SECRET,
    WAIT_S,
    call,
    connection_pair,
    frame_bytes,
    listen,
    new_address,
    no_leak,
    process,
    raw_pair,
    thread,
)
from tarragon.transport import handshake, sockets
from tarragon.transport.frames import FRAME_MAGIC, HEADER_BYTES, FrameReader, decode_header
from tarragon.transport.handshake import (
    HELLO_BYTES,
    PROOF_BYTES,
    REPLY_BYTES,
    DialerHandshake,
    HandshakeError,
    ListenerHandshake,
)
from tarragon.transport.link import Accepted, Offer, decode_answer, decode_offer
from tarragon.transport.local import Connection, Listener
from tarragon.transport.region import RegionShape

quick = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

# ------------------------------------------------------------------ the handshake, without sockets


def shake(dialer: DialerHandshake, listener: ListenerHandshake) -> None:
    listener.step(dialer.step(listener.step(dialer.opening)))


def test_the_same_secret_is_enough() -> None:
    dialer, listener = DialerHandshake(SECRET), ListenerHandshake(SECRET)
    shake(dialer, listener)
    assert dialer.wanted == listener.wanted == 0


def test_each_side_finds_out_by_itself() -> None:
    with pytest.raises(HandshakeError, match="listener does not know"):
        shake(DialerHandshake(SECRET), ListenerHandshake(b"w" * 32))
    listener = ListenerHandshake(SECRET)
    listener.step(DialerHandshake(b"w" * 32).opening)
    with pytest.raises(HandshakeError, match="dialer does not know"):
        listener.step(bytes(PROOF_BYTES))


def test_what_a_listener_says_does_not_pass_for_a_dialer() -> None:
    """Reflection: the attacker sends everything it hears back, on this connection and on a second one."""
    victim = ListenerHandshake(SECRET)
    reply = victim.step(DialerHandshake(b"unknown").opening)
    hello, proof = reply[:HELLO_BYTES], reply[HELLO_BYTES:]
    with pytest.raises(HandshakeError, match="dialer does not know"):
        victim.step(proof)
    with pytest.raises(HandshakeError, match="role"):
        ListenerHandshake(SECRET).step(hello)
    dialer = DialerHandshake(SECRET)
    with pytest.raises(HandshakeError, match="role"):
        dialer.step(dialer.opening + bytes(PROOF_BYTES))


def test_a_listener_used_as_an_oracle_gives_no_proof_of_a_dialer() -> None:
    # The attacker passes the victim's nonce to a second listener, in the dialer's role.
    victim, oracle = ListenerHandshake(SECRET), ListenerHandshake(SECRET)
    reply = victim.step(DialerHandshake(b"unknown").opening)
    forged_hello = reply[:6] + struct.pack("<H", 1) + reply[8:HELLO_BYTES]
    with pytest.raises(HandshakeError, match="dialer does not know"):
        victim.step(oracle.step(forged_hello)[HELLO_BYTES:])


def test_a_recorded_conversation_cannot_be_replayed() -> None:
    dialer, listener = DialerHandshake(SECRET), ListenerHandshake(SECRET)
    reply = listener.step(dialer.opening)
    proof = dialer.step(reply)
    again = ListenerHandshake(SECRET)
    again.step(dialer.opening)
    with pytest.raises(HandshakeError):
        again.step(proof)
    with pytest.raises(HandshakeError):
        DialerHandshake(SECRET).step(reply)


def test_the_secret_and_equal_bytes_never_travel() -> None:
    spoken = set()
    for _ in range(20):
        dialer, listener = DialerHandshake(SECRET), ListenerHandshake(SECRET)
        reply = listener.step(dialer.opening)
        proof = dialer.step(reply)
        spoken |= {dialer.opening, reply, proof, reply[HELLO_BYTES:]}
        assert SECRET not in dialer.opening + reply + proof
    assert len(spoken) == 80


def test_proofs_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = handshake.hmac.compare_digest
    monkeypatch.setattr(
        handshake.hmac, "compare_digest", lambda a, b: compared.append(len(a)) or original(a, b)
    )
    shake(DialerHandshake(SECRET), ListenerHandshake(SECRET))
    assert compared == [PROOF_BYTES, PROOF_BYTES]


def test_any_bit_of_any_message_counts() -> None:
    """Flip each bit of hello_d, hello_l and both proofs: the handshake must not complete."""
    for message, size in ((0, HELLO_BYTES), (1, REPLY_BYTES), (2, PROOF_BYTES)):
        for bit in range(8 * size):
            dialer, listener = DialerHandshake(SECRET), ListenerHandshake(SECRET)

            def flip(number: int, raw: bytes, wanted: int = message, bit: int = bit) -> bytes:
                if number != wanted:
                    return raw
                changed = bytearray(raw)
                changed[bit // 8] ^= 1 << bit % 8
                return bytes(changed)

            with pytest.raises(HandshakeError):
                listener.step(flip(2, dialer.step(flip(1, listener.step(flip(0, dialer.opening))))))
            assert listener.wanted


@quick
@given(st.binary(max_size=2 * REPLY_BYTES), st.binary(max_size=2 * PROOF_BYTES))
def test_garbage_in_a_handshake_is_a_handshake_error(message: bytes, proof: bytes) -> None:
    for side in (DialerHandshake(SECRET), ListenerHandshake(SECRET)):
        with pytest.raises(HandshakeError):
            side.step(message)
        assert side.wanted
    listener = ListenerHandshake(SECRET)
    listener.step(DialerHandshake(SECRET).opening)
    with pytest.raises(HandshakeError):
        listener.step(proof)


# ------------------------------------------------------------------ the handshake, over sockets


def refuse(listener: Listener, reason: str) -> None:
    with pytest.raises(HandshakeError, match=reason):
        listener.accept(WAIT_S)


@no_leak()
def test_another_secret_is_refused_on_both_sides_and_counted() -> None:
    with contextlib.closing(listen(address := new_address())) as listener:
        with thread(lambda: call(address, secret=b"w" * 32)) as dialled:
            refuse(listener, "hung up")
        assert isinstance(dialled.error, HandshakeError)
        assert "secret" in str(dialled.error)
        assert listener.refused == 1
        with thread(lambda: call(address).close()) as dialled:
            listener.accept(WAIT_S).close()
        assert dialled.error is None
        assert listener.refused == 1


@no_leak()
def test_another_user_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    def dial_as_ourselves(address: str) -> None:
        with pytest.raises(HandshakeError):
            call(address)

    def dial_seeing_another_user(address: str) -> None:
        monkeypatch.setattr(sockets.os, "geteuid", lambda: 12_345)
        with pytest.raises(HandshakeError, match="user"):
            call(address)

    with contextlib.closing(listen(address := new_address())) as listener:
        with process(dial_seeing_another_user, address) as child:
            refuse(listener, "hung up")
            child.join(WAIT_S)
            assert child.exitcode == 0
        with process(dial_as_ourselves, address) as child:
            monkeypatch.setattr(sockets.os, "geteuid", lambda: 12_345)
            refuse(listener, "user")
            child.join(WAIT_S)
            assert child.exitcode == 0
        assert listener.refused == 2


@no_leak()
@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4, "protocol"),
        (bytes(10_000), "protocol"),
        (b"", "hung up"),
        (b"TGRH", "hung up"),
        (struct.pack("<4sHH32s", b"TGRH", PROTOCOL_VERSION, 2, bytes(32)), "role"),
        (struct.pack("<4sHH32s", b"TGRH", PROTOCOL_VERSION, 1, bytes(32)) + bytes(32), "secret"),
        (frame_bytes(b"no handshake at all, just a frame of some length"), "protocol"),
    ],
)
def test_a_stranger_is_turned_away(message: bytes, reason: str) -> None:
    with contextlib.closing(listen(address := new_address())) as listener, socket.socket(socket.AF_UNIX) as s:
        s.connect(address)
        s.sendall(message)
        s.shutdown(socket.SHUT_WR)
        refuse(listener, reason)
        assert listener.refused == 1
        s.settimeout(WAIT_S)
        with contextlib.suppress(ConnectionResetError):
            while s.recv(1_000):  # what it was told, then the end
                pass


@no_leak()
def test_another_version_is_named_to_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    def dial_from_the_future(address: str) -> None:
        monkeypatch.setattr(handshake, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        with pytest.raises(HandshakeError, match=f"speaks version {PROTOCOL_VERSION}, not"):
            call(address)

    listener = listen(address := new_address())
    with contextlib.closing(listener), process(dial_from_the_future, address) as child:
        refuse(listener, f"speaks version {PROTOCOL_VERSION + 1}, not {PROTOCOL_VERSION}")
        child.join(WAIT_S)
        assert child.exitcode == 0


@no_leak()
def test_slow_dialers_delay_nobody_and_are_cut_in_time() -> None:
    listener = listen(address := new_address(), handshake_timeout_s=0.4)
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    hello = DialerHandshake(SECRET).opening
    for stranger in strangers:
        stranger.connect(address)
        stranger.send(hello[:1])
    began_s = time.monotonic()
    with thread(lambda: call(address).close()) as dialled:
        listener.accept(WAIT_S).close()
    assert dialled.error is None
    assert time.monotonic() - began_s < AT_ONCE_S

    def drip() -> None:
        for place in range(1, len(hello)):  # each byte alone would be in time
            time.sleep(0.05)
            strangers[0].send(hello[place : place + 1])

    with thread(drip) as dripping:
        for _ in strangers:
            refuse(listener, "took longer")
        assert time.monotonic() - began_s < AT_ONCE_S + 0.4
    assert isinstance(dripping.error, ConnectionError)
    assert listener.refused == len(strangers)
    for stranger in strangers:
        stranger.close()
    listener.close()


@no_leak()
def test_a_crowd_of_silent_dialers_is_bounded() -> None:
    listener = listen(address := new_address(), handshakes_pending_max=4)
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(6)]
    for stranger in strangers:
        stranger.connect(address)
    for _ in range(2):
        refuse(listener, "more than 4")
    with thread(lambda: call(address).close()) as dialled:
        refuse(listener, "more than 4")
        listener.accept(WAIT_S).close()
    assert dialled.error is None
    assert listener.refused == 3
    for stranger in strangers:
        stranger.close()
    listener.close()


@no_leak()
def test_a_false_listener_is_refused() -> None:
    """Who took the address first, but does not know the secret, learns nothing and gets no connection."""
    for babble in (b"", b"x" * 10_000, DialerHandshake(b"w").opening + bytes(PROOF_BYTES)):
        with (
            socket.socket(socket.AF_UNIX) as false,
            thread(partial(call, address := new_address())) as dialled,
        ):
            false.bind(address)
            false.listen(1)
            false.settimeout(WAIT_S)
            accepted, _ = false.accept()
            accepted.sendall(babble)
            accepted.shutdown(socket.SHUT_WR)
            heard = accepted.recv(10_000)
        assert isinstance(dialled.error, HandshakeError)
        assert len(heard) == HELLO_BYTES
        with contextlib.suppress(ConnectionResetError):
            assert accepted.recv(10_000) == b""  # no proof was given away
        accepted.close()


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
