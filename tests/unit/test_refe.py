"""REFE against expert workers that die, hang, wedge or dawdle: rows are answered in time.

The workers are threads with real sockets and regions; each computes ``row * (expert + 2)``.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from tarragon.checkpoint.writer import Fenced
from tarragon.config import Config
from tarragon.messages import (
    DATA_FRAME_BYTES,
    DataFrame,
    DataKind,
    Peer,
    RefusalReason,
    Table,
    pack_data,
)
from tarragon.refe.engine import ExpertUnreachable, Refe
from tarragon.refe.links import LinkDown, NewLink, NewTable
from tarragon.testing.ends import WAIT_S, connection_pair, thread
from tarragon.transport.link import DataLink, Offer
from tarragon.transport.probe import ANSWER, PROBE_FRAME_BYTES, ProbeChannel, pack_probe
from tarragon.transport.region import RegionShape

LAYERS, EXPERTS, HIDDEN, TOP_K, TOKENS = 2, 4, 8, 2, 6
SHAPE = RegionShape(dtype="float32", hidden=HIDDEN, pairs_max=TOKENS * TOP_K)
AW_EPOCH = 9
CONFIG = Config(
    probe_silence_ms=5_000.0,
    probe_interval_ms=50.0,
    probe_misses_max=4,
    expert_batch_ms_max=20_000.0,
    expert_unreachable_timeout_s=0.3,
    expert_answer_timeout_s=30.0,
)
"""Nobody is asked before 5 s have passed: a pause of this process looks like nobody's silence."""
AT_ONCE_MS = 2_000.0
"""Generous on a busy machine; whoever waited for a detection under ``CONFIG`` would take more than 5 s."""
HASTY = msgspec.structs.replace(CONFIG, probe_silence_ms=40.0)
"""Finds a hang after 240 ms of silence; all that is slower takes 20 s or more."""
DETECTION_MS, SLOWER_MS = 239.0, 5_000.0
UNANSWERED = "4 probes in a row unanswered"
WEDGED = msgspec.structs.replace(HASTY, expert_batch_ms_max=800.0, probe_misses_max=10)
"""Looks at progress. Silence is not the point: an answer may be late by 500 ms, and such a pause alone
is no missing progress."""
IDS = torch.tensor([[t % EXPERTS, (t + 1) % EXPERTS] for t in range(TOKENS)], dtype=torch.int32)
ROWS = torch.arange(TOKENS * HIDDEN, dtype=torch.float32).view(TOKENS, HIDDEN)
WEIGHTS = torch.full((TOKENS, TOP_K), 0.5)
EXPECTED = ROWS * (IDS.float() + 2).mul(0.5).sum(1, keepdim=True)


class FakeExpertWorker:
    """Answers doorbells and probes until told otherwise."""

    def __init__(self, name: str, epoch: int) -> None:
        self.peer = Peer(worker_id=name, role="expert", epoch=epoch, address="")
        self.hangs = self.wedged = self.mute = False
        self.answer_after_s = 0.0
        self.frames: list[DataFrame] = []
        self.probed = self.progress = 0
        aw, ew = connection_pair()
        offer = Offer(worker_id="aw-0", epoch=AW_EPOCH, peer_epoch=epoch, shape=SHAPE)
        with thread(
            lambda: DataLink.accept(ew, hidden=HIDDEN, dtype="float32", epoch=epoch, timeout_s=WAIT_S)
        ) as accepted:
            offered = DataLink.offer(aw, offer)
        assert isinstance(accepted.value, DataLink), accepted.error
        self.link = accepted.value
        asking, self.answering = socket.socketpair()
        self.new = NewLink(self.peer, offered, ProbeChannel(asking, epoch))
        self.awake = threading.Event()
        self.threads = [
            threading.Thread(target=target, daemon=True) for target in (self._compute, self._respond)
        ]
        for runner in self.threads:
            runner.start()

    def _compute(self) -> None:
        while (frame := self.link.recv()) is not None:
            self.frames.append(frame)
            if frame.kind != DataKind.ROWS or self.mute:
                continue
            deadline_s = time.monotonic() + self.answer_after_s
            while self.hangs or self.wedged or time.monotonic() < deadline_s:
                if self.awake.wait(0.005):
                    break
                self.progress += not (self.hangs or self.wedged)
            span = slice(frame.first, frame.first + frame.pairs)
            region = self.link.region
            region.results[span] = region.rows[span] * (region.expert_ids[span].float() + 2)[:, None]
            with contextlib.suppress(ConnectionError):
                self.answer(frame)

    def answer(self, frame: DataFrame, step: int | None = None) -> None:
        self.link.send(
            DataFrame(
                DataKind.RESULT,
                frame.layer,
                self.peer.epoch,
                AW_EPOCH,
                frame.pairs,
                frame.step if step is None else step,
            )
        )

    def _respond(self) -> None:
        with contextlib.suppress(OSError):
            while len(raw := self.answering.recv(PROBE_FRAME_BYTES)) == PROBE_FRAME_BYTES:
                self.probed += 1
                if not self.hangs:
                    sequence = int.from_bytes(raw[16:24], "little")
                    self.answering.send(pack_probe(ANSWER, self.peer.epoch, sequence, self.progress))

    def die(self) -> None:
        self.link.close_socket()
        with contextlib.suppress(OSError):
            self.answering.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self.awake.set()
        self.die()
        for runner in self.threads:
            runner.join(WAIT_S)
        self.answering.close()


