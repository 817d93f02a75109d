"""Packed experts that the workers of a host share: packed once, read by all, written to by nobody."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from vllm.platforms import current_platform

from tarragon.experts.kernels import ResidentExperts
from tarragon.experts.memory import HostMemory, part_shapes
from tarragon.messages import ExpertId
from tarragon.models.expert_weights import ExpertTensors, ExpertWeights
from tarragon.models.shape import ModelError, MoeModel, read_model
from tarragon.testing.checkpoints import make_checkpoint

ROWS = 12
EXPERT, OTHER = ExpertId(1, 5), ExpertId(1, 2)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    current_platform.import_kernels()


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoeModel:
    folder: Path = tmp_path_factory.mktemp("model") / request.param
    return read_model(make_checkpoint(request.param, folder, layers=2))


@pytest.fixture
def host(model: MoeModel) -> HostMemory:
    return HostMemory(model)


class NoWeights(ExpertWeights):
    """Of one who must not need to read any."""

    def load(self, layer_position: int, expert: int) -> ExpertTensors:
        raise AssertionError("it was packed before")


def packing(model: MoeModel, host: HostMemory | None = None) -> ResidentExperts:
    """An expert worker that reads what nobody has packed."""
    return ResidentExperts(model, ExpertWeights(model), host)


def mapping(model: MoeModel, host: HostMemory) -> ResidentExperts:
    """One for which everything is there."""
    return ResidentExperts(model, NoWeights(model), host)


def rows_of(experts: ResidentExperts, *chosen: ExpertId) -> torch.Tensor:
    """What these experts make of the same rows, in turn."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(ROWS, experts.model.hidden, generator=generator).bfloat16()
    ids = torch.tensor([chosen[i % len(chosen)].expert for i in range(ROWS)], dtype=torch.int32)
    out = torch.empty_like(rows)
    experts.run(chosen[0].layer, rows, ids, out)
    return out


def one_packs_another_maps(
    model: MoeModel, host: HostMemory
) -> tuple[ResidentExperts, ResidentExperts, torch.Tensor]:
    """Two that have EXPERT, and what the first makes of the rows."""
    first, second = packing(model, host), mapping(model, host)
    first.load(EXPERT)
    second.load(EXPERT)
    return first, second, rows_of(first, EXPERT)


def test_what_one_has_packed_the_others_only_map(model: MoeModel, host: HostMemory) -> None:
    alone = packing(model)
    first = packing(model, host)
    second = mapping(model, host)
    for expert in (EXPERT, OTHER):
        sizes = [experts.load(expert) for experts in (alone, first, second)]
        assert sizes == [model.expert_bytes] * 3
    wanted = rows_of(alone, EXPERT, OTHER)
    assert torch.equal(rows_of(first, EXPERT, OTHER), wanted)
    assert torch.equal(rows_of(second, EXPERT, OTHER), wanted)


def test_what_was_put_into_huge_pages_is_the_same(model: MoeModel, host: HostMemory) -> None:
    first, second, wanted = one_packs_another_maps(model, host)
    first.settle()
    first.settle()
    assert torch.equal(rows_of(second, EXPERT), wanted)
    last = ExpertId(len(model.moe_layers) - 1, model.experts - 1)
    first.load(last)  # into pages that are huge now
    first.settle()
    second.load(last)
    assert torch.equal(rows_of(second, EXPERT, last), rows_of(first, EXPERT, last))


def test_what_one_lets_go_stays_with_the_others(model: MoeModel, host: HostMemory) -> None:
    first, second, wanted = one_packs_another_maps(model, host)
    first.unload(EXPERT)
    assert torch.equal(rows_of(second, EXPERT), wanted)
    again = mapping(model, host)  # a replacement, after all others have died
    again.load(EXPERT)
    assert torch.equal(rows_of(again, EXPERT), wanted)


def test_one_that_dies_while_it_packs_leaves_it_to_the_next(
    model: MoeModel, host: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = packing(model, host)
    set_packed: Callable[[ExpertId], None] = host.set_packed

    def die(_expert: ExpertId) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(host, "set_packed", die)
    with pytest.raises(ZeroDivisionError):
        dying.load(EXPERT)
    assert not host.is_packed(EXPERT)
    monkeypatch.setattr(host, "set_packed", set_packed)
    successor = packing(model, host)
    successor.load(EXPERT)
    assert host.is_packed(EXPERT)
    alone = packing(model)
    alone.load(EXPERT)
    assert torch.equal(rows_of(successor, EXPERT), rows_of(alone, EXPERT))


def test_a_process_that_writes_to_it_by_mistake_is_ended(model: MoeModel, host: HostMemory) -> None:
    experts = packing(model, host)
    experts.load(EXPERT)
    wanted = rows_of(experts, EXPERT)
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        layer: Any = experts._layers[EXPERT.layer]
        layer.w13.tensor[EXPERT.expert].zero_()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV
    assert torch.equal(rows_of(experts, EXPERT), wanted)


def test_nobody_can_call_it_packed_by_mistake(model: MoeModel, host: HostMemory) -> None:
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        host._packed[0] = 1
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert not host.is_packed(ExpertId(0, 0))


def test_memory_made_for_another_model_is_refused(model: MoeModel, host: HostMemory) -> None:
    other = replace(model, intermediate=model.intermediate // 2)
    with pytest.raises(ModelError, match="not what it was"):
        packing(other, host)


def test_every_expert_has_a_place_of_its_own(model: MoeModel) -> None:
    with closing(HostMemory(model)) as host:
        spans = []
        for layer in range(len(model.moe_layers)):
            for part, shape in enumerate(part_shapes(model)):
                start = host.offset(layer, part)
                assert start % mmap.PAGESIZE == 0
                size = model.experts * torch.Size(shape).numel() * getattr(torch, model.dtype).itemsize
                spans.append((start, start + size))
        assert sorted(spans) == spans
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert spans[-1][1] <= len(host.slots)
