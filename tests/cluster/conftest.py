"""Clusters that tests share: starting one costs 15 to 20 s, asking it costs nothing.

``cluster``
    2 + 2 workers with the first layers of the demo model; ``model_name`` is what requests call it.
``clusters.get(attention_workers, expert_workers, *flags, **settings)``
    Any other shape, vLLM flags, or settings of Config. The same arguments give the same cluster again.

Both are function-scoped, and so must be what builds on them; behind them is a pool for the whole session.
A test may kill, stop, drain and add workers. After each test the pool waits until the cluster has full
capacity again; one that does not get there fails its test, and the next one gets a new cluster, as it does
if the number of workers has changed. Write ``with Cluster(...)`` only for a model of your own, or where
start and end are what is tested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.workload import SMALL_LAYERS

from tarragon.cluster import Cluster, ClusterError
from tarragon.models.demo import ensure_demo_model

LOG_CHARACTERS = 20_000
"""Of the end of a cluster's log, for a test that failed."""
RUNNING_MAX = 2
"""Clusters alive at once in a test process; an idle one costs memory only, about 2.5 GiB. The usual one,
which most files ask for, stays; of the others the one used longest ago ends first."""
USUAL = (2, 2)
KV_CACHE_BYTES = 256 << 20
WHOLE_TIMEOUT_S = 120.0
FLAGS = (
    "--max-model-len=1024",
    "--max-num-batched-tokens=256",
    # Four layers of a model like white space better than words.
    '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
)


class Clusters:
    """Running clusters by what they were started with."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._running: dict[Any, Cluster] = {}
        self._lent: list[Any] = []

    def get(
        self, attention_workers: int = 2, expert_workers: int = 2, *flags: str, **settings: Any
    ) -> Cluster:
        """A cluster at full capacity, the same for the same arguments. Raises ClusterError if none starts."""
        key = _key(attention_workers, expert_workers, *flags, **settings)
        running = self._running.pop(key, None)
        if running is None:
            idle = [known for known in self._running if known not in self._lent]
            idle.sort(key=lambda known: known == _key(*USUAL))  # stable: otherwise by their last use
            while idle and len(self._running) >= RUNNING_MAX:
                self._end(idle.pop(0))
            settings = {"kv_cache_bytes": KV_CACHE_BYTES, **settings}
            running = Cluster(
                self._model, attention_workers, expert_workers, engine_args=(*FLAGS, *flags), **settings
            )
            running.start()
        self._running[key] = running  # the last one of the dict is the one used last
        self._lent.append(key)
        return running

    def give_back(self) -> None:
        """After a test: wait until what it used is whole again; ClusterError if it does not get there."""
        lent, self._lent = self._lent, []
        for key in set(lent) & set(self._running):
            try:
                status = self._running[key].wait_for("full_capacity", WHOLE_TIMEOUT_S)
            except ClusterError:
                self._end(key)
                raise
            roles = Counter(worker["role"] for worker in status["workers"] if worker["state"] == "healthy")
            if (roles["attention"], roles["expert"]) != key[:2]:
                self._end(key)

    def lent_logs(self) -> list[tuple[str, str]]:
        """Shape and log of each cluster that the running test has."""
        return [
            (str(key), self._running[key].logs()[-LOG_CHARACTERS:])
            for key in set(self._lent) & set(self._running)
        ]

    def end_all(self) -> None:
        for key in list(self._running):
            self._end(key)

    def _end(self, key: Any) -> None:
        self._running.pop(key).stop()


def _key(attention_workers: int, expert_workers: int, *flags: str, **settings: Any) -> Any:
    return attention_workers, expert_workers, flags, tuple(sorted(settings.items()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """A test that fails shows what its clusters had to say."""
    report = yield
    pool = getattr(item, "funcargs", {}).get("clusters")
    if report.failed and isinstance(pool, Clusters):
        report.sections += [(f"log of cluster {name}", log) for name, log in pool.lent_logs()]
    return report


@pytest.fixture(scope="session")
def cluster_pool() -> Iterator[Clusters]:
    pool = Clusters(ensure_demo_model(layers=SMALL_LAYERS))
    yield pool
    pool.end_all()


@pytest.fixture
def clusters(cluster_pool: Clusters) -> Iterator[Clusters]:
    """Clusters of any shape, with the first layers of the demo model."""
    yield cluster_pool
    cluster_pool.give_back()


@pytest.fixture
def cluster(clusters: Clusters) -> Cluster:
    """2 + 2 workers with the first layers of the demo model."""
    return clusters.get(*USUAL)


@pytest.fixture(scope="session")
def model_name() -> str:
    return ensure_demo_model(layers=SMALL_LAYERS).name
