"""`tarragon bench failover`: what readers see when a worker dies under load (7.2, fig. 9).

A Poisson load of short prompts runs all the time; each trial kills or stops one worker at a random moment
and waits for full capacity. Afterwards every request is asked again without faults and compared token by
token. In the same call: the same load on the workers that are left (what the loss of capacity costs by
itself), and the coarse-grained baseline, where everything restarts and every request is replayed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tarragon.bench import failover_report, timeline
from tarragon.bench.baseline_restart import Restartable, TarragonSystem, VllmSystem, restart_trial
from tarragon.bench.fault_trial import AFTER_S, BEFORE_S, MOMENT_S, fault_trial
from tarragon.bench.faults import SIGNALS, FaultError
from tarragon.bench.load import LoadError, capacity_tokens_per_s, closed_loop
from tarragon.bench.machine import machine
from tarragon.bench.owners import ENGINE_ARGS
from tarragon.bench.poisson import PoissonLoad
from tarragon.bench.progress import Bar
from tarragon.bench.timeline import Trace
from tarragon.bench.workloads import random_workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.config import Config, ConfigError
from tarragon.config import load as load_config
from tarragon.models.demo import ensure_demo_model

QUICK_LAYERS: Final = 4
CAPACITY_INDEX: Final = 1_000_000
BASELINE_INDEX: Final = 2_000_000
CONTROL_INDEX: Final = 3_000_000
"""Where the numbers of the requests of each part begin: no two parts ask for the same."""
_PLAN_START_S: Final = 25.0
_PLAN_RECOVERY_S: Final = 12.0
_PLAN_VLLM_START_S: Final = 120.0


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="tarragon bench failover", description=__doc__)
    options.add_argument("--role", choices=("expert", "attention"), default="expert")
    options.add_argument("--signal", choices=SIGNALS, default="KILL", help="KILL: death; STOP: a hang")
    options.add_argument("--trials", type=int, help="faults (default: 10; with --quick 2)")
    options.add_argument("--baseline-trials", type=int, help="cold restarts (default: 3; with --quick 1)")
    options.add_argument(
        "--control-s", type=float, help="length of the control run (default: 60; quick: 10; 0: none)"
    )
    options.add_argument("--peer", action="store_true", help="also kill and restart monolithic vLLM")
    options.add_argument("--model", type=Path, help="checkpoint folder (default: the demo model)")
    options.add_argument("--layers", type=int, help="demo model: only the first N layers")
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    options.add_argument("--load", type=float, default=0.5, help="share of the measured capacity")
    options.add_argument("--rate", type=float, help="requests/s, instead of a share of the capacity")
    options.add_argument("--concurrency", type=int, default=16, help="closed loops: capacity and replay")
    options.add_argument("--resume-after-s", type=float, default=2.0, help="STOP: when SIGCONT is sent")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the cluster"
    )
    options.add_argument("--quick", action="store_true", help="few trials, the demo model's first layers")
    options.add_argument("--json", type=Path)
    options.add_argument("--plot", type=Path)
    return options


def main(argv: list[str]) -> int:
    """Exit code 1 if a request failed, a stream differs, or the cluster did not recover."""
    options = with_defaults(parser().parse_args(argv))
    model = options.model or ensure_demo_model(layers=options.layers)
    # So that the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    bench = Failover(options, model)
    try:
        with Bar("failover", planned_s(options)) as bar:
            asyncio.run(bench.run(bar))
    except (ClusterError, FaultError, LoadError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    finally:
        bench.write()
    if options.plot:
        from tarragon.bench.plots import failover_picture

        failover_picture(bench.result, options.plot)
    print(failover_report.table(bench.result) if options.json else json.dumps(bench.result, indent=1))
    return 0 if failover_report.promises_kept(bench.result) else 1


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what --quick changes; check the settings. Raises ConfigError."""
    quick = options.quick
    for name, full, short in (("trials", 10, 2), ("baseline_trials", 3, 1), ("control_s", 60.0, 10.0)):
        if getattr(options, name) is None:
            setattr(options, name, short if quick else full)
    if quick and options.model is None and options.layers is None:
        options.layers = QUICK_LAYERS
    if options.trials < 1:
        raise ConfigError(f"--trials must be at least 1, but is {options.trials}")
    options.settings = dict(item.partition("=")[::2] for item in options.set)
    load_config(environ={}, flags=options.settings)
    return options


