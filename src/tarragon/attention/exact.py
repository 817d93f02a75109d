"""Batch-invariant kernels for the attention worker: the promise of exactness.

A token's row must not depend on who else is in the batch. On CPUs with AMX
tiles vLLM's packed linear is invariant from five rows on; everywhere else
our own linear is, by construction (one fixed order of float32 sums per output).
Attention is invariant once its split over the key length is off
(``VLLM_CPU_ATTN_SPLIT_KV=0``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tarragon import native

_AMX_ROWS_MIN = 8
"""vLLM's AMX linear takes another path at 1 to 4 rows; padded to 8 every row count takes the same."""

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def install() -> None:
    """Route every unquantised linear of vLLM's CPU backend through an invariant kernel (once per process)."""
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    for module in (utils, linear, vocab_parallel_embedding):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = choose_linear


def inexact_reason(model_config: Any) -> str:
    """Why a row may depend on its batch, or "" where it cannot. Said in status, never assumed.

    Args:
        model_config: vLLM's ModelConfig.
    """
    from vllm import envs

    if envs.VLLM_CPU_ATTN_SPLIT_KV:
        return "VLLM_CPU_ATTN_SPLIT_KV is on: attention splits the key length by the batch's shape"
    if model_config.use_mla and torch.cpu._is_amx_tile_supported():
        return "latent attention (MLA): the engine's AMX kernel for it is not batch-invariant"
    if not model_config.enforce_eager:
        return "the engine is compiled (--no-enforce-eager): what that generates is not proved invariant"
    return ""


def choose_linear(layer: Any, remove_weight: bool) -> None:
    """Give ``layer`` its ``cpu_linear``: the signature of vLLM's ``dispatch_cpu_unquantized_gemm``."""
    weight = layer.weight
    if weight.is_meta or weight.ndim != 2:
        layer.cpu_linear = F.linear
        return
    rows_out, _ = weight.shape
    layer.cpu_linear = _amx_linear(weight, rows_out) if _amx_usable(weight) else _own_linear(weight, rows_out)
    if remove_weight:
        layer.weight = torch.nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)


def _own_linear(weight: torch.Tensor, rows_out: int) -> Linear:
    packed = native.pack_linear(weight.detach())

    def linear(x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return native.linear(x, packed, bias, rows_out)

    return linear


def _amx_usable(weight: torch.Tensor) -> bool:
    rows_out, columns = weight.shape
    return (
        torch.cpu._is_amx_tile_supported()
        and weight.dtype == torch.bfloat16
        and columns % 32 == 0
        and rows_out % 16 == 0
    )


def _amx_linear(weight: torch.Tensor, rows_out: int) -> Linear:
    packed = torch.ops._C.convert_weight_packed(weight.detach())

    def linear(x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rows = flat.shape[0]
        if rows < _AMX_ROWS_MIN:
            flat = F.pad(flat, (0, 0, 0, _AMX_ROWS_MIN - rows))
        bias32 = None if bias is None else bias.float()
        out = torch.ops._C.weight_packed_linear(flat.contiguous(), packed, bias32, True)
        return out[:rows].reshape(*x.shape[:-1], rows_out)

    return linear
