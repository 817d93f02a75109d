"""What readers get when nothing happens, to compare with what they get when something does.

That depends on the model and the requests alone, and not on the cluster: so each is asked once.
"""

from __future__ import annotations

import json
import random
from typing import Any

from tarragon.cluster import Cluster
from tests.streams import Reading, kinds, read_all, with_stops
from tests.workload import Answer, ask

TOKENS = 40
PREFIX_TOKENS = 400


class Undisturbed:
    """Answers by model and request bodies."""

    def __init__(self) -> None:
        self._readings: dict[str, list[Reading]] = {}
        self._answers: dict[str, list[Answer]] = {}

    def readings(self, cluster: Cluster, model: str, bodies: list[dict[str, Any]]) -> list[Reading]:
        """What ``read_all`` reads, in the order of ``bodies``."""
        key = json.dumps([model, bodies])
        if key not in self._readings:
            self._readings[key] = read_all(cluster.url, model, bodies)
        return self._readings[key]

    def answers(self, cluster: Cluster, model: str, bodies: list[dict[str, Any]]) -> list[Answer]:
        """What ``ask`` brings, all bodies at once."""
        key = json.dumps([model, bodies])
        if key not in self._answers:
            self._answers[key] = ask(cluster.url, model, bodies, concurrency=len(bodies))
        return self._answers[key]

    def of_every_kind(self, cluster: Cluster, model: str) -> tuple[dict[str, dict[str, Any]], list[Reading]]:
        """All kinds of requests by name, and what their readers get."""
        rng = random.Random(5)
        prefix = [rng.randrange(5, 40_000) for _ in range(PREFIX_TOKENS)]
        bodies = kinds("Tell me a story about a lighthouse keeper who", prefix, TOKENS)
        plain = self.readings(cluster, model, list(bodies.values()))
        stops = with_stops(bodies, plain)
        stopped = self.readings(cluster, model, list(stops.values()))
        for body, reading in zip(stops.values(), stopped, strict=True):
            assert reading.finish == {0: ("stop", body["stop"][0])}
        return bodies | stops, plain + stopped
