"""The orchestrator's HTTP interface: what it answers, and what it denies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fake_cluster import (
    LIMIT_S,
    Cluster,
    make_model,
    run,
    wait_for,
    worker,
)

from tarragon.messages import (
    Checkpointing,
    Drain,
    SignalWorker,
    StartWorker,
    Stop,
    WorkerExited,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def idle(model: str) -> Iterator[Cluster]:
    """An orchestrator whose agent and workers are not there (yet): its API answers all the same."""
    cluster = Cluster(model, connect_timeout_s=600.0)
    asyncio.run(_answers(cluster))
    yield cluster
    cluster.kill()


async def _answers(cluster: Cluster) -> None:
    status = await cluster.until(lambda s: True)
    assert status["ready"] is False
    assert status["exact"] is False
    assert status["exact_reason"] == "no attention worker is ready"


BIG = "x" * 20_000


@pytest.mark.parametrize(
    ("method", "path", "options", "code"),
    [
        ("GET", "/nothing", {}, 404),
        ("GET", "/status/", {}, 404),
        ("POST", "/status", {"json": {}}, 405),
        ("GET", "/kill", {}, 405),
        ("DELETE", "/drain", {}, 405),
        ("OPTIONS", "/kill", {}, 405),
        ("GET", "/status", {"headers": {"Host": "evil.example"}}, 403),
        ("GET", "/status", {"headers": {"Host": "127.0.0.1.evil.example:80"}}, 403),
        ("GET", "/status", {"headers": {"Host": ""}}, 403),
        ("POST", "/kill", {"json": {"worker_id": "ew-0"}, "headers": {"Host": "rebound.example"}}, 403),
        ("POST", "/kill", {"data": b'{"worker_id": "ew-0"}', "headers": {"Content-Type": "text/plain"}}, 415),
        ("POST", "/kill", {"data": {"worker_id": "ew-0"}}, 415),
        ("POST", "/kill", {"data": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ("POST", "/kill", {"data": b"\xff", "headers": {"Content-Type": "application/json"}}, 400),
        ("POST", "/kill", {"data": b"", "headers": {"Content-Type": "application/json"}}, 400),
        ("POST", "/kill", {"json": []}, 400),
        ("POST", "/kill", {"json": {}}, 400),
        ("POST", "/kill", {"json": {"worker_id": 7}}, 400),
        ("POST", "/kill", {"json": {"worker_id": "ew-0", "force": True}}, 400),
        ("POST", "/kill", {"json": {"worker_id": "ew-0", "signal": "SIGRTMIN"}}, 400),
        ("POST", "/kill", {"json": {"worker_id": BIG}}, 413),
        ("POST", "/kill", {"json": {"worker_id": "ew-7"}}, 404),
        ("POST", "/drain", {"json": {"worker_id": "ew-7"}}, 404),
        ("POST", "/add", {"json": {"role": "gateway"}}, 400),
        ("POST", "/checkpointing", {"json": {"mode": "sometimes"}}, 409),
        ("POST", "/checkpointing", {"json": {}}, 400),
        (
            "POST",
            "/kill",
            {"json": {"worker_id": "ew-0"}, "headers": {"Origin": "https://evil.example"}},
            403,
        ),
        ("POST", "/kill", {"json": {"worker_id": "ew-0"}, "headers": {"Sec-Fetch-Site": "cross-site"}}, 403),
        ("POST", "/fault_tolerance/apply", {"json": {"instruction": "pause"}}, 400),
        ("POST", "/fault_tolerance/apply", {"json": {"instruction": "restart"}}, 400),
        (
            "POST",
            "/fault_tolerance/apply",
            {"json": {"instruction": "restart", "params": {"worker_ids": ["ew-7"]}}},
            404,
        ),
        ("GET", "/events?limit=-1", {}, 400),
        ("GET", "/events?after=x", {}, 400),
    ],
)
def test_every_error_is_json_with_one_sentence(
    idle: Cluster, method: str, path: str, options: dict[str, Any], code: int
) -> None:
    answer, body = asyncio.run(idle.request(method, path, **options))
    assert answer == code, body
    assert list(body) == ["error"]
    assert isinstance(body["error"], str)
    assert body["error"]
    assert "\n" not in body["error"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8001", "127.9.9.9:80"])
def test_names_of_this_machine_are_accepted(idle: Cluster, host: str) -> None:
    code, _ = asyncio.run(idle.request("GET", "/status", headers={"Host": host}))
    assert code == 200


def raw_http(cluster: Cluster, request: bytes) -> tuple[bytes, Any]:
    """Send bytes; return the answer's first line and its JSON body."""
    with socket.create_connection(("127.0.0.1", cluster.boot.config.admin_port), timeout=LIMIT_S) as sock:
        sock.sendall(request)
        answer = b""
        while chunk := sock.recv(65_536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0], json.loads(body)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01 not http\r\n\r\n",
        b"GET /status HTTP/9.9\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
    ],
    ids=["tls", "version", "length", "long header"],
)
def test_what_is_no_http_is_told_so_in_json(idle: Cluster, request_: bytes) -> None:
    line, body = raw_http(idle, request_)
    assert line.split()[1] == b"400"
    assert list(body) == ["error"]


