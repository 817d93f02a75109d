"""The expert worker's compute thread over real links: what it answers, what it refuses, that it goes on."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform

from tarragon.boot import Boot
from tarragon.config import Config
from tarragon.experts.control import ControlThread
from tarragon.experts.kernels import ResidentExperts
from tarragon.experts.worker import ExpertService
from tarragon.messages import (
    DATA_FRAME_BYTES,
    DataFlag,
    DataFrame,
    DataKind,
    ExpertId,
    RefusalReason,
    pack_data,
)
from tarragon.testing.ends import WAIT_S, connection_pair, thread
from tarragon.transport.link import DataLink, Offer
from tarragon.transport.region import RegionShape

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, PAIRS_MAX = 2, 8, 128, 64, 6
ABSENT = 5
"""An expert that is not loaded."""
EPOCH, AW_EPOCH, STEP = 7, 5, 1 << 40
SHAPE = RegionShape("bfloat16", hidden=HIDDEN, pairs_max=PAIRS_MAX)
ROWS = DataFrame(DataKind.ROWS, 0, AW_EPOCH, EPOCH, 2, STEP, DataFlag.CONTINUES)


def weights_of(layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    """w13 [2 * I, H] and w2 [H, I], another one for every expert, and no biases."""
    generator = torch.Generator().manual_seed(EXPERTS * layer + expert)
    w13, w2 = (
        torch.randn(*shape, generator=generator).bfloat16() / 8
        for shape in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    )
    return w13, w2, None, None


@pytest.fixture(scope="module")
def experts() -> ResidentExperts:
    current_platform.import_kernels()
    model: Any = SimpleNamespace(
        moe_layers=tuple(range(LAYERS)),
        experts=EXPERTS,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        has_bias=False,
        expert_bytes=6 * HIDDEN * INTERMEDIATE,
        dtype="bfloat16",
        activation="silu",
    )
    weights: Any = SimpleNamespace(load=weights_of)
    found = ResidentExperts(model, weights)
    for layer in range(LAYERS):
        for expert in set(range(EXPERTS)) - {ABSENT}:
            found.load(ExpertId(layer, expert))
    return found


class AttentionWorker:
    """The other end of a link; sends layer after layer."""

    def __init__(self, link: DataLink, experts: ResidentExperts) -> None:
        self.link, self.experts = link, experts
        self.layer = 0

    def place(self, ids: list[int], first: int = 0) -> torch.Tensor:
        """Put rows for these experts into the region; returns what their results have to be."""
        span = slice(first, first + len(ids))
        region, wanted = self.link.region, torch.empty(len(ids), HIDDEN, dtype=torch.bfloat16)
        region.rows[span] = torch.randn(len(ids), HIDDEN).bfloat16()
        region.expert_ids[span] = torch.tensor(ids, dtype=torch.int32)
        region.results[span] = 0
        self.experts.run(self.layer, region.rows[span].clone(), region.expert_ids[span].clone(), wanted)
        return wanted

    def answer(self) -> DataFrame | None:
        return self.link.recv(WAIT_S)

    def compute(self, ids: list[int], first: int = 0) -> None:
        """One layer, and its answer."""
        wanted = self.place(ids, first)
        self.link.send(ROWS._replace(layer=self.layer, pairs=len(ids), first=first))
        assert self.answer() == result(layer=self.layer, pairs=len(ids), first=first)
        assert torch.equal(self.link.region.results[first : first + len(ids)], wanted)
        self.layer = (self.layer + 1) % LAYERS


def result(**fields: int) -> DataFrame:
    return DataFrame(DataKind.RESULT, 0, EPOCH, AW_EPOCH, 0, STEP)._replace(**fields)


class ExpertWorker:
    """The service in a thread, with its true mailboxes. No orchestrator is there, so nobody reports."""

    def __init__(self, experts: ResidentExperts) -> None:
        boot = Boot(
            cluster=secrets.token_hex(8),
            secret=secrets.token_bytes(32),
            worker_id="ew-0",
            role="expert",
            epoch=EPOCH,
            model="",
            config=Config(),
        )
        self.service = ExpertService(boot, experts)
        self.control = ControlThread(boot, experts, "", self.service.report)
        self.runner = threading.Thread(target=self.service.serve, args=(self.control,), daemon=True)
        self.runner.start()

    def link(self) -> AttentionWorker:
        aw, ew = connection_pair()
        with thread(lambda: self._admit(*ew.recv_with_fds(WAIT_S), ew)) as admitted:
            offer = Offer(worker_id="aw-0", epoch=AW_EPOCH, peer_epoch=EPOCH, shape=SHAPE)
            link = DataLink.offer(aw, offer, timeout_s=WAIT_S)
        assert admitted.value is True, admitted.error
        return AttentionWorker(link, self.service.experts)

    def _admit(self, first: bytes, descriptors: list[int], connection: Any) -> bool:
        taken = self.control.admit(connection, first, descriptors)
        self.control.wake()
        return taken

    def counters(self) -> dict[str, float]:
        """Those that say what went wrong."""
        names = ("refused_frames", "frames_malformed", "links_lost", "late_answers")
        return {name: count for name, count in self.service.report()[0].items() if name in names and count}

    def end(self) -> None:
        self.control.stopping.set()
        self.control.wake()
        self.runner.join(WAIT_S)
        assert not self.runner.is_alive()
        self.control._listener.close()
        self.control.responder.close()


@pytest.fixture
def worker(experts: ResidentExperts) -> Iterator[ExpertWorker]:
    made = ExpertWorker(experts)
    yield made
    made.end()


@pytest.fixture
def aw(worker: ExpertWorker) -> Iterator[AttentionWorker]:
    made = worker.link()
    with contextlib.closing(made.link):
        yield made


def test_rows_are_computed_from_and_into_the_region(worker: ExpertWorker, aw: AttentionWorker) -> None:
    aw.compute([1, 4])
    aw.compute([0, 7, 7], first=2)
    aw.link.send(ROWS._replace(pairs=0))
    assert aw.answer() == result(), "an empty frame is answered too"
    counters, pairs = worker.service.report()
    assert not torch.equal(aw.link.region.results[3], aw.link.region.results[2])
    assert (counters["frames"], counters["batches"], counters["pairs"]) == (3, 2, 5)
    assert pairs == [[0, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 2]]
    assert worker.counters() == {}


@pytest.mark.parametrize(
    ("changes", "ids", "reason"),
    [
        ({"sender_epoch": AW_EPOCH - 1}, [1, 2], RefusalReason.STALE_EPOCH),
        ({"receiver_epoch": EPOCH - 1}, [1, 2], RefusalReason.STALE_EPOCH),
        ({"kind": DataKind.STEP_END, "receiver_epoch": EPOCH + 1}, [1, 2], RefusalReason.STALE_EPOCH),
        ({"layer": LAYERS}, [1, 2], RefusalReason.BAD_LAYER),
        ({"layer": 0xFFFF}, [1, 2], RefusalReason.BAD_LAYER),
        ({"layer": 1}, [1, 2], RefusalReason.BAD_LAYER),  # it is not its turn
        ({"kind": DataKind.STEP_BEGIN, "layer": LAYERS}, [1, 2], RefusalReason.BAD_LAYER),
        ({"kind": DataKind.RESULT}, [1, 2], RefusalReason.BAD_LAYER),
        ({"kind": DataKind.REFUSED}, [1, 2], RefusalReason.BAD_LAYER),
        ({"kind": DataKind.DRAINING}, [1, 2], RefusalReason.BAD_LAYER),
        ({"pairs": PAIRS_MAX + 1}, [1, 2], RefusalReason.BAD_COUNT),
        ({"first": PAIRS_MAX - 1}, [1, 2], RefusalReason.BAD_COUNT),
        ({"pairs": 0, "first": PAIRS_MAX + 1}, [1, 2], RefusalReason.BAD_COUNT),
        ({"pairs": 0xFFFF_FFFF, "first": 0xFFFF_FFFF}, [1, 2], RefusalReason.BAD_COUNT),
        ({}, [1, EXPERTS], RefusalReason.BAD_COUNT),
        ({}, [-1, 1], RefusalReason.BAD_COUNT),
        ({}, [1, ABSENT], RefusalReason.NOT_RESIDENT),
    ],
    ids=str,
)
def test_a_frame_that_does_not_fit_is_refused_and_the_next_one_is_served(
    changes: dict[str, int], ids: list[int], reason: RefusalReason, worker: ExpertWorker, aw: AttentionWorker
) -> None:
    for _ in range(LAYERS):
        aw.compute([2, 3])
    aw.link.region.expert_ids[:2] = torch.tensor(ids, dtype=torch.int32)
    bad = ROWS._replace(**changes)
    aw.link.send(bad)
    assert aw.answer() == DataFrame(
        DataKind.REFUSED, bad.layer, EPOCH, AW_EPOCH, bad.pairs, STEP, reason, bad.first
    )
    for _ in range(LAYERS):
        aw.compute([2, 3])
    assert worker.counters() == {"refused_frames": 1}


def test_ids_that_change_after_they_were_checked_change_nothing(
    worker: ExpertWorker, aw: AttentionWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = worker.service._run

    def spoilt(batch: Any) -> None:
        aw.link.region.expert_ids[:] = EXPERTS + 1_000_000
        run(batch)

    monkeypatch.setattr(worker.service, "_run", spoilt)
    aw.compute([1, 4])
    aw.compute([6, 2], first=3)
    assert worker.counters() == {}


def test_a_second_frame_is_refused_and_the_first_one_answered(
    worker: ExpertWorker, aw: AttentionWorker
) -> None:
    """One frame of a worker at a time: what comes too early takes nobody's place."""
    wanted = aw.place([1, 2])
    early = ROWS._replace(layer=1, pairs=1, step=STEP + 1)
    aw.link.sock.sendall(pack_data(ROWS) + pack_data(early))  # so that both are there when it looks
    assert aw.answer() == DataFrame(
        DataKind.REFUSED, 1, EPOCH, AW_EPOCH, 1, STEP + 1, RefusalReason.BAD_LAYER
    )
    assert aw.answer() == result(pairs=2)
    assert torch.equal(aw.link.region.results[:2], wanted)
    assert worker.counters() == {"refused_frames": 1}


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff" * DATA_FRAME_BYTES,
        pack_data(ROWS)[:4] + b"\x09" + pack_data(ROWS)[5:],
        pack_data(ROWS._replace(kind=77)),
        pack_data(ROWS)[:-1],
    ],
    ids=["magic", "version", "kind", "length"],
)
def test_what_is_no_frame_ends_its_own_link_and_is_counted(
    raw: bytes, worker: ExpertWorker, aw: AttentionWorker
) -> None:
    other = worker.link()
    with contextlib.closing(other.link):
        for each in (aw, other):
            each.compute([1, 2])
        aw.link.sock.sendall(raw)
        if len(raw) < DATA_FRAME_BYTES:
            aw.link.sock.shutdown(socket.SHUT_WR)
        assert aw.answer() is None
        other.compute([3, 4])
        assert worker.counters() == {"frames_malformed": 1, "links_lost": 1}


def test_a_worker_that_leaves_between_two_frames_has_broken_nothing(
    worker: ExpertWorker, aw: AttentionWorker
) -> None:
    aw.compute([1, 2])
    aw.link.sock.shutdown(socket.SHUT_WR)
    assert aw.answer() is None
    other = worker.link()
    with contextlib.closing(other.link):
        other.compute([3, 4])
        assert worker.counters() == {"links_lost": 1}


def test_an_answer_that_comes_too_late_is_counted(
    worker: ExpertWorker, aw: AttentionWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, left = worker.link(), threading.Event()
    run = worker.service.experts.run

    def leave_first(*arguments: Any) -> None:
        aw.link.close_socket()
        run(*arguments)
        left.set()

    with contextlib.closing(other.link):
        aw.place([1, 2])
        monkeypatch.setattr(worker.service.experts, "run", leave_first)
        aw.link.send(ROWS)
        assert left.wait(WAIT_S)
        monkeypatch.undo()
        other.compute([3, 4])
        assert worker.counters() == {"late_answers": 1, "links_lost": 1}
