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

from tarragon.experts import memory
from tarragon.experts.memory import HostMemory
from tarragon.messages import ExpertId
from tarragon.models.expert_weights import ExpertWeights
from tarragon.models.shape import ModelError, MoeModel


def kernel_isa(dtype: str) -> str:
    """vLLM's name of the expert kernel here: AMX tiles for bfloat16 where the CPU has them, else vectors."""
    return "amx" if dtype == "bfloat16" and torch.cpu._is_amx_tile_supported() else "vec"


class Slots:
    """One tensor [E, ...]: a slot per logical expert, and pages only where one is filled.

    In memory of this process alone, or in the host's, at an offset; ``like`` has one expert's shape and type.
    """

    def __init__(self, experts: int, like: torch.Tensor, host: tuple[Any, int] | None = None) -> None:
        self._slot_bytes = like.nbytes
        self._is_shared = host is not None
        # Private: pages of shared memory stay when one process releases them.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        buffer, offset = host or (mmap.mmap(-1, experts * self._slot_bytes, flags=private), 0)
        flat = torch.frombuffer(buffer, dtype=like.dtype, count=experts * like.numel(), offset=offset)
        self.tensor = flat.view(experts, *like.shape)

    def fill(self, expert: int, value: torch.Tensor) -> None:
        if not self._is_shared:
            self.tensor[expert].copy_(value)
            return
        with memory.writable(self._address(expert), self._slot_bytes):
            self._populate(expert, write=True)
            self.tensor[expert].copy_(value)

    def pack(self, expert: int, weight: torch.Tensor, isa: str) -> None:
        """Lay a matrix out as the kernel reads it."""
        source, target = weight.unsqueeze(0).contiguous(), self.tensor[expert : expert + 1]
        if self._is_shared:
            # Others may compute with what somebody else has packed here: they must find nothing but the
            # final bytes, at any moment.
            target = torch.empty_like(target)
        else:
            self._populate(expert, write=True)  # right where the kernel will read it
        torch.ops._C.prepack_moe_weight(source, target, isa)
        if self._is_shared:
            self.fill(expert, target[0])

    def have(self, expert: int) -> None:
        """Map the pages of what is packed."""
        self._populate(expert, write=False)

    def release(self, expert: int) -> None:
        """Give the slot's whole pages back to the system; those of the host are only unmapped."""
        memory.discard(self._address(expert), self._slot_bytes)

    def _populate(self, expert: int, *, write: bool) -> None:
        memory.populate(self._address(expert), self._slot_bytes, write=write)

    def _address(self, expert: int) -> int:
        return self.tensor.data_ptr() + expert * self._slot_bytes


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
        found = []
        for part, shape in enumerate(memory.part_shapes(model)):
            like = torch.empty(shape, dtype=getattr(torch, model.dtype), device="meta")
            place = None if host is None else (host.slots, host.offset(position, part))
            found.append(Slots(model.experts, like, place))
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
