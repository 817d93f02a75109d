"""How do both ends prove that they know the cluster's secret? No I/O here.

Three messages of fixed size, so that the number of bytes read from a stranger
is bounded by construction::

    dialer   -> listener   hello_d = magic, version, role 1, 32-byte nonce
    listener -> dialer     hello_l = magic, version, role 2, 32-byte nonce ; proof_l
    dialer   -> listener   proof_d

``proof_x = HMAC-SHA256(secret, label_x | hello_d | hello_l)``. Both nonces make a
recorded proof worthless, the label and the role make a reflected one worthless,
and nothing derived from the secret is sent before the other side spent a nonce.
"""

from __future__ import annotations

import hmac
import os
import struct
from typing import Final, Protocol

from tarragon.messages import PROTOCOL_VERSION, ProtocolError

NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
_MAGIC: Final = b"TGRH"
_HELLO: Final = struct.Struct(f"<4sHH{NONCE_BYTES}s")
HELLO_BYTES: Final = _HELLO.size
REPLY_BYTES: Final = HELLO_BYTES + PROOF_BYTES

_ROLE_DIALER: Final = 1
_ROLE_LISTENER: Final = 2
_LABELS: Final = {
    _ROLE_DIALER: b"tarragon handshake: dialer",
    _ROLE_LISTENER: b"tarragon handshake: listener",
}


class HandshakeError(ProtocolError):
    """The other end is not one of us; ``farewell`` is what it may still be told before the socket closes."""

    def __init__(self, reason: str, farewell: bytes = b"") -> None:
        super().__init__(reason)
        self.farewell = farewell


class Handshake(Protocol):
    """One side: send ``opening``, then read ``wanted`` bytes and send ``step(them)`` until none is wanted."""

    opening: bytes
    wanted: int

    def step(self, message: bytes) -> bytes: ...


class DialerHandshake:
    """The side that connected."""

    def __init__(self, secret: bytes) -> None:
        self._secret = _checked(secret)
        self.opening = _encode_hello(_ROLE_DIALER)
        self.wanted = REPLY_BYTES

    def step(self, message: bytes) -> bytes:
        """Check the listener's hello and proof, return our proof. Raises HandshakeError."""
        hello, proof = message[:HELLO_BYTES], message[HELLO_BYTES:]
        _check_hello(hello, _ROLE_LISTENER)
        if not hmac.compare_digest(proof, _proof(self._secret, _ROLE_LISTENER, self.opening, hello)):
            raise HandshakeError("the listener does not know the secret of this cluster")
        self.wanted = 0
        return _proof(self._secret, _ROLE_DIALER, self.opening, hello)


class ListenerHandshake:
    """The side that accepted."""

    def __init__(self, secret: bytes) -> None:
        self._secret = _checked(secret)
        self.opening = b""
        self.wanted = HELLO_BYTES
        self._hello = _encode_hello(_ROLE_LISTENER)
        self._dialer_hello: bytes | None = None

    def step(self, message: bytes) -> bytes:
        """Answer the dialer's hello, then check its proof (answer: nothing). Raises HandshakeError."""
        if self._dialer_hello is None:
            # A dialer of another version learns ours from a reply whose proof is void.
            _check_hello(message, _ROLE_DIALER, farewell=self._hello + bytes(PROOF_BYTES))
            self._dialer_hello = message
            self.wanted = PROOF_BYTES
            return self._hello + _proof(self._secret, _ROLE_LISTENER, message, self._hello)
        if not hmac.compare_digest(
            message, _proof(self._secret, _ROLE_DIALER, self._dialer_hello, self._hello)
        ):
            raise HandshakeError("the dialer does not know the secret of this cluster")
        self.wanted = 0
        return b""


def _checked(secret: bytes) -> bytes:
    if not secret:
        raise ValueError("the secret of a cluster must not be empty")
    return secret


def _encode_hello(role: int) -> bytes:
    return _HELLO.pack(_MAGIC, PROTOCOL_VERSION, role, os.urandom(NONCE_BYTES))


def _check_hello(message: bytes, role: int, farewell: bytes = b"") -> None:
    if len(message) != HELLO_BYTES:
        raise HandshakeError(f"handshake of {len(message)} bytes, expected {HELLO_BYTES}")
    magic, version, claimed_role, _ = _HELLO.unpack(message)
    if magic != _MAGIC:
        raise HandshakeError("the other end does not speak this protocol")
    if version != PROTOCOL_VERSION:
        raise HandshakeError(f"the other end speaks version {version}, not {PROTOCOL_VERSION}", farewell)
    if claimed_role != role:
        raise HandshakeError(f"the other end claims role {claimed_role}, expected {role}")


def _proof(secret: bytes, role: int, dialer_hello: bytes, listener_hello: bytes) -> bytes:
    return hmac.digest(secret, _LABELS[role] + dialer_hello + listener_hello, "sha256")
