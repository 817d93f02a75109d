"""`tarragon bench profile`: where a decode step's time goes on each process (7.3).

A steady load of short prompts; between two looks at it, when all streams decode, the difference of the
workers' own counters (taken at step and layer boundaries, and dated by the worker) and of the kernel's
account of every process: seconds on a core, and seconds runnable without one. Times are given per second
of the worker's life and per step.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tarragon.bench import output
from tarragon.bench.load import closed_loop, fail_on_error
from tarragon.bench.progress import Bar
from tarragon.bench.workloads import PROMPT_TOKENS, VOCABULARY_MAX, Workload
from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model

_PLAN_START_S: Final = 25.0
REPORT_MARGIN_S: Final = 1.2
"""Reports come once a second."""
ATTENTION: Final = (
    "scheduling",
    "attention and dense layers",
    "dispatch",
    "waiting for experts",
    "combine",
    "sampling",
    "output and intake",
    "between steps",
)
EXPERT: Final = ("expert kernels", "gather and scatter", "doorbells and batching", "waiting for rows")
PROCESS: Final = ("on a core", "waiting for a core", "asleep")
_PALE: Final = {
    "waiting for experts": "#dde7f0",
    "waiting for rows": "#e8eef4",
    "between steps": "#eeeeee",
    "waiting for a core": "#f5cccc",
    "asleep": "#f5f5f5",
}


def parser() -> argparse.ArgumentParser:
    options = output.parser("profile", __doc__)
    options.add_argument("--streams", type=int, default=32)
    options.add_argument("--tokens", type=int, default=1_000, help="of each stream")
    options.add_argument("--seconds", type=float, default=15.0, help="between the two looks")
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    model = options.model or ensure_demo_model(layers=options.layers)
    with Bar("profile", _PLAN_START_S + options.seconds) as bar:
        bar.doing("starting the cluster")
        with Cluster(model, options.attention_workers, options.expert_workers) as cluster:
            bar.done(_PLAN_START_S)
            bar.doing("decoding")
            before, after = asyncio.run(observe(cluster, model.name, options))
            bar.done(options.seconds)
    settings = {
        "model": model.name,
        "attention_workers": options.attention_workers,
        "expert_workers": options.expert_workers,
        "streams": options.streams,
    }
    metrics = {worker_id: account(before[worker_id], found) for worker_id, found in after.items()}
    output.write(output.result("profile", settings, metrics), options.json)
    print(report(metrics))
    output.plot(options.plot, lambda axes: draw(axes, metrics))
    return 0


# ------------------------------------------------------------------ looking


async def observe(cluster: Cluster, model: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """Two looks at the cluster under the same steady load. Raises RuntimeError if it was not steady."""
    url = cluster.url
    await load(url, model, options.streams, 8)  # everything has run once
    running = asyncio.create_task(load(url, model, options.streams, options.tokens))
    await asyncio.sleep(2 * REPORT_MARGIN_S)
    before = await asyncio.to_thread(look, cluster)
    await asyncio.sleep(options.seconds)
    after = await asyncio.to_thread(look, cluster)
    if running.done():
        raise RuntimeError("the load ended while it was observed: ask for more --tokens")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return before, after


async def load(url: str, model: str, streams: int, tokens: int) -> None:
    """So many streams of ``tokens`` each. Raises LoadError if one fails."""
    workload = Workload(tokens, VOCABULARY_MAX, PROMPT_TOKENS, tokens, greedy=True)
    fail_on_error(await closed_loop(workload, url, model, range(streams), streams))


def look(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Counters and kernel accounts of every process, by worker id."""
    found = {
        str(worker["id"]): {
            "role": worker["role"],
            "counters": dict(worker.get("counters") or {}),
            **process_seconds(int(worker["pid"])),
        }
        for worker in cluster.status()["workers"]
        if worker["state"] == "healthy"
    }
    return {**found, "node agent": {"role": "agent", "counters": {}, **process_seconds(cluster.agent_pid)}}


def process_seconds(pid: int) -> dict[str, float]:
    """Seconds so far that a process's threads were on a core, and runnable without one; and the time."""
    ran_ns = waited_ns = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            ran, waited, _ = (thread / "schedstat").read_text().split()
        except (OSError, ValueError):  # it ended, or this kernel keeps no such account
            continue
        ran_ns, waited_ns = ran_ns + int(ran), waited_ns + int(waited)
    return {"at_s": time.monotonic(), "on_a_core_s": ran_ns / 1e9, "waiting_for_a_core_s": waited_ns / 1e9}


# ------------------------------------------------------------------ accounting


