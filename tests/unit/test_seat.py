"""Rows of requests from elsewhere are read beside the engine, and loaded a bounded number at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.unit.test_checkpoint_bucket import KINDS, SHAPE, Worker

from tarragon.attention import resume
from tarragon.attention.capture import CachedLayer
from tarragon.attention.resume import Seat
from tarragon.checkpoint.restore import Restorer
from tarragon.gateway.wire import Origin

WAIT_S = 30.0
ORIGIN = [Origin("aw-0", 7, 1)]
BLOCKS = {"r": (5, 2, 9), "s": (4, 6, 8)}
POSITIONS = 10


class Engine:
    """Calls a seat as the scheduler and the runner do; remembers what is written into its cache."""

    window = 0
    """Positions that the next one attends to, itself included; 0 is all."""

    def __init__(self, worker: Worker) -> None:
        self.cache: dict[tuple[int, int], torch.Tensor] = {}
        layers = [CachedLayer(kind, None, self._update(place)) for place, kind in enumerate(KINDS)]
        self.restorer = Restorer("same")
        self.restorer.add("aw-0", 7, worker.fd)
        self.seat = Seat(self.restorer, layers, SHAPE.block_sizes, self._first_held, prompts_may_be_cut=True)

    def _first_held(self, positions: int) -> tuple[int]:
        passed = max(0, positions - self.window + 1) if self.window else 0
        return (passed // 4 * 4,)

    def _update(self, place: int) -> Any:
        def update(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
            for i, slot in enumerate(slots.tolist()):
                self.cache[place, slot] = torch.stack([key[i], value[i]])

        return update

    def matched(self, name: str, computed: int = 0, tokens: int = POSITIONS + 1) -> int | None:
        """What the scheduler is told, once the rows are read."""
        request = SimpleNamespace(request_id=name, num_tokens=tokens)
        self.seat.get_num_new_matched_tokens(request, computed)
        self.seat.wait_for_rows(WAIT_S)
        return self.seat.get_num_new_matched_tokens(request, computed)[0]

    def allocate(self, name: str, blocks: tuple[int, ...], count: int) -> None:
        ids = SimpleNamespace(get_block_ids=lambda: (list(blocks),))
        self.seat.update_state_after_alloc(SimpleNamespace(request_id=name), ids, count)

    def step(self) -> None:
        self.seat.load(self.seat.build_connector_meta(None).loads)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    for row, (name, blocks) in enumerate(BLOCKS.items()):
        made.tables[row, :3] = torch.tensor(blocks)
        made.write(row, 0, POSITIONS)
        made.commit(name, row, POSITIONS)
    yield made
    made.close()


@pytest.fixture
def engine(worker: Worker) -> Engine:
    engine = Engine(worker)
    for name in BLOCKS:
        assert engine.seat.expect(name, ORIGIN, has_begun=True) == POSITIONS
    return engine


def test_rows_are_read_beside_and_end_in_the_new_blocks(worker: Worker, engine: Engine) -> None:
    assert engine.matched("r") == POSITIONS
    engine.allocate("r", (1, 3, 7), POSITIONS)
    engine.step()
    assert len(engine.cache) == SHAPE.layers * POSITIONS
    for position in range(POSITIONS):
        old, new = (blocks[position // 4] * 4 + position % 4 for blocks in (BLOCKS["r"], (1, 3, 7)))
        for layer in range(SHAPE.layers):
            assert torch.equal(engine.cache[layer, new], torch.stack(worker.rows[layer, old]))
    assert engine.restorer.counters.restored_positions == POSITIONS
    assert engine.restorer.counters.restore_s > 0


def test_the_engine_goes_on_while_they_are_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    read, may_go_on = engine.restorer.read, threading.Event()

    def slow(*arguments: Any) -> Any:
        assert may_go_on.wait(WAIT_S)
        return read(*arguments)

    monkeypatch.setattr(engine.restorer, "read", slow)
    request = SimpleNamespace(request_id="r", num_tokens=POSITIONS + 1)
    for _ in range(3):
        assert engine.seat.get_num_new_matched_tokens(request, 0) == (None, False)
    engine.seat.wait_for_rows(0.001)
    engine.step()
    may_go_on.set()
    assert engine.matched("r") == POSITIONS


def test_what_the_cache_got_meanwhile_is_not_loaded_again(engine: Engine) -> None:
    assert engine.matched("r") == POSITIONS
    request = SimpleNamespace(request_id="r", num_tokens=POSITIONS + 1)
    assert engine.seat.get_num_new_matched_tokens(request, 4) == (POSITIONS - 4, False)
    engine.allocate("r", (1, 3, 7), POSITIONS - 4)
    engine.step()
    assert {slot for _, slot in engine.cache} == {3 * 4 + i for i in range(4)} | {7 * 4, 7 * 4 + 1}


def test_a_cache_that_lost_some_has_them_read_anew(engine: Engine) -> None:
    assert engine.matched("r", 8) == POSITIONS - 8
    assert engine.matched("r", 0) == POSITIONS


def test_a_step_takes_up_a_bounded_number(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "RESTORED_POSITIONS_PER_STEP", 1)
    engine.step()
    assert (engine.matched("r"), engine.matched("s")) == (POSITIONS, POSITIONS)
    engine.allocate("r", (1, 3, 7), POSITIONS)
    other = SimpleNamespace(request_id="s", num_tokens=POSITIONS + 1)
    assert engine.seat.get_num_new_matched_tokens(other, 0) == (None, False), "streams that run would wait"
    engine.step()
    assert engine.seat.get_num_new_matched_tokens(other, 0) == (POSITIONS, False)


def test_a_damaged_row_is_computed_anew(worker: Worker, engine: Engine) -> None:
    bucket = worker.writer.bucket
    assert bucket is not None
    bucket.rows[1, 5 * 4 + 2, 17] ^= 1
    assert engine.matched("r") == 0
    assert engine.restorer.counters.restore_corrupt == 1
    assert engine.matched("s") == POSITIONS


def test_a_shorter_commit_is_taken_where_the_longest_is_of_no_use(worker: Worker, engine: Engine) -> None:
    """After two deaths, that of the first worker may be damaged while that of the second stands."""
    second = Worker()
    second.tables[0, :2] = torch.tensor([3, 1])
    second.write(0, 0, 6)
    second.commit("r", 0, 6, attempt=2)
    engine.restorer.add("aw-1", 9, second.fd)
    engine.seat.expect("r", [*ORIGIN, Origin("aw-1", 9, 2)], has_begun=True)
    bucket = worker.writer.bucket
    assert bucket is not None
    bucket.rows[1, 5 * 4 + 2, 17] ^= 1
    engine.matched("r")
    assert engine.matched("r") == 6
    engine.allocate("r", (1, 3), 6)
    engine.step()
    assert torch.equal(engine.cache[0, 1 * 4], torch.stack(second.rows[0, 3 * 4]))
    assert (engine.restorer.counters.restore_corrupt, engine.restorer.counters.restored_positions) == (1, 6)
    second.close()


def test_who_left_meanwhile_is_forgotten(engine: Engine) -> None:
    assert engine.matched("r") == POSITIONS
    engine.seat.forget("r")
    request = SimpleNamespace(request_id="r", num_tokens=POSITIONS + 1)
    assert engine.seat.get_num_new_matched_tokens(request, 0) == (0, False)


def test_a_window_needs_no_more_than_it_sees(engine: Engine) -> None:
    engine.window = 4
    assert engine.matched("r") == POSITIONS, "those that it has passed count as computed"
    engine.allocate("r", (0, 3, 7), POSITIONS)
    engine.step()
    assert {slot for _, slot in engine.cache} == {*range(3 * 4, 4 * 4), 7 * 4, 7 * 4 + 1}


@pytest.mark.parametrize(("unsent", "restored"), [(0, True), (1, True), (2, True), (3, False)])
def test_what_a_window_of_the_writer_has_passed_is_not_read(
    engine: Engine, unsent: int, restored: bool
) -> None:
    """Tokens were lost on the way out: what they no longer attend to may have been overwritten since."""
    engine.window = 5  # with 8 to 10 positions computed the first block is passed, with 7 it is not
    wanted = POSITIONS - unsent
    assert engine.matched("r", tokens=wanted + 1) == (wanted if restored else 0)
    assert engine.restorer.counters.restore_incomplete == (not restored)


def test_what_the_cache_has_got_is_not_missed_beyond_a_window(engine: Engine) -> None:
    engine.window = 5
    assert engine.matched("r", computed=4, tokens=8) == 3, "its first block would be wanted of the writer"


def test_rows_are_read_before_the_engine_takes_the_request_up(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(worker)
    foreseen = engine.seat.foresee("r", ORIGIN, prompt_tokens=POSITIONS, sent=1)
    assert foreseen.reading is not None
    assert foreseen.reading.job.result(WAIT_S) is not None
    monkeypatch.setattr(engine.restorer, "find", None)
    monkeypatch.setattr(engine.restorer, "read", None)
    assert engine.seat.expect("r", ORIGIN, has_begun=True, foreseen=foreseen) == POSITIONS
    request = SimpleNamespace(request_id="r", num_tokens=POSITIONS + 1)
    assert engine.seat.get_num_new_matched_tokens(request, 0) == (POSITIONS, False), "in its first step"
    engine.allocate("r", (1, 3, 7), POSITIONS)
    engine.step()
    assert len(engine.cache) == SHAPE.layers * POSITIONS


def test_a_commit_that_shows_only_later_is_looked_for_again(worker: Worker) -> None:
    """The store may tell of another worker's bucket after the gateway tells of its requests."""
    engine = Engine(worker)
    engine.restorer.drop("aw-0", 7)
    foreseen = engine.seat.foresee("r", ORIGIN, prompt_tokens=POSITIONS, sent=1)
    assert foreseen == ((), None)
    engine.restorer.add("aw-0", 7, worker.fd)
    assert engine.seat.expect("r", ORIGIN, has_begun=True, foreseen=foreseen) == POSITIONS
    assert engine.matched("r") == POSITIONS


def test_what_was_read_for_fewer_tokens_is_read_again(worker: Worker) -> None:
    """A prefix of it is of no use to the scheduler, which would compute the rest."""
    engine = Engine(worker)
    foreseen = engine.seat.foresee("r", ORIGIN, prompt_tokens=4, sent=1)
    engine.seat.expect("r", ORIGIN, has_begun=True, foreseen=foreseen)
    assert engine.matched("r") == POSITIONS


def test_rows_that_are_almost_there_are_waited_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without them is longer; but no step waits more than its patience, whatever it is given."""
    monkeypatch.setattr(resume, "ROWS_PATIENCE_S", WAIT_S)
    engine.step()
    request = SimpleNamespace(request_id="r", num_tokens=POSITIONS + 1)
    assert engine.seat.get_num_new_matched_tokens(request, 0) == (POSITIONS, False)
