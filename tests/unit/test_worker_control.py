"""A worker's line to the orchestrator: it is dialled again, and the worker serves on meanwhile."""

from __future__ import annotations

import os
import queue
import secrets
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

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
from tarragon.transport.local import Connection, Listener, dial

WAIT_S = 40.0
TABLE = Table(version=0, workers=[], candidates=[])


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


def test_probes_are_answered_and_never_admitted(plain: Plain) -> None:
    plain.start()
    with dial(plain.address, plain.boot.secret, timeout_s=WAIT_S, frame_bytes_max=1024) as asking:
        asking.send_control(ProbeOpen(sender_id="o", sender_epoch=1, receiver_epoch=7))
        assert asking.recv_control(WAIT_S) == ProbeAccepted(epoch=7)
    assert plain.admitted.empty()


# ------------------------------------------------------------------ expert workers


class Experts:
    """Loads experts as slowly as the test wants."""

    model: Any = None

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.held: set[ExpertId] = set()

    def load(self, expert: ExpertId) -> int:
        assert self.gate.acquire(timeout=WAIT_S)
        self.held.add(expert)
        return 10

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
