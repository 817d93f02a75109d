"""The dashboard's files: plain HTML, CSS and JavaScript that a browser takes as they are."""

from __future__ import annotations

from importlib import resources
from typing import Final, NamedTuple

PAGE_PATHS: Final = ("/", "/dashboard")
_TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
SECURITY_HEADERS: Final = {
    # Nothing from elsewhere, nothing inline, in nobody's frame: a worker's error text stays text.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


class Asset(NamedTuple):
    """One file as it is served."""

    content_type: str
    body: bytes


def load() -> dict[str, Asset]:
    """Map every path that is served to its file; nothing else can be reached."""
    found = {}
    for file in resources.files(__name__).iterdir():
        kind = _TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            found[f"/dashboard/{file.name}"] = Asset(kind, file.read_bytes())
    page = found.pop("/dashboard/index.html")
    return {**found, **dict.fromkeys(PAGE_PATHS, page)}
