"""The command line: exit codes, one sentence for bad input, and what it asks of the admin API."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tarragon import cli
from tarragon import config as config_module
from tarragon.agent import console
from tarragon.cluster import Cluster, ClusterError, free_ports
from tarragon.config import Config
from tarragon.options import settings_help
from tarragon.testing.checkpoints import make_checkpoint

STATUS = {
    "ready": True,
    "full_capacity": False,
    "exact": True,
    "protected": False,
    "ert_version": 7,
    "workers": [
        {
            "id": "aw-0",
            "role": "attention",
            "pid": 4242,
            "epoch": 1048577,
            "state": "healthy",
            "counters": {"pairs": 1234567.0},
        },
        {"id": "ew-1", "role": "expert", "pid": 4243, "epoch": 1048578, "state": "dead"},
    ],
    "experts": {"total": 240, "with_shadow": 200, "unreachable": 3},
}


class FakeAdmin(ThreadingHTTPServer):
    """Answers like the orchestrator's admin API and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, Any]] = []
        self.answer: tuple[int, bytes] = (200, json.dumps(STATUS).encode())


class Handler(BaseHTTPRequestHandler):
    server: FakeAdmin

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        self.server.asked.append((self.path, body))
        code, data = self.server.answer
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAdmin]:
    with FakeAdmin() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("TARRAGON_ADMIN_PORT", str(server.server_address[1]))
        yield server
        server.shutdown()
        thread.join(5)


