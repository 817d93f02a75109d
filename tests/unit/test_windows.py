"""What a cache group still holds of a request is asked of vLLM's own managers, and of no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    RSWAManager,
    SlidingWindowManager,
)

from tarragon.attention.windows import are_known, first_held

BLOCK_TOKENS = 16


def scheduler(*kinds: type) -> Any:
    """vLLM's, as far as it is asked: managers of these kinds, with a window of 40 where they have one."""
    managers = []
    for kind in kinds:
        manager = object.__new__(kind)
        manager.block_size, manager.sliding_window, manager.extra_retained_tokens = BLOCK_TOKENS, 40, 0
        managers.append(manager)
    coordinator = SimpleNamespace(single_type_managers=tuple(managers))
    return SimpleNamespace(kv_cache_manager=SimpleNamespace(coordinator=coordinator))


@pytest.mark.parametrize(("positions", "first"), [(0, 0), (39, 0), (54, 0), (55, 16), (70, 16), (71, 32)])
def test_a_window_gives_whole_blocks_back_and_full_attention_none(positions: int, first: int) -> None:
    """The next position attends to 40 with itself: after 55, to those from 16 on."""
    assert first_held(scheduler(SlidingWindowManager, FullAttentionManager))(positions) == (first, 0)


def test_managers_that_may_give_back_more_than_they_say_are_not_trusted() -> None:
    assert are_known(scheduler(FullAttentionManager, SlidingWindowManager))
    assert not are_known(scheduler(FullAttentionManager, RSWAManager))
