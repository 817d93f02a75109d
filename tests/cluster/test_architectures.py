"""Any MoE architecture that vLLM's CPU engine runs is served, exactly, unless status says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.workload import ask, differing, mixed_requests, random_checkpoint

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

EXACT = ("qwen3_moe", "olmoe", "gpt_oss")
INEXACT = ("deepseek_v3",)
"""Latent attention: the engine's kernels for it are not batch-invariant."""
LONG_TOKENS = 1_500
FLAGS = ("--max-num-batched-tokens=512", "--max-model-len=2048")


@pytest.mark.parametrize("kind", EXACT)
def test_the_same_tokens_alone_and_in_company(kind: str, tmp_path: Path) -> None:
    folder = random_checkpoint(kind, tmp_path / kind)
    bodies = mixed_requests(12, seed=2, vocabulary=2_000, long_tokens=LONG_TOKENS, output_tokens=8)
    with Cluster(folder, 2, 2, engine_args=FLAGS) as cluster:
        assert cluster.status()["exact"]
        together = ask(cluster.url, folder.name, bodies, concurrency=12)
        alone = ask(cluster.url, folder.name, bodies, concurrency=1)
    assert differing(together, alone) == []


@pytest.mark.parametrize("kind", INEXACT)
def test_what_cannot_be_exact_is_served_and_said(kind: str, tmp_path: Path) -> None:
    folder = random_checkpoint(kind, tmp_path / kind)
    bodies = mixed_requests(4, seed=2, vocabulary=2_000, long_tokens=LONG_TOKENS, output_tokens=8)
    with Cluster(folder, 1, 2, engine_args=FLAGS) as cluster:
        status = cluster.status()
        answers = ask(cluster.url, folder.name, bodies, concurrency=4)
    assert not status["exact"]
    assert "MLA" in status["exact_reason"]
    assert all(len(answer.tokens) == 8 for answer in answers)
