"""The paper's Random workload (7.1): short prompts, 128 tokens each, Poisson arrivals; every token timed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from tarragon.bench.timeline import Trace

REQUEST_TIMEOUT_S: Final = 900.0
REQUESTS_LIVE_MAX: Final = 512
"""More than this in flight means that the system does not keep up, or hangs."""
ID_PREFIX: Final = "bench-"
_TICK_S: Final = 0.02


class LoadError(RuntimeError):
    """The load cannot go on; the text is one sentence."""


@dataclass(frozen=True)
class Workload:
    """Request ``index`` is the same whenever it is asked for: greedy and seeded sampling in turn."""

    seed: int
    vocabulary: int
    prompt_tokens: int = 10
    output_tokens: int = 128

    def body(self, index: int) -> dict[str, Any]:
        """The body of POST /v1/completions for request ``index``, without the model's name."""
        rng = random.Random(f"{self.seed}/{index}")
        sampling = {"temperature": 0.8, "top_p": 0.95, "seed": index} if index % 2 else {"temperature": 0}
        return {
            "prompt": [rng.randrange(5, self.vocabulary) for _ in range(self.prompt_tokens)],
            "max_tokens": self.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **sampling,
        }


async def read_stream(
    session: aiohttp.ClientSession, url: str, model: str, body: dict[str, Any], trace: Trace
) -> None:
    """Stream one completion from ``url`` into ``trace``; what goes wrong is in ``trace.error``."""
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


class PoissonLoad:
    """An open load that goes on until it is stopped, whatever happens to the server.

    ``replay`` makes clients send a request again from its prompt once a server that went down is up; else
    a failed request stays failed. ``first`` numbers the requests.
    """

    def __init__(
        self,
        workload: Workload,
        url: str,
        model: str,
        rate_per_s: float,
        *,
        first: int = 0,
        replay: bool = False,
    ) -> None:
        self.traces: list[Trace] = []
        self.lag_s: list[tuple[float, float]] = []
        """When this process itself was late, and by how much: such a gap is not the server's."""
        self._workload, self._url, self._model = workload, url, model
        self._rate_per_s, self._first, self._replay = rate_per_s, first, replay
        self._rng = random.Random(f"arrivals/{workload.seed}/{first}")
        self._up = asyncio.Event()
        self._up.set()
        self._stopping = asyncio.Event()

    def down(self) -> None:
        """The server is about to go: clients do not try before it is up."""
        self._up.clear()

    def up(self, url: str) -> None:
        self._url = url
        self._up.set()

    def stop(self) -> None:
        """No further arrivals; run() returns when all streams have ended."""
        self._stopping.set()

    async def run(self) -> None:
        """Send requests until stopped. Raises LoadError if they pile up."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        watch = asyncio.create_task(self._watch_lag())
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
                asyncio.TaskGroup() as live,
            ):
                await self._arrive(session, live)
        except ExceptionGroup as group:  # one sentence says it, and there is one cause
            raise group.exceptions[0] from group
        finally:
            watch.cancel()

    async def _arrive(self, session: aiohttp.ClientSession, live: asyncio.TaskGroup) -> None:
        due_s = time.monotonic()
        while True:
            due_s += self._rng.expovariate(self._rate_per_s)
            try:
                async with asyncio.timeout(max(0.0, due_s - time.monotonic())):
                    await self._stopping.wait()
                    return
            except TimeoutError:
                pass  # it is time for the next
            if sum(trace.ended_s is None for trace in self.traces) >= REQUESTS_LIVE_MAX:
                raise LoadError(f"{REQUESTS_LIVE_MAX} requests are in flight: the load is more than it takes")
            trace = Trace(self._first + len(self.traces), due_s)
            self.traces.append(trace)
            live.create_task(self._one(session, trace))

    async def _one(self, session: aiohttp.ClientSession, trace: Trace) -> None:
        body = self._workload.body(trace.index)
        while True:
            await self._up.wait()
            await read_stream(session, self._url, self._model, body, trace)
            if not (trace.error and self._replay and not self._up.is_set()):
                break
            trace.attempts += 1
        trace.ended_s = time.monotonic()

    async def _watch_lag(self) -> None:
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            if (late_s := now_s - before_s - _TICK_S) > _TICK_S / 4:
                self.lag_s.append((now_s, late_s))


async def closed_loop(
    workload: Workload, url: str, model: str, indexes: Iterable[int], concurrency: int
) -> list[Trace]:
    """Run these requests, ``concurrency`` at a time; their traces in order."""
    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(index: int) -> Trace:
            async with gate:
                trace = Trace(index, time.monotonic())
                await read_stream(session, url, model, workload.body(index), trace)
                trace.ended_s = time.monotonic()
                return trace

        return list(await asyncio.gather(*(one(index) for index in indexes)))


async def capacity_tokens_per_s(
    workload: Workload, url: str, model: str, indexes: range, concurrency: int
) -> float:
    """Tokens/s of a closed loop, over the time in which all of its slots were taken.

    Raises LoadError if a request failed.
    """
    start_s = time.monotonic()
    traces = await closed_loop(workload, url, model, indexes, concurrency)
    for trace in traces:
        if trace.error:
            raise LoadError(f"a request failed while capacity was measured: {trace.error}")
    # The last requests of a closed loop run beside empty slots: they would make it look slower.
    full_until_s = max(trace.due_s for trace in traces)
    if full_until_s - start_s < 1.0:
        full_until_s = max(trace.ended_s or 0.0 for trace in traces)
    tokens = sum(at <= full_until_s for trace in traces for at in trace.times_s)
    return tokens / (full_until_s - start_s)
