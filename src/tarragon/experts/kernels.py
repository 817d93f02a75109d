"""Resident expert weights and the kernel that runs them.

Weights of one layer lie in two tensors with a slot for *every* logical expert,
so that a row's logical id is also its index and a shadow costs no lookup. The
tensors are reserved, not filled: pages of experts that are not resident take no
memory.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from vllm import _custom_ops as ops

from tarragon.messages import ExpertId
from tarragon.models.expert_weights import ExpertWeights
from tarragon.models.shape import MoeModel

_MADV_POPULATE_WRITE: Final = 23
_libc: Final = ctypes.CDLL(None)


def kernel_isa(dtype: str) -> str:
    """vLLM's name of the expert kernel here: AMX tiles for bfloat16 where the CPU has them, else vectors."""
    return "amx" if dtype == "bfloat16" and torch.cpu._is_amx_tile_supported() else "vec"


class Slots:
    """One tensor [E, ...] over anonymous memory: a slot per logical expert, pages only where filled."""

    def __init__(self, experts: int, like: torch.Tensor) -> None:
        self._slot_bytes = like.nbytes
        # Private: pages of shared memory, which is what mmap gives by itself, stay when they are released.
        self._memory = mmap.mmap(-1, experts * self._slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._memory, dtype=like.dtype).view(experts, *like.shape)

    def fill(self, expert: int, value: torch.Tensor) -> None:
        self.tensor[expert].copy_(value)

    def _populate(self, expert: int) -> None:
        """Have the slot's pages at once: a fault for each costs more than filling them."""
        page = mmap.PAGESIZE
        start = expert * self._slot_bytes // page * page
        length = (expert + 1) * self._slot_bytes - start
        # Not by ``mmap.madvise``, which keeps the interpreter's lock. Kernels before 5.14 refuse, then every
        # page has its fault.
        address = self.tensor.data_ptr() + start
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)

    def pack(self, expert: int, weight: torch.Tensor, isa: str) -> None:
        """Lay a matrix out as the kernel reads it, right where the kernel will read it."""
        self._populate(expert)
        torch.ops._C.prepack_moe_weight(
            weight.unsqueeze(0).contiguous(), self.tensor[expert : expert + 1], isa
        )

    def release(self, expert: int) -> None:
        """Give the slot's whole pages back to the system."""
        page = mmap.PAGESIZE
        start = -(-expert * self._slot_bytes // page) * page
        end = (expert + 1) * self._slot_bytes // page * page
        if end > start:
            self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)


@dataclass(frozen=True)
class _LayerWeights:
    w13: Slots
    w2: Slots
    b13: Slots | None
    b2: Slots | None

    def present(self) -> list[Slots]:
        return [slots for slots in (self.w13, self.w2, self.b13, self.b2) if slots is not None]


class ResidentExperts:
    """The experts that this worker can run, and the call that runs them.

    Not thread-safe for the same expert; loading other experts while batches run is safe,
    because a slot is published (``resident``) only after its weights are complete.
    """

    def __init__(self, model: MoeModel, weights: ExpertWeights) -> None:
        self.model = model
        self._weights = weights
        self._isa = kernel_isa(model.dtype)
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
        layer = self._layers[expert.layer] or self._reserve(expert.layer, w13, w2, b13, b2)
        layer.w13.pack(expert.expert, w13, self._isa)
        layer.w2.pack(expert.expert, w2, self._isa)
        for slots, bias in ((layer.b13, b13), (layer.b2, b2)):
            if slots is not None and bias is not None:
                slots.fill(expert.expert, bias)
        self.resident[expert.layer, expert.expert] = True
        return sum(part.nbytes for part in (w13, w2, b13, b2) if part is not None)

    def unload(self, expert: ExpertId) -> None:
        """Forget an expert and give its memory back; the caller knows that no row for it can be under way."""
        self.resident[expert.layer, expert.expert] = False
        layer = self._layers[expert.layer]
        if layer is not None:
            for slots in layer.present():
                slots.release(expert.expert)

    def _reserve(
        self,
        position: int,
        w13: torch.Tensor,
        w2: torch.Tensor,
        b13: torch.Tensor | None,
        b2: torch.Tensor | None,
    ) -> _LayerWeights:
        experts = self.model.experts
        layer = _LayerWeights(
            w13=Slots(experts, w13),
            w2=Slots(experts, w2),
            b13=None if b13 is None else Slots(experts, b13),
            b2=None if b2 is None else Slots(experts, b2),
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
