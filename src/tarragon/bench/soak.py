"""`tarragon bench soak`: no false failover while every core is busy for minutes (section 5, appendix E).

A closed loop of streams runs on a cluster with default probe settings, beside one process per core that does
nothing but burn it. Nobody is harmed: every worker that is suspected, declared dead or replaced is a false
alarm, and so is every stream that fails.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from tarragon.agent.process import die_with_parent
from tarragon.bench import output
from tarragon.bench.load import closed_loop
from tarragon.bench.progress import Bar
from tarragon.bench.workloads import VOCABULARY_MAX, Workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.models.demo import ensure_demo_model

ALARMS: Final = ("suspect", "dead", "exited", "start")
PROMPT_TOKENS: Final = 60
OUTPUT_TOKENS: Final = 96


def parser() -> argparse.ArgumentParser:
    options = output.parser("soak", __doc__)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--concurrency", type=int, default=8)
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    return options


def main(argv: list[str]) -> int:
    """Exit code 1 if there was an alarm or a stream failed."""
    options = parser().parse_args(argv)
    model = options.model or ensure_demo_model(layers=options.layers)
    burners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=die_with_parent)
        for _ in range(len(os.sched_getaffinity(0)))
    ]
    try:
        metrics = run(options, model)
    except ClusterError as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    settings = {
        "model": model.name,
        "minutes": options.minutes,
        "concurrency": options.concurrency,
        "burning_processes": len(burners),
    }
    output.write(output.result("soak", settings, metrics), options.json)
    print(
        f"{metrics['requests']} requests in {options.minutes:g} minutes, {len(metrics['errors'])} failed; "
        f"{len(metrics['alarms'])} false alarms; {metrics['probes_answered']:.0f} probes answered"
    )
    return 1 if metrics["alarms"] or metrics["errors"] else 0


def run(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Load the cluster for the time asked for; what happened to it meanwhile."""
    requests, errors = 0, []
    workload = Workload(0, VOCABULARY_MAX, PROMPT_TOKENS, OUTPUT_TOKENS, greedy=True)
    with (
        Cluster(model, options.attention_workers, options.expert_workers) as cluster,
        Bar("soak", 60.0 * options.minutes) as bar,
    ):
        cluster.wait_for("full_capacity")
        before = max(event["number"] for event in _events(cluster, 0))
        end_s = time.monotonic() + 60.0 * options.minutes
        while time.monotonic() < end_s:
            start_s = time.monotonic()
            indexes = range(requests, requests + 3 * options.concurrency)
            traces = asyncio.run(closed_loop(workload, cluster.url, model.name, indexes, options.concurrency))
            requests += len(traces)
            errors += [trace.error for trace in traces if trace.error]
            bar.done(time.monotonic() - start_s)
        return {
            "requests": requests,
            "errors": errors,
            "alarms": [event for event in _events(cluster, before) if event["kind"] in ALARMS],
            "probes_answered": sum(
                worker.get("counters", {}).get("probes_answered", 0.0)
                for worker in cluster.status()["workers"]
            ),
        }


def _events(cluster: Cluster, after: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.admin.request("GET", f"/events?after={after}")["events"]
    return found
