"""The one way in which benchmarks ask a server and time its answers: one stream, or a closed loop of them.

An open loop, whose requests come when they come, is in poisson.py.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any, Final

import aiohttp

from tarragon.bench.timeline import Trace
from tarragon.bench.workloads import Workload

REQUEST_TIMEOUT_S: Final = 900.0
ID_PREFIX: Final = "bench-"
"""Request ``index`` carries this and its number as X-Request-Id (see owners.py)."""


class LoadError(RuntimeError):
    """The load cannot go on; the text is one sentence."""


def session() -> aiohttp.ClientSession:
    """A client without a bound on connections: the load decides how many streams there are."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S), connector=aiohttp.TCPConnector(limit=0)
    )


async def read_stream(
    session: aiohttp.ClientSession, url: str, model: str, body: dict[str, Any], trace: Trace
) -> None:
    """Stream one completion from ``url`` into ``trace``; what goes wrong is in ``trace.error``.

    ``body`` asks for a stream with token ids, as ``Workload.body`` does; ``url`` ends before "/v1".
    """
    trace.error, trace.finish_reason, trace.text = "", None, ""
    position = 0
    headers = {"X-Request-Id": f"{ID_PREFIX}{trace.index}"}
    try:
        async with session.post(
            f"{url}/v1/completions", json={"model": model, **body}, headers=headers
        ) as response:
            if response.status != 200:
                trace.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return
            async for line in response.content:
                position = _take_line(line, trace, position, time.monotonic())
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        trace.error = f"{type(error).__name__}: {error}"
    if not trace.error and trace.finish_reason is None:
        trace.error = "the stream ended without a finish reason"


def _take_line(line: bytes, trace: Trace, position: int, now_s: float) -> int:
    """Take one line of the event stream; return the position of the token that comes next."""
    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
        return position
    event = json.loads(line[6:])
    if "error" in event:
        trace.error = str(event["error"])[:500]
        return position
    for choice in event.get("choices", ()):
        trace.text += choice["text"]
        trace.finish_reason = choice["finish_reason"] or trace.finish_reason
        for token in choice.get("token_ids") or ():
            trace.take(position, token, now_s)
            position += 1
    return position


async def closed_loop(
    workload: Workload, url: str, model: str, indexes: Iterable[int], concurrency: int
) -> list[Trace]:
    """Run these requests, ``concurrency`` at a time; their traces in order."""
    gate = asyncio.Semaphore(concurrency)
    async with session() as client:

        async def one(index: int) -> Trace:
            async with gate:
                trace = Trace(index, time.monotonic())
                await read_stream(client, url, model, workload.body(index), trace)
                trace.ended_s = time.monotonic()
                return trace

        return list(await asyncio.gather(*(one(index) for index in indexes)))


def fail_on_error(traces: Iterable[Trace], doing: str = "") -> None:
    """Raise LoadError for the first request that failed; ``doing`` may say what for, as "while ..."."""
    for trace in traces:
        if trace.error:
            raise LoadError(" ".join(f"a request failed {doing}".split()) + f": {trace.error}")


async def capacity_tokens_per_s(
    workload: Workload, url: str, model: str, indexes: range, concurrency: int
) -> float:
    """Tokens/s of a closed loop, over the time in which all of its slots were taken.

    Raises LoadError if a request failed.
    """
    start_s = time.monotonic()
    traces = await closed_loop(workload, url, model, indexes, concurrency)
    fail_on_error(traces, "while capacity was measured")
    # The last requests of a closed loop run beside empty slots: they would make it look slower.
    full_until_s = max(trace.due_s for trace in traces)
    if full_until_s - start_s < 1.0:
        full_until_s = max(trace.ended_s or 0.0 for trace in traces)
    tokens = sum(at <= full_until_s for trace in traces for at in trace.times_s)
    return tokens / (full_until_s - start_s)
