"""`tarragon bench shadow`: an expert's latency over its batch size, and what a shadow costs (appendix D).

The expert kernels run in this process as an expert worker calls them, on as many cores as one has. First the
latency of one expert over its rows, with the knee: where the time to read the weights, which no batch can go
below, equals the time that the rows take. Then rounds of four sides in turn, with as many rows each in total:
*none*, an expert with nothing beside it; *shadow*, the same with a second expert loaded, not run; *in turn*,
both run with half of the rows each in one call, as an expert worker does after a failover; and *at once*,
both run at the same time on the same cores, as two CUDA streams do in the paper, in two processes (one
process cannot: the kernel is not re-entrant). Ratios are to *none*, round
by round. Calls go around the layers, so that one layer's weights are not simply found in the cache.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from tarragon.bench import output
from tarragon.bench.progress import Bar
from tarragon.bench.shadow_calls import Calls
from tarragon.bench.stats import interval, judge, paired_ratio, summary
from tarragon.config import Config
from tarragon.models.demo import ensure_demo_model

ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SIDES: Final = ("none", "shadow", "in turn", "at once")
SAME_WITHIN: Final = 0.03
"""A shadow costs nothing if the whole interval of its ratio lies so near to 1."""
QUICK_LAYERS: Final = 4
CARRIES_OVER: Final = (
    "The knee is this processor's; a GPU's lies at more rows. What carries over is that calls below it pay "
    "for reading weights, and that a shadow takes no time (bytes, where workers cannot share memory). Two "
    "experts at once share the cores that one had, as two CUDA streams share a GPU; how much they disturb "
    "each other is each machine's own."
)


class Knee(NamedTuple):
    """Where an expert's latency turns from the time of its weights to the time of its rows."""

    rows: float
    floor_us: float
    """Latency of the smallest batch."""
    us_per_row: float
    """The least of any batch."""


def parser() -> argparse.ArgumentParser:
    options = output.parser("shadow", __doc__)
    options.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="batch sizes of one expert")
    options.add_argument("--total", type=int, nargs="+", default=[16, 64, 256], help="rows of each side")
    options.add_argument("--rounds", type=int, default=15, help="of each side and batch size")
    options.add_argument("--calls", type=int, default=60, help="in one measurement")
    options.add_argument(
        "--threads", type=int, help="cores (default: an expert worker's, of two of each role)"
    )
    options.add_argument("--quick", action="store_true", help="few rounds, the demo model's first layers")
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.quick:
        options.rounds, options.calls = 7, 12
        options.layers = options.layers or QUICK_LAYERS
    cores = sorted(os.sched_getaffinity(0))
    threads = options.threads or Config().threads("expert", len(cores))
    os.sched_setaffinity(0, cores[:threads])
    model = options.model or ensure_demo_model(layers=options.layers)
    metrics: dict[str, Any] = {"carries_over": CARRIES_OVER}
    settings = {
        "model": model.name,
        "threads": threads,
        "rounds": options.rounds,
        "calls": options.calls,
    }
    found = output.result("shadow", settings, metrics)
    steps = options.rounds * (len(options.rows) + len(SIDES) * len(options.total))
    # Before the bar: it forks, and the bar has a thread.
    bench = Calls(model, threads, options.calls, max([*options.rows, *options.total]))
    with Bar("shadow", float(steps)) as bar:
        metrics["expert_bytes"] = bench.expert_bytes
        metrics["latency_us"] = latency(bench, options.rows, options.rounds, bar)
        metrics["knee"] = knee(
            [(int(rows), float(one["median"])) for rows, one in metrics["latency_us"].items()]
        )._asdict()
        output.write(found, options.json)
        metrics["sides"] = {}
        for total in options.total:
            metrics["sides"][str(total)] = compare(sides(bench, total, options.rounds, bar))
            metrics["on_core_share"] = bench.on_core_share
            output.write(found, options.json)
    print(table(metrics))
    output.plot(options.plot, lambda axes: draw(axes, metrics))
    return 0


# ------------------------------------------------------------------ measuring


def latency(bench: Calls, sizes: Sequence[int], rounds: int, bar: Bar) -> dict[str, Any]:
    """Microseconds of one call by rows; all sizes in every round, so that a drift hits all alike."""
    found: dict[int, list[float]] = {rows: [] for rows in sizes}
    bench.alone(max(sizes))  # everything has run once
    for number in range(rounds):
        bar.doing(f"latency, round {number + 1} of {rounds}")
        for rows in sizes if number % 2 == 0 else sizes[::-1]:
            found[rows].append(1e6 * bench.alone(rows))
            bar.done(1.0)
    return {str(rows): {**summary(values), "ci95": list(interval(values))} for rows, values in found.items()}


