"""How a peer is asked "do you live?": a control connection of its own per pair, and fixed-size frames (4.1).

The side that watches dials, says ``ProbeOpen`` and then sends probes of 32 bytes; the other side's native
thread (``responder.py``) answers each with the progress of its computing thread.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from contextlib import suppress
from typing import ClassVar, Final, NamedTuple

from tarragon.messages import ProbeAccepted, ProbeOpen, ProtocolError, Refused, decode_control
from tarragon.transport.connection import Connection
from tarragon.transport.local import dial
from tarragon.transport.pulse import PulseView
from tarragon.transport.sockets import SEND_FLAGS, hang_up

PROBE_MAGIC: Final = 0x50524754  # "TGRP"
PROBE_VERSION: Final = 1
PROBE, ANSWER = 1, 2
# Magic u32, version u16, kind u16, epoch u32 of who is asked, 0 u32, sequence u64, progress u64.
_FRAME: Final = struct.Struct("<IHHIIQQ")
PROBE_FRAME_BYTES: Final = _FRAME.size
PROBE_OPEN_BYTES_MAX: Final = 1_024
"""Longest first frame of a probe channel."""
_SEQUENCES_PER_READ: Final = 128


class ProbeRefused(ProtocolError):
    """The worker does not let itself be probed by this sender; the message says why."""


class Answer(NamedTuple):
    """The answer to probe ``sequence``: what the worker had done by then, in batches or layers."""

    sequence: int
    progress: int


def pack_probe(kind: int, epoch: int, sequence: int, progress: int) -> bytes:
    return _FRAME.pack(PROBE_MAGIC, PROBE_VERSION, kind, epoch, 0, sequence, progress)


def unpack_answer(raw: bytes | memoryview, epoch: int) -> Answer:
    """Decode an answer of the worker of ``epoch``; ProtocolError if it is none."""
    magic, version, kind, sender, zero, sequence, progress = _FRAME.unpack(raw)
    if (magic, version, kind, sender, zero) != (PROBE_MAGIC, PROBE_VERSION, ANSWER, epoch, 0):
        raise ProtocolError(f"a frame that is no answer of epoch {epoch} to a probe")
    return Answer(sequence, progress)


def probe_open(first_frame: bytes) -> ProbeOpen | None:
    """What the first frame of a connection asks for, if it asks for probes at all."""
    if len(first_frame) > PROBE_OPEN_BYTES_MAX:
        return None
    try:
        message = decode_control(first_frame)
    except ProtocolError:
        return None
    return message if isinstance(message, ProbeOpen) else None


def _accepted(connection: Connection, epoch: int, timeout_s: float, pulse: bool) -> PulseView | None:
    """The reply to ``ProbeOpen``, and the ``pulse`` that comes with it. Raises as ``ProbeChannel.open``."""
    raw, descriptors = connection.recv_with_fds(timeout_s)
    try:
        reply = decode_control(raw)
        if isinstance(reply, Refused):
            raise ProbeRefused(reply.reason)
        if reply != ProbeAccepted(epoch=epoch):
            raise ProbeRefused(f"unexpected reply {type(reply).__name__}")
        with suppress(OSError):  # it cannot be mapped: then it is probed
            if pulse and len(descriptors) == 1:
                return PulseView(descriptors.pop())
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return None


class ProbeChannel:
    """The asking side; no call but ``open`` ever waits. ``eof``: no answer will come any more."""

    malformed: ClassVar[int] = 0
    """Channels that this process ended because what came was no answer of the one that was asked."""

    def __init__(self, sock: socket.socket, receiver_epoch: int, pulse: PulseView | None = None) -> None:
        self.sock = sock
        self.receiver_epoch = receiver_epoch
        self.pulse = pulse
        """Where to see the worker work, without asking; None if it shares no memory with this process."""
        self.eof = False
        self.end_cause = ""
        self._owner_pid = os.getpid()
        self._rest = b""

    @staticmethod
    def open(
        address: str,
        secret: bytes,
        *,
        sender_id: str,
        sender_epoch: int,
        receiver_epoch: int,
        timeout_s: float,
        pulse: bool = False,
    ) -> ProbeChannel:
        """Dial the worker that listens at ``address``, and wait until it will answer. ``pulse``: map it.

        Raises TimeoutError, ConnectionError, or ProtocolError (HandshakeError and ProbeRefused are), having
        closed everything.
        """
        deadline_s = time.monotonic() + timeout_s
        connection = dial(address, secret, timeout_s=timeout_s, frame_bytes_max=PROBE_OPEN_BYTES_MAX)
        try:
            connection.send_control(
                ProbeOpen(sender_id=sender_id, sender_epoch=sender_epoch, receiver_epoch=receiver_epoch)
            )
            view = _accepted(connection, receiver_epoch, max(0.0, deadline_s - time.monotonic()), pulse)
        except BaseException:
            connection.close()
            raise
        return ProbeChannel(connection.sock, receiver_epoch, view)

    def fileno(self) -> int:
        """For poll: readable means that ``recv_ready`` returns answers or sets ``eof``."""
        return self.sock.fileno()

    def send(self, sequence: int) -> None:
        """Ask. Raises ConnectionError once the channel is over; a worker that takes no probes misses them."""
        if self.eof:
            raise ConnectionResetError(self.end_cause)
        try:
            sent_bytes = self.sock.send(pack_probe(PROBE, self.receiver_epoch, sequence, 0), SEND_FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            self._end("the probe channel is closed")
            raise ConnectionResetError(self.end_cause) from error
        if sent_bytes != PROBE_FRAME_BYTES:
            self._end("part of a probe was sent")
            raise ConnectionResetError(self.end_cause)

    def recv_ready(self) -> list[Answer]:
        """Answers that have arrived."""
        if self.eof:
            return []
        try:
            raw = self.sock.recv(_SEQUENCES_PER_READ * PROBE_FRAME_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            raw = b""
        if not raw:
            self._end("the probe channel is closed")
            return []
        raw = self._rest + raw
        whole = len(raw) - len(raw) % PROBE_FRAME_BYTES
        self._rest = raw[whole:]
        try:
            return [
                unpack_answer(raw[at : at + PROBE_FRAME_BYTES], self.receiver_epoch)
                for at in range(0, whole, PROBE_FRAME_BYTES)
            ]
        except ProtocolError as error:
            ProbeChannel.malformed += 1
            self._end(str(error))
            return []

    def wait(self, timeout_s: float) -> bool:
        """Wait for something to read; for those who have nothing else to wait for."""
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLIN)
        return bool(poll.poll(timeout_s * 1e3))

    def close(self) -> None:
        """Close; twice is harmless."""
        self._end("closed")
        if self.pulse is not None:
            self.pulse.close()
            self.pulse = None
        hang_up(self.sock, self._owner_pid)

    def _end(self, cause: str) -> None:
        if not self.eof:
            self.eof, self.end_cause = True, cause
