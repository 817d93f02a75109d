"""Promise 3: tokens and log-probs do not depend on placement, batch company or the number of workers.

A part of `tarragon bench sametext`, which `make campaign` runs whole: all layers, all prompts one by one too.
Random weights, whose logits are nearly flat, are in test_architectures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from tests.cluster.observe import metric, until
from tests.pool import Clusters
from tests.workload import Answer, ask, differing, mixed_requests

from tarragon.cluster import Cluster

pytestmark = pytest.mark.cluster

SHAPES = ((1, 1), (2, 4))
"""Attention workers x expert workers."""
LONG_TOKENS = 600
"""More than two chunks of a prompt."""
OUTPUT_TOKENS = 24
VOCABULARY = 40_000
REQUESTS = 16
ALONE = 8
"""So many requests are sent one by one as well, to the last shape."""
REPORT_TIMEOUT_S = 60.0
"""Workers report once a second."""


@pytest.mark.timeout(600)
def test_placement_and_company_change_nothing(clusters: Clusters, model_name: str) -> None:
    bodies = mixed_requests(
        REQUESTS, seed=1, vocabulary=VOCABULARY, long_tokens=LONG_TOKENS, output_tokens=OUTPUT_TOKENS
    )
    answers: dict[str, list[Answer]] = {}
    for shape in SHAPES:
        cluster = clusters.get(*shape)
        until(
            "the gateway is not connected to all of them, and would give one of them nothing",
            lambda url=cluster.url, count=shape[0]: (
                metric(url, "tarragon_gateway_attention_workers") == count
            ),
        )
        before = pairs(cluster)
        answers[f"{shape[0]} + {shape[1]}"] = ask(cluster.url, model_name, bodies, concurrency=REQUESTS)
        status = cluster.status()
        assert status["exact"], status["exact_reason"]
        assert_all_took_part(cluster, before)
    answers["one by one"] = ask(cluster.url, model_name, bodies[:ALONE], concurrency=1)
    reference = answers["1 + 1"]
    assert all(len(answer.tokens) == OUTPUT_TOKENS for answer in reference)
    for name, found in answers.items():
        assert differing(found, reference[: len(found)]) == [], name


def pairs(cluster: Cluster) -> dict[str, float]:
    """(token, expert) pairs that each worker has sent or computed."""
    return {
        worker["id"]: worker["counters"].get("pairs", 0)
        for worker in cluster.status()["workers"]
        if worker["role"] in ("attention", "expert")
    }


def assert_all_took_part(cluster: Cluster, before: Mapping[str, float]) -> None:
    """A comparison of placements proves nothing if one worker did everything."""
    deadline_s = time.monotonic() + REPORT_TIMEOUT_S
    while idle := [name for name, count in pairs(cluster).items() if count <= before.get(name, 0)]:
        assert time.monotonic() < deadline_s, f"{idle} did no work"
        time.sleep(0.1)
