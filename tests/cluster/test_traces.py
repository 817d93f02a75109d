"""A request across a real failover, as an OpenTelemetry collector and a reader of the log see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.forkserver import ForkServer
from tests.otlp import Receiver, receiver
from tests.workload import SMALL_LAYERS

from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model
from tarragon.tracing import ATTEMPT_SPAN, REQUEST_SPAN

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TOKENS = 250
KILL_AT = 40
FULL_CAPACITY_S = 120.0


@pytest.fixture(scope="module")
def collector() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


@pytest.fixture(scope="module")
def traced(collector: Receiver, forkserver: ForkServer) -> Iterator[Cluster]:
    environ = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with forkserver.cluster(
        ensure_demo_model(layers=SMALL_LAYERS),
        2,
        2,
        engine_args=["--max-model-len=1024"],
        environ=environ,
        kv_cache_bytes=256 << 20,
        log_format="json",
        otlp_traces_endpoint=collector.endpoint,
    ) as cluster:
        yield cluster


def owner(cluster: Cluster) -> str:
    """The attention worker that runs the only request, by vLLM's own gauge."""
    lines = httpx.get(f"{cluster.url}/metrics", timeout=30).text.splitlines()
    [index] = [
        line.partition('engine="')[2].partition('"')[0]
        for line in lines
        if line.startswith("vllm:num_requests_running{") and float(line.split()[-1]) == 1.0
    ]
    return f"aw-{index}"


def stream_with_a_kill(cluster: Cluster) -> str:
    """Read one stream and kill the worker that runs it in the middle; return the worker's id."""
    body = {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    killed, chunks = "", 0
    with httpx.stream(
        "POST", f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=120
    ) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            chunks += line.startswith("data: {")
            if chunks == KILL_AT and not killed:
                killed = owner(cluster)
                cluster.kill(killed)
    assert killed
    return killed


@pytest.fixture(scope="module")
def killed(traced: Cluster) -> str:
    traced.wait_for("protected")
    victim = stream_with_a_kill(traced)
    traced.wait_for("full_capacity", FULL_CAPACITY_S)
    return victim


def test_the_trace_shows_both_attempts(killed: str, collector: Receiver) -> None:
    one, two = sorted(collector.wait_for(ATTEMPT_SPAN, 2), key=lambda span: span.start_ns)
    [whole] = collector.wait_for(REQUEST_SPAN, 1)
    [engine] = collector.wait_for("llm_request", 1)
    assert {span.trace_id for span in (one, two, whole, engine)} == {TRACE_ID}
    assert whole.parent_id == PARENT_ID
    assert one.parent_id == two.parent_id == engine.parent_id == whole.span_id
    assert whole.service == "tarragon"
    assert whole.attributes["tarragon.attempts"] == 2
    assert whole.attributes["gen_ai.usage.completion_tokens"] == TOKENS
    assert not whole.is_error

    assert one.is_error
    assert one.attributes["tarragon.worker"] == killed
    assert two.attributes["tarragon.worker"] != killed
    assert {one.attributes["tarragon.attempt"], two.attributes["tarragon.attempt"]} == {1, 2}
    assert [name for name, _ in one.events] == ["assigned", "first token", "failure seen", "sealed"]
    assert [name for name, _ in two.events] == ["assigned", "restored", "first token"]
    sent = one.events[-1][1]["tarragon.tokens_sent"]
    restored: dict[str, Any] = two.events[1][1]
    assert restored["tarragon.tokens_restored"] > 0
    known = sum(restored.values())
    assert known == whole.attributes["gen_ai.usage.prompt_tokens"] + sent
    assert one.end_ns <= two.start_ns <= two.end_ns <= whole.end_ns


def test_every_line_of_the_log_is_an_object_that_says_whose_it_is(killed: str, traced: Cluster) -> None:
    lines = [json.loads(line) for line in traced.logs().splitlines()]
    for line in lines:
        assert line["level"] in ("debug", "info", "warning", "error"), line
        assert line["time"].endswith("Z")
        assert isinstance(line["epoch"], int)
        assert line["worker"]
    assert {"orchestrator", "gateway", "console"} <= {line["worker"] for line in lines}
    [told] = [line for line in lines if "goes on behind" in line["text"]]
    assert told["worker"] == "gateway"
    assert told["level"] == "warning"
    assert told["request"].startswith("cmpl-")
    assert f"{killed} was lost" in told["text"]
    assert any(f"{killed} (" in line["text"] and line["level"] == "warning" for line in lines)
