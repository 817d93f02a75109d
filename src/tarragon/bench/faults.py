"""Inject one fault into one worker, and make sure that it happened."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tarragon.admin import AdminError
from tarragon.cluster import Cluster

SIGNALS: Final = ("KILL", "STOP")
_EFFECT_TIMEOUT_S: Final = 5.0
_EFFECT_POLL_S: Final = 0.001
_STATUS_POLL_S: Final = 0.1


class FaultError(RuntimeError):
    """A fault did not happen, or the cluster did not recover from it; the text is one sentence."""


@dataclass(frozen=True)
class Victim:
    """One incarnation of a worker; ``started`` tells its process from a later one with the same pid."""

    worker_id: str
    pid: int
    epoch: int
    started: int

    @property
    def state(self) -> str:
        """The letter that /proc shows for its process; "" once the process is gone."""
        letter, started = process_state(self.pid)
        return letter if started == self.started else ""

    @property
    def alive(self) -> bool:
        return self.state not in ("", "Z", "X")


def process_state(pid: int) -> tuple[str, int]:
    """State letter and start time in clock ticks of a process; ("", 0) if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


def choose_victim(status: Mapping[str, Any], role: str, rng: random.Random) -> Victim:
    """A random healthy worker of ``role``. Raises FaultError if there is none."""
    workers = [w for w in status["workers"] if w["role"] == role and w["state"] == "healthy"]
    if not workers:
        raise FaultError(f"there is no healthy {role} worker to fail")
    worker = rng.choice(sorted(workers, key=lambda w: str(w["id"])))
    _, started = process_state(worker["pid"])
    return Victim(str(worker["id"]), int(worker["pid"]), int(worker["epoch"]), started)


def inject(cluster: Cluster, victim: Victim, name: str) -> tuple[float, float]:
    """Send SIG``name`` to the victim; return the last moment at which it still ran, and the next look at it.

    The order takes its way through the cluster; meanwhile /proc is watched, so that the fault lies between
    the two moments (of the monotonic clock). Raises FaultError if /proc does not show the effect (no process
    after KILL, state T after STOP), AdminError if the cluster refuses.
    """
    with ThreadPoolExecutor(1) as pool:
        ran_s = asked_s = time.monotonic()
        order = pool.submit(cluster.kill, victim.worker_id, f"SIG{name}")
        while True:
            seen_s = time.monotonic()
            if victim.state == "T" if name == "STOP" else not victim.alive:
                break
            ran_s = seen_s
            if ran_s - asked_s > _EFFECT_TIMEOUT_S:
                order.result()
                raise FaultError(f"SIG{name} had no effect on {victim.worker_id} (state {victim.state})")
            time.sleep(_EFFECT_POLL_S)
        order.result()
    return ran_s, seen_s


async def recovered(cluster: Cluster, victim: Victim, timeout_s: float) -> tuple[float, int]:
    """Wait until the victim is replaced and full capacity is back; return when, and the new epoch.

    Raises FaultError after ``timeout_s``.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with suppress(AdminError):
            status = await asyncio.to_thread(cluster.status)
            epoch = epoch_of(status, victim.worker_id)
            if status["full_capacity"] and epoch > victim.epoch:
                return time.monotonic(), epoch
        await asyncio.sleep(_STATUS_POLL_S)
    raise FaultError(
        f"no full capacity {timeout_s:g} s after the fault of {victim.worker_id} "
        f"(its process: {victim.state or 'gone'})"
    )


def epoch_of(status: Mapping[str, Any], worker_id: str) -> int:
    """The epoch of a worker's newest incarnation; 0 if there is none."""
    return max((int(w["epoch"]) for w in status["workers"] if w["id"] == worker_id), default=0)


async def wake_later(victim: Victim, after_s: float) -> dict[str, Any]:
    """SIGCONT a stopped victim after a while, if its process is still there; say what happened."""
    await asyncio.sleep(after_s)
    return {"after_s": after_s, "was_there": wake(victim)}


def wake(victim: Victim) -> bool:
    """SIGCONT the victim's process, which may have been replaced; False if it is gone."""
    if not victim.alive:
        return False
    with suppress(ProcessLookupError):
        os.kill(victim.pid, signal.SIGCONT)
        return True
    return False
