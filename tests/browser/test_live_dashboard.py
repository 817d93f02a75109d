"""A real cluster in a real browser: a worker is killed in the page, and the page shows it die and return."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect
from tests.workload import Answer, ask, differing, mixed_requests

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
BACK_MS = 60_000


def test_a_worker_killed_in_the_page_dies_and_returns(page: Page, cluster: Cluster, model_name: str) -> None:
    bodies = mixed_requests(4, seed=3, vocabulary=40_000, long_tokens=100, output_tokens=250)
    # A thread, because the browser's driver has an event loop in this one.
    with ThreadPoolExecutor(1) as pool:

        def answers() -> Future[list[Answer]]:
            return pool.submit(ask, cluster.url, model_name, bodies, concurrency=4)

        undisturbed = answers().result(120)
        disturbed = _kill_while(answers, page, cluster).result(120)
    assert differing(disturbed, undisturbed) == [], "the streams did not notice"


def events(cluster: Cluster, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.admin.request("GET", "/events")["events"]
    return [event for event in found if event["kind"] == kind]


def mark(page: Page, event: dict[str, Any]) -> Locator:
    """The line of one event in the chart of tokens."""
    return page.locator(f'#throughput .mark[data-kind={event["kind"]}][data-event="{event["number"]}"]')


def _kill_while(
    answers: Callable[[], Future[list[Answer]]], page: Page, cluster: Cluster
) -> Future[list[Answer]]:
    """Kill ew-0 in the page while streams run; return when the page shows it back."""
    before = cluster.pids()["ew-0"]
    page.goto(cluster.admin_url)
    victim = page.locator('[data-id="ew-0"]')
    expect(victim).to_contain_text(f"pid{before}")
    expect(page.locator("#badges")).to_contain_text("full capacity")
    known = events(cluster, "dead")

    disturbed = answers()
    expect(victim).to_contain_text(re.compile(r"[1-9][\d,.]* rows/s"))
    page.get_by_role("button", name="Kill ew-0").click()
    page.locator("#ask-yes").click()
    expect(victim).to_contain_text(re.compile(r"died at [\d:]+: .*SIGKILL"))
    expect(page.locator("#event-rows")).to_contain_text(re.compile("ew-0dead"))
    [death] = [event for event in events(cluster, "dead") if event not in known]
    assert death["worker_id"] == "ew-0"
    expect(mark(page, death)).to_have_count(1)

    expect(victim).to_have_attribute("data-state", "healthy", timeout=BACK_MS)
    expect(victim).not_to_contain_text(f"pid{before}")
    back = events(cluster, "healthy")[-1]
    assert back["worker_id"] == "ew-0"
    expect(mark(page, back)).to_have_count(1)
    expect(page.locator("#badges")).to_contain_text("full capacity", timeout=BACK_MS)
    assert cluster.pids()["ew-0"] != before
    return disturbed
