"""Memory for the shadows of half of the experts: the rest is loaded by survivors while rows wait (5.3)."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from tests.cluster.load import under_load
from tests.cluster.observe import is_gone, kinds_noted, replaced, until, worker
from tests.pool import Clusters
from tests.undisturbed import Undisturbed
from tests.workload import SMALL_LAYERS, Answer, differing, mixed_requests

from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model
from tarragon.models.shape import read_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

EXPERT_WORKERS = 3
BODIES = mixed_requests(8, seed=11, vocabulary=40_000, long_tokens=300, output_tokens=72)


@pytest.fixture(params=["own", "shared"])
def tight(clusters: Clusters, request: pytest.FixtureRequest) -> Cluster:
    """Each expert worker has room for its primaries and for half as many shadows.

    A cold load reads and packs an expert into its own memory, or maps pages of the host's.
    """
    shape = read_model(ensure_demo_model(layers=SMALL_LAYERS))
    primaries_bytes = shape.experts_total * shape.expert_bytes // EXPERT_WORKERS
    cluster = clusters.get(
        2,
        EXPERT_WORKERS,
        expert_memory_bytes_max=int(1.55 * primaries_bytes),
        share_expert_memory=request.param == "shared",
    )
    experts = cluster.wait_for("full_capacity", 120)["experts"]
    assert 0.4 * experts["total"] < experts["with_shadow"] < 0.6 * experts["total"], experts
    return cluster


@pytest.fixture
def wanted(tight: Cluster, model_name: str, undisturbed: Undisturbed) -> list[Answer]:
    """What BODIES are answered when nothing happens."""
    return undisturbed.answers(tight, model_name, BODIES)


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_one_is_lost(tight: Cluster, model_name: str, wanted: list[Answer], fault: str) -> None:
    pids = tight.pids()
    epoch = worker(tight, "ew-1")["epoch"]
    with under_load(tight, model_name, BODIES, "ew-1") as answers:
        tight.kill("ew-1", fault)
        until("nobody noticed", lambda: "dead" in kinds_noted(tight, epoch))
        assert not answers, "the streams ended before"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids["ew-1"], signal.SIGCONT)  # a late return does no harm
    assert differing(answers, wanted) == []
    assert replaced(tight, pids, "ew-1")["experts"]["unreachable"] == 0
    until("the old process is still there", lambda: is_gone(pids["ew-1"]), 15)


def test_two_are_lost_and_the_survivor_has_no_room_for_all(
    tight: Cluster, model_name: str, wanted: list[Answer]
) -> None:
    """Some experts are nowhere until the first replacement has them: their rows wait, no request fails."""
    pids = tight.pids()
    with under_load(tight, model_name, BODIES, "ew-0") as answers:
        tight.kill("ew-0")
        tight.kill("ew-2")
        until("the survivor had room for all", lambda: tight.status()["experts"]["unreachable"] > 0)
        assert not answers, "the streams ended before"
    assert differing(answers, wanted) == []
    assert replaced(tight, pids, "ew-0", "ew-2")["experts"]["unreachable"] == 0
