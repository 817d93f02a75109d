"""`tarragon bench overhead`: tokens/s with protection on against off, without failures (7.3, appendix F).

One cluster under one load; about every second protection is switched on or off, on-off, off-on, ..., so that
both sides meet the same streams, the same processes and the same memory. Off means: nobody is probed and no
shadow is loaded (--parts: only one of these); with --checkpoints, nothing is checkpointed either. Loading
shadows is not part of a window.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tarragon.bench import output
from tarragon.bench.load import LoadError
from tarragon.bench.progress import Bar
from tarragon.bench.stats import judge, paired_ratio, summary
from tarragon.bench.windows import EndlessLoad, Window, alternate, cpu_by_process, cpu_cost, cpu_text
from tarragon.bench.workloads import random_workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.models.demo import ensure_demo_model

COST_MAX: Final = 0.01
"""The promise that protection costs little: at most this share of tokens/s."""
SIDES: Final = ("on", "off")
PARTS: Final = ("both", "probing", "shadows")
SETTLE_S: Final = 0.1
"""Between a switch and its window: workers change at their next step."""
SWITCH_TIMEOUT_S: Final = 120.0
QUICK_LAYERS: Final = 4
_BATCH_S: Final = 20.0
"""So often results are looked at: that takes the time of the last tokens."""
_SWITCH_S: Final = 0.3
"""What a switch takes, for the progress bar."""


def parser() -> argparse.ArgumentParser:
    options = output.parser("overhead", __doc__)
    options.add_argument("--concurrency", type=int, default=16)
    options.add_argument("--parts", choices=PARTS, default="both", help="what is switched on and off")
    options.add_argument("--window-s", type=float, default=1.0, help="seconds of each side in a pair")
    options.add_argument(
        "--output-tokens", type=int, default=512, help="of each request; each new one disturbs one side only"
    )
    options.add_argument("--pairs", type=int, default=300)
    options.add_argument("--pairs-max", type=int, default=900, help="go on to so many while inconclusive")
    options.add_argument("--checkpoints", action="store_true", help="off is without checkpoints too")
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    options.add_argument("--quick", action="store_true", help="few pairs, the demo model's first layers")
    return options


def main(argv: list[str]) -> int:
    """Exit code 1 only if a request or the cluster failed; the verdict is in the result."""
    options = parser().parse_args(argv)
    if options.quick:
        options.pairs = options.pairs_max = min(options.pairs, 10)
        options.layers = options.layers or QUICK_LAYERS
    model = options.model or ensure_demo_model(layers=options.layers)
    planned_s = options.pairs * _pair_s(options)
    try:
        with (
            Cluster(model, options.attention_workers, options.expert_workers) as cluster,
            Bar("overhead", planned_s) as bar,
        ):
            metrics = asyncio.run(_measure(options, model, cluster, bar))
    except (ClusterError, LoadError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    output.write(_result(options, model, metrics), options.json)
    print(report(metrics))
    output.plot(options.plot, lambda axes: draw(axes, metrics))
    return 0


def _result(options: argparse.Namespace, model: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    names = (
        "attention_workers",
        "expert_workers",
        "parts",
        "concurrency",
        "window_s",
        "output_tokens",
        "checkpoints",
    )
    settings = {"model": model.name, **{name: getattr(options, name) for name in names}}
    return output.result("overhead", settings, metrics)


async def _measure(options: argparse.Namespace, model: Path, cluster: Cluster, bar: Bar) -> dict[str, Any]:
    windows: dict[str, list[Window]] = {side: [] for side in SIDES}
    switch = Switch(cluster, options.parts, checkpoints=options.checkpoints)
    metrics: dict[str, Any] = {}
    begun = without_tokens = 0
    workload = replace(random_workload(model), output_tokens=options.output_tokens)
    pids = {"agent": cluster.agent_pid, **cluster.pids()}
    async with EndlessLoad(cluster.url, model.name, workload, options.concurrency, pids) as load:
        while begun < options.pairs or (begun < options.pairs_max and metrics["verdict"] == "inconclusive"):
            count = min(max(1, int(_BATCH_S / _pair_s(options))), options.pairs_max - begun)
            bar.doing(f"pairs {begun + 1} to {begun + count}")
            pairs = [
                await alternate(load, switch.to, SIDES, begun + number, options.window_s)
                for number in range(count)
            ]
            begun += count
            found = await load.between([pair[side] for pair in pairs for side in SIDES])
            whole = whole_pairs(found)
            without_tokens += count - len(whole)
            for pair_windows in whole:
                for side, window in zip(SIDES, pair_windows, strict=True):
                    windows[side].append(window)
            if not windows["on"]:
                raise LoadError(f"no stream brought two tokens within {options.window_s:g} s")
            metrics = {**conclude(windows), "pairs_without_tokens": without_tokens}
            output.write(_result(options, model, metrics), options.json)
            bar.done(count * _pair_s(options), cost_text(metrics))
        await switch.to("on")
    return metrics


def whole_pairs(found: Sequence[Window | None]) -> list[tuple[Window, Window]]:
    """Of windows on, off, on, off, ...: the pairs that brought tokens on both sides."""
    return [
        (on, off)
        for on, off in zip(found[::2], found[1::2], strict=True)
        if on is not None and off is not None
    ]


def _pair_s(options: argparse.Namespace) -> float:
    return 2 * float(options.window_s + SETTLE_S + _SWITCH_S)


class Switch:
    """Turns the protection of one cluster on and off, or one of its parts."""

    def __init__(self, cluster: Cluster, parts: str, *, checkpoints: bool) -> None:
        self._cluster, self._checkpoints = cluster, checkpoints
        self._probing, self._shadows = parts != "shadows", parts != "probing"

    async def to(self, side: str) -> None:
        """Switch, and return when shadows are as wanted. Raises ClusterError if they do not get there."""
        await asyncio.to_thread(self._switch, side == "on")
        await asyncio.sleep(SETTLE_S)

    def _switch(self, on: bool) -> None:
        cluster = self._cluster
        shadows = on or not self._shadows
        cluster.admin.protection(probing=on or not self._probing, shadow_replicas=int(shadows))
        if self._checkpoints:
            cluster.admin.checkpointing("segments" if on else "none", reprotect=False)
        deadline_s = time.monotonic() + SWITCH_TIMEOUT_S
        while self._shadows and shadowed(cluster.admin.request("GET", "/table")) != shadows:
            if time.monotonic() > deadline_s:
                word = "loaded" if shadows else "gone"
                raise ClusterError(f"shadows were not {word} in {SWITCH_TIMEOUT_S:g} s")
            time.sleep(0.05)


def shadowed(table: dict[str, Any]) -> bool | None:
    """Whether every expert of a routing table has a shadow (True), none (False), or some (None)."""
    counts = {len(candidates) > 1 for layer in table["candidates"] for candidates in layer}
    return counts.pop() if len(counts) == 1 else None


def conclude(windows: dict[str, list[Window]]) -> dict[str, Any]:
    """Ratio, cost and verdict of the pairs so far."""
    rates = {side: [window.tokens_per_s for window in found] for side, found in windows.items()}
    cpu = {side: [window.cpu_s_per_token for window in found] for side, found in windows.items()}
    ratio = paired_ratio(rates["on"], rates["off"])
    low, high = ratio["ci95"]
    cost = {"median": 1.0 - ratio["median"], "ci95": [1.0 - high, 1.0 - low], "max": COST_MAX}
    verdict = judge(cost["ci95"], len(rates["on"]), at_most=COST_MAX)
    return {
        "tokens_per_s": rates,
        "ratio": ratio,
        "cost": cost,
        "cpu_cost": cpu_cost(cpu["on"], cpu["off"], at_most=COST_MAX),
        "cpu_by_process": cpu_by_process(windows["on"], windows["off"]),
        "verdict": verdict,
    }


def cost_text(metrics: dict[str, Any]) -> str:
    cost, pairs = metrics["cost"], len(metrics["ratio"]["pairs"])
    low, high = cost["ci95"]
    return f"cost {cost['median']:+.2%} ({low:+.2%} to {high:+.2%}, {pairs} pairs): {metrics['verdict']}"


def report(metrics: dict[str, Any]) -> str:
    """The result in a few lines for a person."""
    lines = [
        f"protection {side:3}: median {summary(metrics['tokens_per_s'][side])['median']:.1f} tokens/s"
        for side in SIDES
    ]
    if metrics["pairs_without_tokens"]:
        lines.append(f"{metrics['pairs_without_tokens']} pairs left out: no tokens in one of their windows")
    lines.append(f"tokens/s: {cost_text(metrics)} (at most {COST_MAX:.0%})")
    if metrics["cpu_cost"]:
        lines.append(cpu_text(metrics["cpu_cost"]))
        for role, found in metrics["cpu_by_process"].items():
            low, high = found["ci95"]
            more = f"{found['more_ms']:+.3f} ({low:+.3f} to {high:+.3f})"
            lines.append(f"  {role:12} {found['off_ms']:7.3f} ms, with it {more}")
    return "\n".join(lines)


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """Each pair's ratio on/off, their median and its 95 % interval."""
    ratio = metrics["ratio"]
    axes.plot(ratio["pairs"], ".", color="#888888", label="pairs")
    axes.axhspan(*ratio["ci95"], color="#1b6e4b", alpha=0.3, label="95 % interval of the median")
    axes.axhline(1.0 - COST_MAX, color="black", linestyle="--", label="at most 1 % slower")
    axes.set_xlabel("pair")
    axes.set_ylabel("tokens/s, on over off")
    axes.legend()
