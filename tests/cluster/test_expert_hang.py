"""Expert workers that hang, are cut off, leave, die in a row or last: streams go on, or fail clearly."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct

import httpx
import pytest
from tests.cluster.load import under_load
from tests.cluster.observe import events, fresh, is_gone, kinds_noted, noted, replaced, until, worker
from tests.pool import Clusters
from tests.undisturbed import Undisturbed
from tests.workload import Answer, ask, differing, mixed_requests

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

BODIES = mixed_requests(8, seed=11, vocabulary=40_000, long_tokens=300, output_tokens=72)
_PIDFD_GETFD = 438


@pytest.fixture
def cluster(clusters: Clusters) -> Cluster:
    """2 attention workers, and 3 expert workers so that two may be lost."""
    return clusters.get(2, 3)


@pytest.fixture
def wanted(cluster: Cluster, model_name: str, undisturbed: Undisturbed) -> list[Answer]:
    """What BODIES are answered when nothing happens."""
    return undisturbed.answers(cluster, model_name, BODIES)


def test_a_stopped_expert_worker_changes_no_stream_and_its_return_does_no_harm(
    cluster: Cluster, model_name: str, wanted: list[Answer]
) -> None:
    before = worker(cluster, "ew-1")
    with under_load(cluster, model_name, BODIES, "ew-1") as answers:
        cluster.kill("ew-1", "SIGSTOP")
        until("it was not replaced", lambda: worker(cluster, "ew-1")["epoch"] != before["epoch"], 10)
        # It wakes while the others go on with what it had: its epoch is stale, and nobody listens to it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(before["pid"]), signal.SIGCONT)
    assert differing(answers, wanted) == []
    assert any("unanswered" in cause for cause in events(cluster, "ew-1", "dead")), "no probe found it"
    cluster.wait_for("full_capacity", 120)
    until("the old process is still there", lambda: is_gone(int(before["pid"])), 15)
    assert differing(ask(cluster.url, model_name, BODIES, concurrency=8), wanted) == []


def cut(one_pid: int, other_pid: int) -> int:
    """Shut every socket that ``one`` accepted from ``other`` down, from outside; returns how many."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(one_pid)
    found = 0
    try:
        for name in os.listdir(f"/proc/{one_pid}/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/{one_pid}/fd/{name}").startswith("socket:"):
                    continue
                copy = libc.syscall(_PIDFD_GETFD, pidfd, int(name), 0)
                assert copy >= 0, os.strerror(ctypes.get_errno())
                with socket.socket(fileno=copy) as sock:
                    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                    if struct.unpack("3i", peer)[0] == other_pid:
                        sock.shutdown(socket.SHUT_RDWR)
                        found += 1
    finally:
        os.close(pidfd)
    return found


def test_a_cut_link_is_the_matter_of_its_two_ends(
    cluster: Cluster, model_name: str, wanted: list[Answer]
) -> None:
    cluster.wait_for("full_capacity", 120)
    before = {entry["id"]: (entry["pid"], entry["epoch"]) for entry in cluster.status()["workers"]}
    dead = events(cluster, "ew-2", "dead")
    lost = fresh(cluster, "aw-0")["aw-0"]["links_lost"]
    with under_load(cluster, model_name, BODIES, "ew-2") as answers:
        assert cut(before["ew-2"][0], before["aw-0"][0]) == 2, "the data link and the probes"
    assert differing(answers, wanted) == []
    until("no link was lost", lambda: worker(cluster, "aw-0")["counters"]["links_lost"] == lost + 1)
    # Both attention workers and the orchestrator: the two ends have found each other again.
    until("they stay apart", lambda: worker(cluster, "ew-2")["counters"]["probe_channels"] == 3)
    after = {entry["id"]: (entry["pid"], entry["epoch"]) for entry in cluster.status()["workers"]}
    assert (after, events(cluster, "ew-2", "dead")) == (before, dead)
    assert worker(cluster, "ew-2")["state"] == "healthy"


def test_two_expert_workers_killed_one_after_the_other_change_no_stream(
    cluster: Cluster, model_name: str, wanted: list[Answer]
) -> None:
    cluster.wait_for("full_capacity", 120)
    pids = cluster.pids()
    with under_load(cluster, model_name, BODIES, "ew-0") as answers:
        cluster.kill("ew-0")
        # Not earlier: for a moment after the death nothing is started.
        until("the first is not being replaced", lambda: is_loading(cluster, "ew-0", pids["ew-0"]))
        cluster.kill("ew-2")
        until("the second kill did nothing", lambda: worker(cluster, "ew-2")["state"] != "healthy")
        assert not answers, "the streams ended before the second kill"
    assert differing(answers, wanted) == []
    replaced(cluster, pids, "ew-0", "ew-2")
    last = [(event["worker_id"], event["kind"]) for event in noted(cluster)]
    second_death = len(last) - last[::-1].index(("ew-2", "dead"))
    assert ("ew-0", "start") not in last[second_death:], "the second one died before the replacement began"
    assert ("ew-0", "healthy") in last[second_death:], "the replacement was there before the second one died"


