"""Authenticated, framed connections between processes of one host: the names that the rest of Tarragon uses.

``dial`` and ``Listener`` make ``Connection`` objects, which block; ``dial_async``
and ``serve_async`` make ``AsyncConnection`` objects. All speak the same wire format.
"""

from __future__ import annotations

import select
import socket
import time

from tarragon.config import DIAL_PAUSE_S_MAX, DIAL_PAUSE_S_MIN, SEND_TIMEOUT_S
from tarragon.transport.aio import AsyncConnection, AsyncServer, dial_async, serve_async
from tarragon.transport.connection import Connection
from tarragon.transport.handshake import DialerHandshake, Handshake, HandshakeError
from tarragon.transport.listener import Listener
from tarragon.transport.sockets import (
    check_same_user,
    connect_once,
    recv_handshake,
    send_handshake,
    wait_ready,
)

__all__ = [
    "AsyncConnection",
    "AsyncServer",
    "Connection",
    "HandshakeError",
    "Listener",
    "dial",
    "dial_async",
    "serve_async",
]


def dial(
    address: str,
    secret: bytes,
    *,
    timeout_s: float,
    frame_bytes_max: int,
    send_timeout_s: float = SEND_TIMEOUT_S,
    handshake_timeout_s: float = 0.0,
) -> Connection:
    """Connect to the listener at ``address``, waiting for it to exist, and shake hands.

    Raises TimeoutError if there is no listener, or no answer from it, within ``timeout_s`` (or, if that is
    later, within ``handshake_timeout_s`` of the connection), and HandshakeError if it
    is not one of us or does not want us.
    """
    handshake = DialerHandshake(secret)
    deadline_s = time.monotonic() + timeout_s
    pause_s = DIAL_PAUSE_S_MIN
    while (sock := connect_once(address)) is None:
        if time.monotonic() + pause_s > deadline_s:
            raise TimeoutError(f"nobody listens at {address!r} after {timeout_s} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, DIAL_PAUSE_S_MAX)
    try:
        peer_pid = check_same_user(sock)
        deadline_s = max(deadline_s, time.monotonic() + handshake_timeout_s)
        _shake_hands(sock, handshake, deadline_s)
        return Connection(
            sock, frame_bytes_max=frame_bytes_max, send_timeout_s=send_timeout_s, peer_pid=peer_pid
        )
    except BaseException:
        sock.close()
        raise


def _shake_hands(sock: socket.socket, handshake: Handshake, deadline_s: float) -> None:
    """Drive ``handshake`` over a non-blocking ``sock``; raises HandshakeError or TimeoutError."""
    try:
        send_handshake(sock, handshake.opening)
        while handshake.wanted:
            message = b""
            while len(message) < handshake.wanted:
                wait_ready(sock, select.POLLIN, deadline_s)
                message += recv_handshake(sock, handshake.wanted - len(message))
            send_handshake(sock, handshake.step(message))
    except ConnectionError as error:
        raise HandshakeError("the other end hung up during the handshake") from error
