"""Single experts' weights, against the reference implementation of every architecture."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tarragon.models.expert_weights import ExpertTensors, ExpertWeights
from tarragon.models.shape import ModelError, MoeModel, read_model
from tarragon.testing.checkpoints import KINDS, make_checkpoint

FUSED = [(kind, False) for kind in ("qwen2_moe", "qwen3_moe", "olmoe")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def open_kind(root: Path, kind: str, original_names: bool = True) -> tuple[MoeModel, ExpertWeights]:
    folder = root / f"{kind}-{original_names}"
    if not folder.exists():
        make_checkpoint(kind, folder, layers=3, experts=4, intermediate=96, original_names=original_names)
    model = read_model(folder)
    return model, ExpertWeights(model)


def expert_forward(x: torch.Tensor, weights: ExpertTensors, activation: str) -> torch.Tensor:
    """One expert in float32, from rows in the order that ``ExpertWeights.load`` promises."""
    w13, w2, b13, b2 = (None if w is None else w.float() for w in weights)
    assert w13 is not None
    assert w2 is not None
    inner = functional.linear(x, w13, b13)
    if activation == "silu":
        gate, up = inner.chunk(2, dim=-1)
        inner = functional.silu(gate) * up
    else:
        gate, up = inner[:, ::2].clamp(max=7.0), inner[:, 1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return functional.linear(inner, w2, b2)


@pytest.mark.parametrize(("kind", "original_names"), [(kind, True) for kind in KINDS] + FUSED)
def test_every_expert_computes_what_the_reference_does(
    kind: str, original_names: bool, checkpoints: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, weights = open_kind(checkpoints, kind, original_names)
    reference: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    x = 3 * torch.randn(5, model.hidden, generator=torch.Generator().manual_seed(1))
    for position, layer in enumerate(model.moe_layers):
        module = reference.model.layers[layer].mlp.experts
        for expert in range(model.experts):
            chosen = torch.full((5, 1), expert)
            with torch.no_grad():
                expected = module(x, chosen, torch.ones(5, 1))
            found = expert_forward(x, weights.load(position, expert), model.activation)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_types_and_bytes(kind: str, checkpoints: Path) -> None:
    model, weights = open_kind(checkpoints, kind)
    w13, w2, b13, b2 = weights.load(0, model.experts - 1)
    assert w13.shape == (2 * model.intermediate, model.hidden)
    assert w2.shape == (model.hidden, model.intermediate)
    present = [tensor for tensor in (w13, w2, b13, b2) if tensor is not None]
    assert all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in present)
    assert sum(tensor.nbytes for tensor in present) == model.expert_bytes
    assert model.has_bias is (b13 is not None) is (b2 is not None)


@pytest.mark.parametrize(("position", "expert"), [(0, 4), (0, -1), (3, 0), (-1, 0)])
def test_an_expert_that_does_not_exist(position: int, expert: int, checkpoints: Path) -> None:
    _, weights = open_kind(checkpoints, "mixtral")
    with pytest.raises(IndexError, match=f"no expert {expert} in MoE layer {position}"):
        weights.load(position, expert)


def mapped_files() -> list[str]:
    """Checkpoint files that this process has mapped, by the kernel's account."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[-1] for line in lines if line.endswith(".safetensors")]


def test_what_lies_ready_in_the_file_is_not_copied(checkpoints: Path) -> None:
    model, weights = open_kind(checkpoints, "qwen3_moe", original_names=False)
    file = Path(model.path) / "model.safetensors"
    for tensor in weights.load(1, 2)[:2]:
        assert tensor is not None
        assert tensor.untyped_storage().nbytes() == file.stat().st_size
    assert mapped_files().count(str(file)) == 1


def test_a_view_keeps_its_file_mapped_and_the_last_one_lets_it_go(checkpoints: Path) -> None:
    model, weights = open_kind(checkpoints, "olmoe")
    file = str(Path(model.path) / "model.safetensors")
    assert file not in mapped_files()
    w2 = weights.load(0, 0)[1]
    before = w2.clone()
    del weights
    gc.collect()
    assert file in mapped_files()
    assert torch.equal(w2, before)
    del w2
    gc.collect()
    assert file not in mapped_files()


def test_writing_to_a_view_does_not_reach_the_file(checkpoints: Path) -> None:
    model, weights = open_kind(checkpoints, "qwen2_moe")
    file = Path(model.path) / "model.safetensors"
    before = file.read_bytes()
    weights.load(0, 0)[1].zero_()
    gc.collect()
    assert file.read_bytes() == before


def test_tensors_that_lie_across_word_boundaries(checkpoints: Path, tmp_path: Path) -> None:
    model, weights = open_kind(checkpoints, "mixtral")
    shifted = tmp_path / "shifted"
    shutil.copytree(model.path, shifted)
    file = shifted / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    # One blank more in the header moves every tensor to an odd byte.
    file.write_bytes((length + 1).to_bytes(8, "little") + whole[8 : 8 + length] + b" " + whole[8 + length :])
    odd = ExpertWeights(read_model(shifted))
    for found, expected in zip(odd.load(2, 3), weights.load(2, 3), strict=True):
        assert (found is None) is (expected is None)
        assert found is None or (expected is not None and torch.equal(found, expected))


def test_a_file_that_vanished_or_shrank(checkpoints: Path, tmp_path: Path) -> None:
    model, _ = open_kind(checkpoints, "mixtral")
    folder = tmp_path / "m"
    shutil.copytree(model.path, folder)
    moved = read_model(folder)
    weights = ExpertWeights(moved)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 1 << 16])
    with pytest.raises(ModelError, match="was cut short while it was in use"):
        weights.load(2, 3)
    with pytest.raises(ModelError, match="truncated"):
        ExpertWeights(moved)
    file.unlink()
    with pytest.raises(ModelError, match="holds no safetensors"):
        ExpertWeights(moved)


def test_checkpoints_are_the_same_every_time_and_differ_by_seed(tmp_path: Path) -> None:
    first, again, other = (
        make_checkpoint("mixtral", tmp_path / name, seed=seed)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    read = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert read[0] == read[1]
    assert read[0] != read[2]
    assert json.loads((first / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]


def test_an_unknown_kind_of_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind of checkpoint 'dbrx': choose one of mixtral"):
        make_checkpoint("dbrx", tmp_path)
