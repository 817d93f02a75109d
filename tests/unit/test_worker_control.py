"""A worker's line to the orchestrator: it is dialled again, and the worker serves on meanwhile."""

from __future__ import annotations

import os
import queue
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from tarragon.attention.control import ControlThread as AttentionControl
from tarragon.boot import Boot
from tarragon.config import Config
from tarragon.control import WorkerControl
from tarragon.experts.control import ControlThread
from tarragon.messages import (
    Assign,
    Control,
    ExpertId,
    Hello,
    ProbeAccepted,
    ProbeOpen,
    Ready,
    Refused,
    Report,
    Role,
    Stop,
    Table,
    TableUpdate,
    Welcome,
)
from tarragon.refe.engine import Refe
from tarragon.testing.ends import frame_bytes
from tarragon.transport.link import DataLink, LinkRefused, Offer
from tarragon.transport.local import Connection, HandshakeError, Listener, dial
from tarragon.transport.probe import ProbeChannel
from tarragon.transport.region import RegionShape

WAIT_S = 40.0
TABLE = Table(version=0, workers=[], candidates=[])
REGION = RegionShape("float32", hidden=8, pairs_max=4)


def wait(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"no {what} after {WAIT_S} s"
        time.sleep(0.005)


def boot_of(role: Role) -> Boot:
    return Boot(
        cluster=secrets.token_hex(8),
        secret=secrets.token_bytes(32),
        worker_id="w-0",
        role=role,
        epoch=7,
        model="",
        config=Config(report_interval_ms=50.0, connect_timeout_s=3.0),
    )


class Orchestrator:
    """Its listener; ``meet`` accepts the worker and returns the connection and the Hello."""

    def __init__(self, boot: Boot) -> None:
        self.listener = Listener(
            boot.orchestrator_address, boot.secret, frame_bytes_max=1 << 20, handshake_timeout_s=WAIT_S
        )

    def meet(self) -> tuple[Connection, Hello]:
        connection = self.listener.accept(WAIT_S)
        hello = connection.recv_control(WAIT_S)
        assert isinstance(hello, Hello)
        return connection, hello

    def close(self) -> None:
        self.listener.close()


def next_of(connection: Connection, kind: type[Control]) -> Any:
    """The next message that is of ``kind``; reports in between do not count."""
    while True:
        message = connection.recv_control(WAIT_S)
        assert message is not None
        if isinstance(message, kind):
            return message
        assert isinstance(message, Report), message


def wait_for_count(connection: Connection, name: str, count: float) -> None:
    """Read reports until one has counted so many; none may have counted more."""
    deadline_s = time.monotonic() + WAIT_S
    while (found := next_of(connection, Report).counters[name]) != count:
        assert found < count, name
        assert time.monotonic() < deadline_s, f"{name} is {found}"


class Plain(WorkerControl):
    """A worker that remembers what it is told."""

    def __init__(self, boot: Boot) -> None:
        super().__init__(boot, frame_bytes_max=1 << 20)
        self.told: queue.SimpleQueue[Control] = queue.SimpleQueue()
        self.admitted: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def handle(self, message: Control) -> None:
        self.told.put(message)

    def report(self) -> None:
        self.send(Report(worker_id="w-0", epoch=7, counters={}))

    def admit(self, connection: Connection, first: bytes, descriptors: list[int]) -> bool:
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()
        self.admitted.put(first)
        return True


@pytest.fixture
def plain() -> Iterator[Plain]:
    control = Plain(boot_of("attention"))
    yield control
    end(control)


def stop_talking(control: WorkerControl, connection: Connection) -> None:
    """End the control thread while its orchestrator is there: it would dial for seconds otherwise."""
    control.stopping.set()
    control.join(WAIT_S)
    connection.close()


def end(control: WorkerControl) -> None:
    control.stopping.set()
    if control.is_alive():
        control.join(WAIT_S)
        assert not control.is_alive()
    control._listener.close()
    control.responder.close()


def test_it_dials_again_with_the_same_epoch_and_says_what_it_is(plain: Plain) -> None:
    ready = Ready(worker_id="w-0", epoch=7, fingerprint="f", exact=True)
    with closing(Orchestrator(plain.boot)) as first:
        plain.start()
        connection, hello = first.meet()
        assert (hello.epoch, hello.pid, hello.was_ready) == (7, os.getpid(), False)
        connection.send_control(Welcome(table=TABLE))
        assert isinstance(plain.told.get(timeout=WAIT_S), Welcome)
        plain.send(ready)
        assert next_of(connection, Ready) == ready
        connection.close()
    with closing(Orchestrator(plain.boot)) as second:
        connection, hello = second.meet()
        assert (hello.epoch, hello.was_ready) == (7, True)
        assert next_of(connection, Ready) == ready
        connection.send_control(TableUpdate(table=TABLE))
        assert isinstance(plain.told.get(timeout=WAIT_S), TableUpdate)
        assert next_of(connection, Report)
        connection.close()


def test_it_serves_on_without_an_orchestrator(plain: Plain) -> None:
    plain.start()
    time.sleep(0.5)  # several attempts to dial
    began_s = time.monotonic()
    for _ in range(1000):
        plain.report()
    plain.send(Ready(worker_id="w-0", epoch=7, fingerprint="f", exact=True))
    # One that waited would do so for connect_timeout_s, which is 3 s.
    assert time.monotonic() - began_s < 2.5, "sending to nobody waits"
    with dial(plain.address, plain.boot.secret, timeout_s=WAIT_S, frame_bytes_max=100) as peer:
        peer.send(b"let me in")
        assert plain.admitted.get(timeout=WAIT_S) == b"let me in"
    assert select.select([plain.wake_fd], [], [], WAIT_S)[0], "the computing thread is not woken"
    assert not plain.stopping.is_set()
    with closing(Orchestrator(plain.boot)) as late:
        connection, _ = late.meet()
        assert next_of(connection, Ready).fingerprint == "f"
        connection.close()


@pytest.mark.parametrize("last_word", [Stop(reason="enough"), Refused(reason="replaced")], ids=str)
def test_it_ends_when_it_is_told_to(plain: Plain, last_word: Control) -> None:
    with closing(Orchestrator(plain.boot)) as orchestrator:
        plain.start()
        connection, _ = orchestrator.meet()
        connection.send_control(last_word)
        assert plain.stopping.wait(WAIT_S)
        plain.join(WAIT_S)
        assert not plain.is_alive()
        connection.close()


def test_who_says_nothing_or_breaks_the_protocol_does_not_end_it(plain: Plain) -> None:
    with closing(Orchestrator(plain.boot)) as orchestrator:
        plain.start()
        for raw in (b"\xff no message", b""):
            connection, _ = orchestrator.meet()
            connection.send(raw)
            while connection.recv(WAIT_S) is not None:
                pass
            connection.close()
        connection, _ = orchestrator.meet()
        connection.close()
    assert not plain.stopping.is_set()


def test_who_is_turned_away_at_the_door_is_reported(plain: Plain) -> None:
    with closing(Orchestrator(plain.boot)) as orchestrator:
        plain.start()
        connection, _ = orchestrator.meet()
        wait_for_count(connection, "connections_refused", 0)
        with pytest.raises(HandshakeError):
            dial(plain.address, b"another secret", timeout_s=WAIT_S, frame_bytes_max=100)
        wait_for_count(connection, "connections_refused", 1)
        for number, raw in enumerate((b"\xff" * 8, b"\xff" * 3, b""), start=2):
            with dial(plain.address, plain.boot.secret, timeout_s=WAIT_S, frame_bytes_max=100) as rude:
                rude.sock.sendall(raw)
                rude.sock.shutdown(socket.SHUT_WR)
                assert rude.recv(WAIT_S) is None
            wait_for_count(connection, "connections_refused", number)
        stop_talking(plain, connection)
    assert plain.admitted.empty()


def spoil(orchestrator: Orchestrator) -> int:
    """Answer Hello with what is no frame, no message, and half a frame; returns how often."""
    spoilt = (b"\xff" * 8, frame_bytes(b"\xff no message"), frame_bytes(b"half a frame")[:-1])
    for raw in spoilt:
        connection, _ = orchestrator.meet()
        connection.sock.sendall(raw)
        connection.sock.shutdown(socket.SHUT_WR)
        while connection.recv(WAIT_S) is not None:
            pass
        connection.close()
    return len(spoilt)


def test_malformed_frames_of_an_orchestrator_are_reported_to_the_next(plain: Plain) -> None:
    with closing(Orchestrator(plain.boot)) as orchestrator:
        plain.start()
        count = spoil(orchestrator)
        connection, _ = orchestrator.meet()
        wait_for_count(connection, "frames_malformed", count + ProbeChannel.malformed)
        stop_talking(plain, connection)


def test_probes_are_answered_and_never_admitted(plain: Plain) -> None:
    plain.start()
    with dial(plain.address, plain.boot.secret, timeout_s=WAIT_S, frame_bytes_max=1024) as asking:
        asking.send_control(ProbeOpen(sender_id="o", sender_epoch=1, receiver_epoch=7))
        assert asking.recv_control(WAIT_S) == ProbeAccepted(epoch=7)
    assert plain.admitted.empty()


# ------------------------------------------------------------------ attention workers


def test_an_attention_worker_adds_what_refe_refused() -> None:
    refe = Refe(
        layers=1,
        experts=1,
        top_k=1,
        pairs_max=1,
        epoch=7,
        config=Config(),
        on_lost=lambda peer, cause: None,
        on_table=lambda version: None,
    )
    refe.counters.frames_malformed = 2
    control = AttentionControl(boot_of("attention"), refe, REGION)
    try:
        with closing(Orchestrator(control.boot)) as orchestrator:
            control.start()
            count = spoil(orchestrator)
            connection, _ = orchestrator.meet()
            wait_for_count(connection, "frames_malformed", 2 + count + ProbeChannel.malformed)
            wait_for_count(connection, "links_refused", DataLink.refused)
            stop_talking(control, connection)
    finally:
        end(control)


# ------------------------------------------------------------------ expert workers


class Experts:
    """Loads experts as slowly as the test wants."""

    model: Any = SimpleNamespace(hidden=8, dtype="float32")

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.held: set[ExpertId] = set()
        self.settled: set[ExpertId] = set()

    def load(self, expert: ExpertId) -> int:
        assert self.gate.acquire(timeout=WAIT_S)
        self.held.add(expert)
        return 10

    def settle(self) -> None:
        self.settled = self.held.copy()

    def unload(self, expert: ExpertId) -> None:
        self.held.discard(expert)


A, B, C, D = (ExpertId(0, number) for number in range(4))


@pytest.fixture
def experts() -> Experts:
    return Experts()


@pytest.fixture
def expert_worker(experts: Experts) -> Iterator[ControlThread]:
    control = ControlThread(boot_of("expert"), experts, "f", lambda: ({}, []))  # type: ignore[arg-type]
    yield control
    end(control)


def test_an_expert_worker_tells_a_new_orchestrator_what_it_holds(
    expert_worker: ControlThread, experts: Experts
) -> None:
    experts.gate.release(100)
    with closing(Orchestrator(expert_worker.boot)) as first:
        expert_worker.start()
        connection, hello = first.meet()
        assert hello.resident == []
        connection.send_control(Welcome(table=TABLE, assigned=[A, B], order=1))
        assert next_of(connection, Ready).resident == [A, B]
        assert experts.settled == {A, B}, "before it was told"
        connection.close()
    with closing(Orchestrator(expert_worker.boot)) as second:
        connection, hello = second.meet()
        assert hello.resident == [A, B]
        connection.send_control(Welcome(table=TABLE, assigned=[A, C], order=1))
        ready = next_of(connection, Ready)
        assert (ready.resident, ready.order, ready.resident_bytes) == ([A, C], 1, 20)
        assert experts.held == {A, C}
        connection.close()


def test_orders_of_a_dead_orchestrator_are_void(expert_worker: ControlThread, experts: Experts) -> None:
    experts.gate.release(2)
    with closing(Orchestrator(expert_worker.boot)) as first:
        expert_worker.start()
        connection, _ = first.meet()
        connection.send_control(Welcome(table=TABLE, assigned=[A, B], order=1))
        next_of(connection, Ready)
        # It is loading C when the orchestrator dies; A would have to go then, and D would come.
        connection.send_control(Assign(experts=[B, C, D], order=2))
        connection.send_control(Assign(experts=[D], order=3))
        wait(lambda: expert_worker._assignments.qsize() == 1, "start of the second order")
        connection.close()
    with closing(Orchestrator(expert_worker.boot)) as second:
        connection, hello = second.meet()
        assert hello.resident == [A, B]
        experts.gate.release(100)
        wait(lambda: C in experts.held, "end of the load")
        time.sleep(0.2)
        assert experts.held == {A, B, C}, "an order of nobody was carried out"
        connection.send_control(Welcome(table=TABLE, assigned=[A, B], order=1))
        ready = next_of(connection, Ready)
        assert (ready.resident, ready.order) == ([A, B], 1)
        assert experts.held == {A, B}
        connection.close()


def test_links_that_do_not_fit_are_refused_and_reported(expert_worker: ControlThread) -> None:
    """Both ends are in this process, and each counts."""

    def door() -> Connection:
        return dial(expert_worker.address, boot.secret, timeout_s=WAIT_S, frame_bytes_max=1 << 20)

    boot = expert_worker.boot
    with closing(Orchestrator(boot)) as orchestrator:
        expert_worker.start()
        connection, _ = orchestrator.meet()
        count = DataLink.refused
        wait_for_count(connection, "links_refused", count)
        for epoch, hidden, words in ((6, 8, "epoch 6"), (7, 9, "hidden size is 8")):
            shape = RegionShape("float32", hidden=hidden, pairs_max=4)
            with pytest.raises(LinkRefused, match=words):
                DataLink.offer(door(), Offer(worker_id="aw-0", epoch=1, peer_epoch=epoch, shape=shape))
            count += 2
        with door() as rude:
            rude.send(b"no offer, and no memory")
            answer = rude.recv_control(WAIT_S)
            assert isinstance(answer, Refused)
            assert "0 descriptors" in answer.reason
            assert rude.recv(WAIT_S) is None
        wait_for_count(connection, "links_refused", count + 1)
        assert expert_worker.links.empty()
        fits = Offer(worker_id="aw-0", epoch=1, peer_epoch=7, shape=REGION)
        with closing(DataLink.offer(door(), fits)), closing(expert_worker.links.get(timeout=WAIT_S)) as link:
            assert link.peer_id == "aw-0"
        stop_talking(expert_worker, connection)
