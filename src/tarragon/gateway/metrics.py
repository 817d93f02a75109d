"""The gateway's own counters, beside vLLM's metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tarragon.gateway.client import Client
from tarragon.transport.probe import ProbeChannel


def counters(client: Client) -> dict[str, float]:
    """Return what the gateway has counted since it started, by name."""
    counted = client.streams.counters
    return {
        "requests_total": counted.requests,
        "requests_restarted_total": counted.restarts,
        "requests_moved_total": counted.moved,
        "requests_failed_total": counted.failed,
        "outputs_stale_total": counted.outputs_stale,
        "outputs_unknown_total": counted.outputs_unknown,
        "frames_malformed_total": counted.frames_malformed + ProbeChannel.malformed,
    }


_HELP = {
    "requests_total": "Texts that the gateway was asked for.",
    "requests_restarted_total": "Texts that went on on another attention worker because theirs was lost.",
    "requests_moved_total": "Texts that went on on another attention worker because theirs is drained.",
    "requests_failed_total": "Texts that ended with an error of the gateway's own.",
    "outputs_stale_total": "Outputs dropped: of an older attempt, or not from the request's owner.",
    "outputs_unknown_total": "Outputs dropped: the request had ended.",
    "frames_malformed_total": "What the orchestrator or a probed worker sent and is no message of theirs.",
}


STALL_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds of the histogram of stalls."""


class GatewayCollector(Collector):
    """Reads the counters when Prometheus asks, and is told of every stall."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stalls = Histogram(
            "tarragon_stall_seconds",
            "From the moment that the loss of a text's attention worker was noticed to its next token.",
            buckets=STALL_BUCKETS_S,
            registry=None,
        )
        client.on_stall = self._stalls.observe

    def register(self) -> None:
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        for name, value in counters(self._client).items():
            full = f"tarragon_gateway_{name.removesuffix('_total')}"
            yield CounterMetricFamily(full, _HELP[name], value=value)
        streams = self._client.streams
        yield from self._failovers()
        yield GaugeMetricFamily(
            "tarragon_gateway_workers_probed",
            "Attention workers that would be noticed if they hung.",
            value=len(self._client.prober.watched),
        )
        yield GaugeMetricFamily(
            "tarragon_gateway_attention_workers", "Attention workers connected.", value=len(streams.loads)
        )
        yield GaugeMetricFamily(
            "tarragon_gateway_requests_live", "Texts in progress or waiting.", value=len(streams.live)
        )
        yield GaugeMetricFamily(
            "tarragon_gateway_requests_waiting",
            "Texts that wait for an attention worker.",
            value=len(streams.waiting),
        )

    def _failovers(self) -> Iterator[Metric]:
        counted = self._client.streams.counters
        failovers = CounterMetricFamily(
            "tarragon_failovers",
            "Workers whose work others took over, by role and cause.",
            labels=("role", "cause"),
        )
        for kind, count in counted.failovers.items():
            failovers.add_metric(("attention", kind), count)
        yield failovers
        yield CounterMetricFamily(
            "tarragon_stale_outputs", _HELP["outputs_stale_total"], value=counted.outputs_stale
        )
        yield CounterMetricFamily(
            "tarragon_requests_restarted", _HELP["requests_restarted_total"], value=counted.restarts
        )
        yield from self._stalls.collect()
