"""One endless load, cut into windows: what does a change at run time do to its pace?

The streams go on while something is switched, so that both sides meet the same streams, cores and moments.
A window of a few seconds has a few dozen steps; counting its tokens would be off by one step in each, which
is more than what is to be found. So the times between tokens are taken, of those that lie wholly in it.

What others do on the same cores is in every such pace. The time that the cluster's own processes are on a
core for each token is not moved by who waits for whom. It tells what a change computes, not what it makes
others wait for.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import aiohttp

from tarragon.bench.load import LoadError, read_stream, session
from tarragon.bench.profile import process_seconds
from tarragon.bench.stats import interval, judge, summary
from tarragon.bench.timeline import Trace
from tarragon.bench.workloads import Workload

WARM_S: Final = 3.0
LAST_TOKENS_S: Final = 1.0
"""How long a window waits for the tokens that were on their way at its end."""


class Window(NamedTuple):
    """What a few seconds brought, and took."""

    tokens_per_s: float
    cpu_s: Mapping[str, float]
    """Seconds on a core for a token, by process; 0.0 where the kernel keeps no account of it."""

    @property
    def cpu_s_per_token(self) -> float:
        """Of all processes that were named."""
        return sum(self.cpu_s.values())


class Mark(NamedTuple):
    """A moment, and what each named process had used of its cores by then."""

    at_s: float
    cpu_s: dict[str, float]


Span = tuple[Mark, Mark]


class EndlessLoad:
    """A fixed number of streams, each replaced as it ends."""

    def __init__(
        self, url: str, model: str, workload: Workload, streams: int, pids: Mapping[str, int] | None = None
    ) -> None:
        """``pids``, by name, are the processes whose time is told; none of them may end or be replaced."""
        self._url, self._model, self._workload, self._streams = url, model, workload, streams
        self._pids = pids or {}
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

    async def window(self, seconds: float) -> Window:
        """Of all streams in the next ``seconds``. Raises LoadError if one failed."""
        [found] = await self.between([await self.span(seconds)])
        if found is None:
            raise LoadError(f"no stream brought two tokens within {seconds:g} s")
        return found

    async def span(self, seconds: float) -> Span:
        """The next ``seconds``, to be asked about with ``between``."""
        start = self.mark()
        await asyncio.sleep(seconds)
        return start, self.mark()

    def mark(self) -> Mark:
        return Mark(time.monotonic(), cpu_seconds(self._pids))

    async def between(self, spans: Sequence[Span]) -> list[Window | None]:
        """The windows of these spans, which end now at the latest; None where no stream brought two tokens.

        Raises LoadError if a stream failed.

        To be asked once for all that are wanted: what has ended by now is forgotten.
        """
        assert self._running is not None
        await asyncio.sleep(LAST_TOKENS_S if self._pids else 0.0)
        if self._running.done():
            await self._running
        windows = [self._window(start, end) for start, end in spans]
        self._traces = [trace for trace in self._traces if trace.ended_s is None]
        return windows

    def _window(self, start: Mark, end: Mark) -> Window | None:
        found = pace(self._traces, start.at_s, end.at_s)
        if not found:
            return None
        tokens = tokens_within(self._traces, start.at_s, end.at_s)
        used = {name: (after - start.cpu_s[name]) / tokens for name, after in end.cpu_s.items()}
        return Window(self._streams * found, used)

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


def cpu_seconds(pids: Mapping[str, int]) -> dict[str, float]:
    """Seconds that the threads of each of these processes have been on a core."""
    return {name: process_seconds(pid)["on_a_core_s"] for name, pid in pids.items()}


def tokens_within(traces: Iterable[Trace], start_s: float, end_s: float) -> float:
    """Tokens of the window, those at its edges by the share of their time that lies in it."""
    return sum(
        max(0.0, min(after, end_s) - max(before, start_s)) / (after - before)
        for trace in traces
        for before, after in zip(trace.times_s, trace.times_s[1:], strict=False)
        if after > before
    )


def cpu_cost(on: Sequence[float], off: Sequence[float], *, at_most: float) -> dict[str, Any]:
    """By what share more a token takes with something ``on``, pair by pair: seconds of CPU time.

    Empty where there is no account of it.
    """
    costs = [a / b - 1.0 for a, b in zip(on, off, strict=True) if a and b]
    if not costs:
        return {}
    ci95 = interval(costs)
    return {
        **summary(costs),
        "ci95": list(ci95),
        "ms_per_token": 1e3 * statistics.median(off),
        "verdict": judge(ci95, len(costs), at_most=at_most),
    }


def cpu_by_process(on: Sequence[Window], off: Sequence[Window]) -> dict[str, dict[str, Any]]:
    """Milliseconds of CPU time for a token, by role: without, and what comes with it, pair by pair."""
    found = {}
    for role in sorted({_role(name) for window in off for name in window.cpu_s}):
        without, more = [], []
        for with_it, without_it in zip(on, off, strict=True):
            ms = [
                1e3 * sum(used for name, used in window.cpu_s.items() if _role(name) == role)
                for window in (with_it, without_it)
            ]
            without.append(ms[1])
            more.append(ms[0] - ms[1])
        found[role] = {
            "off_ms": statistics.median(without),
            "more_ms": statistics.median(more),
            "ci95": list(interval(more)),
        }
    return found


def _role(name: str) -> str:
    """Of a process by its name: "aw" for "aw-0"."""
    return name.partition("-")[0]


def cpu_text(cost: dict[str, Any]) -> str:
    """One line for a person."""
    low, high = cost["ci95"]
    return (
        f"CPU time per token: {cost['median']:+.2%} ({low:+.2%} to {high:+.2%}, {cost['n']} pairs) "
        f"of {cost['ms_per_token']:.1f} ms: {cost['verdict']}"
    )


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
) -> dict[str, Span]:
    """A span of both sides, one after the other; the order changes with ``number``."""
    spans = {}
    for side in sides if number % 2 == 0 else sides[::-1]:
        await switch(side)
        spans[side] = await load.span(seconds)
    return spans
