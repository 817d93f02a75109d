"""`tarragon bench overhead`: tokens/s with protection on against off, without failures (7.3, appendix F).

Two clusters of the same code, one with every protection at its default and one with it switched off, stay
up on the same cores and are loaded in turn, on-off, off-on, ..., so that a drift of the machine hits both;
ratios are taken pair by pair. Both are started anew several times, because where memory happens to lie
favours one of them by more than what is to be found. What the idle one uses meanwhile is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from tarragon.bench.load import LoadError, closed_loop
from tarragon.bench.machine import machine
from tarragon.bench.progress import Bar
from tarragon.bench.stats import paired_ratio, summary
from tarragon.bench.workloads import random_workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.config import Config
from tarragon.config import load as load_config
from tarragon.models.demo import ensure_demo_model

COST_MAX: Final = 0.01
"""Promise 5 of the design: protection costs at most this share of tokens/s."""
NEVER_MS: Final = 86_400_000.0
OFF: Final = {
    "shadow_replicas": 0,
    "probe_silence_ms": NEVER_MS,
    "probe_interval_ms": NEVER_MS,
    "worker_probe_interval_ms": NEVER_MS,
}
"""Settings that switch protection off."""
QUICK_LAYERS: Final = 4
_PLAN_START_S: Final = 50.0
_PLAN_ROUND_S: Final = 12.0
_CLOCK_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="tarragon bench overhead", description=__doc__)
    options.add_argument("--model", type=Path, help="checkpoint folder (default: the demo model)")
    options.add_argument("--layers", type=int, help="demo model: only the first N layers")
    options.add_argument("--concurrency", type=int, default=16)
    options.add_argument("--requests", type=int, help="per measurement (default: two per stream; quick: one)")
    options.add_argument("--starts", type=int, help="fresh pairs of clusters (default: 3; quick: 1)")
    options.add_argument("--pairs", type=int, help="pairs per start (default: 8; quick: 3)")
    options.add_argument(
        "--pairs-max", type=int, default=64, help="the last start goes on to so many while inconclusive"
    )
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    options.add_argument(
        "--off", action="append", default=[], metavar="NAME=VALUE", help="settings of the side without"
    )
    options.add_argument("--quick", action="store_true", help="few pairs, the demo model's first layers")
    options.add_argument("--json", type=Path)
    return options


def main(argv: list[str]) -> int:
    """Exit code 1 only if a request or a cluster failed; the verdict is in the result."""
    options = with_defaults(parser().parse_args(argv))
    model = options.model or ensure_demo_model(layers=options.layers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that both clusters are stopped
    bench = Overhead(options, model)
    try:
        with Bar("overhead", planned_s(options)) as bar:
            bench.run(bar)
    except (ClusterError, LoadError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    print(table(bench.result) if options.json else json.dumps(bench.result, indent=1))
    return 0


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what --quick changes and check the settings. Raises ConfigError."""
    quick = options.quick
    for name, full, short in (
        ("starts", 3, 1),
        ("pairs", 8, 3),
        ("requests", 2 * options.concurrency, options.concurrency),
    ):
        if getattr(options, name) is None:
            setattr(options, name, short if quick else full)
    if quick:
        options.pairs_max = options.pairs
        options.layers = options.layers or (None if options.model else QUICK_LAYERS)
    options.settings_off = dict(item.partition("=")[::2] for item in options.off) or off_settings()
    load_config(environ={}, flags=options.settings_off)
    return options


def off_settings() -> dict[str, Any]:
    """The part of OFF that this version has."""
    return {name: value for name, value in OFF.items() if name in Config.__struct_fields__}


def planned_s(options: argparse.Namespace) -> float:
    return float(options.starts * (_PLAN_START_S + 2 * _PLAN_ROUND_S * options.pairs))


