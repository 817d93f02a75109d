"""A bar with the time left for a benchmark whose parts are planned in seconds, and notes above it."""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SPEED_PERIOD_S: Final = 3_600.0
"""Over so long a time the pace is averaged: parts take very different times."""


class Bar:
    """A context manager. ``done`` moves it by what a part was planned to take; the pace is measured."""

    def __init__(self, title: str, planned_s: float) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            speed_estimate_period=_SPEED_PERIOD_S,
        )
        self._title = title
        self._task = self._progress.add_task(title, total=planned_s)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def doing(self, what: str) -> None:
        self._progress.update(self._task, description=f"{self._title}: {what}")

    def done(self, planned_s: float, note: str = "") -> None:
        """A part that was planned to take so long has ended; ``note`` stays above the bar."""
        self._progress.update(self._task, advance=planned_s)
        if note:
            self._progress.console.print(note, highlight=False, markup=False, soft_wrap=True)
