"""The coarse-grained baseline (2.2, 7.2): everything is killed, started cold, and every request replayed.

A client of such a system holds its request until the server is back and sends it again from the prompt; its
next token is the first that it has not read before.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from tarragon.bench import timeline
from tarragon.bench.peer import MonolithicVllm
from tarragon.bench.poisson import PoissonLoad
from tarragon.bench.timeline import Trace
from tarragon.bench.workloads import Workload
from tarragon.cluster import Cluster, ClusterError

_POLL_S: Final = 0.1
_REPLAY_TIMEOUT_S: Final = 600.0


class Restartable(Protocol):
    """A whole serving system that can be killed and started again. All calls block."""

    @property
    def url(self) -> str: ...
    @property
    def model_name(self) -> str: ...
    def start(self) -> None: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...


class TarragonSystem:
    """Our own cluster without any of its fault tolerance: one failure restarts all."""

    def __init__(self, make: Callable[[], Cluster], model: Path) -> None:
        self._make, self.model_name = make, model.name
        self.cluster = make()

    @property
    def url(self) -> str:
        return self.cluster.url

    def start(self) -> None:
        self.cluster = self._make()
        self.cluster.start()

    def kill(self) -> None:
        """SIGKILL every process: no grace time is counted against the baseline."""
        for pid in self.cluster.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        with suppress(ClusterError):
            self.cluster.stop()


class VllmSystem:
    """Monolithic vLLM at its defaults."""

    model_name: Final = MonolithicVllm.model_name

    def __init__(self, model: Path) -> None:
        self._server = MonolithicVllm(model)

    @property
    def url(self) -> str:
        return self._server.url

    def start(self) -> None:
        self._server.__enter__()

    def kill(self) -> None:
        self._server.kill()

    def stop(self) -> None:
        self._server.__exit__(None, None, None)


async def restart_trial(
    system: Restartable, workload: Workload, rate_per_s: float, *, first: int, before_s: float, seed: int
) -> tuple[dict[str, Any], list[Trace]]:
    """Kill and restart ``system`` under load once; return what its readers saw, and their streams.

    The window ends when every stream that was being read goes on. Raises what the system's start raises.
    """
    load = PoissonLoad(workload, system.url, system.model_name, rate_per_s, first=first, replay=True)
    running = asyncio.create_task(load.run())
    try:
        await asyncio.sleep(before_s + random.Random(seed).uniform(0.0, before_s / 2))
        fault_s = time.monotonic()
        live = [trace for trace in load.traces if trace.live_at(fault_s)]
        load.down()
        await asyncio.to_thread(system.kill)
        killed_s = time.monotonic()
        await asyncio.to_thread(system.start)
        up_s = time.monotonic()
        load.up(system.url)
        await _go_on(live, up_s)
        resumed_s = time.monotonic()
        await asyncio.sleep(before_s / 2)
    finally:
        load.up(system.url)
        load.stop()
    await running
    result = timeline.around_fault(load.traces, fault_s, resumed_s, before_s=before_s)
    return {
        **result,
        "killed_after_s": killed_s - fault_s,
        "serving_after_s": up_s - fault_s,
        "resumed_after_s": resumed_s - fault_s,
        "replayed": sum(trace.attempts > 1 for trace in load.traces),
        "failed": timeline.failed(load.traces, workload.output_tokens),
        "series": timeline.series(load.traces, fault_s, fault_s - before_s, resumed_s + before_s / 2),
    }, load.traces


async def _go_on(live: list[Trace], up_s: float) -> None:
    """Wait until each of these streams has a token that came after ``up_s``, or has ended."""
    deadline_s = up_s + _REPLAY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if all(trace.ended_s is not None or trace.times_s[-1] > up_s for trace in live):
            return
        await asyncio.sleep(_POLL_S)
