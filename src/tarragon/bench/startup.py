"""`tarragon bench startup`: how long until a cluster serves, and until one more worker does (5.4).

Measured from outside: from the start of `tarragon serve` to its ready line; from the command
`tarragon add attention|expert` to the worker's state "healthy"; and from the SIGKILL of a worker to the
health of the incarnation that takes its place.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from tarragon.bench import output
from tarragon.bench.stats import summary
from tarragon.cluster import Cluster, ClusterError
from tarragon.models.demo import ensure_demo_model

POLL_S: Final = 0.02
WORKER_TIMEOUT_S: Final = 180.0
ROLES: Final = ("expert", "attention")


def parser() -> argparse.ArgumentParser:
    options = output.parser("startup", __doc__)
    options.add_argument("--depths", type=int, nargs="+", default=[4, 30], help="layers of the demo model")
    options.add_argument("--rounds", type=int, default=2, help="workers added and killed, of each role")
    options.add_argument("--attention-workers", type=int, default=2)
    options.add_argument("--expert-workers", type=int, default=2)
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    settings = {
        "attention_workers": options.attention_workers,
        "expert_workers": options.expert_workers,
        "rounds": options.rounds,
    }
    if options.model:
        models = {options.model.name: options.model}
    else:
        depths = [options.layers] if options.layers else options.depths
        models = {f"demo model, {depth} layers": ensure_demo_model(layers=depth) for depth in depths}
    metrics: dict[str, Any] = {}
    for name, model in models.items():
        seconds: dict[str, list[float]] = {}
        start_s = time.monotonic()
        with Cluster(model, options.attention_workers, options.expert_workers) as cluster:
            _note(seconds, "serve to ready", time.monotonic() - start_s)
            cluster.wait_for("full_capacity", WORKER_TIMEOUT_S)
            _note(seconds, "serve to full capacity", time.monotonic() - start_s)
            for _ in range(options.rounds):
                for role in ROLES:
                    added, took_s = add(cluster, role)
                    _note(seconds, f"one more {role} worker", took_s)
                    remove(cluster, added)
                    _note(seconds, f"replacement of a killed {role} worker", replace(cluster, role))
        metrics[name] = {what: {**summary(values), "seconds": values} for what, values in seconds.items()}
        output.write(output.result("startup", settings, metrics), options.json)
    print(report(metrics))
    output.plot(options.plot, lambda axes: draw(axes, metrics))
    return 0


def _note(seconds: dict[str, list[float]], what: str, value: float) -> None:
    seconds.setdefault(what, []).append(value)
    print(f"{what}: {value:.2f} s", file=sys.stderr)


def add(cluster: Cluster, role: str) -> tuple[str, float]:
    """Add one worker; its id and the seconds until it was healthy. Raises ClusterError if it never is."""
    before = set(healthy(cluster, role))
    start_s = time.monotonic()
    cluster.add(role)
    found = until(lambda: sorted(set(healthy(cluster, role)) - before), f"one more {role} worker")
    return str(found[0][0]), time.monotonic() - start_s


def remove(cluster: Cluster, worker_id: str) -> None:
    """Drain an added worker and wait until the cluster is what it was."""
    cluster.drain(worker_id)
    until(
        lambda: all(w["id"] != worker_id or w["state"] == "dead" for w in cluster.status()["workers"]),
        f"the end of {worker_id}",
    )
    cluster.wait_for("full_capacity", WORKER_TIMEOUT_S)


def replace(cluster: Cluster, role: str) -> float:
    """Kill the first worker of a role; seconds until a healthy one of its name is back."""
    worker_id, epoch = min(healthy(cluster, role))
    start_s = time.monotonic()
    cluster.kill(worker_id)
    until(
        lambda: any(name == worker_id and new != epoch for name, new in healthy(cluster, role)),
        f"the replacement of {worker_id}",
    )
    took_s = time.monotonic() - start_s
    cluster.wait_for("full_capacity", WORKER_TIMEOUT_S)
    return took_s


def healthy(cluster: Cluster, role: str) -> list[tuple[str, int]]:
    """(id, epoch) of the healthy workers of a role."""
    return [
        (str(worker["id"]), int(worker["epoch"]))
        for worker in cluster.status()["workers"]
        if worker["role"] == role and worker["state"] == "healthy"
    ]


def until(found: Callable[[], Any], what: str) -> Any:
    """Poll until ``found`` returns something true, and return it; ClusterError after WORKER_TIMEOUT_S."""
    deadline_s = time.monotonic() + WORKER_TIMEOUT_S
    while not (value := found()):
        if time.monotonic() > deadline_s:
            raise ClusterError(f"waited {WORKER_TIMEOUT_S:g} s in vain for {what}")
        time.sleep(POLL_S)
    return value


def report(metrics: dict[str, Any]) -> str:
    rows = [
        [f"{name}: {what}", figures["median"], figures["min"], figures["max"], figures["n"]]
        for name, found in metrics.items()
        for what, figures in found.items()
    ]
    return output.table(["seconds", "median", "min", "max", "n"], rows)


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """One bar for each kind of start and model, its length the median."""
    kinds = list(dict.fromkeys(what for found in metrics.values() for what in found))
    height = 0.8 / len(metrics)
    for number, (name, found) in enumerate(metrics.items()):
        at = [index + number * height for index in range(len(kinds))]
        axes.barh(at, [found[kind]["median"] for kind in kinds], height, label=name)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(kinds))], kinds)
    axes.invert_yaxis()
    axes.set_xlabel("seconds (median)")
    axes.legend()
