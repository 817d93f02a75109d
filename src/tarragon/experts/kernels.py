"""Resident expert weights and the kernel that runs them.

Weights of one layer lie in two tensors with a slot for *every* logical expert,
so that a row's logical id is also its index and a shadow costs no lookup. The
tensors are reserved, not filled: pages of experts that nobody holds take no
memory.
"""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm import _custom_ops as ops

from tarragon.experts import pages
from tarragon.experts.memory import HostMemory, part_shapes
from tarragon.messages import ExpertId
from tarragon.models.expert_weights import ExpertWeights
from tarragon.models.shape import ModelError, MoeModel


def kernel_isa(dtype: str) -> str:
    """vLLM's name of the expert kernel here: AMX tiles for bfloat16 where the CPU has them, else vectors."""
    return "amx" if dtype == "bfloat16" and torch.cpu._is_amx_tile_supported() else "vec"


class Slots:
    """One tensor [E, ...] of this process alone: a slot per expert, pages only where one is filled."""

    def __init__(self, experts: int, like: torch.Tensor) -> None:
        """``like`` has one expert's shape and type."""
        # Private: pages of shared memory stay when one process releases them.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._view(experts, like, mmap.mmap(-1, experts * like.nbytes, flags=private), 0)

    def _view(self, experts: int, like: torch.Tensor, buffer: Any, offset: int) -> None:
        flat = torch.frombuffer(buffer, dtype=like.dtype, count=experts * like.numel(), offset=offset)
        self.tensor = flat.view(experts, *like.shape)
        self._slot_bytes = like.nbytes

    def fill(self, expert: int, value: torch.Tensor) -> None:
        self.tensor[expert].copy_(value)

    def pack(self, expert: int, weight: torch.Tensor, isa: str) -> None:
        """Lay a matrix out as the kernel reads it, right where it will read it."""
        self._populate(expert, write=True)
        _prepack(weight, self.tensor[expert], isa)

    def have(self, expert: int) -> None:
        """Map the pages of what is packed."""
        self._populate(expert, write=False)

    def release(self, expert: int) -> None:
        """Give the slot's whole pages back to the system; those of the host are only unmapped."""
        pages.discard(self._address(expert), self._slot_bytes)

    def _populate(self, expert: int, *, write: bool) -> None:
        pages.populate(self._address(expert), self._slot_bytes, write=write)

    def _address(self, expert: int) -> int:
        return self.tensor.data_ptr() + expert * self._slot_bytes


class HostSlots(Slots):
    """One tensor [E, ...] in the host's memory, at an offset. Others may compute with it meanwhile."""

    def __init__(self, experts: int, like: torch.Tensor, buffer: Any, offset: int) -> None:
        self._view(experts, like, buffer, offset)

    def fill(self, expert: int, value: torch.Tensor) -> None:
        with pages.writable(self._address(expert), self._slot_bytes):
            self._populate(expert, write=True)
            super().fill(expert, value)

    def pack(self, expert: int, weight: torch.Tensor, isa: str) -> None:
        """Lay a matrix out elsewhere and copy it: others must find nothing but the final bytes, ever."""
        packed = torch.empty_like(self.tensor[expert])
        _prepack(weight, packed, isa)
        self.fill(expert, packed)


def _prepack(weight: torch.Tensor, target: torch.Tensor, isa: str) -> None:
    torch.ops._C.prepack_moe_weight(weight.unsqueeze(0).contiguous(), target.unsqueeze(0), isa)


class _LayerWeights(NamedTuple):
    w13: Slots
    w2: Slots
    b13: Slots | None = None
    b2: Slots | None = None

    def present(self) -> list[Slots]:
        return [slots for slots in self if slots is not None]


class ResidentExperts:
    """The experts that this worker can run, and the call that runs them.

    Not thread-safe for the same expert; loading other experts while batches run is safe,
    because a slot is published (``resident``) only after its weights are complete.
    """

    def __init__(self, model: MoeModel, weights: ExpertWeights, host: HostMemory | None = None) -> None:
        """``host``: memory that the host's expert workers share; None: every expert is a copy of our own.

        Raises ModelError if that was made for another model.
        """
        if host is not None and host.model != model:
            raise ModelError(f"{model.path} is not what it was when the cluster was started")
        self.model = model
        self._weights = weights
        self._host = host
        self._packed_here: list[ExpertId] = []
        """In the host's memory, since the last ``settle``."""
        self._isa = kernel_isa(model.dtype)
        if self._isa == "amx":
            # Without it the first tile instruction kills the process.
            torch.cpu._init_amx()
        self._layers = [self._reserve(position) for position in range(len(model.moe_layers))]
        self.resident = torch.zeros(len(model.moe_layers), model.experts, dtype=torch.bool)
        self._resident_array = self.resident.numpy()
        self._ones = torch.ones(1, 1, dtype=torch.float32)

    def all_resident(self, position: int, expert_ids: np.ndarray[Any, np.dtype[np.int32]]) -> bool:
        """Whether every id (in range) of a frame can be run here."""
        return bool(self._resident_array[position][expert_ids].all())

    def load(self, expert: ExpertId) -> int:
        """Have one expert, packed, and publish it; returns its bytes. Loading it twice is harmless."""
        if self.resident[expert.layer, expert.expert]:
            return 0
        if self._host is not None and self._host.is_packed(expert):
            for slots in self._layers[expert.layer].present():
                slots.have(expert.expert)
        else:
            self._pack(expert)
        self.resident[expert.layer, expert.expert] = True
        return self.model.expert_bytes

    def _pack(self, expert: ExpertId) -> None:
        """Read the expert and lay it out."""
        w13, w2, *biases = self._weights.load(expert.layer, expert.expert)
        layer = self._layers[expert.layer]
        layer.w13.pack(expert.expert, w13, self._isa)
        layer.w2.pack(expert.expert, w2, self._isa)
        for slots, bias in zip((layer.b13, layer.b2), biases, strict=True):
            if slots is not None and bias is not None:
                slots.fill(expert.expert, bias)
        if self._host is not None:
            self._host.set_packed(expert)
            self._packed_here.append(expert)

    def settle(self) -> None:
        """After loading, before anybody is told: make what was packed here cheap to map for the others."""
        if self._host is not None and self._packed_here:
            self._host.compact(self._packed_here)
            self._packed_here = []

    def unload(self, expert: ExpertId) -> None:
        """Forget an expert and give its own memory back.

        The caller knows that no row for it can be under way.
        """
        self.resident[expert.layer, expert.expert] = False
        for slots in self._layers[expert.layer].present():
            slots.release(expert.expert)

    def _reserve(self, position: int) -> _LayerWeights:
        model, host = self.model, self._host
        found: list[Slots] = []
        for part, shape in enumerate(part_shapes(model)):
            like = torch.empty(shape, dtype=getattr(torch, model.dtype), device="meta")
            if host is None:
                found.append(Slots(model.experts, like))
            else:
                found.append(HostSlots(model.experts, like, host.slots, host.offset(position, part)))
        return _LayerWeights(*found)

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
        if self._ones.shape[0] < pairs:
            self._ones = torch.ones(pairs, 1, dtype=torch.float32)
        ops.cpu_fused_moe(
            out,
            rows,
            layer.w13.tensor,
            layer.w2.tensor,
            None if layer.b13 is None else layer.b13.tensor,
            None if layer.b2 is None else layer.b2.tensor,
            self._ones[:pairs],
            expert_ids.view(pairs, 1),
            self.model.activation,
            self._isa,
            False,
        )
