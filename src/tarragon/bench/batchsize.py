"""`tarragon bench batchsize`: how many rows an expert gets at once, under real routing (appendix B, fig. 13).

A closed loop of short prompts at several numbers of streams, on one cluster. Expert workers count, by layer,
the rows of every call of an expert (``count_batch_sizes``); reported is the distribution between two looks
while all streams decode. Beside it the size that a call would have if routing were even and all rows of a
step met: streams x top-k / experts. Calls are smaller where attention workers are at different layers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from pathlib import Path
from typing import Any, Final

from tarragon.bench import output
from tarragon.bench.load import LoadError, closed_loop, fail_on_error
from tarragon.bench.progress import Bar
from tarragon.bench.workloads import Workload, random_workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.experts.batch_sizes import BOUNDS, SKIPPED, Histogram, histogram
from tarragon.models.demo import ensure_demo_model
from tarragon.models.shape import read_model

QUICK_LAYERS: Final = 4
REPORTED_S: Final = 1.5
"""Workers report their counters every second."""
CARRIES_OVER: Final = (
    "The demo model has few experts per layer and random gates: its batches are larger for the same streams "
    "than those of a model with 128 experts, and its skew is its own. What carries over: sizes grow with the "
    "streams that decode together, and stay far below them."
)
_PLAN_START_S: Final = 20.0


def parser() -> argparse.ArgumentParser:
    options = output.parser("batchsize", __doc__)
    options.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    options.add_argument("--seconds", type=float, default=8.0, help="between two looks")
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    options.add_argument("--quick", action="store_true", help="short looks, the demo model's first layers")
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.quick:
        options.seconds = min(options.seconds, 3.0)
        options.layers = options.layers or QUICK_LAYERS
    model = options.model or ensure_demo_model(layers=options.layers)
    shape = read_model(model)
    settings = {
        "model": model.name,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "attention_workers": options.attention_workers,
        "expert_workers": options.expert_workers,
        "seconds": options.seconds,
    }
    metrics: dict[str, Any] = {"bounds": list(BOUNDS), "streams": {}, "carries_over": CARRIES_OVER}
    each_s = options.seconds + 3 * REPORTED_S
    try:
        with Bar("batchsize", _PLAN_START_S + each_s * len(options.concurrency)) as bar:
            bar.doing("starting the cluster")
            with Cluster(
                model, options.attention_workers, options.expert_workers, count_batch_sizes=True
            ) as cluster:
                bar.done(_PLAN_START_S)
                for number, streams in enumerate(options.concurrency):
                    bar.doing(f"{streams} streams")
                    even = streams * shape.top_k / shape.experts
                    found = asyncio.run(_look(cluster, model, streams, number, options.seconds))
                    metrics["streams"][str(streams)] = {"even_rows": even, **found}
                    output.write(output.result("batchsize", settings, metrics), options.json)
                    bar.done(each_s)
    except (ClusterError, LoadError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    print(table(metrics))
    output.plot(options.plot, lambda axes: draw(axes, metrics))
    return 0


async def _look(cluster: Cluster, model: Path, streams: int, number: int, seconds: float) -> dict[str, Any]:
    """What expert workers counted within ``seconds`` under so many streams. Raises LoadError."""
    workload = random_workload(model, seed=number, greedy=True)
    running = asyncio.create_task(_load(workload, cluster.url, model.name, streams))
    try:
        await asyncio.sleep(2 * REPORTED_S)
        before = await asyncio.to_thread(_counters, cluster)
        start_s = time.monotonic()
        await asyncio.sleep(seconds)
        after = await asyncio.to_thread(_counters, cluster)
        took_s = time.monotonic() - start_s
        if running.done():
            await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return conclude(before, after, took_s)


async def _load(workload: Workload, url: str, model: str, streams: int) -> None:
    """A closed loop until it is cancelled."""
    for wave in itertools.count():
        indexes = range(wave * streams, (wave + 8) * streams)
        fail_on_error(await closed_loop(workload, url, model, indexes, streams))


def _counters(cluster: Cluster) -> list[dict[str, float]]:
    """The last report of each expert worker."""
    return [w.get("counters", {}) for w in cluster.status()["workers"] if w["role"] == "expert"]


def conclude(before: list[dict[str, float]], after: list[dict[str, float]], took_s: float) -> dict[str, Any]:
    """Calls under each bound between two looks: of all layers, and by layer; with quantiles."""
    old, new = total(before), total(after)
    layers = {
        layer: [b - a for a, b in zip(old.get(layer, [0.0] * len(row)), row, strict=True)]
        for layer, row in sorted(new.items())
    }
    calls = [sum(column) for column in zip(*layers.values(), strict=True)]
    pairs = _grown("pairs", before, after)
    count = sum(calls)
    return {
        "calls": calls,
        "calls_per_s": count / took_s,
        "rows_mean": pairs / count if count else 0.0,
        "quantiles": {f"{share:g}": quantile(calls, share) for share in (0.1, 0.5, 0.9, 0.99)},
        "layers": {str(layer): {"calls": row, "median": quantile(row, 0.5)} for layer, row in layers.items()},
        "batches_not_counted": _grown(SKIPPED, before, after),
    }


def total(reports: list[dict[str, float]]) -> Histogram:
    """The sum of what expert workers reported: an expert's rows all go to its primary."""
    found: Histogram = {}
    for counters in reports:
        for layer, row in histogram(counters).items():
            found[layer] = [a + b for a, b in zip(found.get(layer, [0.0] * len(row)), row, strict=True)]
    return found


