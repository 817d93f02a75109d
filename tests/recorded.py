"""A cluster that is not there: what its status API would say, for views that are tested without one."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tarragon.cluster import free_ports
from tarragon.config import Config
from tarragon.orchestrator.membership import UnknownWorkerError
from tarragon.orchestrator.status import StatusServer

GENERATION = 1 << 20
NOW_S = 1_790_000_000.0


class Recorded:
    """Operations of the status API over plain data; commands are remembered, and obeyed a little."""

    def __init__(self, *, attention: int = 2, expert: int = 2, layers: int = 30, experts: int = 8) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.version = GENERATION + 7
        self.layers, self.experts = layers, experts
        self.workers = [_worker("orchestrator", "orchestrator", 0), _worker("gateway", "gateway", 1)]
        self.workers.append(_worker("store", "store", 2))
        self.workers += [_worker(f"aw-{i}", "attention", 3 + i) for i in range(attention)]
        self.workers += [_worker(f"ew-{i}", "expert", 3 + attention + i) for i in range(expert)]
        self.log: list[dict[str, Any]] = []
        for worker in self.workers:
            self.note("healthy", worker["id"], "after 1.9 s", NOW_S - 280)
        self.samples = [self._sample(number) for number in range(1, 281)]

    # ------------------------------------------------------------------ what is asked

    def status(self) -> dict[str, Any]:
        holders = [self.holders(layer, e) for layer in range(self.layers) for e in range(self.experts)]
        healthy = all(worker["state"] == "healthy" for worker in self.workers)
        return {
            "ready": all(holders),
            "full_capacity": healthy,
            "exact": True,
            "exact_reason": "",
            "protected": True,
            "protected_reason": "",
            "ert_version": self.version,
            "workers": self.workers,
            "experts": {
                "total": len(holders),
                "with_shadow": sum(len(found) > 1 for found in holders),
                "unreachable": sum(not found for found in holders),
                "loading_cold": 0,
            },
            "refused": {},
        }

    def table(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "workers": [{"id": w["id"], "epoch": w["epoch"], "pid": w["pid"]} for w in self.live("expert")],
            "candidates": [
                [self.holders(layer, expert) for expert in range(self.experts)]
                for layer in range(self.layers)
            ],
        }

    def events(self, limit: int, after: int) -> dict[str, Any]:
        newer = [event for event in self.log if event["number"] > after]
        return {"events": newer[-limit:] if limit else []}

    def history(self, after: int) -> dict[str, Any]:
        newer = [sample for sample in self.samples if sample["number"] > after]
        return {"interval_ms": 1000.0, "samples_max": 900, "samples": newer}

    def faults(self) -> dict[str, Any]:
        return {"schema_version": 1, "total_engines": 0, "engines": []}

    # ------------------------------------------------------------------ what is told

    def kill(self, worker_id: str, number: int) -> dict[str, Any]:
        worker = self.find(worker_id)
        self.asked.append(("kill", worker_id, str(number)))
        worker.update(state="dead", cause="killed by SIGKILL")
        self.version += 1
        # As it goes: the connection tells first, the reaper how it ended.
        self.note("dead", worker_id, "connection lost", NOW_S)
        self.note("exited", worker_id, "killed by SIGKILL", NOW_S)
        return {"worker_id": worker_id, "signal": "SIGKILL"}

    def drain(self, worker_id: str) -> dict[str, Any]:
        self.find(worker_id)["state"] = "draining"
        self.asked.append(("drain", worker_id))
        self.note("draining", worker_id, "", NOW_S)
        return {"worker_id": worker_id, "state": "draining"}

    def add(self, role: str) -> dict[str, Any]:
        self.asked.append(("add", role))
        prefix = {"attention": "aw", "expert": "ew"}[role]
        count = sum(worker["role"] == role for worker in self.workers)
        worker = _worker(f"{prefix}-{count}", role, len(self.workers))
        self.workers.append({**worker, "state": "starting"})
        self.note("start", worker["id"], role, NOW_S)
        return {"worker_id": worker["id"], "state": "starting"}

    def apply(self, instruction: str, worker_ids: list[str]) -> dict[str, Any]:
        self.asked.append((instruction, *worker_ids))
        return {"message": "accepted", "request_id": "0", "worker_ids": worker_ids}

    def back(self, worker_id: str) -> None:
        """The replacement of a dead worker is ready."""
        worker = self.find(worker_id)
        worker.update(state="healthy", cause="", epoch=worker["epoch"] + 20, pid=worker["pid"] + 100)
        self.version += 1
        self.note("healthy", worker_id, "after 2.1 s", NOW_S)

    # ------------------------------------------------------------------ parts

    def find(self, worker_id: str) -> dict[str, Any]:
        for worker in self.workers:
            if worker["id"] == worker_id:
                return worker
        raise UnknownWorkerError(f"there is no worker {worker_id}")

    def live(self, role: str) -> list[dict[str, Any]]:
        return [w for w in self.workers if w["role"] == role and w["state"] not in ("dead", "starting")]

    def holders(self, layer: int, expert: int) -> list[str]:
        """Primary and shadow of an expert, those that live."""
        count = sum(worker["role"] == "expert" for worker in self.workers)
        first = (expert * count // self.experts + layer) % count
        ids = [f"ew-{first}", f"ew-{(first + 1 + (layer + expert) % max(1, count - 1)) % count}"]
        live = {worker["id"] for worker in self.live("expert")}
        return [worker_id for worker_id in dict.fromkeys(ids) if worker_id in live]

    def note(self, kind: str, worker_id: str, text: str, time_s: float) -> None:
        self.log.append(
            {
                "number": len(self.log) + 1,
                "time_s": time_s,
                "kind": kind,
                "worker_id": worker_id,
                "epoch": GENERATION,
                "text": text,
            }
        )

    def _sample(self, number: int) -> dict[str, Any]:
        wave = 1 + 0.08 * math.sin(number / 9) + 0.03 * math.sin(number * 2.3)
        median_ms = 46.0 / wave
        return {
            "number": number,
            "time_s": NOW_S - 280 + number,
            "tokens_per_s": round(150 * wave, 1),
            "tokens_computed_per_s": round(162 * wave, 1),
            "tbt_ms": {"median": median_ms, "p95": median_ms * 1.4, "max": median_ms * 1.9},
            "streams": 8.0,
            "checkpoint_lag_ms": round(2 + wave, 2),
            "rows_per_s": {
                w["id"]: round(9000 * wave * (1 - 0.07 * index), 1)
                for index, w in enumerate(self.live("attention") + self.live("expert"))
            },
        }


def _worker(worker_id: str, role: str, index: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": worker_id,
        "role": role,
        "pid": 4200 + index,
        "epoch": GENERATION + index,
        "state": "healthy",
        "cause": "",
        "given_up": False,
        "counters": {},
    }
    if role == "expert":
        entry |= {"experts_resident": 240, "resident_bytes": 1_270_000_000}
    if role in ("attention", "expert"):
        entry["counters"] = {"pairs": 1_234_567.0}
    return entry


@contextmanager
def serving(operations: Recorded, port: int = 0) -> Iterator[str]:
    """The real status API, in a thread, over recorded operations; yields its URL."""
    port = port or free_ports(1)[0]
    loop = asyncio.new_event_loop()
    server = StatusServer(operations, Config(admin_port=port))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
