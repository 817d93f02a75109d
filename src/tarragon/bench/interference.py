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
from tarragon.bench.load import REQUEST_TIMEOUT_S, Request, Stream, random_prompts, stream_completion
from tarragon.bench.stats import percentile, summary
from tarragon.cluster import Cluster
from tarragon.config import Config
from tarragon.models.demo import ensure_demo_model

SAME: Final = "on the prompt's attention worker"
OTHER: Final = "on the other attention worker"
SHORT_TOKENS: Final = 10
VOCABULARY: Final = 40_000
START_TIMEOUT_S: Final = 60.0
PARAMS: Final = {"temperature": 0, "ignore_eos": True}


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
        url = f"{cluster.url}/v1"
        asyncio.run(beside(url, model.name, options, prompts=1, seed=0))  # everything has run once
        calm = asyncio.run(calm_streams(url, model.name, options.baseline_tokens))
        streams, spans = asyncio.run(beside(url, model.name, options, prompts=options.prompts, seed=1))
    return {
        "without a prompt": gap_figures([gap for stream in calm for gap in stream.gaps_s]),
        SAME: gap_figures(gaps_in(streams[0], spans)),
        OTHER: gap_figures(gaps_in(streams[1], spans)),
        "prompt_s": summary([span.end_s - span.start_s for span in spans]),
    }


async def calm_streams(url: str, model: str, tokens: int) -> list[Stream]:
    """Two streams with nothing beside them."""
    async with _session() as session:
        prompts = random_prompts(2, SHORT_TOKENS, seed=7, vocabulary=VOCABULARY)
        tasks = [
            asyncio.create_task(stream_completion(session, url, model, Request(prompt, tokens, PARAMS)))
            for prompt in prompts
        ]
        return [_checked(stream) for stream in await asyncio.gather(*tasks)]


async def beside(
    url: str, model: str, options: argparse.Namespace, *, prompts: int, seed: int
) -> tuple[list[Stream], list[Span]]:
    """Two streams that go on for as long as the prompts take, and when each prompt was computed."""
    async with _session() as session:
        shorts = random_prompts(2, SHORT_TOKENS, seed=100 + seed, vocabulary=VOCABULARY)
        longs = random_prompts(prompts, options.prompt_tokens, seed=200 + seed, vocabulary=VOCABULARY)
        streams = [Stream(0.0), Stream(0.0)]
        tasks = []
        for stream, short in zip(streams, shorts, strict=True):
            # In turn, so that the first worker gets the first stream and the second the other.
            tasks.append(asyncio.create_task(decode(session, url, model, short, stream)))
            await _first_token(stream)
        spans = []
        for long in longs:
            await asyncio.sleep(0.5)
            start_s = time.monotonic()
            _checked(await stream_completion(session, url, model, Request(long, 1, PARAMS)))
            spans.append(Span(start_s, time.monotonic()))
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for stream in streams:
        _checked(stream)
    return streams, spans


async def decode(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], into: Stream
) -> None:
    """Stream completions of one prompt one after the other into one trace, until cancelled."""
    while True:
        body = {"model": model, "prompt": prompt, "max_tokens": 1_500, "stream": True, **PARAMS}
        async with session.post(f"{url}/completions", json=body) as response:
            if response.status != 200:
                into.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    into.token_times_s.append(time.monotonic())


def gaps_in(stream: Stream, spans: list[Span]) -> list[float]:
    """Gaps (s) between tokens that overlap any of the spans."""
    times = stream.token_times_s
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


async def _first_token(stream: Stream) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not stream.token_times_s:
        _checked(stream)
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"a stream had no token after {START_TIMEOUT_S:g} s")
        await asyncio.sleep(0.01)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S))


def _checked(stream: Stream) -> Stream:
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
