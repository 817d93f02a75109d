"""The cluster's own metrics for Prometheus, on the admin listener; the gateway's /metrics has the engine's.

Everything comes from the status and the latest sample of the history, so that they never disagree: what
workers count and report, who is in which state, and what of the experts is covered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4"
STATES: Final = ("starting", "healthy", "suspect", "dead", "draining")
UNPROTECTED: Final = "requests_unprotected"
_GAUGES: Final = frozenset(
    {
        "bucket",
        "buckets",
        "buckets_dead",
        "bytes_reserved",
        "bytes_touched",
        "clients",
        "clients_waiting",
        "clock_s",
        "compared_cpu_s",
        "compared_cpu_s_error",
        "compared_pairs",
        "compared_tokens",
        "compared_wall_cost",
        "compared_wall_cost_error",
        "needs_checkpoints",
        "probe_channels",
        "probe_realtime",
        "requests_behind",
        "streams_live",
        UNPROTECTED,
    }
)
"""Counters of reports that go up and down."""


class _Status:
    """A collector over one status and one sample of the history."""

    def __init__(self, status: dict[str, Any], sample: Mapping[str, Any]) -> None:
        self._status, self._sample = status, sample

    def collect(self) -> Iterator[Metric]:
        status = self._status
        for name in ("ready", "full_capacity", "exact", "protected"):
            yield GaugeMetricFamily(
                f"tarragon_{name}", f"1 while the status says {name}.", value=float(status[name])
            )
        yield GaugeMetricFamily(
            "tarragon_ert_version", "Version of the expert routing table.", value=status["ert_version"]
        )
        yield from self._experts()
        yield from self._protection()
        yield from self._failures()
        yield from self._provisioning()
        yield from self._workers()
        yield from self._counters()

    def _experts(self) -> Iterator[Metric]:
        counts = self._status["experts"]
        experts = GaugeMetricFamily(
            "tarragon_experts", "Logical experts: all, with a loaded shadow, without a host.", labels=["kind"]
        )
        for kind in ("total", "with_shadow", "unreachable"):
            experts.add_metric([kind], counts[kind])
        yield experts
        yield GaugeMetricFamily(
            "tarragon_shadow_coverage_ratio",
            "Part of the logical experts that has a loaded shadow.",
            value=counts["with_shadow"] / max(1, counts["total"]),
        )

    def _protection(self) -> Iterator[Metric]:
        counters = [worker.get("counters", {}) for worker in self._status["workers"]]
        yield GaugeMetricFamily(
            "tarragon_unprotected_requests",
            "Running texts whose K,V rows no checkpoint holds.",
            value=sum(found.get(UNPROTECTED, 0.0) for found in counters),
        )
        lag_ms = self._sample.get("checkpoint_lag_ms") or 0.0  # None while no step is run: nothing waits
        yield GaugeMetricFamily(
            "tarragon_checkpoint_lag_seconds",
            "How long a step's tokens wait for their rows to be committed, at the slowest worker.",
            value=lag_ms / 1e3,
        )

    def _failures(self) -> Iterator[Metric]:
        failovers = CounterMetricFamily(
            "tarragon_failovers",
            "Workers whose work others took over, by role and cause; the gateway counts attention workers.",
            labels=["role", "cause"],
        )
        for cause, count in self._status.get("failures", {}).get("expert", {}).items():
            failovers.add_metric(["expert", cause], count)
        yield failovers
        deaths = CounterMetricFamily(
            "tarragon_worker_deaths", "Workers lost after they were ready.", labels=["role", "cause"]
        )
        for role, causes in self._status.get("failures", {}).items():
            for cause, count in causes.items():
                deaths.add_metric([role, cause], count)
        yield deaths
        refused = CounterMetricFamily(
            "tarragon_refused", "Messages and events that the orchestrator did not accept.", labels=["reason"]
        )
        for reason, count in self._status.get("refused", {}).items():
            refused.add_metric([reason], count)
        yield refused

    def _provisioning(self) -> Iterator[Metric]:
        seconds = HistogramMetricFamily(
            "tarragon_provisioning_seconds", "From a worker's start to its being ready.", labels=["role"]
        )
        for role, found in self._status.get("provisioning", {}).items():
            cumulated = accumulate(found["counts"].values())
            buckets = list(zip(found["counts"], map(float, cumulated), strict=True))
            seconds.add_metric([role], buckets, found["sum_s"])
        yield seconds

    def _workers(self) -> Iterator[Metric]:
        states = GaugeMetricFamily(
            "tarragon_worker_state",
            "1 for the state that a worker is in.",
            labels=["worker", "role", "state"],
        )
        epochs = GaugeMetricFamily(
            "tarragon_worker_epoch", "Incarnation of a worker.", labels=["worker", "role"]
        )
        for worker in self._status["workers"]:
            labels = [worker["id"], worker["role"]]
            for state in STATES:
                states.add_metric([*labels, state], float(worker["state"] == state))
            epochs.add_metric(labels, worker["epoch"])
        yield states
        yield epochs

    def _counters(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for worker in self._status["workers"]:
            for name, value in worker.get("counters", {}).items():
                family = families.get(name)
                if family is None:
                    is_gauge = name in _GAUGES or name.startswith("tbt_")
                    kind = GaugeMetricFamily if is_gauge else CounterMetricFamily
                    plain = name.removesuffix("_total")
                    family = families[name] = kind(
                        f"tarragon_worker_{plain}",
                        f"{plain.replace('_', ' ')}, as the worker reports it.",
                        labels=["worker", "role"],
                    )
                family.add_metric([worker["id"], worker["role"]], value)
        yield from families.values()


def exposition(status: dict[str, Any], sample: Mapping[str, Any] | None = None) -> bytes:
    """The body of GET /metrics for a status as GET /status has it, and the latest sample of GET /history."""
    registry = CollectorRegistry()
    registry.register(_Status(status, sample or {}))
    return generate_latest(registry)
