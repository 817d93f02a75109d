"""What joins an attention worker to an expert worker? A region for rows, a socket for doorbells (4.1).

The attention worker dials, creates the region and offers it; the expert worker
maps it or refuses in one sentence. From then on the socket carries nothing but
the 40-byte frames of ``messages.DataFrame``, both ways.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from typing import ClassVar

import msgspec

from tarragon.config import DATA_FRAMES_BUFFERED_MAX, LINK_OFFER_TIMEOUT_S, REGION_PAIRS_MAX, SEND_TIMEOUT_S
from tarragon.messages import (
    DATA_FRAME_BYTES,
    DECODE_ERRORS,
    DataFrame,
    ProtocolError,
    Refused,
    pack_data,
    unpack_data,
)
from tarragon.transport.connection import Connection
from tarragon.transport.region import Region, RegionShape
from tarragon.transport.sockets import SEND_FLAGS, abandon, hang_up, wait_ready


class LinkRefused(ProtocolError):
    """The expert worker does not take the link; the message says why in one sentence."""


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """AW -> EW, with the region's descriptor: who I am, whom I mean, what the region holds."""

    worker_id: str
    epoch: int
    peer_epoch: int
    shape: RegionShape


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """EW -> AW: the region is mapped; data frames follow."""

    epoch: int


_offer_decoder = msgspec.msgpack.Decoder(Offer)
_answer_decoder: msgspec.msgpack.Decoder[Accepted | Refused] = msgspec.msgpack.Decoder(Accepted | Refused)


def decode_offer(raw: bytes) -> Offer:
    """Decode an offer; ProtocolError if it is not one or its shape is out of bounds."""
    try:
        return _offer_decoder.decode(raw)
    except DECODE_ERRORS as error:
        raise ProtocolError(f"malformed offer: {error}") from error


def decode_answer(raw: bytes) -> Accepted | Refused:
    """Decode the answer to an offer; ProtocolError if it is not one."""
    try:
        return _answer_decoder.decode(raw)
    except DECODE_ERRORS as error:
        raise ProtocolError(f"malformed answer to an offer: {error}") from error


def refusal(offer: Offer, *, hidden: int, dtype: str, epoch: int, pairs_max: int) -> str:
    """Why an expert worker with these properties does not take ``offer``; empty if it does."""
    shape = offer.shape
    if offer.peer_epoch != epoch:
        return f"the offer is for epoch {offer.peer_epoch}, but this worker is epoch {epoch}"
    if shape.hidden != hidden:
        return f"the region has rows of {shape.hidden} elements, but the model's hidden size is {hidden}"
    if shape.dtype != dtype:
        return f"the region holds {shape.dtype}, but the model computes in {dtype}"
    if shape.pairs_max > pairs_max:
        return f"the region holds {shape.pairs_max} pairs, but at most {pairs_max} are allowed"
    return ""


