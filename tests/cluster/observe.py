"""What a cluster says of itself, waited for.

What a kill does comes after its answer, and a worker reports once a second: one look may show what was
before.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import requests
from prometheus_client.parser import text_string_to_metric_families

from tarragon.admin import AdminError
from tarragon.cluster import Cluster

POLL_S = 0.05
REPLACED_S = 120.0
REPORTED_S = 60.0


def replaced(cluster: Cluster, pids: Mapping[str, int], *victims: str) -> dict[str, Any]:
    """Wait until the victims are other processes than in ``pids`` and nothing is missing; the status.

    Full capacity alone, right after a kill, may be that of before it.
    """
    deadline_s = time.monotonic() + REPLACED_S
    while True:
        status = cluster.wait_for("full_capacity", REPLACED_S)
        now = {worker["id"]: worker["pid"] for worker in status["workers"]}
        if all(now.get(victim) != pids[victim] for victim in victims):
            return status
        assert time.monotonic() < deadline_s, f"the fault did not happen: {victims} of {now}"
        time.sleep(POLL_S)


def until(what: str, holds: Callable[[], bool], timeout_s: float = REPORTED_S) -> None:
    """Wait until ``holds``; who cannot be asked has not. AssertionError with ``what`` after that time."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        with suppress(AdminError, httpx.HTTPError, requests.RequestException):
            if holds():
                return
        assert time.monotonic() < deadline_s, what
        time.sleep(POLL_S)


def is_open(cluster: Cluster) -> bool:
    """Whether the gateway takes requests."""
    try:
        return httpx.get(f"{cluster.url}/health", timeout=REPORTED_S).status_code == 200
    except httpx.HTTPError:
        return False


def fresh(cluster: Cluster, *worker_ids: str) -> dict[str, dict[str, float]]:
    """What these workers have counted until now, by their second report from here: the first may be older.

    Reports are told apart by what they say: even an idle worker counts the orchestrator's probes. (The
    ``clock_s`` of an idle attention worker stands still.)
    """
    seen: dict[str, list[dict[str, float]]] = {worker_id: [] for worker_id in worker_ids}
    deadline_s = time.monotonic() + REPORTED_S
    while any(len(reports) < 3 for reports in seen.values()):
        assert time.monotonic() < deadline_s, f"no reports: {seen}"
        for worker in cluster.status()["workers"]:
            reports = seen.get(worker["id"])
            if reports is not None and worker["counters"] not in reports[-1:]:
                reports.append(worker["counters"])
        time.sleep(POLL_S)
    return {worker_id: reports[-1] for worker_id, reports in seen.items()}


def worker(cluster: Cluster, worker_id: str) -> dict[str, Any]:
    """What the status says of this worker now."""
    return next(entry for entry in cluster.status()["workers"] if entry["id"] == worker_id)


def noted(cluster: Cluster) -> list[dict[str, Any]]:
    """What the orchestrator has noted, oldest first."""
    reply = httpx.get(f"{cluster.admin_url}/events", params={"limit": 1_000}, timeout=REPORTED_S)
    return list(reply.json()["events"])


def kinds_noted(cluster: Cluster, epoch: int) -> set[str]:
    """What kinds of events the orchestrator has noted of one incarnation."""
    return {event["kind"] for event in noted(cluster) if event["epoch"] == epoch}


def events(cluster: Cluster, worker_id: str, kind: str) -> list[str]:
    """The texts of one kind about one worker."""
    return [e["text"] for e in noted(cluster) if (e["worker_id"], e["kind"]) == (worker_id, kind)]


def metric(url: str, sample_name: str, **labels: str) -> float:
    """Sum of the samples of that name that have these labels, on /metrics of the listener at ``url``."""
    reply = httpx.get(f"{url}/metrics", timeout=REPORTED_S)
    reply.raise_for_status()
    return sum(
        sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
        if sample.name == sample_name and labels.items() <= sample.labels.items()
    )


def is_gone(pid: int) -> bool:
    """Whether there is no such process any more; one that has ended is there until it is reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process hangs during the block, and wakes after it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # who found that it hangs may have ended it
            os.kill(pid, signal.SIGCONT)
