"""Rows in shared memory: layout, sharing between processes, release, and memory that is not as described."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tarragon.testing.ends import WAIT_S, mapped_regions, no_leak, process
from tarragon.transport.region import Region, RegionError, RegionShape

SHAPE = RegionShape("float32", hidden=48, pairs_max=10)
BOTH_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
@pytest.mark.parametrize(("hidden", "pairs"), [(1, 1), (48, 10), (577, 33), (2_048, 1_024)])
def test_parts_are_aligned_and_do_not_overlap(dtype: Any, width: int, hidden: int, pairs: int) -> None:
    shape = RegionShape(dtype, hidden=hidden, pairs_max=pairs)
    assert shape.rows_offset % 64 == shape.results_offset % 64 == 0
    assert shape.rows_offset >= 4 * pairs
    assert shape.results_offset - shape.rows_offset >= pairs * hidden * width
    assert shape.total_bytes - shape.results_offset >= pairs * hidden * width
    assert shape.total_bytes < (4 + 2 * hidden * width) * pairs + 3 * 64


@no_leak()
def test_both_processes_see_the_same_rows() -> None:
    region, fd = Region.create(SHAPE)

    def answer() -> None:
        mapped = Region.map(fd, SHAPE)
        assert mapped.expert_ids.tolist() == list(range(10))
        mapped.results.copy_(mapped.rows * 2)
        mapped.close()

    assert region.rows.eq(0).all()
    region.expert_ids.copy_(torch.arange(10))
    region.rows.copy_(torch.randn(10, 48))
    with process(answer) as child:
        child.join(WAIT_S)
        assert child.exitcode == 0
    os.close(fd)
    assert (region.expert_ids.dtype, region.rows.dtype) == (torch.int32, torch.float32)
    assert torch.equal(region.results, region.rows * 2)
    region.close()


@no_leak()
def test_close_unmaps() -> None:
    before = mapped_regions()
    region, fd = Region.create(SHAPE)
    os.close(fd)
    assert mapped_regions() == before + 1
    region.close()
    assert mapped_regions() == before
    region.close()
    with pytest.raises(AttributeError):
        _ = region.rows


@no_leak()
def test_a_tensor_that_outlives_its_region_stays_readable() -> None:
    before = mapped_regions()
    region, fd = Region.create(SHAPE)
    os.close(fd)
    row = region.rows[3]
    row.fill_(7)
    region.close()
    assert mapped_regions() == before + 1
    assert row.sum().item() == 7 * 48  # not a crash
    del row
    assert mapped_regions() == before


@no_leak()
def test_memory_is_taken_only_where_rows_are_written() -> None:
    shape = RegionShape("bfloat16", hidden=4_096, pairs_max=100_000)
    region, fd = Region.create(shape)
    assert shape.total_bytes > 1_600_000_000
    assert os.fstat(fd).st_blocks == 0
    region.rows[0].fill_(1)
    region.results[99_999].fill_(1)
    assert 0 < os.fstat(fd).st_blocks * 512 <= 64 << 10
    region.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("dtype", "hidden", "pairs_max"),
    [
        ("float32", 0, 1),
        ("float32", 65_537, 1),
        ("float32", 1, 0),
        ("float32", 1, (1 << 22) + 1),
        ("float32", -1, -1),
        ("float32", 1 << 62, 1 << 62),
        ("float64", 1, 1),
        ("", 1, 1),
    ],
)
def test_a_shape_out_of_bounds_does_not_exist(dtype: Any, hidden: int, pairs_max: int) -> None:
    with pytest.raises(RegionError):
        RegionShape(dtype, hidden=hidden, pairs_max=pairs_max)


def memory_file(size_bytes: int, seals: int) -> int:
    fd = os.memfd_create("misuse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_only_memory_file() -> int:
    fd = memory_file(SHAPE.total_bytes, BOTH_SEALS)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


@no_leak()
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: memory_file(SHAPE.total_bytes, 0), "not sealed"),
        (lambda: memory_file(SHAPE.total_bytes, fcntl.F_SEAL_GROW), "not sealed"),
        (lambda: memory_file(SHAPE.total_bytes, fcntl.F_SEAL_SHRINK), "not sealed"),
        (lambda: memory_file(SHAPE.total_bytes - 1, BOTH_SEALS), "bytes"),
        (lambda: memory_file(SHAPE.total_bytes + 1, BOTH_SEALS), "bytes"),
        (lambda: memory_file(0, BOTH_SEALS), "bytes"),
        (lambda: memory_file(SHAPE.total_bytes, BOTH_SEALS | fcntl.F_SEAL_WRITE), "cannot be mapped"),
        (read_only_memory_file, "cannot be mapped"),
        (lambda: os.open("/dev/zero", os.O_RDWR), "not a memory file"),
        (lambda: os.eventfd(0), "not a memory file"),
    ],
)
def test_memory_that_is_not_as_described_is_refused(make: Callable[[], int], reason: str) -> None:
    fd = make()
    with pytest.raises(RegionError, match=reason):
        Region.map(fd, SHAPE)
    os.close(fd)


@no_leak()
def test_the_size_of_an_offered_region_cannot_be_changed() -> None:
    region, fd = Region.create(SHAPE)
    for size_bytes in (0, SHAPE.total_bytes - 1, SHAPE.total_bytes + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size_bytes)
    with pytest.raises(PermissionError):  # nor can anybody seal it against our writes
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)
    with contextlib.closing(region):
        region.results.fill_(1)
