"""A schema is read in one way on every worker, whatever each of them was asked for before."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.cluster.observe import until
from tests.pool import Clusters

from tarragon.cluster import Cluster
from tarragon.gateway.grammar_standby import TITLE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

AUTO = '--structured-outputs-config={"backend": "auto"}'
SETTINGS: dict[str, Any] = {"grammar_helper_silence_s": 5.0}
FOR_XGRAMMAR: dict[str, Any] = {"type": "string", "pattern": "^[ab]{5}$"}
FOR_GUIDANCE: dict[str, Any] = {"type": "string", "pattern": "^[ab]+$", "minLength": 3, "maxLength": 3}
"""xgrammar takes no notice of a length beside a pattern: vLLM gives this one to its other backend."""
SAME = 6
"""So many at once that both workers get some."""


def answers(cluster: Cluster, model: str, schema: dict[str, Any]) -> list[str]:
    body = {
        "model": model,
        "prompt": "Some letters:",
        "max_tokens": 16,
        "temperature": 1.0,
        "seed": 4,
        "structured_outputs": {"json": schema},
    }

    def ask(_: int) -> str:
        reply = requests.post(f"{cluster.url}/v1/completions", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    with ThreadPoolExecutor(SAME) as pool:
        return list(pool.map(ask, range(SAME)))


def helpers(cluster: Cluster) -> list[int]:
    """Pids of the processes that try grammars: one serves, one stands by."""
    return [pid for pid in cluster.processes() if title(pid) == TITLE]


def title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().strip("\0 ")
    return ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["SIGKILL", "SIGSTOP"])
def test_the_processes_that_try_grammars_may_die(
    clusters: Clusters, model_name: str, number: signal.Signals
) -> None:
    cluster = clusters.get(2, 1, AUTO, **SETTINGS)
    before = helpers(cluster)
    assert len(before) == 2, before
    for turn, pid in enumerate(before):
        letters = 3 + turn + 2 * (number == signal.SIGSTOP)  # not asked before: a verdict is remembered
        os.kill(pid, number)
        texts = answers(cluster, model_name, {"type": "string", "pattern": f"^[xyz]{{{letters}}}$"})
        assert len(json.loads(texts[0])) == letters
    until(f"no two others than {before}", lambda: len(set(helpers(cluster)) - set(before)) == 2)


def test_grammars_of_two_backends_beside_each_other(clusters: Clusters, model_name: str) -> None:
    cluster = clusters.get(2, 1, AUTO, **SETTINGS)
    found = {}
    for name, schema in (("plain", FOR_XGRAMMAR), ("length", FOR_GUIDANCE), ("again", FOR_XGRAMMAR)):
        texts = answers(cluster, model_name, schema)
        assert len(set(texts)) == 1, (name, texts)
        found[name] = texts[0]
    assert found["plain"] == found["again"]
    assert len(json.loads(found["length"])) == 3, found
