"""`tarragon bench restore`: what it takes to go on elsewhere, against computing it all again (7.4, fig. 12).

For each failure point a single stream is read up to that token, then the attention worker that holds it is
killed for real. *Restoration* is the time that its new worker spends finding, reading and loading the
committed rows. *Sequential replay* is the time that decoding took up to that token; *parallel replay* is
the time to the first token of a prompt as long as all of it (fresh random tokens, so that no cache helps).
The gap that the reader saw is reported beside them: it has detection and the next step in it as well.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path
from typing import Any, Final

import aiohttp

from tarragon.bench import output
from tarragon.bench.checkpoint import segment_bytes
from tarragon.bench.load import ID_PREFIX, LoadError
from tarragon.bench.owners import ENGINE_ARGS, held_by
from tarragon.bench.progress import Bar
from tarragon.bench.stats import summary
from tarragon.bench.workloads import random_workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.models.demo import ensure_demo_model
from tarragon.models.shape import read_model

AFTER_TOKENS: Final = 4
"""Tokens read after the failure point, so that the stream is seen to go on."""
FULL_CAPACITY_S: Final = 180.0
REPORTED_S: Final = 2.5
"""Workers report their counters every second."""
COUNTERS: Final = ("restore_s", "restored_positions", "restored_bytes", "restored_requests")
QUICK_LAYERS: Final = 4


def parser() -> argparse.ArgumentParser:
    options = output.parser("restore", __doc__)
    options.add_argument("--points", type=int, nargs="+", default=[16, 64, 256, 1024])
    options.add_argument("--trials", type=int, default=3, help="per failure point")
    options.add_argument("--quick", action="store_true", help="near points, one trial, the first layers")
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.quick:
        options.points, options.trials = [16, 64, 256], 1
        options.layers = options.layers or QUICK_LAYERS
    model = options.model or ensure_demo_model(layers=options.layers)
    length = max(options.points) + AFTER_TOKENS + 64
    metrics: dict[str, Any] = {"formula": segment_bytes(model), "points": {}}
    settings = {"model": model.name, "points": options.points, "trials": options.trials}
    arguments = [*ENGINE_ARGS, f"--max-model-len={length}"]
    try:
        with (
            Cluster(model, 2, 2, engine_args=arguments) as cluster,
            Bar("restore", float(options.trials * sum(options.points))) as bar,
        ):
            for point in options.points:
                found: list[dict[str, float]] = []
                for number in range(options.trials):
                    bar.doing(f"token {point}, trial {number + 1} of {options.trials}")
                    found.append(asyncio.run(trial(cluster, model, point, 1_000 * point + number)))
                    metrics["points"][str(point)] = conclude(found)
                    output.write(output.result("restore", settings, metrics), options.json)
                    bar.done(float(point))
    except (ClusterError, LoadError, aiohttp.ClientError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    print(report(metrics))
    output.plot(options.plot, lambda axes: draw(axes, metrics))
    return 0


async def trial(cluster: Cluster, model: Path, point: int, index: int) -> dict[str, float]:
    """One failure at token ``point``; seconds and bytes of each way to go on."""
    workload = random_workload(model, seed=2)
    body = workload.body(index) | {"max_tokens": point + AFTER_TOKENS, "model": model.name}
    before = await asyncio.to_thread(_restored, cluster)
    timeout = aiohttp.ClientTimeout(total=FULL_CAPACITY_S * 4)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        parallel_s = await _first_token(session, cluster, model, workload.prompt_tokens + point, index)
        times = await _killed_at(session, cluster, body, point, index)
    await asyncio.to_thread(cluster.wait_for, "full_capacity", FULL_CAPACITY_S)
    await asyncio.sleep(REPORTED_S)
    done = _difference(before, await asyncio.to_thread(_restored, cluster))
    if done.pop("restored_requests") != 1:
        raise LoadError(f"the stream was not restored from its checkpoint: {done}")
    return {
        **done,
        "sequential_s": times[point - 1] - times[0],
        "parallel_s": parallel_s,
        "reader_gap_s": max(b - a for a, b in zip(times[point - 1 :], times[point:], strict=False)),
    }


async def _killed_at(
    session: aiohttp.ClientSession, cluster: Cluster, body: dict[str, Any], point: int, index: int
) -> list[float]:
    """Arrival times of all tokens; the worker that holds the stream is killed when token ``point`` is in."""
    times: list[float] = []
    headers = {"X-Request-Id": f"{ID_PREFIX}{index}"}
    async with session.post(f"{cluster.url}/v1/completions", json=body, headers=headers) as response:
        if response.status != 200:
            raise LoadError(f"HTTP {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {") or b'"error"' in line[:12]:
                continue
            times.append(time.monotonic())
            if len(times) == point:
                owners = [name for name in ("aw-0", "aw-1") if index in await held_by(cluster.url, name)]
                await asyncio.to_thread(cluster.kill, owners[0])
    if len(times) < point + AFTER_TOKENS:
        raise LoadError(f"the stream ended after {len(times)} tokens")
    return times


async def _first_token(
    session: aiohttp.ClientSession, cluster: Cluster, model: Path, tokens: int, index: int
) -> float:
    rng = random.Random(f"parallel/{index}")
    prompt = [rng.randrange(5, min(40_000, read_model(model).vocab)) for _ in range(tokens)]
    body = {"model": model.name, "prompt": prompt, "max_tokens": 1, "ignore_eos": True}
    start_s = time.monotonic()
    async with session.post(f"{cluster.url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise LoadError(f"HTTP {response.status}: {(await response.text())[:300]}")
        await response.read()
    return time.monotonic() - start_s


def _restored(cluster: Cluster) -> dict[int, dict[str, float]]:
    """Counters of restoring of each living attention worker, by epoch."""
    return {
        worker["epoch"]: {name: worker.get("counters", {}).get(name, 0.0) for name in COUNTERS}
        for worker in cluster.status()["workers"]
        if worker["role"] == "attention"
    }


def _difference(before: dict[int, dict[str, float]], after: dict[int, dict[str, float]]) -> dict[str, float]:
    """What the workers that live now have done since ``before``."""
    return {
        name: sum(found[name] - before.get(epoch, {}).get(name, 0.0) for epoch, found in after.items())
        for name in COUNTERS
    }


def conclude(found: list[dict[str, float]]) -> dict[str, Any]:
    """Medians and spreads of one failure point, and what restoring is ahead by, trial by trial."""
    metrics: dict[str, Any] = {name: summary([one[name] for one in found]) for name in found[0]}
    for way in ("sequential", "parallel"):
        metrics[f"{way}_over_restore"] = summary([one[f"{way}_s"] / one["restore_s"] for one in found])
    return metrics


def report(metrics: dict[str, Any]) -> str:
    rows = [
        [
            point,
            1e3 * found["restore_s"]["median"],
            1e3 * found["parallel_s"]["median"],
            1e3 * found["sequential_s"]["median"],
            found["parallel_over_restore"]["median"],
            found["sequential_over_restore"]["median"],
            found["restored_bytes"]["median"] / 1e6,
            1e3 * found["reader_gap_s"]["median"],
        ]
        for point, found in metrics["points"].items()
    ]
    heads = ["token", "restore ms", "parallel ms", "sequential ms", "times", "times", "MB", "reader's gap ms"]
    return output.table(heads, rows)


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """Milliseconds of each way over the failure point, both axes logarithmic."""
    points = [int(point) for point in metrics["points"]]
    for name, label, colour in (
        ("sequential_s", "sequential replay", "#a34a28"),
        ("parallel_s", "parallel replay", "#c9a227"),
        ("restore_s", "restoration", "#1b6e4b"),
    ):
        values = [1e3 * metrics["points"][str(point)][name]["median"] for point in points]
        axes.plot(points, values, "o-", label=label, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("failure at token")
    axes.set_ylabel("ms")
    axes.legend()
