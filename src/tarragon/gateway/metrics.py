"""The gateway's own counters, beside vLLM's metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tarragon.gateway.client import Client


def counters(client: Client) -> dict[str, float]:
    """Return what the gateway has counted since it started, by name."""
    counted = client.streams.counters
    return {
        "requests_total": counted.requests,
        "requests_restarted_total": counted.restarts,
        "requests_failed_total": counted.failed,
        "outputs_stale_total": counted.outputs_stale,
        "outputs_unknown_total": counted.outputs_unknown,
    }


_HELP = {
    "requests_total": "Texts that the gateway was asked for.",
    "requests_restarted_total": "Texts that began again on another attention worker.",
    "requests_failed_total": "Texts that ended with an error of the gateway's own.",
    "outputs_stale_total": "Outputs dropped: of an older attempt, or not from the request's owner.",
    "outputs_unknown_total": "Outputs dropped: the request had ended.",
}


class GatewayCollector(Collector):
    """Reads the counters when Prometheus asks."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def register(self) -> None:
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        for name, value in counters(self._client).items():
            full = f"tarragon_gateway_{name.removesuffix('_total')}"
            yield CounterMetricFamily(full, _HELP[name], value=value)
        streams = self._client.streams
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
