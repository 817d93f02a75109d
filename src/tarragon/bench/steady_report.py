"""What the windows of `tarragon bench steady --open` say together: figures, a table, a picture. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tarragon.bench import output
from tarragon.bench.sides import DECOUPLED, OURS, SIDES
from tarragon.bench.stats import judge, paired_ratio, summary

FIGURES: Final = ("tokens_per_s", "ttft_median_ms", "ttft_p95_ms", "tbt_median_ms", "tbt_p95_ms")
COST_MAX: Final = 0.028
"""The paper's largest deviation of tokens/s from the decoupled system without resilience (7.3)."""
_COLOURS: Final = dict(zip(SIDES, ("#1b6e4b", "#5b7fb5", "#a34a28", "#c9a227", "#7a5195"), strict=True))


def conclude(metrics: dict[str, Any]) -> None:
    """Put ratios at each rate and the verdicts on the paper's claims into ``metrics``."""
    pooled: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    metrics["by_rate"] = {}
    for kind, rates in metrics["windows"].items():
        by_rate: dict[str, Any] = {}
        metrics["by_rate"][kind] = by_rate
        for rate, sides in rates.items():
            by_rate[rate] = {}
            for name, found in sides.items():
                by_rate[rate][name] = {
                    figure: _compared(found[OURS], found[name], figure) for figure in FIGURES
                }
                for figure in FIGURES:
                    ours, theirs = pooled.setdefault(name, {}).setdefault(figure, ([], []))
                    for mine, other in _pairs(found[OURS], found[name], figure):
                        ours.append(mine)
                        theirs.append(other)
    metrics["ratios"] = {
        name: {figure: paired_ratio(*both) for figure, both in found.items() if both[0]}
        for name, found in pooled.items()
    }
    metrics["claims"] = claims(metrics["ratios"])


def _pairs(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], figure: str
) -> list[tuple[float, float]]:
    """Whole pairs that have this figure: a window without a token has none."""
    both = zip(ours, theirs, strict=False)
    return [(a[figure], b[figure]) for a, b in both if a[figure] > 0 and b[figure] > 0]


def _compared(ours: list[dict[str, float]], theirs: list[dict[str, float]], figure: str) -> dict[str, Any]:
    pairs = _pairs(ours, theirs, figure)
    if not pairs:
        return {}
    mine, other = ([pair[side] for pair in pairs] for side in (0, 1))
    return {OURS: summary(mine), "other": summary(other), "ratio": paired_ratio(mine, other)}


def claims(ratios: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's claims of 7.3, each with its ratio over all rates and workloads, and a verdict."""
    found = []
    for name, compared in ratios.items():
        if "tokens_per_s" not in compared:
            continue
        at_least = 1.0 - COST_MAX if name == DECOUPLED else 1.0
        ratio = compared["tokens_per_s"]
        found.append(
            {
                "claim": f"tokens/s of Tarragon at least {at_least:g} of {SIDES[name].title}",
                "ratio": ratio,
                "at_least": at_least,
                "verdict": judge(ratio["ci95"], ratio["n"], at_least=at_least),
            }
        )
    return found


# ------------------------------------------------------------------ showing


def report(metrics: dict[str, Any]) -> str:
    """Medians of every side at every rate, Tarragon's over all comparisons; then the verdicts."""
    rows: list[list[Any]] = []
    for kind, rates in metrics["windows"].items():
        series = _series(rates)
        for rate in rates:
            for name, by_rate in series.items():
                if windows := by_rate.get(float(rate)):
                    medians = [summary([one[figure] for one in windows])["median"] for figure in FIGURES]
                    ratio = metrics["by_rate"][kind][rate].get(name, {}).get("tokens_per_s", {}).get("ratio")
                    text = "" if ratio is None else f"{ratio['median']:.2f} ({_interval(ratio)})"
                    rows.append([f"{kind}, {rate}/s: {SIDES[name].title}", *medians, text])
    heads = ["median", "tokens/s", "TTFT", "P95", "TBT", "P95", "Tarragon's tokens/s of it"]
    lines = [output.table(heads, rows), "TTFT and TBT in ms"]
    for claim in metrics["claims"]:
        ratio = claim["ratio"]
        lines.append(
            f"{claim['claim']}: {ratio['median']:.2f} ({_interval(ratio)}, {ratio['n']} pairs): "
            f"{claim['verdict']}"
        )
    for name, side in metrics["sides"].items():
        if "error" in side:
            lines.append(f"{SIDES[name].title} did not run: {side['error']}")
    return "\n".join(lines)


def _interval(ratio: dict[str, Any]) -> str:
    low, high = ratio["ci95"]
    return f"{low:.2f} to {high:.2f}"


def picture(metrics: dict[str, Any], file: Path) -> None:
    """TTFT, TBT (fig. 10) and tokens/s (fig. 11) over the request rate, a column for each workload."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    kinds = list(metrics["windows"])
    figure = Figure(figsize=(5.2 * len(kinds), 8.0), layout="constrained")
    axes = figure.subplots(3, len(kinds), squeeze=False, sharex="col")
    for column, kind in enumerate(kinds):
        axes[0][column].set_title(kind)
        axes[2][column].set_xlabel("requests/s")
        for name, by_rate in _series(metrics["windows"][kind]).items():
            _lines(axes[0][column], by_rate, "ttft_median_ms", "ttft_p95_ms", name)
            _lines(axes[1][column], by_rate, "tbt_median_ms", "tbt_p95_ms", name)
            _lines(axes[2][column], by_rate, "tokens_per_s", None, name)
        axes[0][column].set_yscale("log")
        milliseconds = axes[0][column].yaxis
        milliseconds.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        milliseconds.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        milliseconds.set_minor_formatter(NullFormatter())
        for row in (1, 2):
            axes[row][column].set_ylim(bottom=0)
    labels = ("TTFT, ms (dashed: P95)", "TBT, ms (dashed: P95)", "output tokens/s")
    for row, label in enumerate(labels):
        axes[row][0].set_ylabel(label)
    axes[2][0].legend(fontsize="small")
    figure.savefig(file, dpi=output.PLOT_DPI)


def _series(rates: dict[str, Any]) -> dict[str, dict[float, list[dict[str, float]]]]:
    """All windows of each side at each rate; ours come from all comparisons."""
    found: dict[str, dict[float, list[dict[str, float]]]] = {}
    for rate, sides in rates.items():
        for pairs in sides.values():
            for name, windows in pairs.items():
                found.setdefault(name, {}).setdefault(float(rate), []).extend(windows)
    return {name: found[name] for name in SIDES if name in found}


def _lines(
    axes: Any, by_rate: dict[float, list[dict[str, float]]], solid: str, dashed: str | None, name: str
) -> None:
    for figure, style in ((solid, "o-"), (dashed, ".--")):
        if figure is None:
            continue
        points = [
            (rate, summary(values)["median"])
            for rate, windows in sorted(by_rate.items())
            if (values := [one[figure] for one in windows if one[figure] > 0])
        ]
        if points:
            label = SIDES[name].title if style == "o-" else None
            axes.plot(*zip(*points, strict=True), style, color=_COLOURS[name], label=label, markersize=4)
