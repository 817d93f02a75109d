"""An expert's rows are what its formula says, computed from the checkpoint in float32 without our readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm.platforms import current_platform

from tarragon.experts.kernels import ResidentExperts
from tarragon.messages import ExpertId
from tarragon.models.expert_weights import ExpertWeights
from tarragon.models.shape import read_model
from tarragon.testing.checkpoints import make_checkpoint

ROWS = 24
LAYER = 1
CHOSEN = (5, 2)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    current_platform.import_kernels()


def silu(tensors: dict[str, torch.Tensor], expert: int, rows: torch.Tensor) -> torch.Tensor:
    """Mixtral's: down(silu(gate) * up)."""
    stem = f"model.layers.{LAYER}.block_sparse_moe.experts.{expert}."
    gate, up, down = (tensors[f"{stem}{name}.weight"].float() for name in ("w1", "w3", "w2"))
    return (torch.nn.functional.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()


def swigluoai(tensors: dict[str, torch.Tensor], expert: int, rows: torch.Tensor) -> torch.Tensor:
    """GPT-OSS's: gates and ups alternate, are clamped, and have biases; up counts from one."""
    stem = f"model.layers.{LAYER}.mlp.experts."
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    gate_up, gate_up_bias, down, down_bias = (tensors[stem + name][expert].float() for name in names)
    both = rows @ gate_up + gate_up_bias
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ down + down_bias


@pytest.mark.parametrize(("kind", "formula"), [("mixtral", silu), ("gpt_oss", swigluoai)])
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["small", "clamped"])
def test_rows_are_the_formulas(
    kind: str, formula: Callable[..., torch.Tensor], scale: float, tmp_path: Path
) -> None:
    folder = make_checkpoint(kind, tmp_path / kind, layers=2)
    model = read_model(folder)
    experts = ResidentExperts(model, ExpertWeights(model))
    for expert in CHOSEN:
        experts.load(ExpertId(LAYER, expert))
    generator = torch.Generator().manual_seed(0)
    rows = (scale * torch.randn(ROWS, model.hidden, generator=generator)).bfloat16()
    ids = torch.tensor([CHOSEN[row % 2] for row in range(ROWS)], dtype=torch.int32)
    out = torch.empty_like(rows)
    experts.run(LAYER, rows, ids, out)
    tensors = load_file(folder / "model.safetensors")
    for row in range(ROWS):
        wanted = formula(tensors, int(ids[row]), rows[row : row + 1].float())[0]
        error = (out[row].float() - wanted).abs().max() / wanted.abs().max()
        assert error < 0.03, f"row {row}: {error:.3f} off"
