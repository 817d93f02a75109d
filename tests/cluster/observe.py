"""What a cluster says of itself, waited for.

What a kill does comes after its answer, and a worker reports once a second: one look may show what was
before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx
import requests

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
