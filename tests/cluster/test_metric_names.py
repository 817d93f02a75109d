"""docs/metrics.md names what a cluster serves, no more and no less."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from tests.cluster.observe import metric
from tests.metric_names import documented, served
from tests.streams import read_all

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

FULL_CAPACITY_S = 120.0
POLL_S = 0.3


def names(cluster: Cluster) -> set[str]:
    return {
        name
        for url in (cluster.url, cluster.admin_url)
        for name in served(httpx.get(f"{url}/metrics", timeout=30).text)
    }


def test_documented_names_are_those_that_are_served(cluster: Cluster, model_name: str) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True}
    found: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(POLL_S):  # some are there only while tokens flow
            found.update(names(cluster))

    watching = threading.Thread(target=look)
    watching.start()
    try:
        read_all(cluster.url, model_name, [body] * 4)
        over.wait(1.5)
    finally:
        over.set()
        watching.join()
    assert found - documented() == set(), "docs/metrics.md lacks these"
    assert documented() - found == set(), "docs/metrics.md has these, but nothing serves them"


def test_failures_and_replacements_are_counted(cluster: Cluster) -> None:
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    lost = metric(cluster.admin_url, "tarragon_failovers_total", role="expert")
    deaths = metric(cluster.admin_url, "tarragon_worker_deaths_total", role="expert")
    came = metric(cluster.admin_url, "tarragon_provisioning_seconds_count", role="expert")
    cluster.kill("ew-1")
    while metric(cluster.admin_url, "tarragon_worker_deaths_total", role="expert") == deaths:
        time.sleep(POLL_S)
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    assert metric(cluster.admin_url, "tarragon_failovers_total", role="expert") == lost + 1
    assert metric(cluster.admin_url, "tarragon_provisioning_seconds_count", role="expert") == came + 1
    assert metric(cluster.admin_url, "tarragon_provisioning_seconds_sum", role="expert") > 0
    assert metric(cluster.admin_url, "tarragon_shadow_coverage_ratio") == 1.0
    assert metric(cluster.admin_url, "tarragon_unprotected_requests") == 0.0