class DataLink:
    """A region and its doorbells, from either side. One thread sends and receives.

    ``eof`` turns true once the peer is gone or sent what is no frame; ``end_cause`` then says which.
    ``torn`` and ``malformed`` count what ended it otherwise than between two frames.
    ``peer_id`` and ``peer_epoch`` name the other side (an attention worker knows only its epoch).
    """

    refused: ClassVar[int] = 0
    """Links that this process refused, for their offer or for the answer to its own, or was refused."""

    def __init__(
        self, sock: socket.socket, region: Region, *, peer_id: str, peer_epoch: int, send_timeout_s: float
    ) -> None:
        self.sock = sock
        self.region = region
        self.peer_id = peer_id
        self.peer_epoch = peer_epoch
        self.eof = False
        self.end_cause = ""
        self.torn = 0
        self.malformed = 0
        self._send_timeout_s = send_timeout_s
        self._owner_pid = os.getpid()
        self._buffer = memoryview(bytearray(DATA_FRAMES_BUFFERED_MAX * DATA_FRAME_BYTES))
        self._filled = 0
        self._frames: deque[DataFrame] = deque()

    # ------------------------------------------------------------------ setting up

    @staticmethod
    def offer(
        connection: Connection,
        offer: Offer,
        *,
        timeout_s: float = LINK_OFFER_TIMEOUT_S,
        send_timeout_s: float = SEND_TIMEOUT_S,
    ) -> DataLink:
        """Attention worker: create the region, offer it, wait for the answer. Takes the connection over.

        Raises LinkRefused, ConnectionError, TimeoutError or ProtocolError, having closed everything.
        """
        region: Region | None = None
        try:
            region, fd = Region.create(offer.shape)
            try:
                connection.send_with_fd(msgspec.msgpack.encode(offer), fd)
            finally:
                os.close(fd)
            raw = connection.recv(timeout_s)
            if raw is None:
                raise ConnectionResetError("the expert worker is gone")
            answer = decode_answer(raw)
            if isinstance(answer, Refused):
                raise LinkRefused(answer.reason)
        except BaseException as error:
            DataLink.refused += isinstance(error, ProtocolError)
            if region is not None:
                region.close()
            connection.close()
            raise
        return DataLink(
            connection.sock, region, peer_id="", peer_epoch=answer.epoch, send_timeout_s=send_timeout_s
        )

    @staticmethod
    def accept(
        connection: Connection,
        *,
        hidden: int,
        dtype: str,
        epoch: int,
        pairs_max: int = REGION_PAIRS_MAX,
        first: tuple[bytes, int] | None = None,
        timeout_s: float = LINK_OFFER_TIMEOUT_S,
        send_timeout_s: float = SEND_TIMEOUT_S,
    ) -> DataLink:
        """Expert worker of ``epoch``: wait for the offer, map its region. Takes the connection over.

        ``first`` is the offer and its descriptor, which is closed, if they were received already.

        Raises LinkRefused (the peer is told why), ConnectionError, TimeoutError or ProtocolError,
        having closed everything.
        """
        try:
            raw, fd = connection.recv_with_fd(timeout_s) if first is None else first
            try:
                offer = decode_offer(raw)
                reason = refusal(offer, hidden=hidden, dtype=dtype, epoch=epoch, pairs_max=pairs_max)
                if reason:
                    raise LinkRefused(reason)
                region = Region.map(fd, offer.shape)
            finally:
                os.close(fd)
            connection.send(msgspec.msgpack.encode(Accepted(epoch=epoch)))
        except BaseException as error:
            if isinstance(error, ProtocolError):
                DataLink.refuse(connection, str(error))
            connection.close()
            raise
        return DataLink(
            connection.sock,
            region,
            peer_id=offer.worker_id,
            peer_epoch=offer.epoch,
            send_timeout_s=send_timeout_s,
        )

    @staticmethod
    def refuse(connection: Connection, reason: str) -> None:
        """Tell who dialled why there will be no link, and count it; the caller closes the connection."""
        DataLink.refused += 1
        try:
            connection.send_control(Refused(reason=reason))
        except ConnectionError:
            return  # it does not care to know

    # ------------------------------------------------------------------ doorbells

    @property
    def frames_malformed(self) -> int:
        """Frames that were none, or were cut in two: at most one, for it ends the link."""
        return self.torn + self.malformed

    def fileno(self) -> int:
        """For poll: readable means that ``recv_ready`` will return frames or set ``eof``."""
        return self.sock.fileno()

    def send(self, frame: DataFrame) -> None:
        """Send one frame; raises ConnectionError if the peer is gone or takes none for too long."""
        raw = pack_data(frame)
        sent_bytes = self._send_some(raw)
        if sent_bytes != DATA_FRAME_BYTES:
            self._send_rest(memoryview(raw)[sent_bytes:])

    def recv(self, timeout_s: float | None = None) -> DataFrame | None:
        """The next frame, or None at the end of the link. Raises TimeoutError."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        flags = 0 if timeout_s is None else socket.MSG_DONTWAIT
        while not self._frames and not self.eof:
            if not self._receive(flags):
                wait_ready(self.sock, select.POLLIN, deadline_s)
        return self._frames.popleft() if self._frames else None

    def recv_ready(self) -> list[DataFrame]:
        """Frames that have arrived, without waiting; sets ``eof`` when there will be no more.

        One system call, hence at most DATA_FRAMES_BUFFERED_MAX frames: the descriptor stays readable
        while there are more, or an end of file that was not yet seen.
        """
        if not self.eof:
            self._receive(socket.MSG_DONTWAIT)
        frames = list(self._frames)
        self._frames.clear()
        return frames

    def close_socket(self) -> None:
        """Tell the peer that this link is over, but keep the region for whoever still looks at its rows."""
        self.eof = True
        hang_up(self.sock, self._owner_pid)

    def close(self) -> None:
        """Close the socket and let go of the region; closing twice is harmless."""
        self.close_socket()
        self.region.close()

    def _send_some(self, raw: bytes | memoryview) -> int:
        """Bytes sent, 0 if there is no room. Raises ConnectionError."""
        try:
            return self.sock.send(raw, SEND_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:
            if self.sock.fileno() < 0:
                raise ConnectionResetError("the link is closed") from error
            raise

    def _send_rest(self, raw: memoryview) -> None:
        deadline_s = time.monotonic() + self._send_timeout_s
        while raw:
            try:
                wait_ready(self.sock, select.POLLOUT, deadline_s)
            except TimeoutError as error:
                abandon(self.sock)  # part of a frame may be out: nothing that follows it could be read
                raise ConnectionAbortedError(
                    f"the other end took no frame for {self._send_timeout_s} s: given up"
                ) from error
            raw = raw[self._send_some(raw) :]

    def _receive(self, flags: int) -> bool:
        """Take what has arrived, be it the end; False if nothing has."""
        try:
            count = self.sock.recv_into(self._buffer[self._filled :], 0, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            if not isinstance(error, ConnectionError) and self.sock.fileno() >= 0:
                raise
            count = 0
        if count == 0:
            self.torn += self._filled > 0
            self._end("the other end is gone" + (" in the middle of a frame" if self._filled else ""))
        else:
            self._parse(self._filled + count)
        return True

    def _parse(self, filled: int) -> None:
        """Decode the whole frames among the first ``filled`` bytes of the buffer, keep the rest for later."""
        start = 0
        try:
            while filled - start >= DATA_FRAME_BYTES:
                self._frames.append(unpack_data(self._buffer[start : start + DATA_FRAME_BYTES]))
                start += DATA_FRAME_BYTES
        except ProtocolError as error:
            # The boundaries between frames are lost for good: this peer is as gone as a dead one.
            self.malformed += 1
            self._end(str(error))
            return
        self._filled = filled - start
        if start and self._filled:
            self._buffer[: self._filled] = self._buffer[start:filled]

    def _end(self, cause: str) -> None:
        self.eof = True
        self.end_cause = cause
