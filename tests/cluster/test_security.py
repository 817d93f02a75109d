"""A real cluster with keys and certificates: who gets in, who does not, and what nobody may ask for."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import requests
from tests.cluster.observe import replaced, until
from tests.workload import SMALL_LAYERS

from tarragon.admin import AdminError
from tarragon.cluster import Cluster, free_ports
from tarragon.models.demo import ensure_demo_model
from tarragon.testing.certificates import Certificate, make_certificate
from tarragon.testing.checkpoints import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

API_KEYS = ("first-api-key-0123456789", "second-api-key-0123456789")
ADMIN_KEY = "the-admin-key-0123456789"
NEW_KEYS = {"api": "third-api-key-0123456789", "admin": "another-admin-key-0123456789"}
"""By the name of their file."""
HOSTILE_SCHEMA = {
    "type": "object",
    "minProperties": 100,
    "maxProperties": 1000,
    "properties": {f"p{number}": {} for number in range(1500)},
}
"""18 KB that a grammar compiler expands without end."""
HOSTILE_GRAMMAR = "root ::= " + " ".join("[a-z]*" for _ in range(2000))


class Guarded(NamedTuple):
    """A cluster with everything on."""

    cluster: Cluster
    certificate: Certificate
    model: str
    api_key_file: Path
    admin_key_file: Path

    def ask(self, method: str, path: str, key: str | None = API_KEYS[0], **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return requests.request(
            method,
            self.cluster.url + path,
            headers={**headers, **options.pop("headers", {})},
            verify=str(self.certificate.certfile),
            timeout=120,
            **options,
        )

    def complete(self, **changes: Any) -> requests.Response:
        body = {"model": self.model, "prompt": "Hello", "max_tokens": 3, "temperature": 0, **changes}
        return self.ask("POST", "/v1/completions", json=body)

    def admin(self, method: str, path: str, **options: Any) -> requests.Response:
        return requests.request(
            method,
            self.cluster.admin_url + path,
            verify=str(self.certificate.certfile),
            timeout=30,
            **options,
        )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("keys")
    certificate = make_certificate(folder)
    files = {"api": "\n".join(("# of two teams", *API_KEYS)), "admin": ADMIN_KEY}
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
        (folder / name).chmod(0o600)
    model = ensure_demo_model(layers=SMALL_LAYERS)
    with Cluster(
        model,
        1,
        1,
        engine_args=("--max-model-len=1024",),
        # Beyond loopback: allowed, as there are keys.
        host="0.0.0.0",
        admin_host="0.0.0.0",
        api_key_file=folder / "api",
        admin_key_file=folder / "admin",
        ssl_certfile=certificate.certfile,
        ssl_keyfile=certificate.keyfile,
        admin_ssl_certfile=certificate.certfile,
        admin_ssl_keyfile=certificate.keyfile,
        kv_cache_bytes=128 << 20,
        grammar_compile_cpu_s_max=2,
    ) as cluster:
        yield Guarded(cluster, certificate, model.name, folder / "api", folder / "admin")


def test_it_says_that_it_speaks_https(guarded: Guarded) -> None:
    assert "https://127.0.0.1" in guarded.cluster.ready_line
    with pytest.raises(requests.ConnectionError):
        requests.get(guarded.cluster.url.replace("https", "http") + "/health", timeout=10)
    for url in (guarded.cluster.url, guarded.cluster.admin_url):
        address = urlsplit(url)
        context = ssl.create_default_context(cafile=str(guarded.certificate.certfile))
        connection = http.client.HTTPSConnection(address.hostname, address.port, context=context, timeout=10)
        connection.connect()
        assert connection.sock.version() in ("TLSv1.2", "TLSv1.3")
        connection.close()


@pytest.mark.parametrize("key", [None, "wrong", API_KEYS[0][:-1], API_KEYS[0] + "x", ADMIN_KEY])
def test_without_the_right_key_there_is_nothing(guarded: Guarded, key: str | None) -> None:
    for method, path in (
        ("POST", "/v1/completions"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("GET", "/no"),
    ):
        answer = guarded.ask(method, path, key, json={} if method == "POST" else None)
        assert answer.status_code == 401, path
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert guarded.ask("GET", "/health", key).status_code == 200


def test_each_key_of_the_file_is_good(guarded: Guarded) -> None:
    for key in API_KEYS:
        assert guarded.ask("GET", "/v1/models", key).status_code == 200
    assert guarded.complete().status_code == 200


def test_no_key_shows_in_the_arguments_of_any_process(guarded: Guarded) -> None:
    for pid in guarded.cluster.processes():
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        for key in (*API_KEYS, ADMIN_KEY):
            assert key.encode() not in arguments


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/scale_elastic_ep",
        "/inference/v1/generate",
        "/inference/v1/abort_requests",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/sleep",
        "/v1/load_lora_adapter",
        "/v1/completions/render",
        "/v1/completions/",
        "//v1/completions",
        "/v1/../v1/completions/x",
    ],
)
def test_odd_routes_are_not_there(guarded: Guarded, path: str) -> None:
    assert guarded.ask("POST", path, json={}, allow_redirects=False).status_code in (307, 404, 405)
    assert guarded.ask("GET", path, allow_redirects=False).status_code in (307, 404, 405)


def test_the_admin_listener_has_a_key_of_its_own(guarded: Guarded) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {API_KEYS[0]}"}):
        for method, path in (("GET", "/status"), ("GET", "/metrics"), ("POST", "/kill"), ("GET", "/none")):
            answer = guarded.admin(method, path, headers=headers, json={"worker_id": "aw-0"})
            assert answer.status_code == 401, path
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    page = guarded.admin("GET", "/")
    assert page.status_code == 200
    assert ADMIN_KEY not in page.text
    right = {"Authorization": f"Bearer {ADMIN_KEY}"}
    assert guarded.admin("GET", "/status", headers=right).json()["ready"]
    foreign = {**right, "Origin": "https://evil.example"}
    answer = guarded.admin("POST", "/kill", headers=foreign, json={"worker_id": "ew-0"})
    assert answer.status_code == 403


def test_commands_show_the_key(guarded: Guarded) -> None:
    port = urlsplit(guarded.cluster.admin_url).port
    command = [sys.executable, "-m", "tarragon", "status", "--json", f"--admin-port={port}"]
    command.append(f"--admin-ssl-certfile={guarded.certificate.certfile}")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TARRAGON_ADMIN")}

    def run(*more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environ | variables,
        )

    assert json.loads(run(f"--admin-key-file={guarded.admin_key_file}").stdout)["ready"]
    assert json.loads(run(TARRAGON_ADMIN_KEY=ADMIN_KEY).stdout)["ready"]
    refused = run()
    assert refused.returncode == 2
    assert "the admin key is needed" in refused.stderr
    with pytest.raises(AdminError, match="no worker"):
        guarded.cluster.kill("ew-77")


def test_hostile_grammars_are_refused_while_a_stream_goes_on(guarded: Guarded) -> None:
    pids = guarded.cluster.pids()
    answers: dict[str, requests.Response] = {}

    def ask(name: str, **changes: Any) -> None:
        answers[name] = guarded.complete(max_tokens=300, ignore_eos=True, **changes)

    def choose() -> None:
        answers["choice"] = guarded.complete(structured_outputs={"choice": ["yes", "no"]}, max_tokens=10)

    work = [
        Thread(target=ask, args=("plain",)),
        Thread(target=ask, args=("schema",), kwargs={"structured_outputs": {"json": HOSTILE_SCHEMA}}),
        Thread(target=ask, args=("grammar",), kwargs={"structured_outputs": {"grammar": HOSTILE_GRAMMAR}}),
        Thread(target=choose),
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert answers["plain"].status_code == 200
    for name in ("schema", "grammar"):
        assert answers[name].status_code == 400, answers[name].text
        assert "to compile: make it simpler" in answers[name].json()["error"]["message"]
    assert answers["choice"].status_code == 200
    assert answers["choice"].json()["choices"][0]["text"] in ("yes", "no")
    malformed = guarded.complete(structured_outputs={"regex": "((("})
    assert malformed.status_code == 400
    assert guarded.cluster.pids() == pids, "nobody died of it"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n": 129}, "n must be at most"),
        ({"prompt": ["x"] * 2_000}, "prompt must be at most"),
        ({"stop": ["x"] * 100}, "stop must have at most"),
        ({"stop": ["x" * 5_000]}, "stop must be at most"),
        ({"logit_bias": {str(number): 1 for number in range(5_000)}}, "logit_bias"),
        ({"logprobs": 1_000}, "logprobs"),
        ({"prompt": "x" * 4_000_000}, "1024"),
        ({"structured_outputs": {"regex": "a" * 100_000}}, "bytes of JSON"),
        ({"response_format": {"type": "json_schema", "json_schema": {"x": "y" * 100_000}}}, "bytes of JSON"),
        ({"max_tokens": 1 << 40}, "1024"),
    ],
)
def test_too_much_is_a_400(guarded: Guarded, change: dict[str, Any], word: str) -> None:
    answer = guarded.complete(**change)
    assert answer.status_code == 400, answer.text[:300]
    assert word in answer.json()["error"]["message"]
    assert guarded.complete().status_code == 200


def test_too_long_a_body_is_a_413(guarded: Guarded) -> None:
    assert guarded.complete(prompt="x" * (17 << 20)).status_code == 413


def test_keys_are_changed_while_it_runs(guarded: Guarded) -> None:
    """As docs/security.md says: the new key below the old one, then the old one away; workers stay."""
    files = {guarded.api_key_file: API_KEYS, guarded.admin_key_file: (ADMIN_KEY,)}
    workers = {name: pid for name, pid in guarded.cluster.pids().items() if name[:3] in ("aw-", "ew-")}
    for file, keys in files.items():
        file.write_text("\n".join((*keys, NEW_KEYS[file.name])) + "\n")
    both = served_anew(guarded)
    assert both == {"old": 200, "new": 200, "old admin": 200, "new admin": 200}
    for file in files:
        file.write_text(NEW_KEYS[file.name] + "\n")
    # What runs knows the new key already, and the commands show the first of the file.
    assert served_anew(guarded) == {"old": 401, "new": 200, "old admin": 401, "new admin": 200}
    assert workers.items() <= guarded.cluster.pids().items(), "a worker was lost"


def served_anew(guarded: Guarded) -> dict[str, int]:
    """What each key gets once gateway and orchestrator were killed and are there again."""
    before = guarded.cluster.pids()
    guarded.cluster.kill("gateway")
    guarded.cluster.kill("orchestrator")
    replaced(guarded.cluster, before, "gateway", "orchestrator")
    until("no gateway", lambda: guarded.ask("GET", "/health").status_code == 200)

    def admin(key: str) -> int:
        return guarded.admin("GET", "/status", headers={"Authorization": f"Bearer {key}"}).status_code

    return {
        "old": guarded.ask("GET", "/v1/models", API_KEYS[0]).status_code,
        "new": guarded.ask("GET", "/v1/models", NEW_KEYS["api"]).status_code,
        "old admin": admin(ADMIN_KEY),
        "new admin": admin(NEW_KEYS["admin"]),
    }


# ------------------------------------------------------------------ without keys


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_a_foreign_page_gets_nothing(cluster: Cluster, headers: dict[str, str], status: int) -> None:
    assert requests.get(cluster.url + "/v1/models", headers=headers, timeout=30).status_code == status


def test_memory_that_workers_share_has_no_name(cluster: Cluster) -> None:
    """Rows and checkpoints lie in memory files without a path: only a descriptor leads there."""
    shared = set()
    for pid in cluster.pids().values():
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) > 5 else ""
            if line.split()[1].endswith("s") and path:
                shared.add(path)
    assert any("tarragon-bucket" in path for path in shared)
    named = {path for path in shared if path.startswith(("/dev/shm", "/tmp", "/run", "/var"))}
    assert {path for path in named if not path.endswith("(deleted)")} == set()


# ------------------------------------------------------------------ what is refused before anything starts


def _refused(word: str, *arguments: str, **environ: str) -> None:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("TARRAGON_A", "VLLM_API"))
    }
    result = subprocess.run(
        [sys.executable, "-m", "tarragon", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=kept | environ,
    )
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert (result.returncode, len(lines)) == (2, 1), result.stderr
    assert word in lines[0]


def test_what_would_be_open_is_refused(tmp_path: Path) -> None:
    folder = str(make_checkpoint("mixtral", tmp_path / "m"))
    port, admin_port = free_ports(2)
    ports = (f"--port={port}", f"--admin-port={admin_port}")
    _refused("--host 0.0.0.0 is refused without --api-key-file", folder, *ports, "--host=0.0.0.0")
    _refused("--admin-host 0.0.0.0 is refused without", folder, *ports, "--admin-host=0.0.0.0")
    _refused("cannot be read", folder, *ports, "--host=0.0.0.0", "--api-key-file=/nowhere")
    _refused("must have 16 to", folder, *ports, "--host=0.0.0.0", TARRAGON_API_KEY="short")
    keys = tmp_path / "keys"
    keys.write_text(ADMIN_KEY)
    keys.chmod(0o644)
    _refused("chmod o-r", folder, *ports, f"--admin-key-file={keys}")
    _refused("cannot be used", folder, *ports, f"--ssl-certfile={keys}")
    _refused("cannot be read", folder, *ports, "--admin-ssl-certfile=/nowhere")


def test_a_model_with_pickled_weights_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "m")
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02c")
    _refused("pickle files (pytorch_model.bin)", str(folder))