def planned_s(options: argparse.Namespace) -> float:
    """A guess of the whole run's length, for the bar."""
    trial_s = plan_trial_s(options)
    restart_s = plan_restart_s(_PLAN_START_S)
    peer_s = options.peer * (_PLAN_VLLM_START_S + plan_restart_s(_PLAN_VLLM_START_S))
    return float(
        2 * _PLAN_START_S  # the cluster, the control
        + options.concurrency
        + options.trials * trial_s
        + options.trials * trial_s * options.load  # asked again
        + options.baseline_trials * restart_s
        + options.control_s
        + peer_s
    )


def plan_trial_s(options: argparse.Namespace) -> float:
    woken_s = options.resume_after_s if options.signal == "STOP" else 0.0
    return float(BEFORE_S + MOMENT_S / 2 + _PLAN_RECOVERY_S + AFTER_S + woken_s)


def plan_restart_s(start_s: float) -> float:
    return start_s + 4 * BEFORE_S


class Failover:
    """One run; ``result`` is always what is known so far."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self._options, self._model = options, model
        self._workload = random_workload(model, seed=options.seed)
        self._metrics: dict[str, Any] = {"trials": [], "baseline": {}}
        self.result: dict[str, Any] = {
            "name": "failover",
            "settings": {
                "model": model.name,
                "role": options.role,
                "signal": options.signal,
                "trials": options.trials,
                "attention_workers": options.attention_workers,
                "expert_workers": options.expert_workers,
                "prompt_tokens": self._workload.prompt_tokens,
                "output_tokens": self._workload.output_tokens,
                "load_share": None if options.rate else options.load,
                "seed": options.seed,
                "set": options.settings,
            },
            "metrics": self._metrics,
            "machine": machine(),
        }

    def write(self) -> None:
        """Results are written as they come: a later failure must not cost what was measured."""
        failover_report.conclude(self._metrics, self._options.role, self._options.signal)
        if self._options.json:
            self._options.json.write_text(json.dumps(self.result, indent=1))

    async def run(self, bar: Bar) -> None:
        """All parts, one after the other. Raises FaultError, LoadError, ClusterError."""
        options = self._options
        ours = TarragonSystem(self._cluster, self._model)
        try:
            bar.doing("starting the cluster")
            await asyncio.to_thread(ours.start)
            bar.done(_PLAN_START_S, ours.cluster.ready_line)
            rate_per_s = await self._rate(ours, bar)
            await self._trials(ours.cluster, rate_per_s, bar)
            await self._baseline("tarragon", ours, rate_per_s, options.baseline_trials, bar)
        finally:
            await asyncio.to_thread(ours.stop)
        await self._control(rate_per_s, bar)
        if options.peer:
            await self._peer(bar)

    def _cluster(self, lost: int = 0) -> Cluster:
        """The cluster of the options, or what ``lost`` dead workers of the role leave of it."""
        options = self._options
        counts = {"attention": options.attention_workers, "expert": options.expert_workers}
        config = load_config(environ={}, flags={**options.settings, **_counts(counts)})
        counts[options.role] -= lost
        return Cluster(
            self._model,
            counts["attention"],
            counts["expert"],
            engine_args=ENGINE_ARGS,
            **{**options.settings, **attention_threads(config)},
        )

    # ------------------------------------------------------------------ parts

    async def _rate(self, system: Restartable, bar: Bar) -> float:
        """Requests/s that load ``system`` to the wanted share of its own capacity."""
        concurrency = self._options.concurrency
        bar.doing("measuring the capacity")
        await closed_loop(
            self._workload, system.url, system.model_name, range(CAPACITY_INDEX - 4, CAPACITY_INDEX), 4
        )
        waves = 2 if self._options.quick else 3
        indexes = range(CAPACITY_INDEX, CAPACITY_INDEX + waves * concurrency)
        tokens_per_s = await capacity_tokens_per_s(
            self._workload, system.url, system.model_name, indexes, concurrency
        )
        rate_per_s = self._options.rate or self._options.load * tokens_per_s / self._workload.output_tokens
        key = "vllm_" if isinstance(system, VllmSystem) else ""
        self._metrics[f"{key}capacity_tokens_per_s"] = tokens_per_s
        self._metrics[f"{key}rate_per_s"] = rate_per_s
        self.write()
        note = f"capacity {tokens_per_s:.0f} tokens/s at {concurrency} streams"
        bar.done(concurrency, f"{note}; load {rate_per_s:.2f} requests/s")
        return float(rate_per_s)

    async def _trials(self, cluster: Cluster, rate_per_s: float, bar: Bar) -> None:
        options = self._options
        rng = random.Random(f"faults/{options.seed}")
        load = PoissonLoad(self._workload, cluster.url, self._model.name, rate_per_s)
        running = asyncio.create_task(load.run())
        try:
            for number in range(options.trials):
                bar.doing(f"trial {number + 1} of {options.trials}")
                trial = await fault_trial(
                    cluster,
                    load,
                    role=options.role,
                    signal=options.signal,
                    resume_after_s=options.resume_after_s,
                    rng=rng,
                )
                self._metrics["trials"].append(trial)
                self.write()
                bar.done(plan_trial_s(options), failover_report.trial_line(trial))
                if running.done():
                    break  # and raise below
        finally:
            load.stop()
        bar.doing("the last streams end")
        await running
        self._metrics["requests"] = len(load.traces)
        self._metrics["failed"] = timeline.failed(load.traces, self._workload.output_tokens)
        await self._compare(cluster, load.traces, bar)

    async def _compare(self, cluster: Cluster, traces: list[Trace], bar: Bar) -> None:
        """Ask everything again without faults: the streams must be the same, bit for bit."""
        bar.doing("asking everything again, undisturbed")
        undisturbed = await self._ask(cluster.url, traces)
        again = timeline.failed(undisturbed, self._workload.output_tokens)
        if again:
            raise LoadError(
                f"{len(again)} requests failed without a fault, one of them: {min(again.values())}"
            )
        self._metrics["compared"] = len(undisturbed)
        self._metrics["differing"] = timeline.differing(traces, undisturbed)
        self.write()
        bar.done(self._options.trials * plan_trial_s(self._options) * self._options.load)

    async def _ask(self, url: str, traces: list[Trace]) -> list[Trace]:
        indexes = [trace.index for trace in traces]
        return await closed_loop(self._workload, url, self._model.name, indexes, self._options.concurrency)

    async def _baseline(
        self, name: str, system: Restartable, rate_per_s: float, count: int, bar: Bar
    ) -> None:
        """``count`` cold restarts of everything."""
        found = self._metrics["baseline"].setdefault(name, {"trials": []})
        start_s = _PLAN_VLLM_START_S if name == "vllm" else _PLAN_START_S
        for number in range(count):
            bar.doing(f"cold restart of {name}, {number + 1} of {count}")
            trial, _ = await restart_trial(
                system,
                self._workload,
                rate_per_s,
                first=BASELINE_INDEX + 100_000 * number,
                before_s=BEFORE_S,
                seed=self._options.seed + number,
            )
            found["trials"].append(trial)
            self.write()
            note = f"cold restart of {name}: the streams stood still for {trial['stall_ms'] / 1e3:.1f} s"
            bar.done(plan_restart_s(start_s), note)

    async def _control(self, rate_per_s: float, bar: Bar) -> None:
        """The same load on one worker less, without a fault: what the loss of capacity costs by itself."""
        options = self._options
        count = {"attention": options.attention_workers, "expert": options.expert_workers}[options.role]
        if count < 2 or not options.control_s:
            return
        bar.doing("control: one worker less, no fault")
        system = TarragonSystem(lambda: self._cluster(lost=1), self._model)
        try:
            await asyncio.to_thread(system.start)
            warm = range(CONTROL_INDEX - 4, CONTROL_INDEX)
            await closed_loop(self._workload, system.url, self._model.name, warm, 4)
            load = PoissonLoad(self._workload, system.url, self._model.name, rate_per_s, first=CONTROL_INDEX)
            running = asyncio.create_task(load.run())
            await asyncio.sleep(BEFORE_S)
            start_s = time.monotonic()
            await asyncio.sleep(options.control_s)
            end_s = time.monotonic()
            load.stop()
            await running
        finally:
            await asyncio.to_thread(system.stop)
        length_s = failover_report.window_s(self._metrics["trials"])
        self._metrics["control"] = failover_report.control(load.traces, start_s, end_s, length_s)
        self.write()
        bar.done(options.control_s + _PLAN_START_S)

    async def _peer(self, bar: Bar) -> None:
        """Monolithic vLLM at the same share of its own capacity, killed and restarted once."""
        system = VllmSystem(self._model)
        bar.doing("starting monolithic vLLM")
        try:
            await asyncio.to_thread(system.start)
            bar.done(_PLAN_VLLM_START_S)
            rate_per_s = await self._rate(system, bar)
            await self._baseline("vllm", system, rate_per_s, 1, bar)
        finally:
            with suppress(ClusterError, ProcessLookupError):
                await asyncio.to_thread(system.stop)


def _counts(counts: dict[str, int]) -> dict[str, int]:
    return {f"{role}_workers": count for role, count in counts.items()}


def attention_threads(config: Config) -> dict[str, int]:
    """Threads of an attention worker as a setting, so that those of a smaller cluster do not get more.

    Surviving expert workers do take a dead one's cores, and those of a smaller cluster are to as well.
    """
    return {"attention_threads": config.threads("attention", len(os.sched_getaffinity(0)))}
