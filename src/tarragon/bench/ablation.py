"""`tarragon bench ablation`: what each part of the protection costs without failures (appendix F).

Tarragon and its three variants, each without one part more (``bench.modes``), stay up on the same cores and
are loaded in turn, A B C D, D C B A, ...: in a round all get the same requests at the same moments of a
Poisson process. Reported are tokens/s by request rate and workload, and ratios to Tarragon, round by round,
with 95 % intervals. A variant is within 3 % of Tarragon only if its whole interval is. Below saturation every
system gives out what comes in, so a rate above its capacity is among the rates; the time between tokens,
which is there as well, tells the sides apart at all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from tarragon.bench import output
from tarragon.bench.load import LoadError, capacity_tokens_per_s, closed_loop, fail_on_error
from tarragon.bench.modes import MODES, TARRAGON, WITHOUT
from tarragon.bench.progress import Bar
from tarragon.bench.sides import Server
from tarragon.bench.stats import PAIRS_MIN, judge, paired_ratio, summary
from tarragon.bench.steady_open import window
from tarragon.bench.workloads import WORKLOADS, Workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.models.demo import ensure_demo_model

WITHIN: Final = 0.03
"""The paper's claim: the largest deviation among all variants."""
CAPACITY_STREAMS: Final = 16
WARM_INDEX, CAPACITY_INDEX = 1_000_000, 2_000_000
QUICK_LAYERS: Final = 4
FIGURES: Final = ("tokens_per_s", "tbt_median_ms")
CARRIES_OVER: Final = (
    "All four sides share the cores of one machine, and the others' idle processes with them. What carries "
    "over are the sides' proportions, not their rates. On GPUs checkpoints travel by a network card of their "
    "own and probes cost no core; here both take the cores that compute, so their share is an upper bound. "
    "A routing table is looked up at its changes only: without one the same map from expert to link remains."
)
_PLAN_START_S: Final = 20.0
_PLAN_DRAIN_SHARE: Final = 0.3


def parser() -> argparse.ArgumentParser:
    options = output.parser("ablation", __doc__)
    options.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=list(WORKLOADS))
    options.add_argument(
        "--loads",
        type=float,
        nargs="+",
        default=[0.5, 0.8, 1.2],
        help="rates, as shares of Tarragon's capacity",
    )
    options.add_argument("--rates", type=float, nargs="+", help="requests/s, instead of shares")
    options.add_argument("--rounds", type=int, default=6, help="windows of each side, rate and workload")
    options.add_argument("--window-s", type=float, default=5.0, help="seconds of arrivals in a window")
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    options.add_argument(
        "--kv-cache-bytes",
        type=int,
        default=256 << 20,
        help="of each attention worker: four clusters must fit",
    )
    options.add_argument("--quick", action="store_true", help="few rounds, the demo model's first layers")
    return options


