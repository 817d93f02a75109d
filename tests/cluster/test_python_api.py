"""`tarragon.Cluster` as docs/api-python.md has it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import tarragon
from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

FULL_CAPACITY_S = 120.0


def test_the_package_is_light_and_has_the_class() -> None:
    program = (
        "import sys, tarragon; heavy = {'torch', 'vllm', 'tarragon.cluster', 'msgspec'} & set(sys.modules); "
        "sys.exit(bool(heavy) or not isinstance(tarragon.Cluster, type))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
    assert tarragon.Cluster is Cluster
    with pytest.raises(AttributeError, match="no attribute 'Clutser'"):
        _ = tarragon.Clutser


def test_an_attention_worker_that_is_alone_keeps_no_thread_for_each_group_of_its_engine(
    cluster: Cluster,
) -> None:
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    for name, pid in cluster.pids().items():
        threads = [thread.read_text().strip() for thread in Path(f"/proc/{pid}/task").glob("*/comm")]
        assert threads
        assert sum("gloo_tcp_loop" in thread for thread in threads) == name.startswith("aw-"), (name, threads)


def test_ask_kill_add_and_drain(cluster: Cluster) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 8}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["choices"][0]["text"]
    cluster.kill("ew-0")
    again = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert again.status_code == 200
    assert cluster.wait_for("full_capacity", FULL_CAPACITY_S)["ready"]
    added = cluster.add("expert")
    assert added == "ew-2"
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    assert added in cluster.pids()
    cluster.drain(added)
    deadline_s = time.monotonic() + FULL_CAPACITY_S
    while any(worker["id"] == added for worker in cluster.status()["workers"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
