"""What every benchmark does with its result: print it, write it, draw it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tarragon.bench.machine import machine

PLOT_INCHES: Final = (9.0, 4.5)
PLOT_DPI: Final = 120


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of the flags that all benchmarks have: --model, --layers, --json, --plot."""
    options = argparse.ArgumentParser(
        prog=f"tarragon bench {name}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--model", type=Path, help="checkpoint folder (default: the demo model)")
    options.add_argument("--layers", type=int, help="demo model: only the first N layers")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the result there")
    return options


def result(name: str, settings: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """The form that every benchmark's JSON has."""
    return {"name": name, "settings": settings, "metrics": metrics, "machine": machine()}


def write(found: dict[str, Any], file: Path | None) -> None:
    """Write the result as JSON, if a file was asked for: call it as figures come, so that none is lost."""
    if file is not None:
        file.write_text(json.dumps(found, indent=1))


def plot(file: Path | None, draw: Callable[[Any], None]) -> None:
    """Call ``draw`` with matplotlib axes and save what it drew, if a file was asked for."""
    if file is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=PLOT_INCHES, dpi=PLOT_DPI)
    draw(axes)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under heads, the first column to the left, all others to the right; floats with three digits."""
    text = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(heads), *text]) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [list(heads), *text]
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
