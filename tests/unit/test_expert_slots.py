"""A slot's memory: the kernel's layout right in place, other slots untouched, given back when released."""

from __future__ import annotations

import mmap

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from tarragon.experts.kernels import Slots, kernel_isa

EXPERTS, ROWS, COLUMNS = 3, 64, 128


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    current_platform.import_kernels()


def weight(expert: int, rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(expert)
    return torch.randn(rows, COLUMNS, generator=generator).bfloat16()


def test_packing_in_place_is_the_engines_packing() -> None:
    slots = Slots(EXPERTS, weight(0))
    for expert in (2, 0):
        slots.pack(expert, weight(expert), kernel_isa("bfloat16"))
    for expert in (2, 0):
        expected = ops.cpu_prepack_moe_weight(weight(expert).unsqueeze(0), kernel_isa("bfloat16"))[0]
        assert torch.equal(slots.tensor[expert], expected)
    assert not slots.tensor[1].any()


def test_what_does_not_lie_in_rows_is_packed_as_well() -> None:
    slots, transposed = Slots(1, weight(0)), weight(0).t().contiguous().t()
    slots.pack(0, transposed, kernel_isa("bfloat16"))
    expected = ops.cpu_prepack_moe_weight(weight(0).unsqueeze(0), kernel_isa("bfloat16"))[0]
    assert torch.equal(slots.tensor[0], expected)


def test_a_released_slot_gives_its_memory_back_and_its_neighbours_stay() -> None:
    """Released pages are filled with zeros when they are next touched; pages that stayed keep their bytes."""
    rows = 5 * mmap.PAGESIZE // (2 * COLUMNS) // 2  # two pages and a half, so that slots share pages
    slots = Slots(EXPERTS, weight(0, rows))
    for expert in range(EXPERTS):
        slots.fill(expert, weight(expert, rows))
    slots.release(1)
    assert torch.equal(slots.tensor[0], weight(0, rows))
    assert torch.equal(slots.tensor[2], weight(2, rows))
    flat, page = slots.tensor.flatten(), mmap.PAGESIZE // 2
    start = -(-rows * COLUMNS // page) * page
    assert not flat[start : 2 * rows * COLUMNS // page * page].any()
