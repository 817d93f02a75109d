"""What people see: the status contract as a table, progress as bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

_STATE_STYLES: Final[Mapping[str, str]] = {
    "healthy": "green",
    "starting": "yellow",
    "draining": "yellow",
    "suspect": "magenta",
    "dead": "red",
}


class Bars:
    """One bar per stage: callable as ``progress(stage, done, total)``."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._bars[stage], completed=done, total=total)


def summary(status: Mapping[str, Any]) -> Text:
    """One line: does it serve, is it whole, and what does not hold at the moment."""
    experts = status.get("experts", {})
    parts = [
        "serving" if status.get("ready") else "not serving",
        "full capacity" if status.get("full_capacity") else "reduced capacity",
        "exact" if status.get("exact") else f"not exact{_because(status.get('inexact_reason'))}",
        "protected" if status.get("protected") else "unprotected",
        f"table version {status.get('ert_version', 0)}",
        f"{experts.get('total', 0)} experts, {experts.get('with_shadow', 0)} with a shadow"
        + (f", {experts['unreachable']} unreachable" if experts.get("unreachable") else ""),
    ]
    return Text("; ".join(parts))


def workers_table(status: Mapping[str, Any]) -> Table:
    """One row per worker: who it is, how it is, and what it has done since it started."""
    workers = status.get("workers", [])
    counters = sorted({name for worker in workers for name in worker.get("counters", {})})
    table = Table()
    for title in ("worker", "role", "state"):
        table.add_column(title)
    for title in ("pid", "epoch", *(name.removesuffix("_total").replace("_", " ") for name in counters)):
        table.add_column(title, justify="right")
    for worker in workers:
        state = str(worker.get("state", ""))
        numbers = [_number(worker.get("counters", {}).get(name)) for name in counters]
        table.add_row(
            str(worker.get("id", "")),
            str(worker.get("role", "")),
            Text(state, style=_STATE_STYLES.get(state, "")),
            str(worker.get("pid", "")),
            str(worker.get("epoch", "")),
            *numbers,
        )
    return table


def _because(reason: Any) -> str:
    return f" ({reason})" if reason else ""


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"
