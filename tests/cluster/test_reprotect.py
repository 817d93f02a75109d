"""Requests that began without checkpoints get theirs in the background, and are restored from them."""

from __future__ import annotations

import threading
import time

import pytest
from tests.cluster.observe import fresh, replaced
from tests.cluster.test_attention_failover import FULL_CAPACITY_S, Once, assert_same
from tests.streams import kinds, read_all
from tests.undisturbed import Undisturbed

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PROTECTED_S = 60.0
TOKENS = 150
BODIES = {
    name: body
    for name, body in kinds("The lighthouse keeper", list(range(100, 300)), TOKENS).items()
    if name in ("greedy", "three")
}


def until_protected_is(cluster: Cluster, wanted: bool) -> None:
    deadline_s = time.monotonic() + PROTECTED_S
    while cluster.status()["protected"] != wanted:
        assert time.monotonic() < deadline_s, cluster.status()["protected_reason"]
        time.sleep(0.05)


def test_what_ran_without_checkpoints_is_protected_again(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    wanted = undisturbed.readings(cluster, model_name, list(BODIES.values()))
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    before = fresh(cluster, "aw-1")["aw-1"]  # the survivor: what the victim has counted goes with it
    cluster.admin.checkpointing("none")
    until_protected_is(cluster, False)
    seen: dict[str, int] = {}
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
        seen["tokens"] = sum(tokens.values())
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
    replaced(cluster, pids, "aw-0")
    after = fresh(cluster, "aw-1")["aw-1"]
    assert after["restored_positions"] > before["restored_positions"]
    assert after["restore_incomplete"] == before["restore_incomplete"]


def test_nobody_goes_on_from_what_was_written_in_every_other_step(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    asked = dict.fromkeys(("one", "two"), BODIES["greedy"])
    wanted = undisturbed.readings(cluster, model_name, list(BODIES.values()))[:1] * 2
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    before = fresh(cluster, "aw-1")["aw-1"]
    cluster.admin.checkpointing("alternate", reprotect=False)
    try:
        until_protected_is(cluster, False)
        fault = Once(lambda: cluster.kill("aw-0"), TOKENS)
        got = read_all(cluster.url, model_name, list(asked.values()), fault)
        fault.join()
        after = fresh(cluster, "aw-1")["aw-1"]
    finally:
        cluster.admin.checkpointing("segments")
    assert_same(asked, got, wanted)
    assert after["compared_pairs"] > 0
    assert after["checkpoint_commits"] > before["checkpoint_commits"]
    assert after["restored_positions"] == before["restored_positions"]
    replaced(cluster, pids, "aw-0")
    until_protected_is(cluster, True)