def fault(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command line that must fail with exit code 2 and one sentence; return the sentence."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("tarragon: ")
    return line.removeprefix("tarragon: ")


# ------------------------------------------------------------------ a running cluster


def test_status_json_is_the_contract_untouched(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_status_for_people_names_every_worker_and_what_does_not_hold(
    admin: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["status", "--admin-port", str(admin.server_address[1])]) == 0
    text = capsys.readouterr().out
    for part in (
        "aw-0",
        "ew-1",
        "dead",
        "4242",
        "1,234,567",
        "unprotected",
        "reduced capacity",
        "3 unreachable",
    ):
        assert part in text


def test_status_where_nothing_runs_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    [port] = free_ports(1)
    assert f"no Tarragon cluster answers at http://127.0.0.1:{port}" in fault(
        capsys, "status", "--admin-port", str(port)
    )


def test_status_of_something_else_is_one_sentence(
    admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    admin.answer = (200, b"<html>hello</html>")
    assert "is not a Tarragon cluster" in fault(capsys, "status")


def test_commands_ask_the_admin_api(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    admin.answer = (200, b'{"worker_id": "ew-2"}')
    assert cli.main(["kill", "aw-0"]) == 0
    assert cli.main(["kill", "aw-1", "--signal", "SIGSTOP"]) == 0
    assert cli.main(["drain", "ew-0"]) == 0
    assert cli.main(["add", "expert"]) == 0
    assert admin.asked == [
        ("/kill", {"worker_id": "aw-0", "signal": "SIGKILL"}),
        ("/kill", {"worker_id": "aw-1", "signal": "SIGSTOP"}),
        ("/drain", {"worker_id": "ew-0"}),
        ("/add", {"role": "expert"}),
    ]
    assert "ew-2: starting" in capsys.readouterr().out


def test_a_refusal_is_passed_on_in_its_own_words(
    admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    admin.answer = (404, b'{"error": "there is no worker aw-9"}')
    assert fault(capsys, "kill", "aw-9") == "the cluster refused: there is no worker aw-9"


def test_the_ready_line_waits_for_all_workers_and_the_gateway(
    admin: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One server plays the admin API and the gateway; its answers to /status grow with every question.
    healthy = {"id": "aw-0", "role": "attention", "pid": 1, "epoch": 1, "state": "healthy"}
    stages = [
        {"ready": False, "workers": []},
        {"ready": True, "workers": [healthy]},
        {"ready": True, "workers": [healthy, {**healthy, "id": "ew-0", "role": "expert"}]},
    ]
    monkeypatch.setattr("tarragon.agent.console.signal.signal", lambda *args: None)
    monkeypatch.setattr(
        "tarragon.admin.AdminClient.status", lambda self: stages.pop(0) if stages[1:] else stages[0]
    )
    port = admin.server_address[1]
    config = Config(port=port, admin_port=port, attention_workers=1, expert_workers=1)
    console.watch(config, time.monotonic())
    captured = capsys.readouterr()
    assert len(stages) == 1
    assert captured.out.startswith(f"ready: http://127.0.0.1:{port}/v1 (1 attention + 1 expert workers, ")
    assert captured.out.count("\n") == 1
    assert "workers: attention 1/1, expert 0/1" in captured.err
    assert admin.asked == [("/health", None)]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["status", "--nonsense"], "No such option: --nonsense"),
        (["kill"], "Missing argument 'ID'"),
        (["add", "gateway"], 'not as "gateway"'),
        (["bench", "../cli"], "there is no benchmark ../cli"),
        (["status", "--admin-port", "70000"], "admin_port must lie in 1..65535"),
        (["serve"], "Missing argument"),
        (["serve", "--max-model-len", "100", "model"], "MODEL must come before"),
        (["serve", "model", "--port", "many"], "Invalid value for '--port'"),
        (["serve", "model", "--port", "0"], "port must lie in 1..65535, but is 0"),
        (["serve", "model", "--expert-workers", "0"], "expert_workers must be at least 1"),
        (["serve", "model", "--config", "/nowhere.toml"], "cannot read the configuration file /nowhere.toml"),
        (["serve", "/nowhere"], "/nowhere is not a folder with a model"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], quiet_environment: None
) -> None:
    assert words in fault(capsys, *argv)


def test_what_this_host_cannot_run_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet_environment: None
) -> None:
    model = str(make_checkpoint("mixtral", tmp_path / "model", layers=1))
    port, admin_port = (str(number) for number in free_ports(2))
    ports = ["--port", port, "--admin-port", admin_port]
    sentence = fault(capsys, "serve", model, *ports, "--kv-cache-bytes", str(10**15))
    assert "1000000.0 GB of KV cache" in sentence
    with socket.create_server(("127.0.0.1", int(admin_port))):
        assert fault(capsys, "serve", model, *ports) == (
            f"port {admin_port} of 127.0.0.1 is taken: choose another with --admin-port"
        )


@pytest.fixture
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` sets variables for its workers; this process keeps its own."""
    monkeypatch.setattr("tarragon.agent.environment.prepare", lambda: None)


def test_a_fault_of_ours_is_not_dressed_up_as_the_users(
    admin: FakeAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("tarragon.admin.AdminClient.status", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["status"])


# ------------------------------------------------------------------ settings as flags


def test_every_setting_is_a_flag_of_serve_in_a_group() -> None:
    texts = settings_help(Path(config_module.__file__).read_text())
    assert set(texts) == set(Config.__struct_fields__)
    assert texts["port"][0] == "addresses"
    assert texts["kv_cache_bytes"] == ("memory", "Paged KV cache of each attention worker.")
    assert len({group for group, _ in texts.values()}) >= 6


def test_serve_gets_settings_and_passes_on_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, quiet_environment: None, tmp_path: Path
) -> None:
    file = tmp_path / "tarragon.toml"
    file.write_text("[tarragon]\nport = 9100\nexpert_workers = 5\n")
    seen: dict[str, Any] = {}

    def run(config: Config, model: str, engine_args: list[str], started_s: float) -> int:
        seen.update(config=config, model=model, engine_args=engine_args)
        return 7

    monkeypatch.setattr(cli, "_serve", run)
    argv = [
        "serve",
        "some/model",
        "--max-model-len",
        "128",
        "--expert-workers",
        "3",
        "--probe-interval-ms=2.5",
    ]
    assert cli.main([*argv, "--config", str(file), "--enforce-eager"]) == 7
    assert seen["model"] == "some/model"
    assert seen["engine_args"] == ["--max-model-len", "128", "--enforce-eager"]
    config = seen["config"]
    assert (config.port, config.expert_workers, config.probe_interval_ms) == (9100, 3, 2.5)


# ------------------------------------------------------------------ speed, and the cluster as an object


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["status", "--admin-port", "1"]])
def test_light_commands_import_neither_torch_nor_vllm(argv: list[str]) -> None:
    program = (
        "import sys; from tarragon import cli; cli.main(sys.argv[1:]); "
        "print([name for name in ('torch', 'vllm', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_cluster_that_cannot_start_says_why() -> None:
    cluster = Cluster("/nowhere", ready_timeout_s=30)
    with pytest.raises(ClusterError, match=r"exit code 2 before it was ready\n.*/nowhere is not a folder"):
        cluster.start()
    assert cluster.processes() == []
    assert "/nowhere is not a folder" in cluster.logs()
    assert cluster.stop() == 0
