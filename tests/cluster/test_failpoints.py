"""Deaths at named places, which a kill from outside would meet by chance only."""

from __future__ import annotations

import pytest
from tests.cluster.observe import events, replaced
from tests.cluster.test_attention_failover import FULL_CAPACITY_S, assert_same
from tests.pool import Clusters
from tests.streams import kinds, read_all
from tests.undisturbed import Undisturbed

from tarragon.admin import AdminError
from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

STUCK_MS = 2_000.0
"""Longer than any batch or step here takes; the tests would have to wait for the default of 10 s."""


@pytest.fixture
def armed(clusters: Clusters) -> Cluster:
    """A cluster whose workers may be told where to die."""
    return clusters.get(2, 2, failpoints=True)


@pytest.mark.parametrize(
    ("victim", "failpoint", "after"),
    [
        ("aw-0", "prefill", 2),
        ("aw-1", "mid-layer", 9),
        ("aw-0", "before-commit", 12),
        ("aw-1", "between-commit-and-send", 15),
        ("aw-0", "after-send", 15),
        ("ew-0", "before-batch", 150),
        ("ew-1", "between-compute-and-answer", 150),
    ],
)
def test_a_death_at_a_named_place_changes_no_stream(
    armed: Cluster, model_name: str, undisturbed: Undisturbed, victim: str, failpoint: str, after: int
) -> None:
    bodies, wanted = undisturbed.of_every_kind(armed, model_name)
    armed.wait_for("full_capacity", FULL_CAPACITY_S)
    pid = armed.pids()[victim]
    armed.admin.inject(victim, failpoint, after)

    got = read_all(armed.url, model_name, list(bodies.values()))

    assert_same(bodies, got, wanted)
    armed.wait_for("full_capacity", FULL_CAPACITY_S)
    assert armed.pids()[victim] != pid, "the fault did not happen"
    assert f"failpoint {failpoint} reached" in armed.logs()


@pytest.mark.parametrize(
    ("victim", "failpoint", "after"), [("ew-1", "before-batch", 100), ("aw-0", "mid-layer", 9)]
)
def test_a_wedged_thread_is_found_though_its_worker_answers_probes(
    clusters: Clusters, model_name: str, undisturbed: Undisturbed, victim: str, failpoint: str, after: int
) -> None:
    limits = {"expert_batch_ms_max": STUCK_MS, "attention_step_ms_max": STUCK_MS}
    cluster = clusters.get(2, 2, failpoints=True, **limits)
    bodies, wanted = undisturbed.of_every_kind(cluster, model_name)
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    cluster.admin.inject(victim, failpoint, after, "hang")

    got = read_all(cluster.url, model_name, list(bodies.values()))

    assert_same(bodies, got, wanted)
    replaced(cluster, pids, victim)
    assert f"failpoint {failpoint} reached" in cluster.logs()
    causes = events(cluster, victim, "dead")
    assert any("no progress" in cause for cause in causes), causes


LAST = 10
"""Tokens of a stream, of which each step brings one."""


def test_deaths_just_before_and_just_after_the_last_token_is_sent(
    armed: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    """The first worker keeps it to itself, with the finish reason; the second one is asked for it alone."""
    body = kinds("The lighthouse keeper", [], LAST)["logprobs"]
    wanted = undisturbed.readings(armed, model_name, [body])
    armed.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = armed.pids()
    said = len(armed.logs())
    armed.admin.inject("aw-0", "between-commit-and-send", LAST)  # of two that have nothing, it is taken
    armed.admin.inject("aw-1", "after-send")

    assert read_all(armed.url, model_name, [body]) == wanted

    replaced(armed, pids, "aw-0", "aw-1")
    assert "failpoint between-commit-and-send reached" in armed.logs()[said:]
    assert "failpoint after-send reached" in armed.logs()[said:]


def test_a_worker_that_dies_while_it_restores_anothers_requests(
    armed: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    """Then both attention workers are gone, and their replacements restore from both buckets."""
    bodies, wanted = undisturbed.of_every_kind(armed, model_name)
    armed.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = armed.pids()
    armed.admin.inject("aw-0", "restore")
    armed.admin.inject("aw-1", "between-commit-and-send", 15)

    got = read_all(armed.url, model_name, list(bodies.values()))

    assert_same(bodies, got, wanted)
    armed.wait_for("full_capacity", FULL_CAPACITY_S)
    after = armed.pids()
    assert all(after[worker] != pids[worker] for worker in ("aw-0", "aw-1")), "a fault did not happen"
    assert "failpoint restore reached" in armed.logs()


def test_what_is_refused(armed: Cluster, cluster: Cluster) -> None:
    with pytest.raises(AdminError, match="without --failpoints"):
        cluster.admin.inject("aw-0", "mid-layer")
    with pytest.raises(AdminError, match="aw-0 has no failpoint before-batch; it has prefill"):
        armed.admin.inject("aw-0", "before-batch")
    with pytest.raises(AdminError, match=r"orchestrator has no failpoint|no worker"):
        armed.admin.inject("orchestrator", "prefill")
    with pytest.raises(AdminError, match="does not fit"):
        armed.admin.inject("aw-0", "mid-layer", 0)
