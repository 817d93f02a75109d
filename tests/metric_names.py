"""Names of metrics: those that docs/metrics.md has, and those in what a server answers."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parents[1] / "docs/metrics.md"
_NAME = re.compile(r"`(tarragon_[a-z0-9_]+)[`{]")
PATTERNS = (re.compile(r"tarragon_worker_refused_(?!frames)[a-z_]+_total"),)
"""Names that are there only once something has happened, which the page describes by a pattern."""


def documented() -> set[str]:
    """Names in the tables of docs/metrics.md; a histogram's without its suffix."""
    return set(_NAME.findall(DOCS.read_text(encoding="utf-8").partition("## Traces")[0]))


def served(exposition: str) -> set[str]:
    """Names of Tarragon's own in an answer of /metrics, those of counters with their suffix."""
    names = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(exposition)
        if family.name.startswith("tarragon_") and not family.name.endswith("_created")
    }
    return {name for name in names if not any(pattern.fullmatch(name) for pattern in PATTERNS)}