def test_a_chunked_body_is_bounded_as_well(idle: Cluster) -> None:
    head = b"POST /kill HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    line, _ = raw_http(idle, head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunk * 8)
    assert line.split()[1] == b"413"


def test_commands_reach_the_agent_and_the_workers(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        code, body = await cluster.request("POST", "/kill", {"worker_id": "ew-0", "signal": "stop"})
        epoch = cluster.fakes["ew-0"].boot.epoch
        assert code == 202
        assert body == {"worker_id": "ew-0", "epoch": epoch, "pid": os.getpid(), "signal": "SIGSTOP"}
        code, body = await cluster.request("POST", "/kill", {"worker_id": "orchestrator"})
        assert (code, body["pid"]) == (202, cluster.process.pid)
        for order in (
            SignalWorker(worker_id="ew-0", epoch=epoch, signal=signal.SIGSTOP),
            SignalWorker(worker_id="orchestrator", epoch=1 << 20, signal=signal.SIGKILL),
        ):
            await wait_for(lambda order=order: order in cluster.orders, "the agent got no signal")  # type: ignore[misc]

        code, body = await cluster.request("POST", "/add", {"role": "expert"})
        assert (code, body) == (202, {"worker_id": "ew-2", "state": "starting"})
        status = await cluster.until(lambda s: s["full_capacity"] and len(s["workers"]) == 8)
        assert worker(status, "ew-2")["experts_resident"] > 0

        leaving = cluster.fakes["ew-1"]
        code, body = await cluster.request("POST", "/drain", {"worker_id": "ew-1"})
        assert (code, body) == (202, {"worker_id": "ew-1", "state": "draining"})
        await asyncio.wait_for(leaving.task, LIMIT_S)
        assert [type(m) for m in leaving.inbox if isinstance(m, (Drain, Stop))] == [Drain, Stop]
        status = await cluster.until(lambda s: s["full_capacity"] and len(s["workers"]) == 7)
        assert status["experts"]["unreachable"] == 0
        code, body = await cluster.request("POST", "/drain", {"worker_id": "gateway"})
        assert code == 409
        assert "cannot be drained" in body["error"]

    run(test, model)


def test_the_way_to_checkpoint_reaches_the_attention_workers(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        code, body = await cluster.request("POST", "/checkpointing", {"mode": "pause-8"})
        assert code == 202, body
        for worker_id in ("aw-0", "aw-1"):
            inbox = cluster.fakes[worker_id].inbox
            order = Checkpointing(mode="pause-8")
            await wait_for(lambda inbox=inbox, order=order: order in inbox, "it was not told")  # type: ignore[misc]
        assert not any(isinstance(message, Checkpointing) for message in cluster.fakes["ew-0"].inbox)

    run(test, model)


def test_with_keys_only_the_dashboards_files_are_open(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("first-admin-key-01234", "second-admin-key-01234")
    (tmp_path / "keys").write_text(keys[0])
    (tmp_path / "keys").chmod(0o600)
    monkeypatch.setenv("TARRAGON_ADMIN_KEY", keys[1])
    cluster = Cluster(model, connect_timeout_s=600.0, admin_key_file=str(tmp_path / "keys"))
    try:
        asyncio.run(_with_keys(cluster, keys))
    finally:
        cluster.kill()


async def _with_keys(cluster: Cluster, keys: tuple[str, str]) -> None:
    async def code(path: str, key: str, method: str = "GET") -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"http://127.0.0.1:{cluster.boot.config.admin_port}{path}"
        async with aiohttp.ClientSession() as http, http.request(method, url, headers=headers) as answer:
            if answer.status == 401:
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            return answer.status

    async def answers() -> bool:
        try:
            return await code("/", "") == 200
        except aiohttp.ClientConnectionError:
            return False

    end_s = time.monotonic() + LIMIT_S
    while not await answers():
        assert time.monotonic() < end_s, "the status API never came"
        await asyncio.sleep(0.05)
    for key in keys:
        assert await code("/status", key) == 200
    for key in ("", "wrong", keys[0] + "x"):
        for path in ("/status", "/table", "/events", "/history", "/metrics", "/nothing"):
            assert await code(path, key) == 401
        for path in ("/kill", "/drain", "/add", "/checkpointing", "/fault_tolerance/apply", "/nothing"):
            assert await code(path, key, "POST") == 401
        assert await code("/dashboard/main.js", key) == 200


def start_epoch(cluster: Cluster, worker_id: str, count: int) -> int:
    """Epoch of the ``count``-th order to start a worker; 0 until it comes."""
    epochs = [o.epoch for o in cluster.orders if isinstance(o, StartWorker) and o.worker_id == worker_id]
    return epochs[count - 1] if len(epochs) >= count else 0


def test_fault_tolerance_instructions(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        old = cluster.fakes["aw-0"].boot.epoch
        code, body = await cluster.request(
            "POST",
            "/fault_tolerance/apply",
            {"instruction": "restart", "params": {"worker_ids": ["aw-0"]}},
        )
        assert code == 202
        assert body["worker_ids"] == ["aw-0"]
        assert body["request_id"]
        await cluster.until(lambda s: worker(s, "aw-0")["epoch"] > old and s["full_capacity"])

        code, _ = await cluster.request(
            "POST",
            "/fault_tolerance/apply",
            {"instruction": "scale_down", "params": {"worker_ids": ["ew-1"]}},
        )
        assert code == 202
        await cluster.until(lambda s: s["full_capacity"] and len(s["workers"]) == 6)

        assert cluster.agent is not None
        cluster.silent.add("ew-0")
        cluster.fakes["ew-0"].die()
        for asked in (2, 3):  # a crash loop: it is started twice more, and then given up
            epoch = await wait_for(lambda asked=asked: start_epoch(cluster, "ew-0", asked), "no restart")  # type: ignore[misc]
            await cluster.agent.send_control(
                WorkerExited(worker_id="ew-0", epoch=epoch, pid=1, status="exit code 1")
            )
        status = await cluster.until(lambda s: worker(s, "ew-0")["given_up"])
        assert status["ready"] is False
        _, faults = await cluster.request("GET", "/fault_tolerance/status")
        assert faults["total_engines"] == 5
        fault = next(e for e in faults["engines"] if e["id"] == "ew-0")
        assert (fault["status"], fault["cause"]) == ("dead", "exit code 1")
        cluster.silent.clear()
        code, body = await cluster.request("POST", "/fault_tolerance/apply", {"instruction": "retry"})
        assert (code, body["worker_ids"]) == (202, ["ew-0"])
        await cluster.full()

    run(test, model, crash_loop_restarts_max=2, restart_backoff_s=0.0, crash_loop_uptime_s=60.0)
