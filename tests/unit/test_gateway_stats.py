"""Which of vLLM's engines a worker's statistics count for."""

from __future__ import annotations

from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

from tarragon.gateway.stats import EngineSlots


def test_workers_have_the_engine_of_their_number() -> None:
    slots = EngineSlots(2)
    assert [slots.slot(name) for name in ("aw-0", "aw-1", "aw-2", "aw-13", "gateway")] == [0, 1, 0, 1, 0]


def test_a_worker_alone_is_reported_as_it_is() -> None:
    slots = EngineSlots(2)
    stats = SchedulerStats(num_running_reqs=3)
    assert slots.merged("aw-1", stats) is stats


def test_gauges_of_workers_that_share_an_engine_add_up_and_increments_do_not() -> None:
    slots = EngineSlots(1)
    slots.merged(
        "aw-0",
        SchedulerStats(num_running_reqs=3, kv_cache_usage=0.9, prefix_cache_stats=PrefixCacheStats(hits=7)),
    )
    both = slots.merged(
        "aw-1",
        SchedulerStats(
            num_running_reqs=2,
            num_waiting_reqs=1,
            kv_cache_usage=0.1,
            prefix_cache_stats=PrefixCacheStats(hits=5),
        ),
    )
    assert (both.num_running_reqs, both.num_waiting_reqs, both.kv_cache_usage) == (5, 1, 0.9)
    assert both.prefix_cache_stats.hits == 5


def test_gauges_of_a_lost_worker_vanish() -> None:
    slots = EngineSlots(1)
    slots.merged("aw-0", SchedulerStats(num_running_reqs=3, kv_cache_usage=0.9))
    slots.merged("aw-1", SchedulerStats(num_running_reqs=2, kv_cache_usage=0.1))
    left = slots.gone("aw-0")
    assert (left.num_running_reqs, left.kv_cache_usage) == (2, 0.1)
    none = slots.gone("aw-1")
    assert (none.num_running_reqs, none.kv_cache_usage) == (0, 0.0)
    assert slots.gone("aw-1").num_running_reqs == 0
