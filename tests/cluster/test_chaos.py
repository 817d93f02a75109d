"""Chaos by hand: every process is killed in turn under one stream, whose reader notices nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

import httpx
import pytest
from tests.cluster.observe import is_open, until
from tests.pool import CONTEXT_TOKENS

from tarragon.admin import AdminError
from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

IN_TURN = ("ew-0", "aw-0", "store", "orchestrator", "ew-1", "aw-1")
"""All but the gateway, whose streams end with it, and the node agent, which is the service."""
PROMPT = "The lighthouse keeper wrote in his diary:"
BACK_S = 120.0
AGAIN_S = 300.0
"""For all that came during the deaths, once more."""
PARTS = 8


class Reader(threading.Thread):
    """Reads one stream until it is told to stop."""

    def __init__(self, url: str, model: str, tokens: int, prompt: str | list[int] = PROMPT) -> None:
        super().__init__(daemon=True)
        self.tokens: list[int] = []
        self.fault = ""
        self.stopping = False
        self._url = f"{url}/v1/completions"
        self._body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "repetition_penalty": 1.2,  # no loops; and as it counts the prompt, parts can be asked again
            "stream": True,
            "return_token_ids": True,
        }

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=BACK_S) as response:
                if response.status_code != 200:
                    self.fault = f"status {response.status_code}: {response.read()!r}"
                    return
                for line in response.iter_lines():
                    if self.stopping:
                        return
                    self._take(line)
        except httpx.HTTPError as error:
            self.fault = f"{type(error).__name__}: {error}"

    def _take(self, line: str) -> None:
        if line.startswith("data: {"):
            event: dict[str, Any] = json.loads(line[6:])
            if "error" in event:
                self.fault = str(event["error"])
                return
            self.tokens += event["choices"][0].get("token_ids") or []


def is_back(cluster: Cluster, worker_id: str, pid: int) -> bool:
    """Whether another process is this worker, and nothing is missing."""
    try:
        status = cluster.status()
    except AdminError:  # the orchestrator itself was killed
        return False
    pids = {worker["id"]: worker["pid"] for worker in status["workers"]}
    return pids.get(worker_id, pid) != pid and status["full_capacity"] and status["protected"]


def test_every_process_but_the_gateway_is_killed_in_turn(cluster: Cluster, model_name: str) -> None:
    cluster.wait_for("protected", BACK_S)
    reader = Reader(cluster.url, model_name, CONTEXT_TOKENS - 100)
    reader.start()
    for victim in IN_TURN:
        seen = len(reader.tokens)
        until(
            f"no token came before {victim} was killed",
            lambda seen=seen: len(reader.tokens) > seen + 5,
            BACK_S,
        )
        pid = cluster.pids()[victim]
        os.kill(pid, signal.SIGKILL)
        until(
            f"{victim} did not come back",
            lambda victim=victim, pid=pid: is_back(cluster, victim, pid),
            BACK_S,
        )
        assert reader.is_alive(), f"the stream ended with {victim}: {reader.fault}"
    seen = len(reader.tokens)
    until("no token came in the end", lambda: len(reader.tokens) > seen + 5, BACK_S)
    reader.stopping = True
    reader.join(BACK_S)
    assert not reader.fault

    assert_same_again(cluster, model_name, reader.tokens)


def assert_same_again(cluster: Cluster, model: str, tokens: list[int]) -> None:
    """Parts of a stream, each asked for behind what was before it, all at once."""
    reply = httpx.post(f"{cluster.url}/tokenize", json={"model": model, "prompt": PROMPT}, timeout=BACK_S)
    prompt = reply.json()["tokens"]
    step = -(-len(tokens) // PARTS)
    parts = [tokens[start : start + step] for start in range(0, len(tokens), step)]
    again = [
        Reader(cluster.url, model, len(part), prompt + tokens[: number * step])
        for number, part in enumerate(parts)
    ]
    for reader in again:
        reader.start()
    for reader, part in zip(again, parts, strict=True):
        reader.join(AGAIN_S)
        assert not reader.fault
        assert reader.tokens == part


def test_the_gateways_death_is_an_error_and_service_returns(cluster: Cluster, model_name: str) -> None:
    cluster.wait_for("protected", BACK_S)
    reader = Reader(cluster.url, model_name, 900)
    reader.start()
    until("no token came", lambda: len(reader.tokens) > 5, BACK_S)
    pid = cluster.pids()["gateway"]
    os.kill(pid, signal.SIGKILL)
    reader.join(BACK_S)
    assert not reader.is_alive()
    assert reader.fault, "a stream that is cut off must not look complete"
    until("the gateway did not come back", lambda: is_back(cluster, "gateway", pid), BACK_S)
    # It is healthy before its first link to an attention worker is up; until then it refuses requests.
    until("the gateway takes no requests", lambda: is_open(cluster), BACK_S)
    assert_same_again(cluster, model_name, reader.tokens)
