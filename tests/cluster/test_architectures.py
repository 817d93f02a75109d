"""Any MoE architecture that vLLM's CPU engine runs is served, rightly and exactly, and whoever dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.observe import fresh, replaced
from tests.cluster.test_attention_failover import Once, assert_same
from tests.cluster.test_same_text import assert_all_took_part
from tests.forkserver import ForkServer
from tests.pool import resize
from tests.reference import mean_distance, reference_log_probs, served_log_probs
from tests.streams import Reading, read_all
from tests.workload import mixed_requests, random_checkpoint

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

KINDS = {
    "mixtral": "bfloat16",
    "qwen3_moe": "float16",
    "olmoe": "float32",
    "gpt_oss": "bfloat16",
    "deepseek_v2": "bfloat16",
    "deepseek_v3": "bfloat16",
}
"""Architecture and type of the weights. GPT-OSS brings sliding windows, attention sinks and expert biases,
DeepSeek latent attention, a dense first layer, shared experts and grouped top-k."""
LONG_TOKENS = 1_500
FLAGS = ("--max-num-batched-tokens=512", "--max-model-len=2048")
OUTPUT_TOKENS = 24
ROUNDS_MAX = 4
REQUESTS = 10
REFERENCE_TOKENS = 200
DISTANCE_MAX = {"bfloat16": 0.02, "float16": 0.002, "float32": 1e-5}
"""Mean distance from transformers in float32, in nats; a wrong rotary embedding makes 0.13 and more."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_alone_in_company_elsewhere_and_after_deaths(
    kind: str, forkserver: ForkServer, tmp_path: Path
) -> None:
    folder = random_checkpoint(kind, tmp_path / kind, dtype=KINDS[kind])
    bodies = mixed_requests(
        REQUESTS, seed=2, vocabulary=2_000, long_tokens=LONG_TOKENS, output_tokens=OUTPUT_TOKENS
    )
    assert max(len(body["prompt"]) for body in bodies) == LONG_TOKENS
    with forkserver.cluster(folder, 2, 2, engine_args=FLAGS, kv_cache_bytes=256 << 20) as cluster:
        status = cluster.status()
        assert status["exact"], status["exact_reason"]
        prompt = max((body["prompt"] for body in bodies), key=len)[:REFERENCE_TOKENS]
        served = served_log_probs(cluster.url, folder.name, prompt)
        together = read_all(cluster.url, folder.name, bodies)
        alone = [read_all(cluster.url, folder.name, [body])[0] for body in bodies]
        assert_all_took_part(cluster, {})
        assert_nobody_notices_deaths(cluster, folder.name, bodies, together)
        resize(cluster, {"attention": 1, "expert": 1})
        elsewhere = read_all(cluster.url, folder.name, bodies)
    names = [str(number) for number in range(REQUESTS)]
    assert_same(names, together, alone)
    assert all(len(tokens) == OUTPUT_TOKENS for reading in alone for tokens in reading.tokens.values())
    assert_same(names, together, elsewhere)
    assert mean_distance(served, reference_log_probs(folder, prompt)) < DISTANCE_MAX[KINDS[kind]]


def assert_nobody_notices_deaths(
    cluster: Cluster, model: str, bodies: list[dict[str, Any]], wanted: list[Reading]
) -> None:
    """Workers are killed until a request has gone on from its checkpoint; mostly once.

    Models as small as these may be through with all the streams of a worker, or with none of their prompts,
    at whatever moment a busy reader has it killed.
    """
    for _ in range(ROUNDS_MAX):
        assert_nobody_notices_two_deaths(cluster, model, bodies, wanted)
        if fresh(cluster, "aw-1")["aw-1"]["restored_requests"] > 0:
            return
    raise AssertionError("nothing went on from a checkpoint")


def assert_nobody_notices_two_deaths(
    cluster: Cluster, model: str, bodies: list[dict[str, Any]], wanted: list[Reading]
) -> None:
    """One attention worker is killed while the streams run, and one expert worker after it."""
    tokens = len(bodies) * OUTPUT_TOKENS
    pids = cluster.pids()
    faults = [
        Once(lambda: os.kill(pids["aw-0"], signal.SIGKILL), tokens // 4),
        Once(lambda: os.kill(pids["ew-0"], signal.SIGKILL), tokens // 2),
    ]

    def on_token(stream: int, count: int) -> None:
        for fault in faults:
            fault(stream, count)

    got = read_all(cluster.url, model, bodies, on_token)
    for fault in faults:
        fault.join()
    assert_same([str(number) for number in range(len(bodies))], got, wanted)
    replaced(cluster, pids, "aw-0", "ew-0")
