"""`tarragon bench checkpoint`: tokens/s without checkpoints, with Tarragon's, and with the baseline's (7.4).

The baseline stops every few steps to copy the whole cache. One cluster under one closed-loop load; the way
to checkpoint changes every few seconds, in an order that is drawn anew for each round. So all schemes meet
the same streams, cores and moments, and a drift of the machine hits all alike. What is left of its noise is
more than the 1 % in question; so at last every other step has checkpoints, and each is compared with its
neighbour. Beside it, without any comparison: the seconds that writing took of the attention workers' steps,
and the bytes written against the formula of appendix C.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tarragon.bench import output
from tarragon.bench.load import LoadError
from tarragon.bench.progress import Bar
from tarragon.bench.stats import interval, judge, paired_ratio, summary
from tarragon.bench.windows import EndlessLoad, Window, cpu_cost, cpu_text
from tarragon.bench.workloads import random_workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.models.demo import ensure_demo_model
from tarragon.models.headers import read_json
from tarragon.models.shape import read_model

COST_MAX: Final = 0.01
"""The promise that protection costs little: at most this share of tokens/s."""
PAUSES: Final = (1, 4, 8, 16, 32)
SETTLE_S: Final = 0.4
"""Left out at the start of a window: workers change at their next step."""
QUICK_LAYERS: Final = 4
NORMAL_95: Final = 1.96
"""Standard errors on each side of a mean of many that hold 95 %."""
_ELEMENT_BYTES: Final = 2


def parser() -> argparse.ArgumentParser:
    options = output.parser("checkpoint", __doc__)
    options.add_argument("--concurrency", type=int, default=16)
    options.add_argument("--window-s", type=float, default=4.0, help="seconds of each scheme in a round")
    options.add_argument("--rounds", type=int, default=12, help="windows of each scheme")
    options.add_argument(
        "--pair-rounds", type=int, default=10, help="further windows of none against segments"
    )
    options.add_argument(
        "--steps-s", type=float, default=240.0, help="seconds of steps with and without, in turn"
    )
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    options.add_argument("--quick", action="store_true", help="few rounds, the demo model's first layers")
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.quick:
        options.rounds, options.pair_rounds = min(options.rounds, 3), min(options.pair_rounds, 6)
        options.steps_s = min(options.steps_s, 20.0)
        options.layers = options.layers or QUICK_LAYERS
    model = options.model or ensure_demo_model(layers=options.layers)
    schemes = ["none", "segments", *(f"pause-{steps}" for steps in PAUSES)]
    planned_s = options.window_s * (options.rounds * len(schemes) + 2 * options.pair_rounds) + options.steps_s
    try:
        with (
            Cluster(model, options.attention_workers, options.expert_workers) as cluster,
            Bar("checkpoint", planned_s) as bar,
        ):
            metrics = asyncio.run(_measure(options, model, cluster, schemes, bar))
    except (ClusterError, LoadError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    settings = {
        "model": model.name,
        "attention_workers": options.attention_workers,
        "expert_workers": options.expert_workers,
        "concurrency": options.concurrency,
        "window_s": options.window_s,
        "rounds": options.rounds,
        "pair_rounds": options.pair_rounds,
        "steps_s": options.steps_s,
    }
    output.write(output.result("checkpoint", settings, metrics), options.json)
    print(report(metrics))
    output.plot(options.plot, lambda axes: draw(axes, metrics))
    return 0


async def _measure(
    options: argparse.Namespace, model: Path, cluster: Cluster, schemes: list[str], bar: Bar
) -> dict[str, Any]:
    rounds: dict[str, list[Window]] = {scheme: [] for scheme in schemes}
    pairs: dict[str, list[Window]] = {"none": [], "segments": []}
    account: dict[str, float] = {}
    rng = random.Random(0)
    pids = {"agent": cluster.agent_pid, **cluster.pids()}
    load = EndlessLoad(cluster.url, model.name, random_workload(model), options.concurrency, pids)

    async with load:
        for number in range(options.rounds):
            bar.doing(f"round {number + 1} of {options.rounds}")
            for scheme in rng.sample(schemes, len(schemes)):
                rounds[scheme].append(await _window(cluster, load, scheme, options.window_s, account))
                bar.done(options.window_s)
        for number in range(options.pair_rounds):
            bar.doing(f"pair {number + 1} of {options.pair_rounds}")
            for scheme in ("none", "segments") if number % 2 == 0 else ("segments", "none"):
                pairs[scheme].append(await _window(cluster, load, scheme, options.window_s, account))
                bar.done(options.window_s)
        bar.doing("steps in turn")
        steps = await _steps(cluster, load, options.steps_s)
        bar.done(options.steps_s)
    return {**conclude(rounds, pairs, account, segment_bytes(model)), **steps}


async def _steps(cluster: Cluster, load: EndlessLoad, seconds: float) -> dict[str, Any]:
    """Steps with and without checkpoints in turn, as the attention workers compare them."""
    await asyncio.to_thread(cluster.admin.checkpointing, "alternate", reprotect=False)
    before = await asyncio.to_thread(_counters, cluster)
    found = await load.window(seconds)
    after = await asyncio.to_thread(_counters, cluster)
    workers = await asyncio.to_thread(_attention_counters, cluster)
    await asyncio.to_thread(cluster.admin.checkpointing, "none", reprotect=False)
    spent = {name: value - before[name] for name, value in after.items()}
    return {**conclude_steps(workers, found.cpu_s_per_token), **ahead_share(spent)}


def ahead_share(spent: Mapping[str, float]) -> dict[str, float]:
    """CPU time of making pages before they are needed, as a share of the steps' time.

    It is spent beside steps with checkpoints and without, so that comparing these does not show it.
    """
    return {"ahead_share_of_steps": spent["checkpoint_ahead_s"] / spent["step_s"]} if spent["step_s"] else {}


def conclude_steps(workers: Sequence[Mapping[str, float]], cpu_s_per_token: float) -> dict[str, Any]:
    """Cost of a step's checkpoints from the workers' means and standard errors, pooled over all pairs.

    ``step_cost``: of a step's wall time; ``step_cpu_cost``: of the CPU time that all processes of the cluster
    take for a token. Empty if the steps were too few.
    """
    pairs = sum(worker["compared_pairs"] for worker in workers)
    tokens = sum(worker["compared_tokens"] for worker in workers)
    if not tokens or not cpu_s_per_token:
        return {}

    def pooled(name: str) -> tuple[float, float]:
        mean = sum(worker["compared_pairs"] * worker[name] for worker in workers) / pairs
        squares = sum((worker["compared_pairs"] * worker[f"{name}_error"]) ** 2 for worker in workers)
        return mean, math.sqrt(squares) / pairs

    def told(mean: float, error: float) -> dict[str, Any]:
        ci95 = [mean - NORMAL_95 * error, mean + NORMAL_95 * error]
        return {"mean": mean, "ci95": ci95, "verdict": judge(ci95, int(pairs), at_most=COST_MAX)}

    wall, cpu = pooled("compared_wall_cost"), pooled("compared_cpu_s")
    share = pairs / tokens / cpu_s_per_token
    return {
        "step_pairs": pairs,
        "step_cost": told(*wall),
        "step_cpu_cost": {**told(cpu[0] * share, cpu[1] * share), "us_per_step": 1e6 * cpu[0]},
    }


async def _window(
    cluster: Cluster, load: EndlessLoad, scheme: str, window_s: float, account: dict[str, float]
) -> Window:
    """One window; adds what its writing cost to ``account`` if it is Tarragon's."""
    await asyncio.to_thread(cluster.admin.checkpointing, scheme, reprotect=False)
    await asyncio.sleep(SETTLE_S)
    before = await asyncio.to_thread(_counters, cluster) if scheme == "segments" else {}
    found = await load.window(window_s - SETTLE_S)
    for name, value in (await asyncio.to_thread(_counters, cluster)).items() if before else ():
        account[name] = account.get(name, 0.0) + value - before.get(name, 0.0)
    return found


