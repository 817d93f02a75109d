"""Probe channels: answered by a native thread whatever the interpreter does; garbage ends a channel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tarragon import native
from tarragon.messages import ProbeOpen, ProtocolError, encode_control
from tarragon.testing.ends import (
    FRAME_BYTES_MAX,
    SECRET,
    WAIT_S,
    call,
    listen,
    new_address,
    no_leak,
    process,
    stop,
    thread,
)
from tarragon.transport.connection import Connection
from tarragon.transport.listener import Listener
from tarragon.transport.probe import (
    ANSWER,
    PROBE,
    PROBE_FRAME_BYTES,
    Answer,
    ProbeChannel,
    ProbeRefused,
    pack_probe,
    probe_open,
    unpack_answer,
)
from tarragon.transport.responder import ProbeResponder

EPOCH = 7


@contextlib.contextmanager
def responding(channels_max: int = 8) -> Iterator[ProbeResponder]:
    responder = ProbeResponder(EPOCH, channels_max=channels_max)
    try:
        yield responder
    finally:
        responder.close()


def admit(listener: Listener, responder: ProbeResponder) -> bool:
    """What a worker's acceptor does."""
    connection = listener.accept(WAIT_S)
    opened = probe_open(connection.recv(WAIT_S) or b"")
    assert opened is not None
    return responder.adopt(connection, opened)


def opening(address: str, epoch: int = EPOCH) -> ProbeChannel:
    return ProbeChannel.open(
        address, SECRET, sender_id="aw-0", sender_epoch=3, receiver_epoch=epoch, timeout_s=WAIT_S
    )


@contextlib.contextmanager
def channel(responder: ProbeResponder) -> Iterator[ProbeChannel]:
    with contextlib.closing(listen(address := new_address())) as listener:
        with thread(lambda: admit(listener, responder)) as admitted:
            opened = opening(address)
        assert admitted.value is True
    with contextlib.closing(opened):
        yield opened


def answers(asking: ProbeChannel, count: int) -> list[Answer]:
    found: list[Answer] = []
    deadline_s = time.monotonic() + WAIT_S
    while len(found) < count:
        assert asking.wait(deadline_s - time.monotonic()), "no answer"
        found += asking.recv_ready()
        assert not asking.eof, asking.end_cause
    return found


def counts(responder: ProbeResponder, name: str, value: float) -> None:
    """Wait for a counter's value: the native thread counts after it has answered."""
    deadline_s = time.monotonic() + WAIT_S
    while responder.counters[name] < value:
        assert time.monotonic() < deadline_s, f"{name} is not {value}"
        time.sleep(0.001)


def wait_for_end(asking: ProbeChannel) -> None:
    while not asking.eof:
        assert asking.wait(WAIT_S), "the channel was not closed"
        asking.recv_ready()


@no_leak()
def test_answers_carry_the_progress_of_that_moment() -> None:
    with responding() as responder, channel(responder) as asking:
        asking.send(1)
        assert answers(asking, 1) == [Answer(1, 0)]
        responder.pulse.beat()
        responder.pulse.beat()
        asking.send(2)
        asking.send(9)
        assert answers(asking, 2) == [Answer(2, 2), Answer(9, 2)]
        assert asking.recv_ready() == []
        counts(responder, "probes_answered", 3.0)
        assert responder.counters == {
            "probes_answered": 3.0,
            "probe_channels": 1.0,
            "probe_channels_refused": 0.0,
            "probe_realtime": float(responder.realtime),
        }


@no_leak()
def test_the_thread_begins_and_ends_as_often_as_asked_but_once_at_a_time() -> None:
    for _ in range(3):
        with responding() as responder, channel(responder) as asking:
            with pytest.raises(ValueError, match="already"):
                ProbeResponder(EPOCH)
            asking.send(1)
            answers(asking, 1)
    native.probe_stop()
    with pytest.raises(ValueError, match="answers no probes"):
        native.probe_adopt(0)


@no_leak()
def test_a_channel_ends_with_its_responder_and_says_so() -> None:
    with responding() as responder:
        context = channel(responder)
        asking = context.__enter__()
    wait_for_end(asking)
    with pytest.raises(ConnectionError):
        asking.send(1)
    context.__exit__(None, None, None)


@no_leak()
def test_the_wrong_epoch_is_refused_and_counted() -> None:
    with responding() as responder, contextlib.closing(listen(address := new_address())) as listener:
        with (
            thread(lambda: admit(listener, responder)) as admitted,
            pytest.raises(ProbeRefused, match="this worker is 7"),
        ):
            opening(address, epoch=6)
        assert admitted.value is False
        assert responder.counters["probe_channels_refused"] == 1


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(PROBE_FRAME_BYTES),
        pack_probe(ANSWER, EPOCH, 1, 0),
        pack_probe(PROBE, EPOCH - 1, 1, 0),
        pack_probe(PROBE, EPOCH, 1, 5),
        b"\xff" + pack_probe(PROBE, EPOCH, 1, 0)[1:],
        random.Random(0).randbytes(5_000),
    ],
    ids=["zeros", "an answer", "another epoch", "with progress", "bad magic", "noise"],
)
def test_what_is_no_probe_ends_its_channel_and_no_other(garbage: bytes) -> None:
    with responding() as responder, channel(responder) as hostile, channel(responder) as other:
        with contextlib.suppress(ConnectionError):
            hostile.sock.sendall(garbage)
        wait_for_end(hostile)
        assert responder.counters["probe_channels_refused"] == 1
        other.send(4)
        assert answers(other, 1) == [Answer(4, 0)]


