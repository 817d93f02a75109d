"""The death of an expert worker: streams go on, unchanged, and the worker is replaced."""

from __future__ import annotations

import threading
import time

import pytest
from tests.cluster.conftest import Clusters
from tests.workload import SMALL_LAYERS, Answer, ask, differing, mixed_requests

from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model
from tarragon.models.shape import read_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.mark.parametrize("victim", ["ew-0", "ew-1"])
def test_a_killed_expert_worker_changes_no_stream(cluster: Cluster, model_name: str, victim: str) -> None:
    bodies = mixed_requests(8, seed=5, vocabulary=40_000, long_tokens=300, output_tokens=96)
    undisturbed = ask(cluster.url, model_name, bodies, concurrency=8)
    cluster.wait_for("full_capacity", 120)
    before = _worker(cluster, victim)

    disturbed: list[Answer] = []
    reader = threading.Thread(
        target=lambda: disturbed.extend(ask(cluster.url, model_name, bodies, concurrency=8))
    )
    reader.start()
    _wait_until_it_works(cluster, victim)
    cluster.kill(victim)
    reader.join(timeout=180)

    assert not reader.is_alive()
    assert differing(disturbed, undisturbed) == []
    cluster.wait_for("full_capacity", 120)
    after = _worker(cluster, victim)
    assert (after["pid"], after["epoch"]) != (before["pid"], before["epoch"]), "the fault did not happen"
    replayed = sum(w["counters"].get("links_lost", 0) for w in cluster.status()["workers"] if "counters" in w)
    assert replayed >= 1, "no attention worker met the death"


def _worker(cluster: Cluster, worker_id: str) -> dict[str, object]:
    return next(worker for worker in cluster.status()["workers"] if worker["id"] == worker_id)


def _wait_until_it_works(cluster: Cluster, worker_id: str) -> None:
    """Until the victim is computing for the load: its counters move between two reports."""
    counters = _worker(cluster, worker_id)["counters"]
    deadline_s = time.monotonic() + 30
    while _worker(cluster, worker_id)["counters"] == counters:
        assert time.monotonic() < deadline_s, "the load never reached the victim"
        time.sleep(0.02)


def test_a_budget_that_covers_half_of_the_experts(clusters: Clusters, model_name: str) -> None:
    """Shadows for the most used; an uncovered expert is loaded by a survivor while its rows wait (5.3)."""
    shape = read_model(ensure_demo_model(layers=SMALL_LAYERS))
    primaries = shape.experts_total * shape.expert_bytes // 3
    tight = clusters.get(2, 3, expert_memory_bytes_max=int(1.55 * primaries))
    bodies = mixed_requests(8, seed=6, vocabulary=40_000, long_tokens=200, output_tokens=96)
    undisturbed = ask(tight.url, model_name, bodies, concurrency=8)
    experts = tight.wait_for("full_capacity", 120)["experts"]
    assert 0 < experts["with_shadow"] < experts["total"], experts
    before = _worker(tight, "ew-1")

    disturbed: list[Answer] = []
    reader = threading.Thread(
        target=lambda: disturbed.extend(ask(tight.url, model_name, bodies, concurrency=8))
    )
    reader.start()
    _wait_until_it_works(tight, "ew-1")
    tight.kill("ew-1")
    reader.join(timeout=180)

    assert not reader.is_alive()
    assert differing(disturbed, undisturbed) == []
    assert tight.wait_for("full_capacity", 120)["experts"]["unreachable"] == 0
    assert _worker(tight, "ew-1")["epoch"] != before["epoch"], "the fault did not happen"