Group = tuple[Refe, list[FakeExpertWorker], list[tuple[str, str]]]


def table(workers: list[FakeExpertWorker], version: int = 1) -> NewTable:
    """Expert e is at worker e mod n first, then at all others in turn."""
    count = len(workers)
    row = [[(expert + i) % count for i in range(count)] for expert in range(EXPERTS)]
    return NewTable(
        Table(version=version, workers=[worker.peer for worker in workers], candidates=[row] * LAYERS)
    )


@contextlib.contextmanager
def group(count: int, config: Config = CONFIG) -> Iterator[Group]:
    workers = [FakeExpertWorker(f"ew-{i}", 100 + i) for i in range(count)]
    lost: list[tuple[str, str]] = []
    refe = Refe(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=TOP_K,
        pairs_max=TOKENS * TOP_K,
        epoch=AW_EPOCH,
        config=config,
        on_lost=lambda peer, cause: lost.append((peer.worker_id, cause)),
        on_table=lambda version: None,
    )
    refe.post(table(workers))
    for worker in workers:
        refe.post(worker.new)
    try:
        yield refe, workers, lost
    finally:
        for worker in workers:
            worker.end()


def layer(refe: Refe, position: int = 0) -> float:
    """Run one layer of a step of its own, check the outcome; returns how long it took, in ms."""
    refe.begin_step(TOKENS)
    start_s = time.monotonic()
    out = refe.expert_io(position, IDS, ROWS, WEIGHTS)
    took_ms = (time.monotonic() - start_s) * 1e3
    assert torch.equal(out, EXPECTED)
    return took_ms


def test_nobody_is_asked_while_all_answer() -> None:
    with group(2) as (refe, workers, lost):
        for position in (0, 1, 0, 1):
            layer(refe, position)
        assert (refe.counters.probes, [worker.probed for worker in workers], lost) == (0, [0, 0], [])


def acknowledged(refe: Refe) -> list[tuple[int, frozenset[int]]]:
    """Versions of tables as they are acknowledged, with the slots that owe answers at that moment."""
    told: list[tuple[int, frozenset[int]]] = []
    refe._on_table = lambda version: told.append((version, refe._exchange.owing))
    return told


def test_a_table_is_acknowledged_once_all_rows_of_older_ones_are_back() -> None:
    """Only then may an expert worker drop what the table no longer names: it may be computing with it."""
    with group(2) as (refe, workers, _):
        layer(refe)
        told = acknowledged(refe)
        for worker in workers:
            worker.answer_after_s = 0.05
        refe.on_gap = lambda: refe.post(table(workers, 2))
        layer(refe)
        assert told == [(2, frozenset())]
        refe.on_gap = lambda: None
        refe.post(table(workers, 3))
        refe.woken()
        assert told[1:] == [(3, frozenset())], "between layers at once"


def test_the_dead_do_not_keep_a_table_from_being_acknowledged() -> None:
    with group(2) as (refe, workers, _):
        layer(refe)
        told = acknowledged(refe)
        workers[0].hangs = True

        def gap() -> None:
            refe.post(table(workers, 2))
            workers[0].die()

        refe.on_gap = gap
        layer(refe)
        assert [version for version, _ in told] == [2]


def test_a_table_is_acknowledged_while_an_expert_is_waited_for() -> None:
    """The memory for that expert may be what another one gives back after the acknowledgement."""
    with group(2, msgspec.structs.replace(CONFIG, expert_unreachable_timeout_s=WAIT_S)) as (refe, workers, _):
        layer(refe)
        alone = [[[expert % 2] for expert in range(EXPERTS)]] * LAYERS
        both = table(workers, 3)
        refe._on_table = lambda version: refe.post(both) if version == 2 else None
        workers[0].hangs = True
        workers[1].answer_after_s = 0.05

        def gap() -> None:
            refe.on_gap = lambda: None
            refe.post(NewTable(Table(version=2, workers=both.table.workers, candidates=alone)))
            workers[0].die()

        refe.on_gap = gap
        layer(refe)