def is_loading(cluster: Cluster, worker_id: str, old_pid: int) -> bool:
    """Whether a replacement's process has begun, and is not ready."""
    found = worker(cluster, worker_id)
    return found["state"] == "starting" and found["pid"] not in (0, old_pid)


@pytest.mark.parametrize("victim", ["ew-0", "aw-1"])
def test_one_that_hangs_without_traffic_is_found_and_replaced(cluster: Cluster, victim: str) -> None:
    cluster.wait_for("full_capacity", 120)
    before = worker(cluster, victim)
    cluster.kill(victim, "SIGSTOP")
    until("nobody noticed", lambda: worker(cluster, victim)["epoch"] > before["epoch"], 10)
    until("the old process is still there", lambda: is_gone(int(before["pid"])), 15)


def test_an_expert_worker_that_is_drained_changes_no_stream_and_nothing_is_replayed(
    cluster: Cluster, model_name: str, wanted: list[Answer]
) -> None:
    cluster.wait_for("full_capacity", 120)
    before = fresh(cluster, "aw-0", "aw-1")
    epoch = worker(cluster, "ew-2")["epoch"]
    with under_load(cluster, model_name, BODIES * 2, "ew-2") as answers:
        cluster.drain("ew-2")
        until("it does not leave", lambda: all(w["id"] != "ew-2" for w in cluster.status()["workers"]))
        assert not answers, "the streams ended before it had left"
    assert differing(answers, wanted * 2) == []
    until("its process is not reaped", lambda: {"left", "exited"} <= kinds_noted(cluster, epoch))
    assert "dead" not in kinds_noted(cluster, epoch), "nobody is alarmed by what was asked for"
    after = fresh(cluster, "aw-0", "aw-1")
    replayed = {name: after[name]["replayed_pairs"] - before[name]["replayed_pairs"] for name in after}
    assert replayed == {"aw-0": 0, "aw-1": 0}


def test_the_only_expert_worker_dies_and_its_requests_wait_for_the_next(
    clusters: Clusters, model_name: str, undisturbed: Undisturbed
) -> None:
    """The last replica of every expert is gone: all are loaded anew, from cold, while the streams wait."""
    alone = clusters.get(2, 1)
    wanted = undisturbed.answers(alone, model_name, BODIES)
    pids = alone.pids()
    with under_load(alone, model_name, BODIES, "ew-0") as answers:
        alone.kill("ew-0")
        until("no other was started", lambda: worker(alone, "ew-0")["pid"] not in (0, pids["ew-0"]))
    assert differing(answers, wanted) == []
    after = replaced(alone, pids, "ew-0")
    assert {w["id"]: w["pid"] for w in after["workers"] if w["role"] == "attention"} == {
        name: pid for name, pid in pids.items() if name.startswith("aw-")
    }, "an attention worker died of it"


def test_the_last_replica_lost_is_a_503_after_the_limit_and_later_requests_are_served(
    clusters: Clusters, model_name: str, undisturbed: Undisturbed
) -> None:
    alone = clusters.get(1, 1, failpoints=True, expert_unreachable_timeout_s=0.05, link_retry_ms=100.0)
    wanted = undisturbed.answers(alone, model_name, BODIES[:4])
    pids = alone.pids()
    body = {"model": model_name, "prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True}
    alone.admin.inject("ew-0", "before-batch", 100)  # of about 1200: surely in the middle of the request

    def post(**changes: int) -> httpx.Response:
        return httpx.post(f"{alone.url}/v1/completions", json=body | changes, timeout=60)

    reply = post()
    assert reply.status_code == 503, reply.text
    assert "has no live host" in reply.text
    replaced(alone, pids, "ew-0")
    # Full capacity is what the orchestrator knows; with so short a limit the attention worker must know too,
    # and have its link.
    until(
        "aw-0 goes by an old table",
        lambda: worker(alone, "aw-0")["ert_version"] == alone.status()["ert_version"],
    )
    until("later requests are not served", lambda: post(max_tokens=1).status_code == 200)
    assert worker(alone, "aw-0")["pid"] == pids["aw-0"], "the attention worker died of it"
    assert differing(ask(alone.url, model_name, BODIES[:4], concurrency=4), wanted) == []
