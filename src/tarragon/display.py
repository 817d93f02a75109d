"""What people see: the status contract as a table, progress as bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.box import SIMPLE
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
    unreachable = f", {experts['unreachable']} unreachable" if experts.get("unreachable") else ""
    parts = [
        "serving" if status.get("ready") else "not serving",
        "full capacity" if status.get("full_capacity") else "reduced capacity",
        "exact" if status.get("exact") else f"not exact{_because(status.get('exact_reason'))}",
        "protected" if status.get("protected") else f"unprotected{_because(status.get('protected_reason'))}",
        f"{experts.get('total', 0)} experts, {experts.get('with_shadow', 0)} with a shadow{unreachable}",
        f"table version {status.get('ert_version', 0)}",
    ]
    return Text("; ".join(parts))


def workers_table(status: Mapping[str, Any]) -> Table:
    """One row per worker: who it is, how it is, and what it holds and has done since it started."""
    table = Table(box=SIMPLE)
    workers = status.get("workers", [])
    for title in ("worker", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("pid", "epoch", "pairs", "experts", "GB"):
        table.add_column(title, justify="right", no_wrap=True)
    if any(_note(worker) for worker in workers):
        table.add_column("note")
    for worker in workers:
        resident = worker.get("resident_bytes")
        table.add_row(
            str(worker.get("id", "")),
            state_text(worker),
            str(worker.get("pid", "")),
            str(worker.get("epoch", "")),
            number(worker.get("counters", {}).get("pairs")),
            number(worker.get("experts_resident")),
            "" if resident is None else f"{resident / 1e9:.2f}",
            *([_note(worker)] if len(table.columns) > 7 else []),
        )
    return table


def state_text(worker: Mapping[str, Any]) -> Text:
    """The state of a worker, in its colour."""
    state = str(worker.get("state", ""))
    return Text(state, style=_STATE_STYLES.get(state, ""))


def number(value: float | None) -> str:
    """A count for people: thousands apart, nothing for None."""
    return "" if value is None else f"{value:,.0f}"


def _note(worker: Mapping[str, Any]) -> str:
    note = str(worker.get("cause", ""))
    return f"given up: {note}" if worker.get("given_up") else note


def _because(reason: Any) -> str:
    return f" ({reason})" if reason else ""
