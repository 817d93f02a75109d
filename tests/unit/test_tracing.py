"""Spans and log lines of a request across its failovers, from the decisions of Streams themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from tarragon import tracing
from tarragon.gateway.streams import Streams
from tarragon.gateway.watcher import Narrator, Watcher
from tarragon.gateway.wire import Resumed

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}


def request(request_id: str, headers: dict[str, str] | None = None) -> EngineCoreRequest:
    made = EngineCoreRequest(
        request_id, [1, 2, 3], None, SamplingParams(temperature=0), None, 0.0, None, None, None
    )
    made.trace_headers = headers
    return made


def output(request_id: str, *tokens: int, last: bool = False) -> EngineCoreOutput:
    return EngineCoreOutput(request_id, list(tokens), finish_reason=FinishReason.LENGTH if last else None)


def streams(watcher: Watcher, *workers: str) -> Streams:
    seeds = itertools.count(1)
    made = Streams(
        failovers_max=1, waiting_max=2, wait_s=10.0, draw_seed=lambda: next(seeds), watcher=watcher
    )
    for epoch, worker in enumerate(workers, 1):
        made.worker_up(worker, epoch, 0.0)
    return made


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def watcher(exporter: InMemorySpanExporter) -> tracing.TracingWatcher:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return tracing.TracingWatcher(provider.get_tracer("test"))


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def told(span: ReadableSpan) -> list[tuple[str, dict[str, Any]]]:
    return [(event.name, dict(event.attributes or {})) for event in span.events]


def test_a_failover_is_two_attempts_of_one_request(
    exporter: InMemorySpanExporter, watcher: tracing.TracingWatcher
) -> None:
    live = streams(watcher, "aw-0", "aw-1")
    live.add(request("r", HEADERS), 0.0)
    first = live.live["r"].owner
    assert first is not None
    live.accept(first, {"r": 1}, [output("r", 5)], 0.0)
    live.accept(first, {"r": 1}, [output("r", 6)], 0.0)
    live.worker_down(first, "its connection ended", 1.0)
    second = live.live["r"].owner
    assert second not in (None, first)
    live.accept(second, {"r": 2}, [output("r", 7)], 2.0, {"r": Resumed(restored=3, cached=1)})
    live.accept(second, {"r": 2}, [output("r", 8, last=True)], 2.0)

    [whole] = named(exporter, tracing.REQUEST_SPAN)
    assert whole.context is not None
    assert whole.parent is not None
    assert f"{whole.context.trace_id:032x}" == TRACE_ID
    assert f"{whole.parent.span_id:016x}" == PARENT_ID
    attributes = dict(whole.attributes or {})
    assert attributes["tarragon.attempts"] == 2
    assert attributes["tarragon.outcome"] == "length"
    assert attributes["gen_ai.usage.completion_tokens"] == 4
    one, two = named(exporter, tracing.ATTEMPT_SPAN)
    assert {one.parent.span_id, two.parent.span_id} == {whole.context.span_id}  # type: ignore[union-attr]
    assert told(one) == [
        ("assigned", {}),
        ("first token", {}),
        ("failure seen", {"tarragon.kind": "closed", "tarragon.cause": "its connection ended"}),
        ("sealed", {"tarragon.tokens_sent": 2}),
    ]
    # Three of the prompt and two of the text: three restored, one in the cache, one computed again.
    restored = {
        "tarragon.tokens_restored": 3,
        "tarragon.tokens_cached": 1,
        "tarragon.tokens_recomputed": 1,
    }
    assert told(two) == [("assigned", {}), ("restored", restored), ("first token", {})]
    for span, worker, number in ((one, first, 1), (two, second, 2)):
        found = dict(span.attributes or {})
        assert (found["tarragon.worker"], found["tarragon.attempt"]) == (worker, number)
        assert found["tarragon.epoch"] == int(worker[-1]) + 1


def test_the_engine_s_own_span_becomes_a_child(
    exporter: InMemorySpanExporter, watcher: tracing.TracingWatcher
) -> None:
    live = streams(watcher, "aw-0")
    for request_id, headers in (("with", HEADERS), ("without", None)):
        live.add(request(request_id, headers), 0.0)
        given = live.live[request_id].request.trace_headers
        live.abort([request_id])
        span = named(exporter, tracing.REQUEST_SPAN)[-1]
        assert span.context is not None
        assert given is not None
        assert given["traceparent"].startswith(
            f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-"
        )
        assert dict(span.attributes or {})["tarragon.outcome"] == "abort"
        assert (span.parent is None) == (headers is None)


def test_a_drained_worker_s_attempt_ends_and_a_failed_request_says_why(
    exporter: InMemorySpanExporter, watcher: tracing.TracingWatcher
) -> None:
    live = streams(watcher, "aw-0", "aw-1")
    live.add(request("r"), 0.0)
    owner = live.live["r"].owner
    assert owner is not None
    live.drain(owner, 0.0)
    assert ("failure seen", {"tarragon.kind": "drained", "tarragon.cause": f"{owner} is drained"}) in told(
        named(exporter, tracing.ATTEMPT_SPAN)[0]
    )
    live.shut("the gateway is shutting down")
    [whole] = named(exporter, tracing.REQUEST_SPAN)
    assert not whole.status.is_ok
    assert whole.status.description == "the gateway is shutting down"
    assert len(named(exporter, tracing.ATTEMPT_SPAN)) == 2
    assert not watcher._live


def test_without_an_endpoint_there_are_no_spans() -> None:
    assert type(tracing.watcher("")) is Narrator
    assert isinstance(tracing.watcher("http://localhost:4317"), tracing.TracingWatcher)


def test_the_log_has_one_line_for_a_request_that_goes_on_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    live = streams(Narrator(), "aw-0", "aw-1")
    live.add(request("cmpl-1"), 0.0)
    first = live.live["cmpl-1"].owner
    assert first is not None
    live.accept(first, {"cmpl-1": 1}, [output("cmpl-1", 5)], 0.0)
    assert capsys.readouterr().err == ""
    live.worker_down(first, "silent", 1.0, "hung")
    second = live.live["cmpl-1"].owner
    epoch = int(str(second)[-1]) + 1
    assert capsys.readouterr().err == (
        f"WARNING request cmpl-1: {first} was lost (hung: silent), attempt 2 goes on behind 1 tokens "
        f"at {second} ({epoch})\n"
    )
    live.shut("the end")
    assert capsys.readouterr().err == "WARNING request cmpl-1: the end\n"
