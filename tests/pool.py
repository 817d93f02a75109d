"""Clusters that tests share: starting one costs 5 s, 17 with its imports, asking it costs nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tarragon.cluster import Cluster, ClusterError
from tests.forkserver import ForkServer

LOG_CHARACTERS = 20_000
"""Of the end of a cluster's log, for a test that failed."""
RUNNING_MAX = 2
"""Clusters alive at once in a test process; an idle one costs memory only, about 2.5 GiB. The usual one,
which most files ask for, stays; of the others the one used longest ago ends first."""
KV_CACHE_BYTES = 256 << 20
REPORT_INTERVAL_MS = 200.0
"""Tests wait for what workers report."""
WHOLE_TIMEOUT_S = 120.0
POLL_S = 0.05
CONTEXT_TOKENS = 4_096
FLAGS = (
    f"--max-model-len={CONTEXT_TOKENS}",
    "--max-num-batched-tokens=256",
    # Four layers of a model like white space better than words.
    '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
)


class Clusters:
    """Running clusters by what they were started with, their numbers of workers apart: those can change."""

    def __init__(self, model: Path, forkserver: ForkServer) -> None:
        self._model = model
        self._forkserver = forkserver
        self._running: dict[Any, Cluster] = {}
        self._lent: list[Any] = []

    def get(
        self, attention_workers: int = 2, expert_workers: int = 2, *flags: str, **settings: Any
    ) -> Cluster:
        """A cluster at full capacity, the same for the same flags and settings.

        Raises ClusterError if none starts, or one does not get that many workers.
        """
        key = _key(*flags, **settings)
        running = self._running.pop(key, None)
        if running is None:
            idle = [known for known in self._running if known not in self._lent]
            idle.sort(key=lambda known: known == _key())  # stable: otherwise by their last use
            while idle and len(self._running) >= RUNNING_MAX:
                self._end(idle.pop(0))
            settings = {
                "kv_cache_bytes": KV_CACHE_BYTES,
                "report_interval_ms": REPORT_INTERVAL_MS,
                **settings,
            }
            running = self._forkserver.cluster(
                self._model, attention_workers, expert_workers, engine_args=(*FLAGS, *flags), **settings
            )
            running.start()
        self._running[key] = running  # the last one of the dict is the one used last
        self._lent.append(key)
        resize(running, {"attention": attention_workers, "expert": expert_workers})
        return running

    def give_back(self) -> None:
        """After a test: wait until what it used is whole again; ClusterError if it does not get there."""
        lent, self._lent = self._lent, []
        for key in set(lent) & set(self._running):
            try:
                self._running[key].wait_for("full_capacity", WHOLE_TIMEOUT_S)
            except ClusterError:
                self._end(key)
                raise

    def lent_logs(self) -> list[tuple[str, str]]:
        """Flags and log of each cluster that the running test has."""
        return [
            (str(key), self._running[key].logs()[-LOG_CHARACTERS:])
            for key in set(self._lent) & set(self._running)
        ]

    def end_all(self) -> None:
        for key in list(self._running):
            self._end(key)

    def _end(self, key: Any) -> None:
        self._running.pop(key).stop()


def _key(*flags: str, **settings: Any) -> Any:
    return flags, tuple(sorted(settings.items()))


def resize(cluster: Cluster, wanted: Mapping[str, int]) -> None:
    """Add workers, or drain the last ones, until each role has so many and nothing is missing.

    Raises ClusterError if the cluster does not get there.
    """
    deadline_s = time.monotonic() + WHOLE_TIMEOUT_S
    while True:
        workers = cluster.wait_for("full_capacity", WHOLE_TIMEOUT_S)["workers"]
        if all(worker["state"] == "healthy" for worker in workers):  # nobody comes or leaves
            found = {role: [w["id"] for w in workers if w["role"] == role] for role in wanted}
            if all(len(found[role]) == count for role, count in wanted.items()):
                return
            for role, count in wanted.items():
                for _ in range(count - len(found[role])):
                    cluster.add(role)
                for worker_id in sorted(found[role])[count:]:
                    cluster.drain(worker_id)
        if time.monotonic() > deadline_s:
            raise ClusterError(f"the cluster did not get to {dict(wanted)} workers: {workers}")
        time.sleep(POLL_S)
