"""Before a step, records are taken back whose blocks it may overwrite."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.test_checkpoint_bucket import Worker
from vllm.v1.request import RequestStatus

from tarragon.attention.capture import Capture
from tarragon.attention.checkpoints import Checkpoints
from tarragon.checkpoint.mode import parse
from tarragon.config import Config


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    made = Worker()
    for row, name in enumerate("abcd"):
        made.commit(name, row, 4)
    monkeypatch.setattr(Capture, "noted", None)
    yield made
    made.close()


def test_records_of_who_ended_or_lost_its_blocks_are_taken_back(worker: Worker) -> None:
    """``b`` was preempted and goes on in the same step, ``d`` waits its turn with all it has."""
    checkpoints: Any = object.__new__(Checkpoints)
    checkpoints.writer, checkpoints._mode = worker.writer, parse(Config().checkpoint_mode)
    running = SimpleNamespace(status=RequestStatus.RUNNING)
    checkpoints._scheduler = SimpleNamespace(requests={"b": running, "c": running, "d": running})
    checkpoints.begin(
        SimpleNamespace(
            total_num_scheduled_tokens=5,
            num_scheduled_tokens={"b": 4, "c": 1},
            finished_req_ids={"a"},
            preempted_req_ids={"b"},
            kv_cache_block_copies=[],
        )
    )
    assert set(worker.writer.recorded) == {"c", "d"}
