"""Promise 3: tokens and log-probs do not depend on placement, batch company or the number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.workload import Answer, ask, differing, mixed_requests, random_checkpoint

from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model

pytestmark = pytest.mark.cluster

CHUNK_TOKENS = 256
LONG_TOKENS = 600
FLAGS = (f"--max-num-batched-tokens={CHUNK_TOKENS}", "--max-model-len=2048")
SHAPES = ((1, 1), (2, 2), (2, 4))
"""Attention workers x expert workers."""


@pytest.fixture(scope="module", params=["demo model", "random weights"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint and the size of the vocabulary that its prompts are drawn from."""
    if request.param == "demo model":
        return ensure_demo_model(layers=4), 40_000
    return random_checkpoint("mixtral", tmp_path_factory.mktemp("random") / "mixtral", layers=4), 40_000


@pytest.mark.timeout(600)
def test_placement_and_company_change_nothing(model: tuple[Path, int]) -> None:
    folder, vocabulary = model
    bodies = mixed_requests(64, seed=1, vocabulary=vocabulary, long_tokens=LONG_TOKENS)
    answers: dict[str, list[Answer]] = {}
    for attention_workers, expert_workers in SHAPES:
        with Cluster(folder, attention_workers, expert_workers, engine_args=FLAGS) as cluster:
            name = f"{attention_workers} + {expert_workers}"
            answers[name] = ask(cluster.url, folder.name, bodies, concurrency=64)
            status = cluster.status()
            assert status["exact"], status
            if (attention_workers, expert_workers) == (2, 2):
                answers["one by one"] = ask(cluster.url, folder.name, bodies[:16], concurrency=1)
                assert_all_took_part(status)
    reference = answers["1 + 1"]
    assert all(len(answer.tokens) == 64 for answer in reference)
    for name, found in answers.items():
        assert differing(found, reference[: len(found)]) == [], name


def assert_all_took_part(status: dict[str, object]) -> None:
    """A comparison of placements proves nothing if one worker did everything."""
    workers = status["workers"]
    assert isinstance(workers, list)
    for worker in workers:
        if worker["role"] in ("attention", "expert"):
            assert worker["counters"]["pairs"] > 0, worker
