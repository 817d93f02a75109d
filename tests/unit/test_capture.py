"""What the engine writes into its cache is noted, and in a compiled engine written at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.unit.test_checkpoint_bucket import Worker

from tarragon.attention import capture
from tarragon.attention.capture import Capture

ROW, SLOTS = torch.ones(1, 2, 8, dtype=torch.bfloat16), torch.tensor([20])


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    made = Worker()
    monkeypatch.setattr(Capture, "noted", made.writer.begin_step(1))
    yield made
    made.close()


def written(worker: Worker) -> int:
    return worker.writer.counters.checkpoint_segments


def test_rows_wait_for_a_gap(worker: Worker) -> None:
    capture._note(1, ROW, ROW, SLOTS)
    assert Capture.noted is not None
    assert (Capture.noted.places, written(worker)) == ([1], 0)
    assert [id(each) for each in Capture.noted.tensors] == [id(ROW), id(ROW), id(SLOTS)]


def test_rows_of_a_compiled_engine_are_written_at_once(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Capture, "at_once", worker.writer.flush)
    for layer in (0, 1):
        capture._note(layer, ROW, ROW, SLOTS)
        assert written(worker) == layer + 1
    bucket = worker.writer.bucket
    assert bucket is not None
    assert torch.equal(bucket.rows[1, 20].view(torch.bfloat16), torch.ones(32, dtype=torch.bfloat16))


def test_layers_without_a_cache_of_their_own_and_unwanted_steps_leave_nothing(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture._note(None, ROW, ROW, SLOTS)
    assert Capture.noted is not None
    assert Capture.noted.places == Capture.noted.tensors == []
    monkeypatch.setattr(Capture, "noted", None)
    capture._note(1, ROW, ROW, SLOTS)
    worker.writer.flush()
    assert written(worker) == 0
