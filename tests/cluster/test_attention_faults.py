"""Attention workers that die in hard places: a small cache, a damaged checkpoint, twice in a row."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.cluster.observe import fresh, replaced
from tests.cluster.test_attention_failover import FULL_CAPACITY_S, Once, assert_same
from tests.pool import Clusters
from tests.streams import Reading, kinds, read_all
from tests.undisturbed import Undisturbed
from tests.workload import mixed_requests

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SEED_PREFIX = list(range(100, 500))


KINDS = ("greedy", "seeded", "penalties", "three, shared prefix", "schema", "logprobs")
EVEN = ("greedy", "seeded", "penalties", "three", "logprobs")
"""Of one weight, so that both workers have some all the time."""


def bodies(tokens: int = 48, chosen: tuple[str, ...] = KINDS) -> dict[str, dict[str, Any]]:
    every = kinds("The captain looked at the map and", SEED_PREFIX, tokens)
    return {name: every[name] for name in chosen}


def bucket_files(cluster: Cluster) -> list[Path]:
    """The store's descriptors of buckets, as the system shows them."""
    folder = Path(f"/proc/{cluster.pids()['store']}/fd")
    return [entry for entry in folder.iterdir() if "tarragon-bucket" in os.readlink(entry)]


def test_a_damaged_checkpoint_is_found_and_computed_anew(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    asked = bodies(120, EVEN)
    wanted = undisturbed.readings(cluster, model_name, list(asked.values()))
    cluster.wait_for("protected", FULL_CAPACITY_S)
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    before = fresh(cluster, "aw-1")["aw-1"]  # the survivor, who reads what was damaged

    def damage_and_kill() -> None:
        for file in bucket_files(cluster):
            fd = os.open(file, os.O_RDWR)
            with mmap.mmap(fd, os.fstat(fd).st_size) as memory:
                # Every written row of the last layers is hit; what was never written stays empty.
                for at in range(len(memory) - 512, len(memory) // 2, -512):
                    if memory[at]:
                        memory[at] ^= 1
            os.close(fd)
        cluster.kill("aw-0")

    fault = Once(damage_and_kill, 80)
    got = read_all(cluster.url, model_name, list(asked.values()), fault)
    fault.join()
    assert_same(asked, got, wanted)
    replaced(cluster, pids, "aw-0")
    assert fresh(cluster, "aw-1")["aw-1"]["restore_corrupt"] > before["restore_corrupt"]


CROWD = mixed_requests(12, seed=21, vocabulary=40_000, long_tokens=200, output_tokens=36)


def assert_nobody_notices_a_death(
    cluster: Cluster,
    model: str,
    asked: list[dict[str, Any]],
    wanted: list[Reading],
    victim: str,
    at: int,
) -> None:
    """With a kill when they have brought so many tokens, requests get what they get where there is room."""
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    fault = Once(lambda: cluster.kill(victim), at)
    got = read_all(cluster.url, model, asked, fault)
    fault.join()
    assert_same([str(number) for number in range(len(asked))], got, wanted)
    replaced(cluster, pids, victim)


LITTLE_ROOM = ("--block-size=32", "--max-model-len=1024")


def test_preemption_under_a_small_cache(
    cluster: Cluster, clusters: Clusters, model_name: str, undisturbed: Undisturbed
) -> None:
    wanted = undisturbed.readings(cluster, model_name, CROWD)
    small = clusters.get(2, 2, *LITTLE_ROOM, kv_cache_bytes=4 << 20)
    assert_nobody_notices_a_death(small, model_name, CROWD, wanted, "aw-0", at=200)


def test_a_small_store_makes_requests_wait_and_protects_what_runs(
    cluster: Cluster, clusters: Clusters, model_name: str, undisturbed: Undisturbed
) -> None:
    wanted = undisturbed.readings(cluster, model_name, CROWD)
    tight = clusters.get(2, 2, *LITTLE_ROOM, checkpoint_bytes_max=24 << 20)
    assert tight.wait_for("protected", FULL_CAPACITY_S)["protected"]
    assert_nobody_notices_a_death(tight, model_name, CROWD, wanted, "aw-1", at=150)
    assert tight.wait_for("protected", FULL_CAPACITY_S)["protected"], "the replacement found no room"


def test_a_second_attention_worker_dies_while_the_first_ones_requests_are_restored(
    clusters: Clusters, model_name: str, undisturbed: Undisturbed
) -> None:
    three = clusters.get(3, 2)
    asked = bodies()
    wanted = undisturbed.readings(three, model_name, list(asked.values()))
    three.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = three.pids()

    def one_then_another() -> None:
        three.kill("aw-0")
        time.sleep(0.03)
        three.kill("aw-1")

    fault = Once(one_then_another, 100)
    got = read_all(three.url, model_name, list(asked.values()), fault)
    fault.join()
    assert_same(asked, got, wanted)
    replaced(three, pids, "aw-0", "aw-1")


def test_a_client_that_leaves_in_mid_failover(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    asked = bodies()
    wanted = undisturbed.readings(cluster, model_name, list(asked.values()))
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()

    async def leave(body: dict[str, Any]) -> None:
        """Read some tokens, see the fault, hang up."""
        async with aiohttp.ClientSession() as session:
            request = {"model": model_name, "stream": True, **body, "max_tokens": 400}
            async with session.post(f"{cluster.url}/v1/completions", json=request) as response:
                for _ in range(40):
                    await response.content.readline()
                await asyncio.to_thread(cluster.kill, "aw-1")
                await asyncio.sleep(0.02)

    leaving = threading.Thread(target=lambda: asyncio.run(leave(asked["seeded"])))
    leaving.start()
    got = read_all(cluster.url, model_name, list(asked.values()))
    leaving.join()
    assert_same(asked, got, wanted)
    replaced(cluster, pids, "aw-1")
    deadline_s = time.monotonic() + 30
    while running := _running(cluster):
        assert time.monotonic() < deadline_s, f"{running} requests run for nobody"
        time.sleep(0.2)


def _running(cluster: Cluster) -> float:
    gateway = next(w for w in cluster.status()["workers"] if w["role"] == "gateway")
    return float(gateway["counters"]["streams_live"])


def test_failures_leave_no_descriptor_and_no_memory_behind(cluster: Cluster, model_name: str) -> None:
    def held() -> dict[str, int]:
        pids = {
            name: pid for name, pid in cluster.pids().items() if name in ("gateway", "orchestrator", "store")
        }
        pids["agent"] = cluster.agent_pid
        return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()}

    def lose(victim: str) -> None:
        pids = cluster.pids()
        cluster.kill(victim)
        replaced(cluster, pids, victim)

    asked = bodies(16)
    read_all(cluster.url, model_name, list(asked.values()))
    for victim in ("aw-0", "ew-0"):  # whatever is opened once is open after the first failure
        lose(victim)
    before = held()
    for victim in ("aw-1", "ew-1", "aw-0"):
        lose(victim)
        read_all(cluster.url, model_name, list(asked.values()))
    # A dead worker's bucket lingers for those who restore from it: one descriptor in agent and store each.
    allowance = {"agent": 3, "store": 3, "gateway": 2, "orchestrator": 2}
    deadline_s = time.monotonic() + 30
    while any((after := held())[name] > before[name] + allowance[name] for name in before):
        assert time.monotonic() < deadline_s, json.dumps([before, after])
        time.sleep(0.2)
