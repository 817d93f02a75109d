"""Data links: setting up and refusing, doorbells both ways, ends, bounds, leaks."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tarragon.messages import (
    DATA_FRAME_BYTES,
    DataFrame,
    DataKind,
    ProtocolError,
    Refused,
    TableAck,
    pack_data,
)
from tarragon.testing.ends import AT_ONCE_S, WAIT_S, connection_pair, frame_bytes, no_leak, process, thread
from tarragon.transport.link import DataLink, LinkRefused, Offer
from tarragon.transport.local import Connection
from tarragon.transport.region import Region, RegionError, RegionShape

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")

OFFER = Offer(worker_id="aw-0", epoch=5, peer_epoch=7, shape=RegionShape("float32", hidden=48, pairs_max=10))
ROWS = DataFrame(DataKind.ROWS, 3, 5, 7, 10, 1 << 40, 1, 2)
RESULT = DataFrame(DataKind.RESULT, 3, 7, 5, 10, 1 << 40)


def accept(connection: Connection, timeout_s: float = WAIT_S, **changes: Any) -> DataLink:
    """An expert worker that fits OFFER, but for ``changes``."""
    expected: dict[str, Any] = {"hidden": 48, "dtype": "float32", "epoch": 7, "pairs_max": 10}
    return DataLink.accept(connection, timeout_s=timeout_s, **{**expected, **changes})


@contextlib.contextmanager
def linked(send_timeout_s: float = WAIT_S) -> Iterator[tuple[DataLink, DataLink]]:
    """The attention worker's end and the expert worker's end."""
    aw, ew = connection_pair()
    with thread(lambda: accept(ew)) as accepted:
        offered = DataLink.offer(aw, OFFER, timeout_s=WAIT_S, send_timeout_s=send_timeout_s)
    assert isinstance(accepted.value, DataLink), accepted.error
    with contextlib.closing(offered), contextlib.closing(accepted.value):
        yield offered, accepted.value


# ------------------------------------------------------------------ doorbells


@no_leak()
def test_a_link_carries_rows_and_doorbells_both_ways() -> None:
    with linked() as (aw, ew):
        assert (ew.peer_id, ew.peer_epoch, aw.peer_epoch) == ("aw-0", 5, 7)
        aw.region.rows[2:].fill_(3)
        aw.send(ROWS)
        assert ew.recv(WAIT_S) == ROWS
        ew.region.results.copy_(ew.region.rows + 1)
        ew.send(RESULT)
        assert aw.recv() == RESULT
        assert aw.region.results[2:].eq(4).all()


def test_what_has_arrived_is_drained_without_waiting() -> None:
    with linked() as (aw, ew):
        assert ew.recv_ready() == []
        with pytest.raises(TimeoutError):
            ew.recv(0.0)
        frames = [ROWS._replace(layer=layer) for layer in range(5)]
        for frame in frames:
            aw.send(frame)
        assert ew.recv(WAIT_S) == frames[0]
        assert ew.recv_ready() == frames[1:]
        assert not ew.eof


def test_the_descriptor_stays_readable_until_the_end_was_seen() -> None:
    with linked() as (aw, ew):
        poll = select.poll()
        poll.register(ew.fileno(), select.POLLIN)
        assert poll.poll(0) == []
        aw.send(ROWS)
        aw.close_socket()
        received = []
        while not ew.eof:
            assert poll.poll(WAIT_S * 1e3)
            received += ew.recv_ready()
        assert received == [ROWS]
        assert ew.recv() is None
        assert (ew.frames_malformed, ew.end_cause) == (0, "the other end is gone")


@pytest.mark.parametrize("piece_bytes", [1, 7, 33, 41, 1_000])
def test_frames_in_pieces_are_put_together(piece_bytes: int) -> None:
    with linked() as (aw, ew):
        wire = b"".join(pack_data(ROWS._replace(step=step)) for step in range(200))
        received: list[DataFrame] = []
        for start in range(0, len(wire), piece_bytes):
            aw.sock.sendall(wire[start : start + piece_bytes])
            received += ew.recv_ready()
        assert [frame.step for frame in received] == list(range(200))


def test_more_frames_than_one_call_takes_are_all_delivered() -> None:
    def send_many() -> None:
        for step in range(1_000):
            aw.send(ROWS._replace(step=step))

    with linked() as (aw, ew), thread(send_many):
        steps: list[int] = []
        while len(steps) < 1_000:
            frame = ew.recv(WAIT_S)
            assert frame is not None
            steps += [frame.step, *(more.step for more in ew.recv_ready())]
        assert steps == list(range(1_000))


def test_a_stopped_peer_does_not_block_a_doorbell_for_ever() -> None:
    with linked(send_timeout_s=0.2) as (aw, ew):

        def send_for_ever() -> None:
            while True:
                aw.send(ROWS)

        with pytest.raises(ConnectionError, match="took no frame"):
            send_for_ever()
        with pytest.raises(ConnectionError):
            aw.send(ROWS)
        while ew.recv(WAIT_S) is not None:
            pass
        assert ew.torn == 0  # frames are small enough to go whole or not at all


# ------------------------------------------------------------------ ends


def test_a_frame_cut_in_two_ends_the_link_and_is_counted() -> None:
    with linked() as (aw, ew):
        aw.send(ROWS)
        aw.sock.sendall(pack_data(ROWS)[: DATA_FRAME_BYTES - 1])
        aw.close_socket()
        assert ew.recv(WAIT_S) == ROWS
        assert ew.recv(WAIT_S) is None
        assert (ew.eof, ew.torn, ew.malformed, ew.frames_malformed) == (True, 1, 0, 1)
        assert ew.end_cause == "the other end is gone in the middle of a frame"


def test_what_is_no_frame_ends_the_link_and_is_counted() -> None:
    with linked() as (aw, ew):
        aw.sock.sendall(pack_data(ROWS) + b"\xff" * DATA_FRAME_BYTES + pack_data(ROWS))
        assert ew.recv_ready() == [ROWS]
        assert (ew.eof, ew.torn, ew.malformed, ew.frames_malformed) == (True, 0, 1, 1)
        assert "magic" in ew.end_cause
        assert ew.recv_ready() == []
        assert ew.recv() is None


def test_closing_ends_the_link_even_if_a_child_inherited_it() -> None:
    with linked() as (aw, ew), process(time.sleep, 60):
        aw.close_socket()
        assert ew.recv(AT_ONCE_S) is None


def accept_then_sleep(connection: Connection) -> None:
    accept(connection).send(RESULT)
    time.sleep(60)


@no_leak()
@pytest.mark.parametrize("unread", [0, 3])
def test_a_killed_expert_worker_is_seen_at_once(unread: int) -> None:
    aw, ew = connection_pair()
    with process(accept_then_sleep, ew) as child:
        ew.sock.close()  # without a shutdown: the child's duplicate goes on
        with contextlib.closing(DataLink.offer(aw, OFFER, timeout_s=WAIT_S)) as link:
            assert link.recv(WAIT_S) == RESULT
            for _ in range(unread):
                link.send(ROWS)
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            killed_s = time.monotonic()
            assert link.recv() is None
            assert time.monotonic() - killed_s < AT_ONCE_S
            assert link.eof
            with pytest.raises(ConnectionError):
                link.send(ROWS)
            link.close_socket()
            assert link.region.results.shape == (10, 48)  # what it wrote can still be read


# ------------------------------------------------------------------ refusals


@no_leak()
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": 64}, "hidden size is 64"),
        ({"dtype": "bfloat16"}, "computes in bfloat16"),
        ({"pairs_max": 9}, "at most 9"),
        ({"epoch": 8}, "epoch 8"),
    ],
)
def test_a_link_that_does_not_fit_is_refused_on_both_sides(changes: dict[str, Any], reason: str) -> None:
    aw, ew = connection_pair()
    before = DataLink.refused
    accepting = thread(lambda: accept(ew, **changes))
    with accepting as accepted, pytest.raises(LinkRefused, match=reason) as offered:
        DataLink.offer(aw, OFFER, timeout_s=WAIT_S)
    assert isinstance(accepted.error, LinkRefused)
    assert str(accepted.error) == str(offered.value)
    assert DataLink.refused == before + 2


@no_leak()
@pytest.mark.parametrize("descriptors", [0, 1, 2])
@pytest.mark.parametrize("payload", [b"", b"\x81\xa4type\xa5Offer", msgspec.msgpack.encode(OFFER)[:-1]])
def test_an_offer_of_something_else_is_refused(descriptors: int, payload: bytes) -> None:
    aw, ew = connection_pair()
    before = DataLink.refused
    with aw:
        fd = os.eventfd(0)
        socket.send_fds(aw.sock, [frame_bytes(payload)], [fd] * descriptors)
        os.close(fd)
        with pytest.raises(ProtocolError):
            accept(ew)
        assert DataLink.refused == before + 1
        assert isinstance(aw.recv_control(WAIT_S), Refused)
        assert aw.recv(WAIT_S) is None


@no_leak()
def test_an_offer_with_the_wrong_memory_is_refused() -> None:
    region, smaller = Region.create(RegionShape("float32", hidden=40, pairs_max=10))
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, OFFER.shape.total_bytes)
    for fd, reason in ((smaller, "bytes"), (unsealed, "not sealed")):
        aw, ew = connection_pair()
        with aw:
            aw.send_with_fd(msgspec.msgpack.encode(OFFER), fd)
            with pytest.raises(RegionError, match=reason):
                accept(ew)
            answer = aw.recv_control(WAIT_S)
            assert isinstance(answer, Refused)
            assert reason in answer.reason
        os.close(fd)
    region.close()


@no_leak()
def test_setting_up_a_link_with_a_silent_peer_is_bounded() -> None:
    aw, ew = connection_pair()
    with ew, pytest.raises(TimeoutError):
        DataLink.offer(aw, OFFER, timeout_s=0.05)
    aw, ew = connection_pair()
    with aw, pytest.raises(TimeoutError):
        accept(ew, timeout_s=0.05)


@no_leak()
def test_setting_up_a_link_with_a_peer_that_leaves_or_babbles_leaves_nothing() -> None:
    before = DataLink.refused
    aw, ew = connection_pair()
    ew.close()
    with pytest.raises(ConnectionError):
        DataLink.offer(aw, OFFER, timeout_s=WAIT_S)
    aw, ew = connection_pair()
    aw.close()
    with pytest.raises(ConnectionError):
        accept(ew)
    aw, ew = connection_pair()
    with ew:
        ew.send_control(TableAck(worker_id="ew-0", epoch=7, version=1))
        with pytest.raises(ProtocolError, match="answer"):
            DataLink.offer(aw, OFFER, timeout_s=WAIT_S)
    assert DataLink.refused == before + 1, "who leaves is not refused, who babbles is"
