"""Strangers and forgers: who does not know the secret gets in nowhere, delays nobody, learns nothing."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarragon.messages import (
    PROTOCOL_VERSION,
)
from tarragon.testing.ends import (
    AT_ONCE_S,
    SECRET,
    WAIT_S,
    call,
    frame_bytes,
    listen,
    new_address,
    no_leak,
    process,
    thread,
)
from tarragon.transport import handshake, sockets
from tarragon.transport.handshake import (
    HELLO_BYTES,
    PROOF_BYTES,
    REPLY_BYTES,
    DialerHandshake,
    HandshakeError,
    ListenerHandshake,
)
from tarragon.transport.local import Listener

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")

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
    listener = listen(address := new_address(), handshake_timeout_s=2.0)
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    hello = DialerHandshake(SECRET).opening
    for stranger in strangers:
        stranger.connect(address)
        stranger.send(hello[:1])
    began_s = time.monotonic()
    with thread(lambda: call(address).close()) as dialled:
        listener.accept(WAIT_S).close()
    assert dialled.error is None
    assert time.monotonic() - began_s < 1.5, "it waited for a stranger to be cut"

    def drip() -> None:
        for place in range(1, len(hello)):  # each byte alone would be in time
            time.sleep(0.2)
            strangers[0].send(hello[place : place + 1])

    with thread(drip) as dripping:
        for _ in strangers:
            refuse(listener, "took longer")
        assert time.monotonic() - began_s < AT_ONCE_S + 2.0  # the drops take 8 s
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