def test_the_memory_of_a_dead_link_is_given_back_with_the_next_step() -> None:
    """Also where its replacement came in the middle of a layer and got a slot of its own."""
    with group(2) as (refe, workers, _):
        layer(refe)
        workers[0].hangs = True
        fresh = FakeExpertWorker("ew-0", 200)
        workers.append(fresh)

        def gap() -> None:
            refe.on_gap = lambda: None
            workers[0].die()
            refe.post(table([fresh, workers[1]], version=2))
            refe.post(fresh.new)

        refe.on_gap = gap
        layer(refe)
        assert [len(rows) > 0 for rows in refe._links.rows] == [True, True, True]
        layer(refe)
        assert [len(rows) > 0 for rows in refe._links.rows] == [False, True, True]
        assert [len(results) > 0 for results in refe._links.results] == [False, True, True]
        fresh.die()
        refe.end_step()
        assert [len(rows) > 0 for rows in refe._links.rows] == [False, True, False]


def test_a_closed_link_is_replayed_at_once_as_priority() -> None:
    with group(2) as (refe, workers, lost):
        layer(refe)
        workers[0].hangs = True
        refe.on_gap = workers[0].die
        assert layer(refe) < AT_ONCE_MS
        assert (refe.counters.probes, lost) == (0, [("ew-0", "connection closed")])
        assert refe.counters.replayed_pairs == 6
        assert refe.counters.replays == 1
        assert 0.0 < refe.counters.replay_s < refe.counters.wait_s
        assert [bool(frame.flags & 2) for frame in workers[1].frames if frame.kind == 2] == [
            False,
            False,
            True,
        ]


def test_a_hang_costs_one_detection_and_then_nothing() -> None:
    with group(3, HASTY) as (refe, workers, lost):
        layer(refe)
        workers[1].hangs = True
        assert DETECTION_MS < layer(refe) < SLOWER_MS
        [(name, cause)] = lost
        assert (name, cause.split(", ")[1]) == ("ew-1", UNANSWERED)
        assert refe.counters.links_hung == 1
        refe._silence_s = CONFIG.probe_silence_ms / 1e3  # a second detection would take longer than 5 s
        probes = refe.counters.probes
        assert layer(refe) < AT_ONCE_MS
        assert (refe.counters.probes, len(lost)) == (probes, 1)


def test_what_a_hung_worker_answers_when_it_wakes_reaches_nobody() -> None:
    with group(2, HASTY) as (refe, workers, lost):
        workers[0].hangs = True
        layer(refe)
        workers[0].hangs = False
        workers[0].awake.set()
        workers[0].threads[0].join(WAIT_S)  # it computed, could not answer, and saw the end of its link
        for position in (1, 0, 1):
            layer(refe, position)
        assert [name for name, _ in lost] == ["ew-0"]


def test_two_that_hang_at_once_cost_one_detection() -> None:
    with group(3, HASTY) as (refe, workers, lost):
        asked: list[int] = []
        tell = refe._links._on_lost

        def lose(peer: Peer, cause: str) -> None:
            asked.append(refe._links.probes_sent)
            tell(peer, cause)

        refe._links._on_lost = lose
        workers[0].hangs = workers[2].hangs = True
        assert DETECTION_MS < layer(refe) < SLOWER_MS
        assert sorted(name for name, _ in lost) == ["ew-0", "ew-2"]
        assert all(cause.endswith(UNANSWERED) for _, cause in lost)
        assert refe.counters.links_hung == 2
        # Not one after the other, which no bound on the time tells from a pause: when the first was given up,
        # the second had been asked as often, and nobody was asked again because of the other.
        assert asked[0] > 6
        for worker in (workers[0], workers[2]):
            worker.threads[1].join(WAIT_S)  # it has read all that it was asked
            assert worker.probed == 4


def test_one_that_hangs_under_the_replay_is_found_too() -> None:
    with group(3, HASTY) as (refe, workers, lost):
        workers[0].die()
        workers[1].hangs = True
        assert DETECTION_MS < layer(refe) < SLOWER_MS
        causes = dict(lost)
        assert sorted(causes) == ["ew-0", "ew-1"]
        assert causes["ew-1"].endswith(UNANSWERED)
        assert refe.counters.links_hung == 1


