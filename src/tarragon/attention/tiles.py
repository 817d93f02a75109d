"""Attention whose arithmetic does not depend on how a prompt is cut into chunks (exactness).

vLLM's CPU kernel walks the keys in tiles whose size it derives from the number
of queries that one work item holds; a prompt's rows then differ, in the last
bits, with the chunk they came in. Here every work item holds at most as many
queries as fit the kernel's registers at once: for all those sizes the kernel
uses one and the same key tile, which starts at key 0. Keys beyond a query's
own position are masked, and add exact zeros.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tarragon.attention.capture import CapturingImpl

_QUERY_HEADS_PER_ITERATION = 8
"""Query heads that the kernel's vector path holds in registers; its other paths hold a multiple."""


def queries_per_item(heads: int, kv_heads: int, windowed: bool) -> int:
    """Most queries of one request that one work item may hold.

    The kernel lets the query heads of one key head share an iteration if their number
    divides its capacity, and takes every head for itself otherwise. With a sliding window
    the tiles start at the window of an item's first query, so an item holds one query only.
    """
    if windowed:
        return 1
    group = heads // kv_heads
    return (
        _QUERY_HEADS_PER_ITERATION // group
        if _QUERY_HEADS_PER_ITERATION % group == 0
        else (_QUERY_HEADS_PER_ITERATION)
    )


def split_queries(
    query_start: torch.Tensor, seq_lens: torch.Tensor, item: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut every request's queries into items of at most ``item``.

    Args:
        query_start: int32 [R + 1], prefix sums of queries per request.
        seq_lens: int32 [R], keys per request, its queries being the last of them.

    Returns:
        (query_start int32 [I + 1], seq_lens int32 [I], request int64 [I]) of the items, in order.
    """
    counts = query_start[1:] - query_start[:-1]
    items = (counts + item - 1) // item
    request = torch.repeat_interleave(torch.arange(len(counts)), items.long())
    first_item = torch.cumsum(items, 0) - items
    offset = (torch.arange(len(request)) - first_item[request]) * item
    starts = query_start[:-1][request] + offset
    length = torch.minimum(counts[request] - offset, torch.tensor(item))
    keys = seq_lens[request] - counts[request] + offset + length
    ends = query_start[-1:]
    return torch.cat([starts, ends]).to(torch.int32), keys.to(torch.int32), request


class TiledMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's metadata for the CPU kernel, with long runs of queries cut into items."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        windowed = self.window_size != -1 or getattr(self.kv_cache_spec, "sliding_window", None) is not None
        self._item = queries_per_item(self.num_heads, self.num_kv_heads, windowed)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        common = common_attn_metadata
        if common.max_query_len > self._item and common.causal is True:
            requests = common.num_reqs
            query_start, keys, request = split_queries(
                common.query_start_loc[: requests + 1], common.seq_lens[:requests], self._item
            )
            common = dataclasses.replace(
                common,
                num_reqs=len(request),
                query_start_loc=query_start,
                query_start_loc_cpu=query_start,
                seq_lens=keys,
                max_query_len=self._item,
                block_table_tensor=common.block_table_tensor[request].contiguous(),
            )
        return super().build(common_prefix_len, common, fast_build)


class TiledAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU attention with chunk-invariant work items, whose cache updates are noted."""

    @staticmethod
    def get_impl_cls() -> type[CapturingImpl]:
        return CapturingImpl

    @staticmethod
    def get_builder_cls() -> type[TiledMetadataBuilder]:
        return TiledMetadataBuilder


def install() -> None:
    """Make vLLM's CPU platform use this backend (once per process)."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.TiledAttentionBackend")
