"""Resident expert weights and the kernel that runs them.

Weights of one layer lie in two tensors with a slot for *every* logical expert,
so that a row's logical id is also its index and a shadow costs no lookup. The
tensors are reserved, not filled: pages of experts that are not resident are
never touched, hence take no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops

from tarragon.messages import ExpertId
from tarragon.models.expert_weights import ExpertWeights
from tarragon.models.shape import MoeModel


def kernel_isa() -> str:
    """vLLM's name of the expert kernel for this CPU: AMX tiles where there are any, else vectors."""
    return "amx" if torch.cpu._is_amx_tile_supported() else "vec"


@dataclass(frozen=True)
class _LayerWeights:
    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None
    b2: torch.Tensor | None


class ResidentExperts:
    """The experts that this worker can run, and the call that runs them.

    Not thread-safe for the same expert; loading other experts while batches run is safe,
    because a slot is published (``resident``) only after its weights are complete.
    """

    def __init__(self, model: MoeModel, weights: ExpertWeights) -> None:
        self.model = model
        self._weights = weights
        self._isa = kernel_isa()
        if self._isa == "amx":
            # Without it the first tile instruction kills the process.
            torch.cpu._init_amx()
        self._layers: list[_LayerWeights | None] = [None] * len(model.moe_layers)
        self.resident = torch.zeros(len(model.moe_layers), model.experts, dtype=torch.bool)
        self._resident_array = self.resident.numpy()
        self._ones = torch.ones(1, 1, dtype=torch.float32)

    def all_resident(self, position: int, expert_ids: np.ndarray[Any, np.dtype[np.int32]]) -> bool:
        """Whether every id (in range) of a frame can be run here."""
        return bool(self._resident_array[position][expert_ids].all())

    def load(self, expert: ExpertId) -> int:
        """Read, pack and publish one expert; returns its bytes. Loading it twice is harmless."""
        if self.resident[expert.layer, expert.expert]:
            return 0
        w13, w2, b13, b2 = self._weights.load(expert.layer, expert.expert)
        packed13 = ops.cpu_prepack_moe_weight(w13.unsqueeze(0).contiguous(), self._isa)
        packed2 = ops.cpu_prepack_moe_weight(w2.unsqueeze(0).contiguous(), self._isa)
        layer = self._layers[expert.layer] or self._reserve(expert.layer, packed13, packed2, b13, b2)
        layer.w13[expert.expert].copy_(packed13[0])
        layer.w2[expert.expert].copy_(packed2[0])
        if b13 is not None and layer.b13 is not None:
            layer.b13[expert.expert].copy_(b13)
        if b2 is not None and layer.b2 is not None:
            layer.b2[expert.expert].copy_(b2)
        self.resident[expert.layer, expert.expert] = True
        return packed13.nbytes + packed2.nbytes

    def _reserve(
        self,
        position: int,
        packed13: torch.Tensor,
        packed2: torch.Tensor,
        b13: torch.Tensor | None,
        b2: torch.Tensor | None,
    ) -> _LayerWeights:
        experts = self.model.experts
        layer = _LayerWeights(
            w13=torch.empty(experts, *packed13.shape[1:], dtype=packed13.dtype),
            w2=torch.empty(experts, *packed2.shape[1:], dtype=packed2.dtype),
            b13=None if b13 is None else torch.zeros(experts, *b13.shape, dtype=b13.dtype),
            b2=None if b2 is None else torch.zeros(experts, *b2.shape, dtype=b2.dtype),
        )
        self._layers[position] = layer
        return layer

    def run(self, position: int, rows: torch.Tensor, expert_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Compute one row per (token, expert) pair.

        Args:
            position: the MoE layer.
            rows: [P, H] inputs in the model's dtype.
            expert_ids: int32 [P], all resident in this layer.
            out: [P, H], written in place; row i depends on rows[i] and expert_ids[i] alone.
        """
        pairs = rows.shape[0]
        layer = self._layers[position]
        assert layer is not None, "a batch for a layer without resident experts"
        if self._ones.shape[0] < pairs:
            self._ones = torch.ones(pairs, 1, dtype=torch.float32)
        ops.cpu_fused_moe(
            out,
            rows,
            layer.w13,
            layer.w2,
            layer.b13,
            layer.b2,
            self._ones[:pairs],
            expert_ids.view(pairs, 1),
            self.model.activation,
            self._isa,
            False,
        )