def test_one_that_takes_the_replay_and_hangs_then_is_found_too() -> None:
    with group(2, HASTY) as (refe, workers, lost):
        workers[0].hangs = True
        answer = workers[1].answer

        def answer_and_hang(frame: DataFrame, step: int | None = None) -> None:
            answer(frame, step)
            workers[1].hangs = True  # in the thread that takes the replay: it cannot come before

        workers[1].answer = answer_and_hang  # type: ignore[method-assign]
        refe.begin_step(TOKENS)
        start_s = time.monotonic()
        with pytest.raises(ExpertUnreachable):
            refe.expert_io(0, IDS, ROWS, WEIGHTS)
        assert 2 * DETECTION_MS < (time.monotonic() - start_s) * 1e3 < SLOWER_MS
        assert sorted(name for name, _ in lost) == ["ew-0", "ew-1"]
        assert all(cause.endswith(UNANSWERED) for _, cause in lost)


def test_a_long_batch_is_no_failure_while_it_makes_progress() -> None:
    with group(2, WEDGED) as (refe, workers, lost):
        workers[0].answer_after_s = 1.6
        assert layer(refe) > 1_500
        assert (lost, workers[0].probed > 5) == ([], True)


def test_a_wedged_worker_is_found_though_it_answers_probes() -> None:
    with group(2, WEDGED) as (refe, workers, lost):
        workers[0].wedged = True
        assert 800 < layer(refe) < 10_000
        [(name, cause)] = lost
        assert (name, cause.split(" for ")[0]) == ("ew-0", "no progress")


def test_rows_are_not_left_for_ever_with_one_that_only_looks_well() -> None:
    config = msgspec.structs.replace(HASTY, probe_misses_max=10, expert_answer_timeout_s=1.0)
    with group(2, config) as (refe, workers, lost):
        workers[0].mute = True
        with thread(lambda: _bump(workers[0], lambda: bool(lost))):
            assert 900 < layer(refe) < 10_000
        assert lost == [("ew-0", "no answer for 1 s")]


def _bump(worker: FakeExpertWorker, done: Callable[[], bool]) -> None:
    while not done():
        worker.progress += 1
        time.sleep(0.01)


def test_a_cut_probe_channel_fails_the_pair_only_when_it_is_needed() -> None:
    with group(2, HASTY) as (refe, workers, lost):
        refe.probe(False)  # a pause in this layer would be a reason to ask
        workers[0].answering.shutdown(socket.SHUT_RDWR)
        layer(refe)
        assert lost == []
        refe.probe(True)
        workers[0].hangs = True
        assert layer(refe) < SLOWER_MS
        [(name, cause)] = lost
        assert (name, cause) == ("ew-0", "it cannot be probed: the probe channel is closed")


def test_stale_answers_are_dropped_and_counted() -> None:
    with group(2) as (refe, workers, lost):
        layer(refe)
        rows = next(frame for frame in workers[0].frames if frame.kind == DataKind.ROWS)
        workers[0].answer(rows)
        workers[0].answer(rows, step=77)
        workers[0].answer_after_s = workers[1].answer_after_s = 0.02
        layer(refe, 1)
        assert (refe.counters.stale_frames, lost) == (2, [])


def test_an_answer_of_another_incarnation_is_no_answer() -> None:
    """Neither from a former expert worker nor to a former attention worker, though layer and step fit."""
    with group(2) as (refe, workers, lost):
        workers[0].hangs = True  # so that its own answer comes behind the others
        fits = DataFrame(DataKind.RESULT, 0, workers[0].peer.epoch, AW_EPOCH, 0, 1)

        def gap() -> None:
            assert refe._step == fits.step
            workers[0].link.send(fits._replace(sender_epoch=fits.sender_epoch - 1))
            workers[0].link.send(fits._replace(receiver_epoch=AW_EPOCH - 1))
            workers[0].hangs = False

        refe.on_gap = gap
        layer(refe)  # a first one: no earlier results lie in the region
        assert (refe.counters.stale_frames, lost) == (2, [])


