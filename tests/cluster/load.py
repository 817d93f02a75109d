"""Requests that run beside what a test does to a worker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.cluster.observe import fresh, until, worker
from tests.workload import Answer, ask

from tarragon.cluster import Cluster

ENDED_S = 180.0


@contextmanager
def under_load(
    cluster: Cluster, model_name: str, bodies: list[dict[str, Any]], worker_id: str
) -> Iterator[list[Answer]]:
    """Ask for ``bodies``, eight at a time, beside the block, which begins when the worker computes for them.

    The list that the block is given has the answers when the last stream has ended, and is empty before.
    """
    answers: list[Answer] = []
    reader = threading.Thread(
        target=lambda: answers.extend(ask(cluster.url, model_name, bodies, concurrency=8)), daemon=True
    )
    before = fresh(cluster, worker_id)[worker_id]["batches"]  # all of older load
    reader.start()
    until(
        "the load reached nobody", lambda: worker(cluster, worker_id)["counters"].get("batches", 0) > before
    )
    yield answers
    reader.join(ENDED_S)
    assert not reader.is_alive(), "a stream hangs"
