"""Where is a Chromium? For tests and screenshots of the dashboard."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import Playwright

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE: Final = "TARRAGON_CHROMIUM"
ABSENT: Final = (
    "NOT RUN: no Chromium was found. Install one (Debian: apt install chromium; elsewhere: "
    f".venv/bin/playwright install chromium) or name one with {VARIABLE}=/path/to/chromium"
)


def find_chromium(playwright: Playwright) -> str | None:
    """Path of a Chromium: the one that is named, the system's, or playwright's own; None if there is none."""
    named = os.environ.get(VARIABLE)
    found = [named] if named else [*map(shutil.which, NAMES), playwright.chromium.executable_path]
    return next((path for path in found if path and Path(path).exists()), None)


def launch_options(path: str) -> dict[str, Any]:
    """Arguments of playwright's ``launch`` for a headless browser that shows our own pages alone."""
    # Chromium's sandbox does not work for root, which is who runs in a container.
    sandbox = [] if os.geteuid() else ["--no-sandbox"]
    return {"executable_path": path, "args": ["--disable-gpu", *sandbox]}
