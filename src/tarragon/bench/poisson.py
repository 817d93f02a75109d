"""An open load (7.1): requests come as a Poisson process has them come, whatever the server makes of it."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Final

import aiohttp

from tarragon.bench.load import LoadError, read_stream, session
from tarragon.bench.timeline import Trace
from tarragon.bench.workloads import Workload

REQUESTS_LIVE_MAX: Final = 512
"""More than this in flight means that the system does not keep up, or hangs."""
_TICK_S: Final = 0.02


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
        watch = asyncio.create_task(self._watch_lag())
        try:
            async with session() as client, asyncio.TaskGroup() as live:
                await self._arrive(client, live)
        except ExceptionGroup as group:  # one sentence says it, and there is one cause
            raise group.exceptions[0] from group
        finally:
            watch.cancel()

    async def _arrive(self, client: aiohttp.ClientSession, live: asyncio.TaskGroup) -> None:
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
            live.create_task(self._one(client, trace))

    async def _one(self, client: aiohttp.ClientSession, trace: Trace) -> None:
        body = self._workload.body(trace.index)
        while True:
            await self._up.wait()
            await read_stream(client, self._url, self._model, body, trace)
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
