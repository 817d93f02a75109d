"""Pictures of results, drawn from their JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_OURS, _THEIRS, _FAULT = "#1b6e4b", "#a34a28", "#b00020"


def failover_picture(result: dict[str, Any], file: Path) -> None:
    """Time between tokens and tokens/s around the fault, ours beside each cold restart (fig. 9).

    Of the trials the one with the median stall is shown.
    """
    metrics, settings = result["metrics"], result["settings"]
    shown = [(f"one {settings['role']} worker, SIG{settings['signal']}", metrics["trials"], _OURS)]
    for name, found in metrics["baseline"].items():
        shown.append((f"cold restart of {name}, replay", found["trials"], _THEIRS))
    shown = [(title, trials, colour) for title, trials, colour in shown if trials]
    figure = Figure(figsize=(5.0 * len(shown), 6.0), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False, sharex="col")
    for column, (title, trials, colour) in enumerate(shown):
        trial = middle(trials)
        gap_axes, rate_axes = axes[0][column], axes[1][column]
        gap_axes.set_title(f"{title}\nstall {trial['stall_ms']:,.0f} ms")
        draw_gaps(gap_axes, trial["series"], colour)
        draw_rate(rate_axes, trial["series"], colour)
        for one in (gap_axes, rate_axes):
            one.axvline(0.0, color=_FAULT, linestyle="--", linewidth=1, label="fault")
            full_s = trial.get("full_capacity_s", trial.get("serving_after_s"))
            one.axvline(full_s, color="grey", linestyle=":", linewidth=1, label="full capacity")
        rate_axes.set_xlabel("seconds after the fault")
        gap_axes.legend(fontsize="small")
    axes[0][0].set_ylabel("time between tokens, ms")
    axes[1][0].set_ylabel("output tokens/s")
    figure.savefig(file, dpi=130)


def middle(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the (lower) median stall."""
    return sorted(trials, key=lambda trial: float(trial["stall_ms"]))[(len(trials) - 1) // 2]


def draw_gaps(axes: Axes, series: dict[str, list[float]], colour: str) -> None:
    """Median and largest gap of each bin, on a logarithmic scale; empty bins are left out."""
    times = series["after_fault_s"]
    for key, label, marker in (("gap_largest_ms", "largest", "."), ("gap_median_ms", "median", "_")):
        points = [(at, gap) for at, gap in zip(times, series[key], strict=True) if gap > 0]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=4, label=label)
    axes.set_yscale("log")


def draw_rate(axes: Axes, series: dict[str, list[float]], colour: str) -> None:
    axes.step(series["after_fault_s"], series["tokens_per_s"], where="mid", color=colour, linewidth=0.9)
    axes.set_ylim(bottom=0)