class Overhead:
    """One run; ``result`` is always what is known so far."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self._options, self._model = options, model
        self._workload = random_workload(model)
        self._metrics: dict[str, Any] = {
            name: {"on": [], "off": []} for name in ("tokens_per_s", "cpu_ms_per_token", "idle_cores")
        }
        self.result: dict[str, Any] = {
            "name": "overhead",
            "settings": {
                "model": model.name,
                "attention_workers": options.attention_workers,
                "expert_workers": options.expert_workers,
                "concurrency": options.concurrency,
                "requests": options.requests,
                "output_tokens": self._workload.output_tokens,
                "starts": options.starts,
                "off": options.settings_off,
            },
            "metrics": self._metrics,
            "machine": machine(),
        }

    def run(self, bar: Bar) -> None:
        """All starts; the last one is made longer while the run is inconclusive."""
        options = self._options
        for start in range(options.starts):
            bar.doing(f"start {start + 1} of {options.starts}")
            with ExitStack() as stack:
                clusters = {"on": self._cluster({}), "off": self._cluster(options.settings_off)}
                # Who is first in memory changes with every start.
                for side in ("on", "off") if start % 2 == 0 else ("off", "on"):
                    stack.enter_context(clusters[side])
                for cluster in clusters.values():
                    self._measure(cluster, range(options.concurrency))
                bar.done(_PLAN_START_S)
                for _ in range(options.pairs):
                    self._pair(clusters, bar)
                is_last = start == options.starts - 1
                while (
                    is_last
                    and self._metrics["verdict"] == "inconclusive"
                    and len(self._metrics["tokens_per_s"]["on"]) < options.pairs_max
                ):
                    self._pair(clusters, bar)

    def _cluster(self, settings: dict[str, Any]) -> Cluster:
        options = self._options
        return Cluster(self._model, options.attention_workers, options.expert_workers, **settings)

    def _pair(self, clusters: dict[str, Cluster], bar: Bar) -> None:
        """The same requests to both; who comes first alternates."""
        options, metrics = self._options, self._metrics
        number = len(metrics["tokens_per_s"]["on"])
        bar.doing(f"pair {number + 1}")
        first = 1_000 * (number + 1)
        sides = ("on", "off") if number % 2 == 0 else ("off", "on")
        for side, idle in (sides, sides[::-1]):
            idle_s, used_s = cpu_s(clusters[idle]), cpu_s(clusters[side])
            tokens, elapsed_s = self._measure(clusters[side], range(first, first + options.requests))
            used_s, idle_s = cpu_s(clusters[side]) - used_s, cpu_s(clusters[idle]) - idle_s
            metrics["tokens_per_s"][side].append(tokens / elapsed_s)
            metrics["cpu_ms_per_token"][side].append(1e3 * used_s / tokens)
            metrics["idle_cores"][idle].append(idle_s / elapsed_s)
        conclude(metrics)
        if options.json:  # as they come: a later failure must not cost what was measured
            options.json.write_text(json.dumps(self.result, indent=1))
        on, off = (metrics["tokens_per_s"][side][-1] for side in ("on", "off"))
        note = f"on {on:.1f}, off {off:.1f} tokens/s; {cost_text(metrics)}"
        bar.done(2 * _PLAN_ROUND_S, note)

    def _measure(self, cluster: Cluster, indexes: range) -> tuple[int, float]:
        """Tokens of these requests and seconds they took. Raises LoadError if one fails."""
        start_s = time.monotonic()
        traces = asyncio.run(
            closed_loop(self._workload, cluster.url, self._model.name, indexes, self._options.concurrency)
        )
        elapsed_s = time.monotonic() - start_s
        for trace in traces:
            if trace.error:
                raise LoadError(f"a request failed: {trace.error}")
        return sum(len(trace.tokens) for trace in traces), elapsed_s


def cpu_s(cluster: Cluster) -> float:
    """Processor seconds that the living processes of a cluster have used."""
    ticks = 0
    for pid in cluster.processes():
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _CLOCK_TICKS_PER_S


def conclude(metrics: dict[str, Any]) -> None:
    """Put ratio, cost and verdict into ``metrics``.

    Processor time per token is there beside them: others on the machine disturb it less, but it does not see
    waiting. The verdict is about tokens/s.
    """
    ratio = paired_ratio(metrics["tokens_per_s"]["on"], metrics["tokens_per_s"]["off"])
    low, high = ratio["ci95"]
    metrics["ratio"] = ratio
    metrics["cost"] = {"median": 1.0 - ratio["median"], "ci95": [1.0 - high, 1.0 - low], "max": COST_MAX}
    metrics["verdict"] = verdict(metrics["cost"]["ci95"], len(ratio["pairs"]))
    metrics["cpu_ratio"] = paired_ratio(metrics["cpu_ms_per_token"]["on"], metrics["cpu_ms_per_token"]["off"])


def verdict(ci95: list[float], pairs: int) -> str:
    """Whether the whole interval of the cost says that it is at most COST_MAX, or more.

    An interval of fewer than 5 pairs says nothing: no bootstrap is wider than its few values.
    """
    if pairs < 5:
        return "inconclusive"
    if ci95[1] <= COST_MAX:
        return "holds"
    return "does not hold" if ci95[0] > COST_MAX else "inconclusive"


def cost_text(metrics: dict[str, Any]) -> str:
    cost, pairs = metrics["cost"], len(metrics["ratio"]["pairs"])
    low, high = cost["ci95"]
    return f"cost {cost['median']:+.2%} ({low:+.2%} to {high:+.2%}, {pairs} pairs): {metrics['verdict']}"


def table(result: dict[str, Any]) -> str:
    """The result in a few lines for a person."""
    metrics = result["metrics"]
    lines = []
    for side in ("on", "off"):
        rate, cpu, idle = (
            summary(metrics[name][side])["median"]
            for name in ("tokens_per_s", "cpu_ms_per_token", "idle_cores")
        )
        lines.append(
            f"protection {side:3}: median {rate:.1f} tokens/s, {cpu:.2f} ms of processor per token; "
            f"{idle:.3f} cores while idle"
        )
    cpu = metrics["cpu_ratio"]
    low, high = cpu["ci95"]
    lines.append(f"processor time, on against off: {cpu['median']:.3f} ({low:.3f} to {high:.3f})")
    lines.append(f"tokens/s: {cost_text(metrics)} (at most {COST_MAX:.0%})")
    return "\n".join(lines)
