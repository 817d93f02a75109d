"""A headless Chromium, and the status API of a cluster that is not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.recorded import Recorded, serving

from tarragon.testing.browser import ABSENT, find_chromium, launch_options

WAIT_MS = 15_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Until the module ends: its driver keeps an event loop running, which other tests have of their own."""
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        path = find_chromium(playwright)
        if path is None:
            pytest.skip(ABSENT)
        running = playwright.chromium.launch(**launch_options(path))
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new tab; an error in its console fails the test, unless it is that the server is gone."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    faults: list[str] = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    yield tab
    context.close()
    assert [fault for fault in faults if "net::ERR_" not in fault] == []


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def url(recorded: Recorded) -> Iterator[str]:
    with serving(recorded) as address:
        yield address
