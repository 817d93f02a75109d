"""No request, however odd, takes a worker with it or stops what others are served."""

from __future__ import annotations

from typing import Any, Final

import pytest
import requests

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

HUGE: Final = 10**20
"""No machine word holds it."""
ODD: Final[list[dict[str, Any]]] = [
    *({"top_k": value, "temperature": 1} for value in (HUGE, 2**31, 2**63, -5)),
    *({"seed": value, "temperature": 1} for value in (HUGE, 2**63, -(2**63), -1)),
    *({"stop_token_ids": [value], "min_tokens": 3, "ignore_eos": True} for value in (HUGE, 2**40, 10**6, -1)),
    *({"logit_bias": {str(value): 1.0}} for value in (HUGE, 10**6, -1)),
    *({"allowed_token_ids": [value]} for value in (HUGE, 10**6, -1)),
    *({"logprobs": value} for value in (HUGE, 20, -1)),
    *({"prompt_logprobs": value} for value in (HUGE, 20, -1)),
    *({"max_tokens": value} for value in (HUGE, 0, -1)),
    *({"min_tokens": value} for value in (HUGE, 10**6, -1)),
    *({"temperature": value} for value in (1e-300, 1e300, -1)),
    *({"top_p": value, "temperature": 1} for value in (0, 1e-320, 2)),
    *({"repetition_penalty": value} for value in (0, 1e-300, 1e308)),
    *({"priority": value} for value in (HUGE, 5)),
    *({"truncate_prompt_tokens": value} for value in (HUGE, 1, -1)),
    *({"prompt": value} for value in ([HUGE], [2**40], [10**6], [-1], [], "", [0] * 5000)),
    *({"request_id": value} for value in ("r" * 5000, "", "\u0000", "\u00e9" * 200)),
    {"cache_salt": "x" * 10_000},
    {"vllm_xargs": {"a": HUGE}},
    {"use_beam_search": True, "n": 2, "length_penalty": 1e300},
    {"logprob_token_ids": [HUGE]},
    {"structured_outputs": {"choice": ["yes", "no"]}, "min_tokens": 5},
    {"structured_outputs": {"regex": "a{1000000}"}},
    {"repetition_detection": {"max_pattern_size": HUGE, "min_count": 1}},
]


def post(cluster: Cluster, body: dict[str, Any], **headers: str) -> int:
    reply = requests.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=100)
    return reply.status_code


def test_odd_values_are_answered_and_harm_nobody(cluster: Cluster, model_name: str) -> None:
    before = cluster.pids()
    usual: dict[str, Any] = {"model": model_name, "prompt": "Hello there, the", "max_tokens": 4}
    for odd in ODD:
        assert post(cluster, {**usual, **odd}) < 500, odd
    assert post(cluster, usual, **{"X-Request-Id": "q" * 3_000}) == 200
    assert post(cluster, usual) == 200
    assert cluster.pids() == before, "a worker was lost"
