"""The death of an expert worker: streams go on, unchanged, and the worker is replaced."""

from __future__ import annotations

import os

import pytest
from tests.cluster.load import under_load
from tests.cluster.observe import fresh, replaced, until
from tests.pool import Clusters, resize
from tests.undisturbed import Undisturbed
from tests.workload import ask, differing, mixed_requests

from tarragon.cluster import Cluster
from tarragon.config import Config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.mark.parametrize("victim", ["ew-0", "ew-1"])
def test_a_killed_expert_worker_changes_no_stream(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed, victim: str
) -> None:
    bodies = mixed_requests(8, seed=5, vocabulary=40_000, long_tokens=300, output_tokens=64)
    wanted = undisturbed.answers(cluster, model_name, bodies)
    cluster.wait_for("full_capacity", 120)
    pids = cluster.pids()
    before = fresh(cluster, "aw-0", "aw-1")

    with under_load(cluster, model_name, bodies, victim) as disturbed:
        cluster.kill(victim)
    assert differing(disturbed, wanted) == []
    replaced(cluster, pids, victim)
    after = fresh(cluster, "aw-0", "aw-1")
    met = [worker for worker, found in after.items() if found["links_lost"] > before[worker]["links_lost"]]
    assert met, "no attention worker met the death"


def test_those_left_take_over_the_cores_of_one_that_left(clusters: Clusters, model_name: str) -> None:
    cluster = clusters.get(2, 2)
    pids = cluster.pids()
    cluster.kill("ew-0")
    pid = {w["id"]: w["pid"] for w in replaced(cluster, pids, "ew-0")["workers"]}["ew-0"]
    [body] = mixed_requests(1, seed=9, vocabulary=40_000, long_tokens=300, output_tokens=4)
    shared, alone = (Config().threads("expert", len(os.sched_getaffinity(0)), count) for count in (2, 1))

    def threads() -> int:
        """Of the process, after enough rows for all of them."""
        ask(cluster.url, model_name, [body], concurrency=1)
        return len(os.listdir(f"/proc/{pid}/task"))

    before = threads()
    resize(cluster, {"expert": 1})
    assert list_of(cluster, "expert") == ["ew-0"]
    until(f"not {alone - shared} threads more than {before}", lambda: threads() == before + alone - shared)


def list_of(cluster: Cluster, role: str) -> list[str]:
    return [worker["id"] for worker in cluster.status()["workers"] if worker["role"] == role]
