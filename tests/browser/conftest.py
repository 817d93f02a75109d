"""A headless Chromium, and the status API of a cluster that is not there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.recorded import Recorded

from tarragon.cluster import free_ports
from tarragon.config import Config
from tarragon.orchestrator.status import StatusServer
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


@contextmanager
def serving(operations: Recorded) -> Iterator[str]:
    """The real status API, in a thread, over recorded operations; yields its URL."""
    [port] = free_ports(1)
    loop = asyncio.new_event_loop()
    server = StatusServer(operations, Config(admin_port=port))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def url(recorded: Recorded) -> Iterator[str]:
    with serving(recorded) as address:
        yield address