def _counters(cluster: Cluster) -> dict[str, float]:
    """Sums over the attention workers."""
    names = (
        "checkpoint_s",
        "checkpoint_ahead_s",
        "checkpoint_bytes",
        "checkpoint_segments",
        "checkpoint_commits",
        "step_s",
        "pairs",
    )
    found = _attention_counters(cluster)
    return {name: sum(counters.get(name, 0.0) for counters in found) for name in names}


def _attention_counters(cluster: Cluster) -> list[dict[str, float]]:
    """Of each attention worker; as old as its last report."""
    return [w.get("counters", {}) for w in cluster.status()["workers"] if w["role"] == "attention"]


def segment_bytes(model: Path) -> dict[str, float]:
    """Appendix C: bytes per token of checkpoints (K and V of all layers) and of AW-EW traffic (both ways)."""
    shape, config = read_model(model), read_json(model / "config.json")
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    head = int(config.get("head_dim") or shape.hidden // int(config["num_attention_heads"]))
    return {
        "checkpoint_bytes_per_token": 2.0 * shape.layers * heads * head * _ELEMENT_BYTES,
        "experts_bytes_per_token": 2.0 * len(shape.moe_layers) * shape.top_k * shape.hidden * _ELEMENT_BYTES,
        "pairs_per_token": float(len(shape.moe_layers) * shape.top_k),
    }


def conclude(
    rounds: dict[str, list[Window]],
    pairs: dict[str, list[Window]],
    account: dict[str, float],
    formula: dict[str, float],
) -> dict[str, Any]:
    """Ratios to no checkpoints, the verdict on their cost, and bytes against appendix C."""
    rates = {scheme: [window.tokens_per_s for window in found] for scheme, found in rounds.items()}
    metrics: dict[str, Any] = {
        scheme: {"tokens_per_s": summary(found), "ratio": paired_ratio(found, rates["none"])}
        for scheme, found in rates.items()
    }
    on, off = rounds["segments"] + pairs["segments"], rounds["none"] + pairs["none"]
    costs = [1.0 - a.tokens_per_s / b.tokens_per_s for a, b in zip(on, off, strict=True)]
    low, high = interval(costs)
    verdict = judge([low, high], len(costs), at_most=COST_MAX)
    metrics["cost"] = {**summary(costs), "ci95": [low, high], "verdict": verdict}
    metrics["cpu_cost"] = cpu_cost(
        [window.cpu_s_per_token for window in on],
        [window.cpu_s_per_token for window in off],
        at_most=COST_MAX,
    )
    if account.get("step_s"):
        metrics["writing_share_of_steps"] = account["checkpoint_s"] / account["step_s"]
    tokens = account.get("pairs", 0.0) / formula["pairs_per_token"]
    if tokens:
        written = account["checkpoint_bytes"] / tokens
        metrics["bytes"] = {
            **formula,
            "written_bytes_per_token": written,
            "written_over_formula": written / formula["checkpoint_bytes_per_token"],
            "formula_over_experts_traffic": formula["checkpoint_bytes_per_token"]
            / formula["experts_bytes_per_token"],
        }
    return metrics


def report(metrics: dict[str, Any]) -> str:
    rows = [
        [scheme, found["tokens_per_s"]["median"], found["ratio"]["median"], *found["ratio"]["ci95"]]
        for scheme, found in metrics.items()
        if isinstance(found, dict) and "tokens_per_s" in found
    ]
    cost = metrics["cost"]
    lines = [
        output.table(["scheme", "tokens/s", "of none", "from", "to"], rows),
        f"cost of segments: {100 * cost['median']:.2f} % "
        f"({100 * cost['ci95'][0]:.2f} to {100 * cost['ci95'][1]:.2f} %, {cost['n']} pairs): "
        f"at most {100 * COST_MAX:g} % {cost['verdict']}",
    ]
    if metrics["cpu_cost"]:
        lines.append(cpu_text(metrics["cpu_cost"]))
    if "step_cost" in metrics:
        lines += [
            f"{metrics['step_pairs']:.0f} pairs of steps: "
            + _step_text(metrics["step_cost"], "time of a step"),
            _step_text(metrics["step_cpu_cost"], "CPU time per token")
            + f"; {metrics['step_cpu_cost']['us_per_step']:.0f} us a step",
        ]
    if "ahead_share_of_steps" in metrics:
        lines.append(
            "beside all steps, in neither of the two: making pages took "
            f"{metrics['ahead_share_of_steps']:.2%} of their time"
        )
    if "writing_share_of_steps" in metrics:
        lines.append(f"writing took {100 * metrics['writing_share_of_steps']:.2f} % of the steps' time")
    if "bytes" in metrics:
        found = metrics["bytes"]
        lines.append(
            f"{found['written_bytes_per_token']:.0f} bytes a token written, "
            f"{found['checkpoint_bytes_per_token']:.0f} by the formula, which is "
            f"{found['formula_over_experts_traffic']:.2f} of the AW-EW traffic"
        )
    return "\n".join(lines)


def _step_text(cost: dict[str, Any], what: str) -> str:
    low, high = cost["ci95"]
    return f"{what} {cost['mean']:+.2%} ({low:+.2%} to {high:+.2%}): {cost['verdict']}"


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """Tokens/s of each scheme as a share of no checkpoints, with 95 % intervals."""
    found = {
        name: value for name, value in metrics.items() if isinstance(value, dict) and "tokens_per_s" in value
    }
    medians = [value["ratio"]["median"] for value in found.values()]
    spread = [
        [max(0.0, value["ratio"]["median"] - value["ratio"]["ci95"][0]) for value in found.values()],
        [max(0.0, value["ratio"]["ci95"][1] - value["ratio"]["median"]) for value in found.values()],
    ]
    axes.bar(list(found), medians, yerr=spread, color="#1b6e4b", ecolor="black", capsize=3)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_ylabel("tokens/s, of no checkpoints")
