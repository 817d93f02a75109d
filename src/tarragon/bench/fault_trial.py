"""One trial of `tarragon bench failover`: a fault at a random moment under a load that goes on."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any, Final

from tarragon.bench import timeline
from tarragon.bench.faults import (
    FaultError,
    Victim,
    choose_victim,
    epoch_of,
    inject,
    recovered,
    wake,
    wake_later,
)
from tarragon.bench.owners import held_by
from tarragon.bench.poisson import PoissonLoad
from tarragon.cluster import Cluster

BEFORE_S: Final = 5.0
"""Undisturbed load before a fault; the fault comes at a random moment within MOMENT_S after it."""
MOMENT_S: Final = 3.0
AFTER_S: Final = 2.0
"""Load after full capacity, and after a stopped worker was woken."""
RECOVERY_TIMEOUT_S: Final = 120.0
OLD_PROCESS_TIMEOUT_S: Final = 30.0


async def fault_trial(
    cluster: Cluster,
    load: PoissonLoad,
    *,
    role: str,
    signal: str,
    resume_after_s: float,
    rng: random.Random,
) -> dict[str, Any]:
    """Inject one fault and wait for full capacity; return what the streams saw.

    Raises FaultError if the fault did not happen or the cluster does not recover.
    """
    await asyncio.sleep(BEFORE_S + rng.uniform(0.0, MOMENT_S))
    victim = choose_victim(await asyncio.to_thread(cluster.status), role, rng)
    held = await held_by(cluster.url, victim.worker_id) if role == "attention" else []
    fault_s, seen_s = await asyncio.to_thread(inject, cluster, victim, signal)
    waking = asyncio.create_task(wake_later(victim, resume_after_s)) if signal == "STOP" else None
    try:
        full_s, epoch = await recovered(cluster, victim, RECOVERY_TIMEOUT_S)
        woken = await after_waking(cluster, victim, epoch, waking) if waking is not None else None
    finally:
        if waking is not None:
            waking.cancel()
            wake(victim)
    await asyncio.sleep(AFTER_S)
    end_s = max(full_s, fault_s + timeline.FIRST_S)
    lags_s = [late for at, late in load.lag_s if at > fault_s and at - late < end_s]
    return {
        "victim": victim.worker_id,
        "pid": victim.pid,
        "epoch_before": victim.epoch,
        "epoch_after": epoch,
        "fault_known_to_ms": 1e3 * (seen_s - fault_s),
        "full_capacity_s": full_s - fault_s,
        "woken": woken,
        "reader_late_ms": 1e3 * max(lags_s, default=0.0),
        **timeline.around_fault(load.traces, fault_s, end_s, before_s=BEFORE_S, held=held),
        "series": timeline.series(load.traces, fault_s, fault_s - BEFORE_S, full_s + AFTER_S),
    }


async def after_waking(
    cluster: Cluster, victim: Victim, epoch: int, waking: asyncio.Task[dict[str, Any]]
) -> dict[str, Any]:
    """Wait for the SIGCONT and watch what a worker that comes back does: it must disturb nothing.

    Raises FaultError if the cluster took it back, lost its full capacity, or lets it live on.
    """
    result = await waking
    await asyncio.sleep(AFTER_S)
    status = await asyncio.to_thread(cluster.status)
    if epoch_of(status, victim.worker_id) != epoch or not status["full_capacity"]:
        raise FaultError(f"{victim.worker_id} came back to life and the cluster is not what it was")
    deadline_s = time.monotonic() + OLD_PROCESS_TIMEOUT_S
    while victim.alive:
        if time.monotonic() > deadline_s:
            raise FaultError(f"the old process of {victim.worker_id} still lives after its replacement")
        await asyncio.sleep(0.1)
    return result
