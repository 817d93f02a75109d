"""One endless load, cut into windows: what does a change at run time do to its pace?

The streams go on while something is switched, so that both sides meet the same streams, cores and moments.
A window of a few seconds has a few dozen steps; counting its tokens would be off by one step in each, which
is more than what is to be found. So the times between tokens are taken, of those that lie wholly in it.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import aiohttp

from tarragon.bench.load import LoadError, read_stream, session
from tarragon.bench.timeline import Trace
from tarragon.bench.workloads import Workload

WARM_S: Final = 3.0


class EndlessLoad:
    """A fixed number of streams, each replaced as it ends."""

    def __init__(self, url: str, model: str, workload: Workload, streams: int) -> None:
        self._url, self._model, self._workload, self._streams = url, model, workload, streams
        self._next = 0
        self._traces: list[Trace] = []
        self._running: asyncio.Task[None] | None = None
        self._stopping = False

    async def __aenter__(self) -> EndlessLoad:
        self._running = asyncio.create_task(self._run())
        await asyncio.sleep(WARM_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let the streams end; raises LoadError if one failed."""
        self._stopping = True
        assert self._running is not None
        try:
            await self._running
        except* LoadError as failed:
            raise failed.exceptions[0] from None

    async def window(self, seconds: float) -> float:
        """Tokens/s of all streams in the next ``seconds``. Raises LoadError if a stream failed."""
        assert self._running is not None
        start_s = time.monotonic()
        await asyncio.sleep(seconds)
        if self._running.done():
            await self._running
        end_s = time.monotonic()
        found = pace(self._traces, start_s, end_s)
        self._traces = [trace for trace in self._traces if trace.ended_s is None]
        if not found:
            raise LoadError(f"no stream brought two tokens within {seconds:g} s")
        return self._streams * found

    async def _run(self) -> None:
        async with session() as client, asyncio.TaskGroup() as group:
            for _ in range(self._streams):
                group.create_task(self._keep_one(client))

    async def _keep_one(self, client: aiohttp.ClientSession) -> None:
        while not self._stopping:
            trace = Trace(self._next, time.monotonic())
            self._next += 1
            self._traces.append(trace)
            await read_stream(client, self._url, self._model, self._workload.body(trace.index), trace)
            if trace.error:
                raise LoadError(f"a request failed: {trace.error}")
            trace.ended_s = time.monotonic()


def pace(traces: Iterable[Trace], start_s: float, end_s: float) -> float:
    """Tokens/s of one stream: the inverse of the mean of the gaps that begin and end in the window."""
    gaps = [
        after - before
        for trace in traces
        for before, after in zip(trace.times_s, trace.times_s[1:], strict=False)
        if before >= start_s and after <= end_s
    ]
    return 1.0 / statistics.fmean(gaps) if gaps else 0.0


async def alternate(
    load: EndlessLoad,
    switch: Callable[[str], Awaitable[None]],
    sides: tuple[str, str],
    number: int,
    seconds: float,
) -> dict[str, float]:
    """Tokens/s of both sides, one after the other; the order changes with ``number``."""
    found = {}
    for side in sides if number % 2 == 0 else sides[::-1]:
        await switch(side)
        found[side] = await load.window(seconds)
    return found