def _grown(name: str, before: list[dict[str, float]], after: list[dict[str, float]]) -> float:
    return sum(one.get(name, 0.0) for one in after) - sum(one.get(name, 0.0) for one in before)


def quantile(calls: list[float], share: float) -> float:
    """The bound under which at least ``share`` of the calls lie; infinity beyond the last, 0 for none."""
    if not sum(calls):
        return 0.0
    for bound, reached in zip([*BOUNDS, float("inf")], itertools.accumulate(calls), strict=True):
        if reached >= share * sum(calls):
            return float(bound)
    raise AssertionError("shares add up to one")


def table(metrics: dict[str, Any]) -> str:
    rows = [
        [streams, found["even_rows"], found["rows_mean"], *found["quantiles"].values(), found["calls_per_s"]]
        for streams, found in metrics["streams"].items()
    ]
    heads = ["streams", "rows if even", "mean rows", "10 %", "median", "90 %", "99 %", "calls/s"]
    return (
        f"{output.table(heads, rows)}\n(a quantile is the upper bound of its bin)\n{metrics['carries_over']}"
    )


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """The share of calls with at most so many rows, one line for each number of streams; layers in pale."""
    for number, (streams, found) in enumerate(metrics["streams"].items()):
        colour = f"C{number}"
        for layer in found["layers"].values():
            _draw_shares(axes, layer["calls"], color=colour, alpha=0.3, linewidth=0.8)
        label = f"{streams} streams"
        _draw_shares(axes, found["calls"], color=colour, label=label, marker=".")
    largest = max(quantile(found["calls"], 1.0) for found in metrics["streams"].values())
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.9, 1.5 * min(largest, BOUNDS[-1]))
    axes.xaxis.set_major_formatter(lambda rows, _position: f"{rows:g}")
    axes.set_ylim(0.0, 1.02)
    axes.set_xlabel("rows of one call of an expert, at most")
    axes.set_ylabel("share of the calls")
    axes.legend()


def _draw_shares(axes: Any, calls: list[float], **style: Any) -> None:
    if count := sum(calls):
        shares = [reached / count for reached in itertools.accumulate(calls)]
        axes.step(BOUNDS, shares[: len(BOUNDS)], where="post", **style)