def main(argv: list[str]) -> int:
    """Exit code 1 only if a request or a cluster failed; the verdicts are in the result."""
    options = parser().parse_args(argv)
    if options.quick:
        options.rounds, options.window_s = min(options.rounds, PAIRS_MIN), min(options.window_s, 2.0)
        options.loads = [options.loads[0], options.loads[-1]]
        options.workloads = options.workloads[:1]
        options.layers = options.layers or QUICK_LAYERS
    model = options.model or ensure_demo_model(layers=options.layers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all clusters are stopped
    bench = Ablation(options, model)
    try:
        with Bar("ablation", planned_s(options)) as bar, ExitStack() as stack:
            servers = {}
            for name in MODES:
                bar.doing(f"starting {name}")
                servers[name] = bench.start(name, stack)
                bar.done(_PLAN_START_S)
            asyncio.run(bench.run(servers, bar))
    except (ClusterError, LoadError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    print(table(bench.metrics))
    output.plot(options.plot, lambda axes: draw(axes, bench.metrics))
    return 0


def planned_s(options: argparse.Namespace) -> float:
    windows: int = len(options.workloads) * len(options.rates or options.loads) * options.rounds * len(MODES)
    return len(MODES) * _PLAN_START_S + windows * plan_window_s(options)


def plan_window_s(options: argparse.Namespace) -> float:
    return float(options.window_s * (1.0 + _PLAN_DRAIN_SHARE))


class Ablation:
    """One run; ``metrics`` is always what is known so far."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self._options, self._model = options, model
        self._workloads: dict[str, Workload] = {
            name: WORKLOADS[name](model, greedy=True) for name in options.workloads
        }
        self.metrics: dict[str, Any] = {
            "capacity_tokens_per_s": {},
            "rates": {name: {} for name in options.workloads},
            "carries_over": CARRIES_OVER,
        }
        settings = {
            "model": model.name,
            "attention_workers": options.attention_workers,
            "expert_workers": options.expert_workers,
            "rounds": options.rounds,
            "window_s": options.window_s,
            "kv_cache_bytes": options.kv_cache_bytes,
            "modes": MODES,
            "workloads": {name: workload.mean for name, workload in self._workloads.items()},
        }
        self._result = output.result("ablation", settings, self.metrics)

    def start(self, name: str, stack: ExitStack) -> Server:
        """Start one side; ``stack`` ends it. Raises ClusterError."""
        options = self._options
        cluster = Cluster(
            self._model,
            options.attention_workers,
            options.expert_workers,
            kv_cache_bytes=options.kv_cache_bytes,
            **MODES[name],
        )
        stack.enter_context(cluster)
        return Server(cluster.url, self._model.name, 0.0)

    async def run(self, servers: dict[str, Server], bar: Bar) -> None:
        """All workloads and rates. Raises LoadError if a request failed."""
        for kind, workload in self._workloads.items():
            bar.doing(f"{kind}: warming up")
            for server in servers.values():
                await _closed(workload, server, WARM_INDEX)
            rates_per_s = await self._rates(kind, workload, servers[TARRAGON])
            found: dict[str, Any] = {
                f"{rate:g}": {name: {figure: [] for figure in FIGURES} for name in servers}
                for rate in rates_per_s
            }
            for number in range(self._options.rounds):
                for place, rate in enumerate(rates_per_s):
                    # Requests are new ones in every round and the same for all sides.
                    first = 1_000 * (number * len(rates_per_s) + place)
                    await self._round(servers, workload, rate, first, number, found[f"{rate:g}"], bar)
                    if found[f"{rate:g}"][TARRAGON]["tokens_per_s"]:
                        self.metrics["rates"][kind][f"{rate:g}"] = conclude(found[f"{rate:g}"])
                    output.write(self._result, self._options.json)

    async def _rates(self, kind: str, workload: Workload, server: Server) -> list[float]:
        """Requests/s as asked for, or shares of what a closed loop of Tarragon does."""
        if self._options.rates:
            return list(self._options.rates)
        indexes = range(CAPACITY_INDEX, CAPACITY_INDEX + 2 * CAPACITY_STREAMS)
        tokens_per_s = await capacity_tokens_per_s(
            workload, server.url, server.model, indexes, CAPACITY_STREAMS
        )
        self.metrics["capacity_tokens_per_s"][kind] = tokens_per_s
        return [round(load * tokens_per_s / workload.mean[1], 3) for load in self._options.loads]

    async def _round(
        self,
        servers: dict[str, Server],
        workload: Workload,
        rate: float,
        first: int,
        number: int,
        found: dict[str, Any],
        bar: Bar,
    ) -> None:
        """One window on every side; the order turns around from round to round."""
        names = list(servers) if number % 2 == 0 else list(servers)[::-1]
        seen: dict[str, dict[str, float]] = {}
        for name in names:
            bar.doing(f"{name}, {rate:g}/s, round {number + 1} of {self._options.rounds}")
            seen[name] = await window(servers[name], workload, rate, first, self._options.window_s)
            bar.done(plan_window_s(self._options))
        take(found, seen)


async def _closed(workload: Workload, server: Server, first: int) -> None:
    indexes = range(first, first + CAPACITY_STREAMS)
    fail_on_error(await closed_loop(workload, server.url, server.model, indexes, CAPACITY_STREAMS))


def take(found: dict[str, Any], seen: dict[str, dict[str, float]]) -> None:
    """Add a round; not one in which no request came in time to say anything (chance has it so, for all)."""
    if all(one[figure] > 0 for one in seen.values() for figure in FIGURES):
        for name, one in seen.items():
            for figure in FIGURES:
                found[name][figure].append(one[figure])


def conclude(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, spreads, ratios to Tarragon and verdicts of one rate, from the windows of every side."""
    result: dict[str, Any] = {}
    for name, windows in found.items():
        ratios = {figure: paired_ratio(windows[figure], found[TARRAGON][figure]) for figure in FIGURES}
        result[name] = {
            **{figure: summary(windows[figure]) for figure in FIGURES},
            "ratio": ratios["tokens_per_s"],
            "tbt_ratio": ratios["tbt_median_ms"],
            "verdict": judge(
                ratios["tokens_per_s"]["ci95"],
                len(windows["tokens_per_s"]),
                at_least=1.0 - WITHIN,
                at_most=1.0 + WITHIN,
            ),
        }
    return result


def table(metrics: dict[str, Any]) -> str:
    rows: list[list[Any]] = []
    for kind, rates in metrics["rates"].items():
        for rate, sides in rates.items():
            for name, found in sides.items():
                rate_found, tbt = found["tokens_per_s"], found["tbt_median_ms"]["median"]
                spread = f"{rate_found['min']:.0f} to {rate_found['max']:.0f}"
                figures = [rate_found["median"], spread, found["ratio"]["median"], *found["ratio"]["ci95"]]
                verdict_found = "" if name == TARRAGON else found["verdict"]
                rows.append([f"{kind}, {rate}/s: {name}", *figures, tbt, verdict_found])
    within = f"within {WITHIN:.0%}"
    heads = ["side", "tokens/s", "spread", "of tarragon", "from", "to", "ms a token", within]
    lines = [f"{name}: {text}" for name, text in WITHOUT.items()]
    return "\n".join([output.table(heads, rows), *lines, metrics["carries_over"]])


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """Tokens/s over the request rate, one panel for each workload, with the spread of the windows."""
    figure = axes.figure
    axes.remove()
    panels = figure.subplots(1, len(metrics["rates"]), squeeze=False)[0]
    for panel, (kind, rates) in zip(panels, metrics["rates"].items(), strict=True):
        at = range(len(rates))
        width = 0.8 / len(MODES)
        for number, name in enumerate(MODES):
            found = [sides[name]["tokens_per_s"] for sides in rates.values()]
            medians = [one["median"] for one in found]
            spread = [
                [one["median"] - one["min"] for one in found],
                [one["max"] - one["median"] for one in found],
            ]
            places = [index + number * width for index in at]
            panel.bar(places, medians, width, yerr=spread, capsize=2, label=f"{name}: {WITHOUT[name]}")
        panel.set_xticks([index + 1.5 * width for index in at], [f"{rate}/s" for rate in rates])
        panel.set_title(kind)
        panel.set_xlabel("requests/s")
    panels[0].set_ylabel("output tokens/s")
    panels[0].set_ylim(top=1.35 * panels[0].get_ylim()[1])  # room for the legend
    panels[0].legend(fontsize="x-small", loc="upper left")
