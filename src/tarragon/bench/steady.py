"""`tarragon bench steady`: latency and tokens/s without failures, against monolithic vLLM (7.3).

By default a closed loop of so many streams: both servers stay up on the same cores and are loaded in turn,
A B A B, so that a drift of the machine's speed hits both; ratios are taken pair by pair. The peer has its
defaults, that is, it is compiled. With --open, requests come as a Poisson process has them come, at several
rates, and Tarragon is also compared with a decoupled system without resilience and with vLLM's tensor and
pipeline parallelism (steady_open.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tarragon.bench import output, steady_open, steady_report
from tarragon.bench.load import LoadError, closed_loop, fail_on_error
from tarragon.bench.peer import MonolithicVllm, PeerError
from tarragon.bench.progress import Bar
from tarragon.bench.sides import SIDES
from tarragon.bench.stats import judge, paired_ratio, percentile, summary
from tarragon.bench.workloads import PROMPT_TOKENS, VOCABULARY_MAX, WORKLOADS, Workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.models.demo import ensure_demo_model
from tarragon.models.shape import read_model

OUTPUT_TOKENS: Final = 64
GATE: Final = {"streams": 32, "ratio_min": 0.80}
"""Tokens/s against monolithic vLLM that is accepted."""
QUICK_LAYERS: Final = 4
_PLAN_START_S: Final = 60.0
_COLOURS: Final = {"tarragon": "#1b6e4b", "vllm": "#a34a28"}
_PANELS: Final = {
    "output tokens/s": ("tarragon", "vllm"),
    "TTFT, ms": ("ttft_ms",),
    "TBT, ms": ("tbt_ms",),
}
"""What is drawn, and where it is in a result: one entry for each side, or one that holds both."""
_BAR: Final = 0.35


def parser() -> argparse.ArgumentParser:
    options = output.parser("steady", __doc__)
    options.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument(
        "--rounds", type=int, help="interleaved pairs (default: 5; with --open 3, of each rate)"
    )
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    options.add_argument("--requests-per-stream", type=int, default=2)
    options.add_argument(
        "--compiled", action="store_true", help="Tarragon with torch.compile; the peer has it always"
    )
    options.add_argument("--quick", action="store_true", help="few pairs, the demo model's first layers")
    opened = options.add_argument_group("with --open")
    opened.add_argument("--open", action="store_true", help="Poisson arrivals at a range of rates")
    opened.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    opened.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    opened.add_argument(
        "--loads", type=float, nargs="+", default=[0.3, 0.6, 0.9], help="rates as shares of the capacity"
    )
    opened.add_argument("--rates", type=float, nargs="+", help="requests/s, instead of shares")
    opened.add_argument("--window-s", type=float, default=15.0, help="seconds of a rate")
    return options


def main(argv: list[str]) -> int:
    """Exit code 1 if a request or our own cluster failed; verdicts are in the result."""
    options = with_defaults(parser().parse_args(argv))
    model = options.model or ensure_demo_model(layers=options.layers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that both servers are stopped
    try:
        result = steady_open.run(options, model) if options.open else run(options, model)
    except (ClusterError, LoadError, PeerError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    show = steady_report.report(result["metrics"]) if options.open else table(result)
    print(show if options.json else json.dumps(result, indent=1))
    if options.plot and options.open:
        steady_report.picture(result["metrics"], options.plot)
    else:
        output.plot(options.plot, lambda axes: draw(axes, result["metrics"]))
    return 0


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what --quick and --open change."""
    quick = options.quick
    if options.rounds is None:
        options.rounds = (1 if quick else 3) if options.open else (1 if quick else 5)
    if quick:
        options.requests_per_stream = 1
        options.window_s = min(options.window_s, 8.0)
        options.layers = options.layers or (None if options.model else QUICK_LAYERS)
    options.loads = options.rates or options.loads
    options.capacity_waves = 1 if quick else 2
    return options


