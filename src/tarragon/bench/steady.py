"""`tarragon bench steady`: tokens/s without failures against monolithic vLLM at its defaults (7.3).

Both servers stay up on the same cores and are loaded in turn, A B A B, so that
a drift of the machine's speed hits both; ratios are taken pair by pair.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tarragon.bench.load import Request, Stream, closed_loop, random_prompts
from tarragon.bench.machine import machine
from tarragon.bench.peer import MonolithicVllm
from tarragon.bench.stats import paired_ratio, percentile, summary
from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model

OUTPUT_TOKENS = 64
PROMPT_TOKENS = 10


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="tarragon bench steady", description=__doc__)
    options.add_argument("--model", type=Path, help="checkpoint folder (default: the demo model)")
    options.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--rounds", type=int, default=5, help="interleaved pairs per concurrency")
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    options.add_argument("--layers", type=int, help="demo model: only the first N layers")
    options.add_argument("--requests-per-stream", type=int, default=2)
    options.add_argument(
        "--compiled", action="store_true", help="Tarragon with torch.compile; the peer has it always"
    )
    options.add_argument("--json", type=Path)
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    model = options.model or ensure_demo_model(layers=options.layers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that both servers are stopped
    result = run(options, model)
    print(table(result) if options.json else json.dumps(result, indent=1))
    return 0


def run(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Measure and return {"name", "settings", "metrics", "machine"}."""
    metrics: dict[str, Any] = {}
    result: dict[str, Any] = {}
    settings = {
        "model": model.name,
        "attention_workers": options.attention_workers,
        "expert_workers": options.expert_workers,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "rounds": options.rounds,
        "compiled": options.compiled,
    }
    with (
        MonolithicVllm(model) as peer,
        Cluster(
            model,
            attention_workers=options.attention_workers,
            expert_workers=options.expert_workers,
            engine_args=["--no-enforce-eager"] if options.compiled else [],
        ) as cluster,
    ):
        name, url = model.name, f"{cluster.url}/v1"
        startup = {"tarragon": cluster.ready_line, "vllm_s": peer.startup_s}
        for concurrency in options.concurrency:
            warm_up(url, name, peer.url, concurrency)
            before = cluster.status()
            ours, theirs = [], []
            for turn in range(options.rounds):
                load = requests(concurrency, options.requests_per_stream * concurrency, turn)
                ours.append(measure(url, name, concurrency, load))
                theirs.append(measure(peer.url, "model", concurrency, load))
                print(
                    f"{concurrency:3} streams, pair {turn + 1}/{options.rounds}: "
                    f"{ours[-1]['tokens_per_s']:.1f} against {theirs[-1]['tokens_per_s']:.1f} tokens/s",
                    file=sys.stderr,
                )
            metrics[str(concurrency)] = {
                "tarragon": summary([m["tokens_per_s"] for m in ours]),
                "vllm": summary([m["tokens_per_s"] for m in theirs]),
                "ratio": paired_ratio([m["tokens_per_s"] for m in ours], [m["tokens_per_s"] for m in theirs]),
                "tbt_ms": {
                    "tarragon": summary([m["tbt_median_ms"] for m in ours]),
                    "vllm": summary([m["tbt_median_ms"] for m in theirs]),
                },
                "where": where(before, cluster.status()),
            }
            result = {
                "name": "steady",
                "settings": settings,
                "metrics": {"by_concurrency": metrics, "startup": startup},
                "machine": machine(),
            }
            if options.json:  # as they come: a later failure must not cost what was measured
                options.json.write_text(json.dumps(result, indent=1))
    return result


def requests(concurrency: int, count: int, seed: int) -> list[Request]:
    params = {"temperature": 0, "ignore_eos": True}
    prompts = random_prompts(count, PROMPT_TOKENS, seed=1_000 * concurrency + seed, vocabulary=40_000)
    return [Request(prompt, OUTPUT_TOKENS, params) for prompt in prompts]


def measure(url: str, model: str, concurrency: int, load: list[Request]) -> dict[str, float]:
    """One closed-loop run; raises RuntimeError if any stream failed."""
    start = time.monotonic()
    streams = asyncio.run(closed_loop(url, model, load, concurrency))
    elapsed = time.monotonic() - start
    fail_on_error(streams)
    gaps = [gap for stream in streams for gap in stream.gaps_s]
    tokens = sum((stream.usage or {}).get("completion_tokens", 0) for stream in streams)
    return {
        "tokens_per_s": tokens / elapsed,
        "tbt_median_ms": percentile(gaps, 0.5) * 1e3,
        "tbt_p95_ms": percentile(gaps, 0.95) * 1e3,
    }


def warm_up(ours: str, our_name: str, theirs: str, concurrency: int) -> None:
    load = requests(concurrency, concurrency, 999)
    for url, name in ((ours, our_name), (theirs, "model")):
        fail_on_error(asyncio.run(closed_loop(url, name, load, concurrency)))


def fail_on_error(streams: list[Stream]) -> None:
    for stream in streams:
        if stream.error:
            raise RuntimeError(f"a stream failed: {stream.error}")


def where(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds spent per worker and kind of work between two statuses (the counters that end in _s)."""
    old = {worker["id"]: worker.get("counters", {}) for worker in before["workers"]}
    return {
        worker["id"]: {
            name: value - old.get(worker["id"], {}).get(name, 0.0)
            for name, value in worker.get("counters", {}).items()
        }
        for worker in after["workers"]
        if worker.get("counters")
    }


def table(result: dict[str, Any]) -> str:
    """The result in a few lines for a person."""
    lines = ["streams  tarragon tok/s  vllm tok/s  ratio (95 % interval)"]
    for concurrency, found in result["metrics"]["by_concurrency"].items():
        ratio = found["ratio"]
        lines.append(
            f"{concurrency:>7}  {found['tarragon']['median']:14.1f}  {found['vllm']['median']:10.1f}  "
            f"{ratio['median']:.2f} ({ratio['ci95'][0]:.2f} to {ratio['ci95'][1]:.2f})"
        )
    return "\n".join(lines)
