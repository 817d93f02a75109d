"""Promise 3: tokens and log-probs do not depend on placement, batch company or the number of workers.

A part of `tarragon bench sametext`, which `make campaign` runs whole: all layers, all prompts one by one too.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.workload import Answer, ask, differing, mixed_requests, random_checkpoint

from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model

pytestmark = pytest.mark.cluster

CHUNK_TOKENS = 256
LONG_TOKENS = 600
FLAGS = (f"--max-num-batched-tokens={CHUNK_TOKENS}", "--max-model-len=2048")
OUTPUT_TOKENS = 24
VOCABULARY = 40_000
REPORT_TIMEOUT_S = 60.0
"""Workers report once a second."""
ALONE = 8
"""So many requests are sent one by one as well, to the last shape."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("weights", "shapes", "requests"),
    [("demo model", ((1, 1), (2, 4)), 16), ("random weights", ((1, 1), (2, 2)), 12)],
    ids=["demo model", "random weights"],
)
def test_placement_and_company_change_nothing(
    weights: str, shapes: tuple[tuple[int, int], ...], requests: int, tmp_path: Path
) -> None:
    """``shapes``: attention workers x expert workers, the first of which is the reference."""
    folder = (
        random_checkpoint("mixtral", tmp_path / "mixtral", layers=4)
        if weights == "random weights"
        else ensure_demo_model(layers=4)
    )
    bodies = mixed_requests(
        requests, seed=1, vocabulary=VOCABULARY, long_tokens=LONG_TOKENS, output_tokens=OUTPUT_TOKENS
    )
    answers: dict[str, list[Answer]] = {}
    for attention_workers, expert_workers in shapes:
        with Cluster(
            folder, attention_workers, expert_workers, engine_args=FLAGS, kv_cache_bytes=256 << 20
        ) as cluster:
            name = f"{attention_workers} + {expert_workers}"
            answers[name] = ask(cluster.url, folder.name, bodies, concurrency=len(bodies))
            status = cluster.status()
            assert status["exact"], status["exact_reason"]
            assert_all_took_part(cluster)
            if (attention_workers, expert_workers) == shapes[-1]:
                answers["one by one"] = ask(cluster.url, folder.name, bodies[:ALONE], concurrency=1)
    reference = answers["1 + 1"]
    assert all(len(answer.tokens) == OUTPUT_TOKENS for answer in reference)
    for name, found in answers.items():
        assert differing(found, reference[: len(found)]) == [], name


def assert_all_took_part(cluster: Cluster) -> None:
    """A comparison of placements proves nothing if one worker did everything."""
    deadline_s = time.monotonic() + REPORT_TIMEOUT_S
    while idle := [
        worker["id"]
        for worker in cluster.status()["workers"]
        if worker["role"] in ("attention", "expert") and not worker["counters"].get("pairs")
    ]:
        assert time.monotonic() < deadline_s, f"{idle} did no work"
        time.sleep(0.1)