def run(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """The closed loop: measure and return {"name", "settings", "metrics", "machine"}."""
    metrics: dict[str, Any] = {}
    settings = {
        "model": model.name,
        "attention_workers": options.attention_workers,
        "expert_workers": options.expert_workers,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "rounds": options.rounds,
        "compiled": options.compiled,
    }
    result = output.result("steady", settings, metrics)
    vocabulary = min(VOCABULARY_MAX, read_model(model).vocab)
    planned = {streams: plan_pair_s(streams, options) for streams in options.concurrency}
    with Bar("steady", _PLAN_START_S + sum((options.rounds + 1) * pair for pair in planned.values())) as bar:
        bar.doing("starting both")
        with (
            MonolithicVllm(model) as peer,
            Cluster(
                model,
                attention_workers=options.attention_workers,
                expert_workers=options.expert_workers,
                engine_args=["--no-enforce-eager"] if options.compiled else [],
            ) as cluster,
        ):
            bar.done(_PLAN_START_S)
            metrics["by_concurrency"] = {}
            metrics["startup"] = {"tarragon": cluster.ready_line, "vllm_s": peer.startup_s}
            sides = ((cluster.url, model.name), (peer.url, peer.model_name))
            for streams in options.concurrency:
                for url, name in sides:
                    measure(url, name, requests(streams, 999, vocabulary), streams, streams)
                bar.done(planned[streams])
                before = cluster.status()
                found = pairs(sides, streams, options, vocabulary, bar)
                metrics["by_concurrency"][str(streams)] = {
                    **compare(*found, streams),
                    "where": where(before, cluster.status()),
                }
                output.write(result, options.json)  # as they come: a later failure must not cost it
    return result


def plan_pair_s(streams: int, options: argparse.Namespace) -> float:
    """A guess of what both sides take for one pair."""
    return float(2 * options.requests_per_stream * OUTPUT_TOKENS * (0.1 + 0.02 * streams))


def pairs(
    sides: Sequence[tuple[str, str]], streams: int, options: argparse.Namespace, vocabulary: int, bar: Bar
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Both sides (URL and model) in turn, with the same requests in each pair."""
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    count = options.requests_per_stream * streams
    for turn in range(options.rounds):
        what = f"{streams} streams, pair {turn + 1}/{options.rounds}"
        bar.doing(what)
        load = requests(streams, turn, vocabulary)
        for (url, name), found in zip(sides, (ours, theirs), strict=True):
            found.append(measure(url, name, load, count, streams))
        rates = " against ".join(f"{found[-1]['tokens_per_s']:.1f}" for found in (ours, theirs))
        bar.done(plan_pair_s(streams, options), f"{what}: {rates} tokens/s")
    return ours, theirs


def requests(concurrency: int, seed: int, vocabulary: int) -> Workload:
    """Short greedy requests, others for each concurrency and pair."""
    return Workload(1_000 * concurrency + seed, vocabulary, PROMPT_TOKENS, OUTPUT_TOKENS, greedy=True)


def measure(url: str, model: str, load: Workload, count: int, concurrency: int) -> dict[str, float]:
    """One closed-loop run of ``count`` requests. Raises LoadError if any stream failed."""
    start_s = time.monotonic()
    traces = asyncio.run(closed_loop(load, url, model, range(count), concurrency))
    elapsed_s = time.monotonic() - start_s
    fail_on_error(traces)
    gaps_s = [gap for trace in traces for gap in trace.gaps_s]
    first_s = [trace.times_s[0] - trace.due_s for trace in traces]
    return {
        "tokens_per_s": sum(len(trace.tokens) for trace in traces) / elapsed_s,
        "tbt_median_ms": percentile(gaps_s, 0.5) * 1e3,
        "tbt_p95_ms": percentile(gaps_s, 0.95) * 1e3,
        "ttft_median_ms": percentile(first_s, 0.5) * 1e3,
        "ttft_p95_ms": percentile(first_s, 0.95) * 1e3,
    }


def compare(ours: list[dict[str, float]], theirs: list[dict[str, float]], concurrency: int) -> dict[str, Any]:
    """Medians, spreads and the ratio of tokens/s, pair by pair."""
    rates = [[one["tokens_per_s"] for one in side] for side in (ours, theirs)]
    ratio = paired_ratio(*rates)
    found: dict[str, Any] = {"tarragon": summary(rates[0]), "vllm": summary(rates[1]), "ratio": ratio}
    for name in ("tbt_ms", "tbt_p95_ms", "ttft_ms", "ttft_p95_ms"):
        key = name if "p95" in name else name.replace("_ms", "_median_ms")
        found[name] = {
            side: summary([one[key] for one in measured])
            for side, measured in (("tarragon", ours), ("vllm", theirs))
        }
    if concurrency == GATE["streams"]:
        found["gate"] = {**GATE, "verdict": judge(ratio["ci95"], ratio["n"], at_least=GATE["ratio_min"])}
    return found


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
    """The closed loop's result in a few lines for a person."""
    lines = [
        "streams  tarragon tok/s  vllm tok/s  ratio (95 % interval)  "
        "TTFT ms, ours and theirs  TBT ms, ours and theirs"
    ]
    for concurrency, found in result["metrics"]["by_concurrency"].items():
        ratio = found["ratio"]
        times = (
            " ".join(f"{found[name][side]['median']:.0f}" for side in ("tarragon", "vllm"))
            for name in ("ttft_ms", "tbt_ms")
        )
        first, between = times
        lines.append(
            f"{concurrency:>7}  {found['tarragon']['median']:14.1f}  {found['vllm']['median']:10.1f}  "
            f"{ratio['median']:.2f} ({ratio['ci95'][0]:.2f} to {ratio['ci95'][1]:.2f})"
            f"{first:>26}{between:>25}"
        )
        if "gate" in found:
            lines.append(f"gate (at least {GATE['ratio_min']:.2f} of vLLM): {found['gate']['verdict']}")
    return "\n".join(lines)


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """Tokens/s, TTFT and TBT of both by the number of streams, with the range of the pairs."""
    figure, found = axes.figure, metrics["by_concurrency"]
    axes.remove()
    panels = figure.subplots(1, len(_PANELS))
    for panel, (label, keys) in zip(panels, _PANELS.items(), strict=True):
        for number, (side, colour) in enumerate(_COLOURS.items()):
            figures = [one[keys[number]] if len(keys) > 1 else one[keys[0]][side] for one in found.values()]
            medians = [one["median"] for one in figures]
            spread = [
                [one["median"] - one["min"] for one in figures],
                [one["max"] - one["median"] for one in figures],
            ]
            at = [index + _BAR * number for index in range(len(found))]
            panel.bar(at, medians, _BAR, yerr=spread, capsize=3, color=colour, label=side)
        panel.set_xticks([index + _BAR / 2 for index in range(len(found))], list(found))
        panel.set_xlabel("streams")
        panel.set_title(label)
    panels[0].legend(loc="upper left", fontsize="small")
