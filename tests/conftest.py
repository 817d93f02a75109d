"""What tests of all kinds share.

``cluster``
    2 + 2 workers with the first layers of the demo model; ``model_name`` is what requests call it.
``clusters.get(attention_workers, expert_workers, *flags, **settings)``
    Other numbers of workers, vLLM flags, or settings of Config. The same flags and settings give the same
    cluster again, with workers added or drained.
``forkserver.cluster(...)``
    Like ``Cluster(...)``, with torch and vLLM imported before: for a model or an environment of your own.
``undisturbed``
    What requests to these clusters are answered when nothing happens, asked once.

The first two are function-scoped, and so must be what builds on them; behind them is a pool for the whole
session. A test may kill, stop, drain and add workers. After each test the pool waits until the cluster has
full capacity again; one that does not get there fails its test, and the next one gets a new cluster. Write
``with Cluster(...)`` only where the start itself is what is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model
from tests.forkserver import ForkServer, the_forkserver
from tests.pool import Clusters
from tests.undisturbed import Undisturbed
from tests.workload import SMALL_LAYERS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """A test that fails shows what its clusters had to say."""
    report = yield
    pool = getattr(item, "funcargs", {}).get("clusters")
    if report.failed and isinstance(pool, Clusters):
        report.sections += [(f"log of cluster {name}", log) for name, log in pool.lent_logs()]
    return report


@pytest.fixture(scope="session")
def forkserver() -> ForkServer:
    """Starts clusters in 5 s instead of 17."""
    return the_forkserver()


@pytest.fixture(scope="session")
def cluster_pool(forkserver: ForkServer) -> Iterator[Clusters]:
    pool = Clusters(ensure_demo_model(layers=SMALL_LAYERS), forkserver)
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
    return clusters.get()


@pytest.fixture(scope="session")
def model_name() -> str:
    return ensure_demo_model(layers=SMALL_LAYERS).name


@pytest.fixture(scope="session")
def undisturbed() -> Undisturbed:
    """Answers of the clusters above when nothing happens."""
    return Undisturbed()
