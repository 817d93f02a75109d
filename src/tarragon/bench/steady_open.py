"""`tarragon bench steady --open`: latency and tokens/s over a range of request rates (7.3, figs. 10, 11).

Tarragon stays up all the time; each other side comes up beside it, is compared, and goes. In every pair both
get the same requests at the same moments of a Poisson process, one after the other; who comes first
alternates. A window ends after its time: what has not ended soon after is cut off, and counts with the time
that it has waited.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from tarragon.bench import output, timeline
from tarragon.bench.load import LoadError, capacity_tokens_per_s, closed_loop, fail_on_error
from tarragon.bench.machine import cores
from tarragon.bench.peer import PeerError
from tarragon.bench.poisson import PoissonLoad
from tarragon.bench.progress import Bar
from tarragon.bench.sides import OURS, SIDES, Server, Shape
from tarragon.bench.stats import percentile
from tarragon.bench.steady_report import conclude
from tarragon.bench.timeline import Trace
from tarragon.bench.workloads import WORKLOADS, Workload
from tarragon.cluster import ClusterError

CAPACITY_INDEX: Final = 1_000_000
CAPACITY_STREAMS: Final = 16
RAMP_SHARE: Final = 1 / 3
"""This part of a window, at its start, only fills the server: tokens of it do not count."""
REQUESTS_MIN: Final = 4
"""A window is as long as it takes for so many to arrive on average, if that is longer."""
DRAIN_SHARE: Final = 0.5
"""Of a window's length, after its end: what has not ended by then is cut off."""
_SETTLE_S: Final = 0.5
_PLAN_START_S: Final = 45.0
_T = TypeVar("_T")


