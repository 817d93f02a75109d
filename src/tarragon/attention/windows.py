"""From which position on does each cache group still hold a request's rows? As vLLM's managers count it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FirstHeld = Callable[[int], tuple[int, ...]]
"""Positions that are computed -> per cache group, the first one whose block has not been given back."""


def first_held(scheduler: Any) -> FirstHeld:
    """For vLLM's scheduler. Groups with a sliding window give whole blocks back, the others hold all."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers

    def of(positions: int) -> tuple[int, ...]:
        return tuple(
            manager.get_num_skipped_tokens(positions) // manager.block_size * manager.block_size
            for manager in managers
        )

    return of
