"""`tarragon bench interference`: what a long prompt does to the streams beside it (5.2).

Two streams decode, one on each attention worker. Then prompts of 2,000 tokens come, one after the
other. The gateway gives each to the first worker (equal load, smallest id): the first stream shares its
attention worker with them, the second one only the expert workers and the cores. Reported is the time
between tokens of both, for the gaps that overlap a prompt's time from request to first token, and the
same of two streams with nothing beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp

from tarragon.bench import output
from tarragon.bench.load import closed_loop, read_stream, session
from tarragon.bench.stats import percentile, summary
from tarragon.bench.timeline import Trace
from tarragon.bench.workloads import VOCABULARY_MAX, Workload
from tarragon.cluster import Cluster
from tarragon.config import Config
from tarragon.models.demo import ensure_demo_model

SAME: Final = "on the prompt's attention worker"
OTHER: Final = "on the other attention worker"
SHORT_TOKENS: Final = 10
START_TIMEOUT_S: Final = 60.0
DECODED_TOKENS: Final = 1_500
"""Of each stream that goes on for as long as the prompts take, before it begins anew."""


class Span(NamedTuple):
    """When a prompt was being computed; seconds of the monotonic clock."""

    start_s: float
    end_s: float


def parser() -> argparse.ArgumentParser:
    options = output.parser("interference", __doc__)
    options.add_argument("--prompts", type=int, default=3, help="long prompts of each setting")
    options.add_argument("--prompt-tokens", type=int, default=2_000)
    options.add_argument(
        "--pairs-max", type=int, nargs="+", default=[Config().batch_pairs_max], help="batch_pairs_max to try"
    )
    options.add_argument(
        "--chunk-tokens",
        type=int,
        nargs="+",
        default=[0],
        help="max-num-batched-tokens to try; 0 leaves the engine's default",
    )
    options.add_argument("--baseline-tokens", type=int, default=64)
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    model = options.model or ensure_demo_model(layers=options.layers)
    settings = {
        "model": model.name,
        "attention_workers": 2,
        "expert_workers": 2,
        "prompts": options.prompts,
        "prompt_tokens": options.prompt_tokens,
    }
    metrics: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for pairs_max in options.pairs_max:
        for chunk in options.chunk_tokens:
            name = f"pairs {pairs_max}, chunk {chunk or 'default'}"
            metrics[name] = measure(model, options, pairs_max, chunk)
            found = output.result("interference", settings, metrics)
            output.write(found, options.json)
            print(f"{name}: done", file=sys.stderr)
    print(report(metrics))
    output.plot(options.plot, lambda axes: draw(axes, metrics))
    return 0


def measure(model: Path, options: argparse.Namespace, pairs_max: int, chunk: int) -> dict[str, Any]:
    """One cluster with one setting; gaps in ms."""
    flags = [f"--max-num-batched-tokens={chunk}"] if chunk else []
    with Cluster(model, 2, 2, engine_args=flags, batch_pairs_max=pairs_max) as cluster:
        url = cluster.url
        asyncio.run(beside(url, model.name, options, prompts=1, seed=0))  # everything has run once
        calm = asyncio.run(calm_streams(url, model.name, options.baseline_tokens))
        streams, spans = asyncio.run(beside(url, model.name, options, prompts=options.prompts, seed=1))
    return {
        "without a prompt": gap_figures([gap for stream in calm for gap in stream.gaps_s]),
        SAME: gap_figures(gaps_in(streams[0], spans)),
        OTHER: gap_figures(gaps_in(streams[1], spans)),
        "prompt_s": summary([span.end_s - span.start_s for span in spans]),
    }


async def calm_streams(url: str, model: str, tokens: int) -> list[Trace]:
    """Two streams with nothing beside them."""
    workload = Workload(7, VOCABULARY_MAX, SHORT_TOKENS, tokens, greedy=True)
    return [_checked(trace) for trace in await closed_loop(workload, url, model, range(2), 2)]


async def beside(
    url: str, model: str, options: argparse.Namespace, *, prompts: int, seed: int
) -> tuple[list[Trace], list[Span]]:
    """Two streams that go on for as long as the prompts take, and when each prompt was computed."""
    shorts = Workload(100 + seed, VOCABULARY_MAX, SHORT_TOKENS, DECODED_TOKENS, greedy=True)
    longs = Workload(200 + seed, VOCABULARY_MAX, options.prompt_tokens, 1, greedy=True)
    async with session() as client:
        streams = [Trace(0, 0.0), Trace(1, 0.0)]
        tasks = []
        for stream in streams:
            # In turn, so that the first worker gets the first stream and the second the other.
            tasks.append(asyncio.create_task(decode(client, url, model, shorts.body(stream.index), stream)))
            await _first_token(stream)
        spans = []
        for index in range(prompts):
            await asyncio.sleep(0.5)
            long = Trace(index, time.monotonic())
            await read_stream(client, url, model, longs.body(index), long)
            spans.append(Span(_checked(long).due_s, time.monotonic()))
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for stream in streams:
        _checked(stream)
    return streams, spans


async def decode(
    client: aiohttp.ClientSession, url: str, model: str, body: dict[str, Any], into: Trace
) -> None:
    """Stream one completion after the other, until cancelled; the times of all are in one trace."""
    while not into.error:
        one = Trace(into.index, time.monotonic(), times_s=into.times_s)
        await read_stream(client, url, model, body, one)
        into.error = one.error


def gaps_in(stream: Trace, spans: list[Span]) -> list[float]:
    """Gaps (s) between tokens that overlap any of the spans."""
    times = stream.times_s
    return [
        b - a
        for a, b in itertools.pairwise(times)
        if any(b > span.start_s and a < span.end_s for span in spans)
    ]


def gap_figures(gaps_s: list[float]) -> dict[str, float]:
    return {
        "median_ms": percentile(gaps_s, 0.5) * 1e3,
        "p95_ms": percentile(gaps_s, 0.95) * 1e3,
        "max_ms": max(gaps_s, default=0.0) * 1e3,
        "gaps": len(gaps_s),
    }


async def _first_token(stream: Trace) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not stream.times_s:
        _checked(stream)
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"a stream had no token after {START_TIMEOUT_S:g} s")
        await asyncio.sleep(0.01)


def _checked(stream: Trace) -> Trace:
    if stream.error:
        raise RuntimeError(f"a stream failed: {stream.error}")
    return stream


def report(metrics: dict[str, Any]) -> str:
    rows = [
        [
            f"{setting}: {where}",
            *(figures[name] for name in ("median_ms", "p95_ms", "max_ms")),
            figures["gaps"],
        ]
        for setting, found in metrics.items()
        for where, figures in found.items()
        if where != "prompt_s"
    ]
    lines = [output.table(["time between tokens", "median ms", "P95 ms", "max ms", "gaps"], rows)]
    lines += [
        f"{setting}: first token of the long prompt after {found['prompt_s']['median']:.2f} s (median)"
        for setting, found in metrics.items()
    ]
    return "\n".join(lines)


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """Bars of the median with the maximum above, by setting and place; logarithmic."""
    places = ["without a prompt", OTHER, SAME]
    width = 0.8 / len(places)
    for number, place in enumerate(places):
        at = [index + (number - 1) * width for index in range(len(metrics))]
        medians = [found[place]["median_ms"] for found in metrics.values()]
        above = [found[place]["max_ms"] - found[place]["median_ms"] for found in metrics.values()]
        axes.bar(at, medians, width, label=place, yerr=[[0.0] * len(at), above], capsize=3)
    axes.set_xticks(range(len(metrics)), list(metrics))
    axes.set_yscale("log")
    axes.set_ylabel("time between tokens, ms (bar: median, whisker: max)")
    axes.legend()