def test_probes_may_come_in_pieces_and_in_heaps() -> None:
    rng = random.Random(1)
    raw = b"".join(pack_probe(PROBE, EPOCH, sequence, 0) for sequence in range(1, 501))
    with responding() as responder, channel(responder) as asking:
        found: list[Answer] = []
        while raw:
            size = rng.randrange(1, 300)
            asking.sock.sendall(raw[:size])
            raw = raw[size:]
            found += asking.recv_ready()
        found += answers(asking, 500 - len(found))
        assert [answer.sequence for answer in found] == list(range(1, 501))


def test_channels_beyond_the_bound_are_closed_and_counted() -> None:
    with responding(channels_max=1) as responder, channel(responder) as first, channel(responder) as second:
        wait_for_end(second)
        first.send(1)
        answers(first, 1)
        assert responder.counters["probe_channels_refused"] == 1


@pytest.mark.parametrize("seed", range(50))
def test_no_garbage_is_taken_for_an_answer(seed: int) -> None:
    rng = random.Random(seed)
    raw = bytearray(pack_probe(ANSWER, EPOCH, 1, 2))
    raw[rng.randrange(16)] ^= 1 << rng.randrange(8)
    with pytest.raises(ProtocolError):
        unpack_answer(bytes(raw), EPOCH)


@pytest.mark.parametrize(
    "raw",
    [b"\xff" * PROBE_FRAME_BYTES, pack_probe(ANSWER, EPOCH - 1, 1, 0), pack_probe(PROBE, EPOCH, 1, 0)],
    ids=["garbage", "another epoch", "a probe"],
)
def test_what_is_no_answer_ends_the_channel_and_is_counted(raw: bytes) -> None:
    asking, answering = socket.socketpair()
    before = ProbeChannel.malformed
    with contextlib.closing(ProbeChannel(asking, EPOCH)) as channel, answering:
        answering.sendall(pack_probe(ANSWER, EPOCH, 1, 5))
        assert channel.recv_ready() == [Answer(1, 5)]
        answering.sendall(raw)
        assert channel.recv_ready() == []
        assert (channel.eof, ProbeChannel.malformed - before) == (True, 1)
        with pytest.raises(ConnectionError, match="no answer of epoch"):
            channel.send(2)


def test_only_a_probe_open_opens() -> None:
    message = ProbeOpen(sender_id="aw-0", sender_epoch=1, receiver_epoch=2)
    assert probe_open(encode_control(message)) == message
    for other in (b"", b"\x81", encode_control(message)[:-1], bytes(2_000)):
        assert probe_open(other) is None


# ------------------------------------------------------------------ in a process of its own


def _worker(address: str, does: str) -> None:
    with contextlib.closing(listen(address)) as listener, responding() as responder:
        admit(listener, responder)
        if does == "holds the interpreter lock":
            ctypes.PyDLL(None).sleep(60)
        time.sleep(60)


def _slowest_ms(asking: ProbeChannel, probes: int) -> float:
    slowest_s = 0.0
    for sequence in range(1, probes + 1):
        start_s = time.monotonic()
        asking.send(sequence)
        answers(asking, 1)
        slowest_s = max(slowest_s, time.monotonic() - start_s)
        time.sleep(0.002)
    return slowest_s * 1e3


def test_the_answer_needs_no_interpreter_lock() -> None:
    address = new_address()
    with (
        process(_worker, address, "holds the interpreter lock"),
        contextlib.closing(opening(address)) as asking,
    ):
        time.sleep(0.1)
        assert _slowest_ms(asking, 50) < 1_000


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_process_closes_its_channels_and_a_stopped_one_is_silent(end: int) -> None:
    address = new_address()
    with process(_worker, address, "nothing") as child, contextlib.closing(opening(address)) as asking:
        _slowest_ms(asking, 1)
        assert child.pid is not None
        if end == signal.SIGKILL:
            child.kill()
            wait_for_end(asking)
            return
        stop(child.pid)
        for sequence in range(2, 10_000):  # more than the socket holds: asking never waits
            asking.send(sequence)
        assert asking.recv_ready() == []
        assert not asking.eof
        os.kill(child.pid, signal.SIGCONT)
        assert answers(asking, 1)[0] == Answer(2, 0)


def test_the_first_frame_bound_is_kept() -> None:
    """A worker's listener takes bigger first frames than a probe's: those are for others."""
    bare, sock = socket.socketpair()
    with bare, Connection(sock, frame_bytes_max=FRAME_BYTES_MAX) as connection:
        Connection(bare, frame_bytes_max=FRAME_BYTES_MAX).send(bytes(1_025))
        assert probe_open(connection.recv(WAIT_S) or b"") is None


def test_nobody_without_the_secret_gets_an_answer() -> None:
    with contextlib.closing(listen(address := new_address())) as listener:
        with thread(lambda: listener.accept(WAIT_S)) as accepted, pytest.raises(ProtocolError):
            call(address, secret=b"x" * 32)
        assert accepted.error is not None


def test_the_thread_goes_first_exactly_where_that_is_allowed() -> None:
    mine = os.sched_getscheduler(0)
    with responding() as responder:
        policies = []
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/comm") as comm:
                if comm.read().strip() == "probe":
                    policies.append(os.sched_getscheduler(int(task)))
        assert policies == [os.SCHED_RR if responder.realtime else mine]
    assert os.sched_getscheduler(0) == mine, "nobody else does"