def sides(bench: Calls, total: int, rounds: int, bar: Bar) -> dict[str, list[float]]:
    """Microseconds of each side in each round; the order turns around from round to round."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        bar.doing(f"{total} rows, round {number + 1} of {rounds}")
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            bench.with_shadow(loaded=side != "none")
            call = {"in turn": bench.in_turn, "at once": bench.at_once}.get(side, bench.alone)
            call(total)  # warm again after the loading
            found[side].append(1e6 * call(total))
            bar.done(1.0)
    return found


# ------------------------------------------------------------------ conclusions


def knee(points: Sequence[tuple[int, float]]) -> Knee:
    """The knee of (rows, microseconds): where the floor meets the line of the best time per row.

    The floor is the latency of the smallest batch; no batch is faster than either. Where the latency does not
    grow at all, the knee is at the largest batch or beyond.
    """
    floor_us = min(points)[1]
    us_per_row = min(latency_us / rows for rows, latency_us in points)
    return Knee(floor_us / us_per_row, floor_us, us_per_row)


def compare(found: dict[str, list[float]]) -> dict[str, Any]:
    """Latency of each side, and its ratio to *none*; the verdict on a shadow that is only loaded."""
    result: dict[str, Any] = {
        side: {"us": summary(values), "ratio": paired_ratio(values, found["none"])}
        for side, values in found.items()
    }
    ci95, pairs = result["shadow"]["ratio"]["ci95"], len(found["none"])
    result["verdict"] = judge(ci95, pairs, at_least=1.0 - SAME_WITHIN, at_most=1.0 + SAME_WITHIN)
    return result


def table(metrics: dict[str, Any]) -> str:
    latencies = [[rows, one["median"], one["min"], one["max"]] for rows, one in metrics["latency_us"].items()]
    found = metrics["knee"]
    rows: list[list[Any]] = []
    lines = []
    for total, by_side in metrics["sides"].items():
        for side in SIDES:
            ratio = by_side[side]["ratio"]
            rows.append(
                [f"{total} rows, {side}", by_side[side]["us"]["median"], ratio["median"], *ratio["ci95"]]
            )
        lines.append(
            f"{total} rows: a loaded shadow is within {SAME_WITHIN:.0%} of none: {by_side['verdict']}"
        )
    return "\n".join(
        [
            output.table(["rows of one expert", "median us", "min", "max"], latencies),
            f"knee at {found['rows']:.0f} rows: {found['floor_us']:.0f} us for the weights, "
            f"{found['us_per_row']:.2f} us a row",
            "",
            output.table(["side", "median us", "of none", "from", "to"], rows),
            *lines,
            f"this process had its cores for {metrics['on_core_share']:.0%} of the time measured alone; if "
            "others take a good part of it nothing above counts, and two at once look better than one",
            metrics["carries_over"],
        ]
    )


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """Latency over rows with its knee on the left; the sides, as shares of none, on the right."""
    figure = axes.figure
    axes.remove()
    left, right = figure.subplots(1, 2)
    sizes = [int(rows) for rows in metrics["latency_us"]]
    left.plot(sizes, [one["median"] for one in metrics["latency_us"].values()], "o-", color="#1b6e4b")
    found = metrics["knee"]
    left.axvline(found["rows"], color="#a34a28", linestyle="--", label=f"knee, {found['rows']:.0f} rows")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda rows, _position: f"{rows:g}")
    left.set_yscale("log")
    left.set_xlabel("rows of one expert")
    left.set_ylabel("us")
    left.legend()
    width = 0.8 / len(SIDES)
    for number, side in enumerate(SIDES):
        ratios = [by_side[side]["ratio"] for by_side in metrics["sides"].values()]
        spread = [
            [max(0.0, ratio["median"] - ratio["ci95"][0]) for ratio in ratios],
            [max(0.0, ratio["ci95"][1] - ratio["median"]) for ratio in ratios],
        ]
        at = [index + number * width for index in range(len(ratios))]
        right.bar(at, [ratio["median"] for ratio in ratios], width, yerr=spread, capsize=2, label=side)
    right.axhline(1.0, color="grey", linewidth=0.8)
    right.set_xticks([index + 1.5 * width for index in range(len(metrics["sides"]))], list(metrics["sides"]))
    right.set_xlabel("rows in total")
    right.set_ylabel("latency, of none")
    right.set_ylim(top=1.3 * right.get_ylim()[1])  # room for the legend
    right.legend(fontsize="small", loc="upper left", ncols=2)
