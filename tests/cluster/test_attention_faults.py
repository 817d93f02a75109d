"""Attention workers that die in hard places: a small cache, a damaged checkpoint, twice in a row."""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from tests.cluster.observe import POLL_S, fresh, metric, replaced, until, worker
from tests.cluster.test_attention_failover import FULL_CAPACITY_S, Once, assert_same
from tests.pool import Clusters
from tests.streams import Reading, kinds, read_all
from tests.undisturbed import Undisturbed
from tests.workload import mixed_requests

from tarragon.cluster import Cluster
from tarragon.config import CHECKPOINT_ROWS_SHARE

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
                bytes_hit = np.frombuffer(memory, dtype=np.uint8)[len(memory) // 2 :: 512]
                bytes_hit[bytes_hit != 0] ^= 1
                del bytes_hit  # memory with a view cannot be unmapped
            os.close(fd)
        cluster.kill("aw-0")

    fault = Once(damage_and_kill, 80)
    got = read_all(cluster.url, model_name, list(asked.values()), fault)
    fault.join()
    assert_same(asked, got, wanted)
    replaced(cluster, pids, "aw-0")
    assert fresh(cluster, "aw-1")["aw-1"]["restore_corrupt"] > before["restore_corrupt"]


CROWD = mixed_requests(18, seed=21, vocabulary=40_000, long_tokens=200, output_tokens=36)


def assert_nobody_notices_a_death(
    cluster: Cluster,
    model: str,
    asked: list[dict[str, Any]],
    wanted: list[Reading],
    victim: str,
    at: int,
) -> list[int]:
    """With a kill when they have brought so many tokens, requests get what they get where there is room.

    Returns the stream of every token, in the order in which they came.
    """
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    fault = Once(lambda: cluster.kill(victim), at)
    order: list[int] = []

    def on_token(stream: int, count: int) -> None:
        order.append(stream)
        fault(stream, count)

    got = read_all(cluster.url, model, asked, on_token)
    fault.join()
    assert_same([str(number) for number in range(len(asked))], got, wanted)
    replaced(cluster, pids, victim)
    return order


def one_waited(order: list[int]) -> bool:
    """Whether a stream began only after another one had ended."""
    begins = [order.index(stream) for stream in set(order)]
    ends = [len(order) - 1 - order[::-1].index(stream) for stream in set(order)]
    return max(begins) > min(ends)


CACHE_BLOCKS = 13
"""Of 32 tokens; one of them vLLM keeps for itself. CROWD needs 39 for its prompts and 57 in the end: more
than two workers have."""
CACHE_BYTES = CACHE_BLOCKS * 98_304
LITTLE_ROOM = ("--block-size=32", "--max-model-len=256")
LINGER_S = 2.0
"""How long a small store keeps the checkpoints of the dead."""
PREEMPTIONS = "vllm:num_preemptions_total"
RUNNING = "vllm:num_requests_running"
"""What the attention workers' own schedulers say, all added up."""


def test_preemption_under_a_small_cache(
    cluster: Cluster, clusters: Clusters, model_name: str, undisturbed: Undisturbed
) -> None:
    wanted = undisturbed.readings(cluster, model_name, CROWD)
    small = clusters.get(2, 2, *LITTLE_ROOM, kv_cache_bytes=CACHE_BYTES)
    before = metric(small.url, PREEMPTIONS)
    assert_nobody_notices_a_death(small, model_name, CROWD, wanted, "aw-0", at=250)
    assert metric(small.url, PREEMPTIONS) > before, "there was room for all"


def small_store(clusters: Clusters) -> Cluster:
    """A cluster whose caches are small because its store is: it has one bucket more than workers."""
    bytes_max = int(3 * CACHE_BYTES / CHECKPOINT_ROWS_SHARE) + 3
    return clusters.get(2, 2, *LITTLE_ROOM, checkpoint_bytes_max=bytes_max, bucket_linger_s=LINGER_S)


def test_a_small_store_makes_requests_wait_and_protects_what_runs(
    cluster: Cluster, clusters: Clusters, model_name: str, undisturbed: Undisturbed
) -> None:
    wanted = undisturbed.readings(cluster, model_name, CROWD)
    tight = small_store(clusters)
    assert tight.wait_for("protected", FULL_CAPACITY_S)["protected"]
    order = assert_nobody_notices_a_death(tight, model_name, CROWD, wanted, "aw-1", at=150)
    assert one_waited(order), "there was room for all"
    assert counters(tight, "aw-0")["restored_positions"] > 0, "what ran was not protected"
    assert tight.wait_for("protected", FULL_CAPACITY_S)["protected"], "the replacement found no room"


def counters(cluster: Cluster, worker_id: str) -> dict[str, float]:
    """As the worker has reported them last."""
    return dict(worker(cluster, worker_id)["counters"])


def test_failures_leave_no_descriptor_and_no_memory_behind(clusters: Clusters, model_name: str) -> None:
    small = small_store(clusters)  # it keeps what the dead have left for a moment only
    asked = list(bodies(16, EVEN).values())
    survivors = ("gateway", "orchestrator", "store", "aw-0", "ew-0")

    def lose_one_of_each_role() -> None:
        pids = small.pids()
        fault = Once(lambda: small.kill("aw-1"), 20)
        read_all(small.url, model_name, asked, fault)
        fault.join()
        replaced(small, pids, "aw-1")
        # Without traffic, so that the replacement's link meets the same moment each time.
        small.kill("ew-1")
        replaced(small, pids, "ew-1")
        read_all(small.url, model_name, asked)
        until("a dead worker's checkpoints stay", lambda: len(bucket_files(small)) == 2)

    lose_one_of_each_role()  # whatever is opened once is open after the first failure
    before = least_held(small, survivors)
    lose_one_of_each_role()
    deadline_s = time.monotonic() + 30
    while left := {what: n for what, n in held(small, survivors).items() if n > before[what]}:
        assert time.monotonic() < deadline_s, f"{left} where there was {before}"
        time.sleep(POLL_S)
    until("blocks stay in use", lambda: not holds_blocks(small))


def held(cluster: Cluster, worker_ids: Iterable[str]) -> dict[str, int]:
    """How many descriptors, and how many mappings of shared memory, these and the node agent have."""
    pids = cluster.pids() | {"agent": cluster.agent_pid}
    found = {}
    for name in ("agent", *worker_ids):
        process = Path(f"/proc/{pids[name]}")
        found[f"{name}: descriptors"] = len(list((process / "fd").iterdir()))
        found[f"{name}: shared memory"] = (process / "maps").read_text().count("/memfd:tarragon")
    return found


def least_held(cluster: Cluster, worker_ids: Iterable[str], looks: int = 10) -> dict[str, int]:
    """The same without what is open for a moment only, such as a connection that asks for the status."""
    found = []
    for _ in range(looks):
        found.append(held(cluster, worker_ids))
        time.sleep(POLL_S)
    return {what: min(look[what] for look in found) for what in found[0]}


def holds_blocks(cluster: Cluster) -> bool:
    """Whether a request holds a part of an attention worker's cache."""
    return metric(cluster.url, "vllm:kv_cache_usage_perc") > 0


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


RESTARTED = "tarragon_requests_restarted_total"
LEAVING = 4
"""Streams whose readers hang up: the gateway deals them out in turn."""


def test_clients_that_leave_in_mid_failover(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    asked = bodies()
    wanted = undisturbed.readings(cluster, model_name, list(asked.values()))
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    moved = metric(cluster.url, RESTARTED)
    begun, killed, over = threading.Event(), threading.Event(), threading.Event()

    async def leave() -> None:
        """Half of the readers hang up with the kill, the others once their streams are somewhere else."""
        async with aiohttp.ClientSession() as session:
            leaving = [await begin(session) for _ in range(LEAVING)]
            begun.set()
            await asyncio.to_thread(killed.wait, FULL_CAPACITY_S)
            for response in leaving[: LEAVING // 2]:
                response.close()
            await asyncio.to_thread(over.wait, FULL_CAPACITY_S)
            for response in leaving[LEAVING // 2 :]:
                response.close()

    async def begin(session: aiohttp.ClientSession) -> aiohttp.ClientResponse:
        body = {"model": model_name, "stream": True, **asked["seeded"], "max_tokens": 3_000}
        response = await session.post(f"{cluster.url}/v1/completions", json=body)
        async for line in response.content:
            if line.startswith(b"data: "):
                return response
        raise AssertionError("no token came")

    def kill() -> None:
        cluster.kill("aw-1")
        killed.set()
        until("nothing goes on elsewhere", lambda: metric(cluster.url, RESTARTED) > moved)
        over.set()

    readers = threading.Thread(target=lambda: asyncio.run(leave()), daemon=True)
    readers.start()
    assert begun.wait(FULL_CAPACITY_S)
    until("they do not run", lambda: metric(cluster.url, RUNNING) == LEAVING)
    for _ in range(2):  # what is reported first may have been done for others
        until_it_steps(cluster, "aw-1")
    fault = Once(kill, 40)
    got = read_all(cluster.url, model_name, list(asked.values()), fault)
    fault.join()
    readers.join()
    assert_same(asked, got, wanted)
    replaced(cluster, pids, "aw-1")
    until("the gateway has streams for nobody", lambda: counters(cluster, "gateway")["streams_live"] == 0, 30)
    until("a worker runs for nobody", lambda: metric(cluster.url, RUNNING) == 0, 30)
    until("blocks are held for nobody", lambda: not holds_blocks(cluster), 30)


def until_it_steps(cluster: Cluster, worker_id: str) -> None:
    """Wait until the attention worker reports steps of which nothing was known before."""
    known = counters(cluster, worker_id).get("steps", 0)
    until(f"{worker_id} runs nothing", lambda: counters(cluster, worker_id).get("steps", 0) > known)
