"""Requests that began without checkpoints get theirs in the background, and are restored from them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from tests.cluster.test_attention_failover import FULL_CAPACITY_S, assert_same, counters
from tests.streams import kinds, read_all

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROTECTED_S = 60.0
TOKENS = 400
BODIES = {
    name: body
    for name, body in kinds("The lighthouse keeper", list(range(100, 300)), TOKENS).items()
    if name in ("greedy", "seeded", "three")
}


def until_protected_is(cluster: Cluster, wanted: bool) -> None:
    deadline_s = time.monotonic() + PROTECTED_S
    while cluster.status()["protected"] != wanted:
        assert time.monotonic() < deadline_s, cluster.status()["protected_reason"]
        time.sleep(0.05)


def test_what_ran_without_checkpoints_is_protected_again(cluster: Cluster, model_name: str) -> None:
    wanted = read_all(cluster.url, model_name, list(BODIES.values()))
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    cluster.admin.checkpointing("none")
    until_protected_is(cluster, False)
    seen: dict[str, Any] = {}
    tokens: dict[int, int] = {}
    begun, lock = threading.Event(), threading.Lock()

    def fault(stream: int, count: int) -> None:
        with lock:
            tokens[stream] = count
            if sum(tokens.values()) >= 60:
                begun.set()

    def protect_then_kill() -> None:
        begun.wait(PROTECTED_S)
        cluster.admin.checkpointing("segments")
        until_protected_is(cluster, True)
        seen["pid"] = cluster.pids()["aw-0"]
        seen["tokens"] = sum(tokens.values())
        seen["restored"] = counters(cluster, "restored_positions")
        cluster.kill("aw-0")

    killer = threading.Thread(target=protect_then_kill)
    killer.start()
    try:
        got = read_all(cluster.url, model_name, list(BODIES.values()), fault)
    finally:
        killer.join(PROTECTED_S)
        cluster.admin.checkpointing("segments")

    assert_same(BODIES, got, wanted)
    assert seen["tokens"] < sum(len(found) for reading in wanted for found in reading.tokens.values())
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    assert cluster.pids()["aw-0"] != seen["pid"], "the fault did not happen"
    assert counters(cluster, "restored_positions") > seen["restored"]
    assert counters(cluster, "restore_incomplete") == 0