def run(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Measure and return the result, which is written as it comes. Raises ClusterError, LoadError."""
    bench = OpenLoops(options, model)
    with Bar("steady", planned_s(options)) as bar:
        asyncio.run(bench.run(bar))
    return bench.result


def planned_s(options: argparse.Namespace) -> float:
    """A guess of the whole run's length, for the bar."""
    pairs = len(options.workloads) * len(options.loads) * options.rounds
    return float(len(others(options)) * (_PLAN_START_S + 2 * pairs * plan_window_s(options)) + _PLAN_START_S)


def plan_window_s(options: argparse.Namespace) -> float:
    return float(options.window_s * (1 + DRAIN_SHARE / 2))


def others(options: argparse.Namespace) -> list[str]:
    return [name for name in options.sides if name != OURS]


class OpenLoops:
    """One run; ``result`` is always what is known so far."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self._options, self._model = options, model
        self._workloads = {name: WORKLOADS[name](model, greedy=True) for name in options.workloads}
        self._shape = Shape(options.attention_workers, options.expert_workers)
        self._metrics: dict[str, Any] = {"capacity_tokens_per_s": {}, "rates_per_s": {}, "sides": {}}
        self._metrics["windows"] = {name: {} for name in options.workloads}
        settings = {
            "mode": "open",
            "model": model.name,
            "attention_workers": options.attention_workers,
            "expert_workers": options.expert_workers,
            "cores": cores(),
            "rounds": options.rounds,
            "window_s": options.window_s,
            "workloads": {name: workload.mean for name, workload in self._workloads.items()},
        }
        self.result = output.result("steady", settings, self._metrics)

    async def run(self, bar: Bar) -> None:
        """All sides, one after the other beside Tarragon."""
        bar.doing("starting Tarragon")
        with SIDES[OURS].start(self._model, self._shape) as ours:
            await self._rates(ours)
            bar.done(_PLAN_START_S)
            for name in others(self._options):
                await self._side(ours, name, bar)

    async def _rates(self, ours: Server) -> None:
        """Requests/s of each workload: as asked for, or shares of what a closed loop of ours does."""
        options, metrics = self._options, self._metrics
        for name, workload in self._workloads.items():
            await self._warm_up(ours, workload)
            indexes = range(CAPACITY_INDEX, CAPACITY_INDEX + options.capacity_waves * CAPACITY_STREAMS)
            tokens_per_s = await capacity_tokens_per_s(
                workload, ours.url, ours.model, indexes, CAPACITY_STREAMS
            )
            metrics["capacity_tokens_per_s"][name] = tokens_per_s
            metrics["rates_per_s"][name] = options.rates or [
                round(load * tokens_per_s / workload.mean[1], 3) for load in options.loads
            ]

    async def _warm_up(self, server: Server, workload: Workload) -> None:
        warm = range(CAPACITY_INDEX - CAPACITY_STREAMS, CAPACITY_INDEX)
        fail_on_error(await closed_loop(workload, server.url, server.model, warm, CAPACITY_STREAMS))

    async def _side(self, ours: Server, name: str, bar: Bar) -> None:
        """Start one side, compare it at every rate, and stop it; one that does not come up is noted."""
        bar.doing(f"starting {SIDES[name].title}")
        metrics, options = self._metrics, self._options
        try:
            with SIDES[name].start(self._model, self._shape) as theirs:
                metrics["sides"][name] = {"startup_s": theirs.startup_s}
                bar.done(_PLAN_START_S)
                for workload in self._workloads.values():
                    await _of_the_peer(self._warm_up(theirs, workload))
                for turn in range(options.rounds):
                    await self._round(ours, theirs, name, turn, bar)
        except (PeerError, ClusterError) as error:
            # The first line is the sentence; what follows is the end of a log.
            metrics["sides"][name] = {"error": str(error).splitlines()[0]}
            skipped_s = planned_s(options) / max(1, len(others(options)))
            bar.done(skipped_s, f"{SIDES[name].title}: {metrics['sides'][name]['error']}")
        self._write()

    async def _round(self, ours: Server, theirs: Server, name: str, turn: int, bar: Bar) -> None:
        """One pair of windows for every workload and rate."""
        for kind, workload in self._workloads.items():
            for rate_per_s in self._metrics["rates_per_s"][kind]:
                found = self._metrics["windows"][kind].setdefault(str(rate_per_s), {})
                pairs = found.setdefault(name, {OURS: [], name: []})
                order = ((OURS, ours), (name, theirs))
                for side, server in order if turn % 2 == 0 else order[::-1]:
                    bar.doing(f"{SIDES[side].title}, {kind}, {rate_per_s:g}/s, pair {turn + 1}")
                    first = 1_000 * turn
                    seen = window(server, workload, rate_per_s, first, self._options.window_s)
                    pairs[side].append(await (seen if side == OURS else _of_the_peer(seen)))
                mine, other = (pairs[side][-1] for side in (OURS, name))
                note = (
                    f"{kind}, {rate_per_s:g}/s: Tarragon {mine['tokens_per_s']:.1f}, {SIDES[name].title} "
                    f"{other['tokens_per_s']:.1f} tokens/s; a token every {mine['tbt_median_ms']:.0f}, "
                    f"{other['tbt_median_ms']:.0f} ms"
                )
                bar.done(2 * plan_window_s(self._options), note)
                self._write()

    def _write(self) -> None:
        """As they come: a later failure must not cost what was measured."""
        conclude(self._metrics)
        output.write(self.result, self._options.json)


async def _of_the_peer(work: Coroutine[Any, Any, _T]) -> _T:
    """A request of another side that fails is that side's error, and ends its comparison only."""
    try:
        return await work
    except LoadError as error:
        raise PeerError(str(error)) from error


async def window(
    server: Server, workload: Workload, rate_per_s: float, first: int, window_s: float
) -> dict[str, float]:
    """Load ``server`` for one window with the requests from ``first`` on; what its readers saw.

    Raises LoadError if a request failed, or if they pile up.
    """
    length_s = max(window_s, REQUESTS_MIN / rate_per_s)
    load = PoissonLoad(workload, server.url, server.model, rate_per_s, first=first)
    running = asyncio.create_task(load.run())
    start_s = time.monotonic()
    await asyncio.sleep(length_s)
    load.stop()
    await asyncio.wait([running], timeout=DRAIN_SHARE * length_s)
    if not running.done():
        running.cancel()
        await asyncio.wait([running])
    else:
        running.result()
    cut_s = time.monotonic()
    fail_on_error(trace for trace in load.traces if trace.ended_s is not None)
    await asyncio.sleep(_SETTLE_S)  # what was cut off is gone from the server
    return figures(load.traces, start_s, start_s + length_s, cut_s)


def figures(traces: Sequence[Trace], start_s: float, end_s: float, cut_s: float) -> dict[str, float]:
    """TTFT and TBT in ms, tokens/s, and how many requests they are of.

    A request without a token counts with the time it waited until it was cut off at ``cut_s``.
    """
    from_s = start_s + RAMP_SHARE * (end_s - start_s)
    first_ms = [1e3 * ((trace.times_s[0] if trace.times_s else cut_s) - trace.due_s) for trace in traces]
    gaps_ms = [
        1e3 * gap.length_s for gap in timeline.ended_between(timeline.gaps(traces, cut_s), from_s, end_s)
    ]
    return {
        "tokens_per_s": timeline.tokens_per_s(traces, from_s, end_s),
        "ttft_median_ms": percentile(first_ms, 0.5),
        "ttft_p95_ms": percentile(first_ms, 0.95),
        "tbt_median_ms": percentile(gaps_ms, 0.5),
        "tbt_p95_ms": percentile(gaps_ms, 0.95),
        "requests": float(len(traces)),
        "cut_off": float(sum(trace.ended_s is None for trace in traces)),
    }
