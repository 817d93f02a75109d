"""What Tarragon is compared with: modes of its own code, and monolithic vLLM in its own ways (7.1).

Every side is a server on the same cores; a side that this machine cannot run says why in one sentence.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from tarragon.bench.modes import MODES
from tarragon.bench.peer import MonolithicVllm, PeerError
from tarragon.cluster import Cluster


class Server(NamedTuple):
    """A side that is up."""

    url: str
    """Without "/v1"."""
    model: str
    startup_s: float


class Shape(NamedTuple):
    """How many workers our own sides have."""

    attention_workers: int = 2
    expert_workers: int = 2


class Side(NamedTuple):
    """One of the systems of figs. 10 and 11."""

    title: str
    start: Callable[[Path, Shape], AbstractContextManager[Server]]
    """A context manager; raises PeerError or ClusterError where it does not come up."""


def _tarragon(**settings: Any) -> Callable[[Path, Shape], AbstractContextManager[Server]]:
    @contextmanager
    def start(model: Path, shape: Shape) -> Iterator[Server]:
        before_s = time.monotonic()
        with Cluster(model, shape.attention_workers, shape.expert_workers, **settings) as cluster:
            yield Server(cluster.url, model.name, time.monotonic() - before_s)

    return start


def _vllm(ways: int, *flags: str) -> Callable[[Path, Shape], AbstractContextManager[Server]]:
    """vLLM at its defaults; with several ways its worker processes get a core each."""

    @contextmanager
    def start(model: Path, _shape: Shape) -> Iterator[Server]:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < ways:
            raise PeerError(f"{ways} workers of one core each need {ways} cores, but there are {len(cores)}")
        environ = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores[:ways]))} if ways > 1 else {}
        with MonolithicVllm(model, *flags, environ=environ, startup_timeout_s=STARTUP_TIMEOUT_S) as peer:
            yield Server(peer.url, peer.model_name, peer.startup_s)

    return start


STARTUP_TIMEOUT_S: Final = 240.0
"""A peer that is not up after this long has not come up: it takes about 40 s, compiling included."""
OURS: Final = "tarragon"
DECOUPLED: Final = "decoupled"
SIDES: Final[dict[str, Side]] = {
    OURS: Side("Tarragon", _tarragon()),
    DECOUPLED: Side("decoupled, not resilient", _tarragon(**MODES["alt-3"])),
    "vllm": Side("vLLM", _vllm(1)),
    "vllm-tp2": Side("vLLM, TP=2", _vllm(2, "-tp=2")),
    "vllm-pp2": Side("vLLM, PP=2", _vllm(2, "-pp=2")),
}