@pytest.mark.parametrize(
    ("raw", "words", "malformed"),
    [
        (b"\xff" * DATA_FRAME_BYTES, "data frame with magic 0xffffffff", 1),
        (pack_data(DataFrame(77, 0, 100, AW_EPOCH, 0, 1)), "data frame of unknown kind 77", 1),
        (pack_data(DataFrame(DataKind.RESULT, 0, 100, AW_EPOCH, 0, 1))[:-1], "the middle of a frame", 1),
        (pack_data(DataFrame(DataKind.REFUSED, 0, 100, AW_EPOCH, 0, 1, 99)), "a reason that there is not", 1),
        (pack_data(DataFrame(DataKind.REFUSED, 0, 100, AW_EPOCH, 0, 1, 0)), "a reason that there is not", 1),
        (
            pack_data(DataFrame(DataKind.REFUSED, 0, 100, AW_EPOCH, 0, 1, RefusalReason.NOT_RESIDENT)),
            "refused a frame: NOT_RESIDENT",
            0,
        ),
    ],
    ids=["magic", "kind", "length", "reason", "no reason", "refusal"],
)
def test_a_worker_that_answers_what_is_no_answer_is_cut_and_replaced(
    raw: bytes, words: str, malformed: int
) -> None:
    with group(2) as (refe, workers, lost):
        workers[0].hangs = True

        def gap() -> None:
            refe.on_gap = lambda: None
            workers[0].link.sock.sendall(raw)
            if len(raw) < DATA_FRAME_BYTES:
                workers[0].die()

        refe.on_gap = gap
        layer(refe)
        layer(refe, 1)
        [(name, cause)] = lost
        assert name == "ew-0"
        assert words in cause
        counted = refe.counters
        assert (counted.frames_malformed, counted.links_lost, counted.replays) == (malformed, 1, 1)


def test_the_last_replica_lost_fails_the_step_and_no_later_one() -> None:
    with group(2, HASTY) as (refe, workers, _lost):
        workers[0].die()
        workers[1].hangs = True
        abandoned: list[int] = []
        refe.on_abandoned = lambda: abandoned.append(1)
        refe.begin_step(TOKENS)
        with pytest.raises(ExpertUnreachable, match="an expert of layer 0 has no live host"):
            refe.expert_io(0, IDS, ROWS, WEIGHTS)
        assert (refe.counters.steps_unreachable, abandoned) == (1, [1])
        fresh = FakeExpertWorker("ew-0", 200)
        workers.append(fresh)
        refe.post(table([fresh], version=2))
        refe.post(fresh.new)
        layer(refe)


def test_what_is_asked_while_no_expert_can_be_reached_may_end_the_step() -> None:
    """Those that are gone may have given this worker up: its bucket then says so."""
    with group(1, msgspec.structs.replace(CONFIG, expert_unreachable_timeout_s=WAIT_S)) as (refe, workers, _):
        asked = 0

        def ask() -> None:
            nonlocal asked
            asked += 1
            if asked == 3:
                raise Fenced("its requests were given to other workers")

        refe.on_unreachable = ask
        layer(refe)
        assert asked == 0
        workers[0].die()
        with pytest.raises(Fenced):
            layer(refe, 1)
        assert refe.counters.steps_unreachable == 0


def test_rows_wait_for_a_new_host_and_go_on_with_it() -> None:
    with group(1, msgspec.structs.replace(CONFIG, expert_unreachable_timeout_s=WAIT_S)) as (refe, workers, _):
        workers[0].die()
        fresh = FakeExpertWorker("ew-0", 200)
        workers.append(fresh)

        def replace() -> None:
            time.sleep(0.2)
            refe.post(LinkDown("ew-0", 100, "left the table"))
            refe.post(table([fresh], version=2))
            refe.post(fresh.new)

        began_s = time.monotonic()
        with thread(replace):
            layer(refe)
            assert time.monotonic() - began_s > 0.19
        layer(refe, 1)


def test_an_abandoned_layer_takes_its_late_answers_back_first() -> None:
    """The next step must find every expert worker free: each holds one frame of this worker at a time."""
    with group(2) as (refe, workers, lost):
        layer(refe)
        refe.post(
            NewTable(
                Table(
                    version=2,
                    workers=[worker.peer for worker in workers],
                    candidates=[[[0], [1], [0], [1]]] * LAYERS,
                )
            )
        )
        workers[1].answer_after_s = 0.6
        refe.begin_step(TOKENS)
        workers[0].die()
        with pytest.raises(ExpertUnreachable):
            refe.expert_io(0, IDS, ROWS, WEIGHTS)
        workers[1].answer_after_s = 0.0
        refe.post(table(workers, version=3))
        layer(refe)
        assert [name for name, _ in lost] == ["ew-0"]
        assert refe.counters.stale_frames == 0


def test_a_link_to_one_that_left_the_table_meanwhile_is_not_used() -> None:
    with group(2) as (refe, workers, _lost):
        layer(refe)
        late = FakeExpertWorker("ew-7", 50)
        workers.append(late)
        refe.post(late.new)
        layer(refe)
        late.threads[0].join(WAIT_S)
        assert late.frames == []
        assert not late.threads[0].is_alive(), "its link was closed"
