"""The pages of a checkpoint bucket are there before they are written."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tarragon.config import SEGMENT_POPULATED_BYTES
from tarragon.native.populated import Populated
from tarragon.native.segments import SegmentWriter
from tarragon.transport.memory import create_sealed

ABSENT, WANTED, THERE = 0, 1, 2
LAYERS, ROW_BYTES = 2, 1024
SLOTS = 4 * SEGMENT_POPULATED_BYTES // ROW_BYTES
"""Four chunks of each layer."""
PER_CHUNK = SEGMENT_POPULATED_BYTES // ROW_BYTES
WAIT_S = 10.0


@pytest.fixture
def memory() -> Iterator[tuple[int, torch.Tensor]]:
    """A descriptor of fresh shared memory, and its rows, uint8 [layers, slots, row bytes]."""
    fd = create_sealed("bucket", LAYERS * SLOTS * ROW_BYTES)
    rows = torch.frombuffer(mmap.mmap(fd, 0), dtype=torch.uint8).view(LAYERS, SLOTS, ROW_BYTES)
    yield fd, rows
    os.close(fd)


def write(writer: SegmentWriter, layer: int, *slots: int) -> None:
    half = torch.full((len(slots), 1, ROW_BYTES // 4), 7, dtype=torch.bfloat16)
    assert writer([layer], [half, half, torch.tensor(slots)]) == len(slots)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_chunk_after_the_one_that_is_written_is_made_by_the_thread(
    memory: tuple[int, torch.Tensor],
) -> None:
    fd, rows = memory
    writer = SegmentWriter(rows, torch.zeros(LAYERS, SLOTS, dtype=torch.int32))
    write(writer, 0, 0)
    until(lambda: list(writer.pages.states) == [THERE, THERE] + 6 * [ABSENT])
    assert os.fstat(fd).st_blocks * 512 == 2 * SEGMENT_POPULATED_BYTES
    until(lambda: writer.pages.ahead_s > 0)
    write(writer, 0, 1)
    assert list(writer.pages.states) == [THERE, THERE] + 6 * [ABSENT]


def test_rows_far_ahead_have_their_pages_too(memory: tuple[int, torch.Tensor]) -> None:
    fd, rows = memory
    writer = SegmentWriter(rows, torch.zeros(LAYERS, SLOTS, dtype=torch.int32))
    write(writer, 1, *range(0, SLOTS, PER_CHUNK))
    assert list(writer.pages.states) == 4 * [ABSENT] + 4 * [THERE]
    assert os.fstat(fd).st_blocks * 512 == 4 * SEGMENT_POPULATED_BYTES
    assert bool((rows[1, ::PER_CHUNK] != 0).any(dim=1).all())


def test_what_the_thread_has_not_made_yet_is_made_by_the_writer(memory: tuple[int, torch.Tensor]) -> None:
    _, rows = memory
    writer = SegmentWriter(rows, torch.zeros(LAYERS, SLOTS, dtype=torch.int32))
    writer.pages.states[3] = WANTED
    write(writer, 0, SLOTS - 1)
    assert writer.pages.states[3] == THERE


def test_the_thread_ends_with_its_owner(memory: tuple[int, torch.Tensor]) -> None:
    def fds() -> set[str]:
        return {entry.name for entry in Path("/proc/self/fd").iterdir()}

    gc.collect()  # writers of the other tests
    for thread in threading.enumerate():
        if thread.name == "checkpoint-pages":
            thread.join(WAIT_S)
    before = fds()
    made = Populated(memory[1])
    thread = made.thread
    assert thread.is_alive()
    assert fds() - before
    del made
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert fds() <= before