def account(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of one process's time between two looks; seconds are per second unless they say per step."""
    elapsed = after["at_s"] - before["at_s"]
    ran = (after["on_a_core_s"] - before["on_a_core_s"]) / elapsed
    waited = (after["waiting_for_a_core_s"] - before["waiting_for_a_core_s"]) / elapsed
    busy = min(1.0, ran)
    behind = min(1.0 - busy, waited)
    found: dict[str, Any] = {
        "role": after["role"],
        "cores_used": ran,
        "waiting_for_a_core": waited,
        "process_seconds_per_second": dict(zip(PROCESS, (busy, behind, 1.0 - busy - behind), strict=True)),
        "counters": {
            name: value - before["counters"].get(name, 0.0) for name, value in after["counters"].items()
        },
    }
    counters = found["counters"]
    split = {"attention": attention_split, "expert": expert_split}.get(after["role"])
    if split is not None and counters.get("clock_s"):
        seconds = split(counters)
        found["seconds_per_second"] = {name: value / counters["clock_s"] for name, value in seconds.items()}
        steps = counters.get("steps", 0.0)
        if steps:
            found["ms_per_step"] = {name: 1e3 * value / steps for name, value in seconds.items()}
            found["step_ms"] = 1e3 * counters["clock_s"] / steps
    else:
        found["seconds_per_second"] = found["process_seconds_per_second"]
    return found


def attention_split(counters: Mapping[str, float]) -> dict[str, float]:
    """Seconds of an attention worker's engine thread; they add up to ``clock_s``."""
    experts = sum(counters[f"experts_{name}_s"] for name in ("dispatch", "wait", "combine"))
    step, forward, sample = counters["step_s"], counters["forward_s"], counters["sample_s"]
    links = counters["deliver_s"] + counters["intake_s"]
    return dict(
        zip(
            ATTENTION,
            (
                step - forward - sample,
                forward - experts,
                counters["experts_dispatch_s"],
                counters["experts_wait_s"],
                counters["experts_combine_s"],
                sample,
                links,
                counters["clock_s"] - step - links,
            ),
            strict=True,
        )
    )


def expert_split(counters: Mapping[str, float]) -> dict[str, float]:
    """Seconds of an expert worker's compute thread; they add up to ``clock_s``."""
    kernels = counters["compute_s"] - counters["copy_s"]
    rest = counters["clock_s"] - counters["compute_s"] - counters["idle_s"]
    return dict(zip(EXPERT, (kernels, counters["copy_s"], rest, counters["idle_s"]), strict=True))


# ------------------------------------------------------------------ showing


def report(metrics: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = []
    for worker_id, found in metrics.items():
        per_step = found.get("ms_per_step", {})
        for name, share in found["seconds_per_second"].items():
            rows.append([f"{worker_id}: {name}", f"{share:.1%}", per_step.get(name, "")])
        rows.append([f"{worker_id}: cores used", f"{found['cores_used']:.2f}", ""])
        rows.append([f"{worker_id}: waiting for a core", f"{found['waiting_for_a_core']:.2f}", ""])
    return output.table(["where the time goes", "share", "ms a step"], rows)


def draw(axes: Any, metrics: Mapping[str, Any]) -> None:
    """One bar for each process, its second stacked from what it was spent on; waiting is pale.

    Under a worker's, a thin one: what the kernel says of its threads, without which a part that waited for a
    core looks like work.
    """
    from matplotlib.patches import Patch

    kinds = [*ATTENTION, *EXPERT, *PROCESS]
    working = [kind for kind in kinds if kind not in _PALE]
    colours = {kind: _PALE.get(kind) or f"C{working.index(kind)}" for kind in kinds}
    own = [found["seconds_per_second"] for found in metrics.values()]
    process = [
        found["process_seconds_per_second"] if found["role"] in ("attention", "expert") else {}
        for found in metrics.values()
    ]
    places = range(len(metrics))
    _stack(axes, list(places), own, 0.5, colours)
    _stack(axes, [place + 0.36 for place in places], process, 0.2, colours)
    axes.set_yticks(list(places), list(metrics))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the time; thin: the kernel's account of the same process")
    used = [kind for kind in kinds if any(parts.get(kind) for parts in (*own, *process))]
    patches = [Patch(color=colours[kind], label=kind) for kind in used]
    axes.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")


def _stack(
    axes: Any,
    places: Sequence[float],
    bars: Sequence[Mapping[str, float]],
    height: float,
    colours: Mapping[str, str],
) -> None:
    ends = [0.0] * len(bars)
    for kind, colour in colours.items():
        parts = [bar.get(kind, 0.0) for bar in bars]
        axes.barh(places, parts, height, left=ends, color=colour)
        ends = [end + part for end, part in zip(ends, parts, strict=True)]
