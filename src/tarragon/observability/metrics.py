"""The cluster's own metrics for Prometheus, on the admin listener; the gateway's /metrics has the engine's.

Everything comes from the status, so that the two never disagree: what workers count and report, who is in
which state, and what of the experts is covered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4"
STATES: Final = ("starting", "healthy", "suspect", "dead", "draining")
_GAUGES: Final = frozenset({"bucket", "clock_s", "probe_channels", "probe_realtime", "streams_live"})
"""Counters of reports that go up and down."""


class _Status:
    """A collector over one status."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        for name in ("ready", "full_capacity", "exact", "protected"):
            yield GaugeMetricFamily(
                f"tarragon_{name}", f"1 while the status says {name}.", value=float(status[name])
            )
        yield GaugeMetricFamily(
            "tarragon_ert_version", "Version of the expert routing table.", value=status["ert_version"]
        )
        experts = GaugeMetricFamily(
            "tarragon_experts", "Logical experts: all, with a loaded shadow, without a host.", labels=["kind"]
        )
        for kind in ("total", "with_shadow", "unreachable"):
            experts.add_metric([kind], status["experts"][kind])
        yield experts
        yield from self._workers()
        yield from self._counters()

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


def exposition(status: dict[str, Any]) -> bytes:
    """The body of GET /metrics for a status as GET /status has it."""
    registry = CollectorRegistry()
    registry.register(_Status(status))
    return generate_latest(registry)
