"""A request of each kind, alone: its worker is killed in the middle of it, and it went on on another.

Among others (test_attention_failover.py), chance says whose worker dies.
"""

from __future__ import annotations

from functools import partial

import httpx
import pytest
from tests.cluster.observe import REPORTED_S, metric, replaced
from tests.cluster.test_attention_failover import FULL_CAPACITY_S, STALLS, Once, assert_same
from tests.pool import Clusters
from tests.streams import kinds, read_all, streamed_tokens
from tests.undisturbed import Undisturbed

from tarragon.bench.owners import ENGINE_ARGS, PATH
from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

ATTEMPTS = 5
"""On a busy machine an answer of a second may end before the kill."""
KINDS = [*kinds("", []), "stop string, greedy", "stop string, seeded"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_goes_on_elsewhere(
    clusters: Clusters, model_name: str, undisturbed: Undisturbed, kind: str
) -> None:
    cluster = clusters.get(2, 2, *ENGINE_ARGS)
    bodies, readings = undisturbed.of_every_kind(cluster, model_name)
    assert sorted(bodies) == sorted(KINDS)
    # An answer that comes whole tells nobody how far it is: a stream as long as it does.
    names = [kind] if bodies[kind].get("stream", True) else [kind, "seeded"]
    asked = [bodies[name] for name in names]
    wanted = [readings[list(bodies).index(name)] for name in names]
    for _ in range(ATTEMPTS):
        cluster.wait_for("full_capacity", FULL_CAPACITY_S)
        pids, stalls = cluster.pids(), metric(cluster.url, STALLS)
        killed: set[str] = set()
        fault = Once(partial(kill_owners, cluster, killed), max(1, streamed_tokens(asked, wanted) // 3))
        got = read_all(cluster.url, model_name, asked, fault)
        fault.join()
        assert_same(names, got, wanted)
        if killed:
            replaced(cluster, pids, *killed)
        if metric(cluster.url, STALLS) >= stalls + sum(len(reading.texts) for reading in wanted):
            return
    pytest.fail(f"in {ATTEMPTS} attempts it has never moved")


def kill_owners(cluster: Cluster, killed: set[str]) -> None:
    """Kill whoever holds a request now; ``killed`` gets their ids."""
    owners = httpx.get(f"{cluster.url}{PATH}", timeout=REPORTED_S).raise_for_status().json()
    for worker_id in sorted(set(owners.values()) - {""}):
        cluster.kill(worker_id)
        killed.add(worker_id)
