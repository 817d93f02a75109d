"""From which position on does each cache group still hold a request's rows? As vLLM's managers count it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    SlidingWindowManager,
)

FirstHeld = Callable[[int], tuple[int, ...]]
"""Positions that are computed -> per cache group, the first one whose block has not been given back."""

_KNOWN: Final = {FullAttentionManager, SlidingWindowManager, ChunkedLocalAttentionManager}
"""Not those derived from them: they may give back what they do not say."""


def are_known(scheduler: Any) -> bool:
    """Whether ``first_held`` is true of all cache groups of vLLM's scheduler."""
    return all(type(manager) in _KNOWN for manager in _managers(scheduler))


def first_held(scheduler: Any) -> FirstHeld:
    """For vLLM's scheduler. Groups with a sliding window give whole blocks back, the others hold all."""
    managers = _managers(scheduler)

    def after(positions: int) -> tuple[int, ...]:
        return tuple(
            manager.get_num_skipped_tokens(positions) // manager.block_size * manager.block_size
            for manager in managers
        )

    return after


def _managers(scheduler: Any) -> tuple[Any, ...]:
    return tuple(scheduler.kv_cache_manager.coordinator.single_type_managers)
