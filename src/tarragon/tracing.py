"""Spans of a request across its failovers, for OpenTelemetry.

::

    tarragon.request          from the gateway's taking a text over to its end; child of the client's span
      tarragon.attempt        one per assignment to an attention worker: worker, epoch, number of the attempt
        event assigned
        event first token     with the positions restored, found in the prefix cache and recomputed
        event failure seen    with the cause
        event sealed          what was accepted until here counts as sent
      llm_request             vLLM's own span

vLLM's tracer provider exports them, so that its flag and OpenTelemetry's variables hold for all spans.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tarragon.config import TRACES_FLUSH_TIMEOUT_S
from tarragon.gateway.watcher import Narrator, Watcher

if TYPE_CHECKING:
    from tarragon.gateway.streams import Stream
    from tarragon.gateway.wire import Resumed

SERVICE_NAME: Final = "tarragon"
REQUEST_SPAN: Final = "tarragon.request"
ATTEMPT_SPAN: Final = "tarragon.attempt"
_PROPAGATOR: Final = TraceContextTextMapPropagator()


def watcher(endpoint: str) -> Watcher:
    """What Streams tells its events to: the log, and spans if there is an ``endpoint`` to send them to.

    vLLM sets the tracer provider up when its engine is built; until then nothing is recorded.
    """
    if not endpoint:
        return Narrator()
    os.environ.setdefault("OTEL_SERVICE_NAME", SERVICE_NAME)
    return TracingWatcher(trace.get_tracer("tarragon.gateway"))


def close() -> None:
    """Send what has not been sent yet, for a bounded time; the process may end afterwards."""
    shutdown = getattr(trace.get_tracer_provider(), "shutdown", None)
    if shutdown is not None:
        last = threading.Thread(target=shutdown, name="last spans", daemon=True)
        last.start()
        last.join(TRACES_FLUSH_TIMEOUT_S)


@dataclass
class _Spans:
    request: Span
    attempt: Span | None = None


class TracingWatcher(Narrator):
    """Turns the events of each request into spans."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self._live: dict[str, _Spans] = {}

    def began(self, stream: Stream) -> None:
        request = stream.request
        span = self._tracer.start_span(
            REQUEST_SPAN,
            context=_PROPAGATOR.extract(dict(request.trace_headers or {})),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.request.id": stream.request_id,
                "gen_ai.usage.prompt_tokens": len(request.prompt_token_ids),
            },
        )
        self._live[stream.request_id] = _Spans(span)
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, trace.set_span_in_context(span))
        request.trace_headers = headers  # the parent of vLLM's own span

    def assigned(self, stream: Stream, epoch: int) -> None:
        super().assigned(stream, epoch)
        spans = self._live[stream.request_id]
        spans.attempt = self._tracer.start_span(
            ATTEMPT_SPAN,
            context=trace.set_span_in_context(spans.request),
            attributes={
                "tarragon.worker": stream.owner or "",
                "tarragon.epoch": epoch,
                "tarragon.attempt": stream.attempt,
                "tarragon.tokens_sent": len(stream.sent),
            },
        )
        spans.attempt.add_event("assigned")

    def lost(self, stream: Stream, kind: str, cause: str) -> None:
        super().lost(stream, kind, cause)
        attempt = self._live[stream.request_id].attempt
        if attempt is not None:
            attempt.add_event("failure seen", {"tarragon.kind": kind, "tarragon.cause": cause})
            attempt.set_status(StatusCode.ERROR, cause)

    def sealed(self, stream: Stream) -> None:
        attempt = self._live[stream.request_id].attempt
        if attempt is not None:
            attempt.add_event("sealed", {"tarragon.tokens_sent": len(stream.sent)})
        self._end_attempt(stream)

    def delivered(self, stream: Stream, resumed: Resumed | None) -> None:
        attempt = self._live[stream.request_id].attempt
        if attempt is None:
            return
        if resumed is None:
            attempt.add_event("first token")
            return
        known = resumed.restored + resumed.cached
        restored = {
            "tarragon.tokens_restored": resumed.restored,
            "tarragon.tokens_cached": resumed.cached,
            "tarragon.tokens_recomputed": stream.tokens - known,
        }
        attempt.set_attributes(restored)
        attempt.add_event("restored", restored)
        attempt.add_event("first token")

    def ended(self, stream: Stream, outcome: str, error: str = "") -> None:
        super().ended(stream, outcome, error)
        self._end_attempt(stream)
        span = self._live.pop(stream.request_id).request
        span.set_attribute("gen_ai.usage.completion_tokens", len(stream.sent))
        span.set_attribute("tarragon.attempts", stream.attempt)
        span.set_attribute("tarragon.outcome", outcome)
        if error:
            span.set_status(StatusCode.ERROR, error)
        span.end()

    def _end_attempt(self, stream: Stream) -> None:
        spans = self._live[stream.request_id]
        if spans.attempt is not None:
            spans.attempt.end()
            spans.attempt = None
