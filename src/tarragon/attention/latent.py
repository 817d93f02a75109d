"""Latent attention (MLA, DeepSeek) whose rows do not depend on their batch (exactness).

vLLM's reference kernels look at one request at a time: prompts are computed whole. But the order in which
the decode kernel adds up depends on the number of threads, so such a worker runs with one (see ``worker``).
What depends on the batch are its projections: two batched matrix products around the decode kernel and the
one that unfolds the latent rows of a prompt round differently with the number of rows. Here all three run on
our linear.

One thing stays outside: a prompt's rows come from unfolded keys, a decoded token's from folded ones,
so that computing a decoded token again as part of a prompt changes its last bits.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention.mla_attention import split_kv_b_proj
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tarragon import native


class _Projection:
    """A packed weight [N, K] in place of a linear layer of vLLM, whose calls return (output, bias)."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.rows_out = weight.shape[0]
        self.packed = native.pack_linear(weight.contiguous())

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return native.linear(x, self.packed, None, self.rows_out), None


class LatentAttention(CPUMLAImpl):
    """vLLM's reference MLA with batch-invariant projections."""

    # vLLM then takes both products around the decode kernel from ``_w_uk_packed`` and ``_w_uv_packed``
    # through ``bmm_cpu``, and leaves the packing to us.
    uses_amx_bmm = True
    _w_scale = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Pack the products per head, and the projection that unfolds a prompt's latent rows."""
        module: Any = self.kv_b_proj  # type: ignore[has-type] # vLLM sets it
        # [L, heads, P] and [L, heads, V]: latent, per-head query and value sizes.
        unfold_keys, unfold_values = split_kv_b_proj(
            module, act_dtype, self.kv_lora_rank, self.num_heads, self.qk_nope_head_dim, self.v_head_dim
        )
        self._w_uk_packed = [_Projection(unfold_keys[:, head, :]) for head in range(self.num_heads)]
        self._w_uv_packed = [_Projection(unfold_values[:, head, :].T) for head in range(self.num_heads)]
        self.kv_b_proj = _Projection(module.weight.to(act_dtype))


def _products(out: torch.Tensor, rows: torch.Tensor, heads: list[_Projection], *_: Any) -> None:
    """``out[h] = rows[h] @ weight[h].T`` for every head; [heads, B, N] and [heads, B, K]."""
    for head, projection in enumerate(heads):
        out[head].copy_(projection(rows[head])[0])


class LatentBackend(CPUMLABackend):
    """vLLM's reference MLA backend with the implementation above."""

    @staticmethod
    def get_impl_cls() -> type[LatentAttention]:
        return LatentAttention


def install() -> None:
    """Make vLLM's CPU platform use this backend for latent attention (once per process).

    Not on CPUs with AMX: vLLM takes another one there, with blocks of another size.
    """
    register_backend(AttentionBackendEnum.CPU_MLA, f"{__name__}.LatentBackend")
    if not torch.cpu._is_amx_tile_supported():
        ops.bmm_cpu = _products
