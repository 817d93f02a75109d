"""Make docs/images/*.png: the dashboard and `tarragon top` of a real cluster whose workers are killed.

    .venv/bin/python docs/make_screenshots.py [--layers 30]

Needs a Chromium (see docs/dashboard.md). The pictures are reduced to few colours, so that they stay small.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from textual.widgets import DataTable

from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model
from tarragon.observability.top import Top
from tarragon.testing.browser import ABSENT, find_chromium, launch_options

FOLDER = Path(__file__).parent / "images"
STREAMS = 6
LOAD_S = 20.0
BACK_S = 60.0
COLOURS = 256
VIEWS = {
    "dashboard-light": (1280, 1420, "light"),
    "dashboard-dark": (1280, 1420, "dark"),
    "dashboard-phone-light": (390, 844, "light"),
    "dashboard-phone-dark": (390, 844, "dark"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30, help="of the demo model")
    layers = parser.parse_args().layers
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        path = find_chromium(playwright)
        if path is None:
            print(ABSENT, file=sys.stderr)
            return 1
        model = ensure_demo_model(layers=layers)
        with (
            Cluster(model, 2, 2, engine_args=("--max-model-len=1024",), kv_cache_bytes=256 << 20) as cluster,
            playwright.chromium.launch(**launch_options(path)) as browser,
        ):
            over = threading.Event()
            readers = [threading.Thread(target=_read, args=(cluster.url, over)) for _ in range(STREAMS)]
            for reader in readers:
                reader.start()
            try:
                picture_all(cluster, browser)
            finally:
                over.set()
                for reader in readers:
                    reader.join()
    return 0


def picture_all(cluster: Cluster, browser: Browser) -> None:
    """Kill an expert worker under load, wait until it is back, look."""
    time.sleep(LOAD_S)
    cluster.kill("ew-1")
    time.sleep(LOAD_S / 2)
    cluster.wait_for("full_capacity", BACK_S)
    for name, (width, height, scheme) in VIEWS.items():
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(cluster.admin_url)
        page.locator('[data-id="ew-1"]').wait_for()
        page.locator("#span").select_option("60")
        page.wait_for_timeout(1_500)
        save(name, page.screenshot())
        context.close()
    page = browser.new_page(viewport={"width": 1160, "height": 900}, device_scale_factor=1)
    with ThreadPoolExecutor(1) as other:  # the browser's driver has an event loop in this thread
        drawing = other.submit(asyncio.run, draw_top(cluster)).result()
    # Textual names a font of the web; whatever monospaced one there is will do.
    page.set_content(re.sub(r"@font-face\s*\{.*?\}", "", drawing, flags=re.S))
    save("top", page.locator("svg").screenshot())


async def draw_top(cluster: Cluster) -> str:
    """`tarragon top` on the real cluster: a worker is killed with its keys. Returns an SVG."""
    app = Top(cluster.admin)
    async with app.run_test(size=(116, 40)) as pilot:
        workers = app.query_one("#workers", DataTable)
        async with asyncio.timeout(BACK_S):
            while not workers.row_count:
                await pilot.pause(0.1)
            workers.move_cursor(row=workers.get_row_index("ew-0"))
            await pilot.press("k", "y")
            while not any("ew-0" in line and "dead" in line for line in _log(app)):
                await pilot.pause(0.1)
            await pilot.pause(0.5)
            return app.export_screenshot()


def _log(app: Top) -> list[str]:
    from textual.widgets import RichLog

    return [line.text for line in app.query_one("#log", RichLog).lines]


def _read(url: str, over: threading.Event) -> None:
    """Keep one stream running."""
    body = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0.8, "ignore_eos": True}
    with httpx.Client(timeout=300, trust_env=False) as client:
        while not over.is_set():
            client.post(f"{url}/v1/completions", json=body)


def save(name: str, png: bytes) -> None:
    target = FOLDER / f"{name}.png"
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE).save(
        target, optimize=True
    )
    print(f"{target} ({target.stat().st_size >> 10} KiB)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
