"""Bad input gets a clear error, and the rest of the service goes on unharmed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file
from tests.forkserver import COMMAND_LINE, ForkServer
from tests.pool import CONTEXT_TOKENS
from tests.workload import random_checkpoint

from tarragon.cluster import Cluster, free_ports
from tarragon.testing.checkpoints import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TIMEOUT_S = 120


def _post(cluster: Cluster, body: Any, path: str = "/v1/completions") -> requests.Response:
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return requests.post(
        cluster.url + path, data=data, headers={"content-type": "application/json"}, timeout=60
    )


def _works(cluster: Cluster, model_name: str) -> bool:
    answer = _post(cluster, {"model": model_name, "prompt": "Hello", "max_tokens": 2, "temperature": 0})
    return answer.status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"prompt": [7] * 5_000}, 400, str(CONTEXT_TOKENS)),
        ({"temperature": -1}, 400, "temperature"),
        ({"tempreature": 1}, 400, "tempreature"),
        ({"n": 0}, 400, "n"),
        ({"max_tokens": 0, "n": -3}, 400, "n"),
        ({"logprobs": 10_000}, 400, "logprobs"),
        ({"model": "nobody"}, 404, "nobody"),
        ({"prompt": None}, 400, "prompt"),
    ],
)
def test_a_bad_request_is_a_4xx_that_names_the_fault(
    cluster: Cluster, model_name: str, change: dict[str, Any], status: int, word: str
) -> None:
    answer = _post(cluster, {"model": model_name, "prompt": "Hello", "max_tokens": 2, **change})
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]["message"]
    assert _works(cluster, model_name)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt":' * 2_000])
def test_a_malformed_body_is_a_4xx(cluster: Cluster, model_name: str, body: bytes) -> None:
    assert 400 <= _post(cluster, body).status_code < 500
    assert _works(cluster, model_name)


def _serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tarragon", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def _one_sentence(result: subprocess.CompletedProcess[str], word: str) -> None:
    """Exit code 2, and nothing on stderr but one line that has ``word`` in it."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert (result.returncode, len(lines)) == (2, 1), result.stderr
    assert lines[0].startswith("tarragon: ")
    assert word in lines[0]
    assert result.stdout == ""


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    _one_sentence(_serve(str(tmp_path)), "config.json")


def test_a_model_without_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64})
    )
    _one_sentence(_serve(str(tmp_path)), "LlamaForCausalLM")


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "m")
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1_000])
    _one_sentence(_serve(str(folder)), shard.name)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "m")
    next(folder.glob("*.safetensors")).unlink()
    _one_sentence(_serve(str(folder)), "safetensors")


def test_more_experts_than_memory(tmp_path: Path) -> None:
    folder = random_checkpoint("mixtral", tmp_path / "m")
    _one_sentence(_serve(str(folder), "--expert-memory-bytes-max=1000"), "bytes")


def test_a_port_in_use(cluster: Cluster, tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "m")
    port = cluster.url.rsplit(":", 1)[1]
    _one_sentence(_serve(str(folder), f"--port={port}"), port)


def test_a_flag_that_does_not_apply_is_refused_by_name(forkserver: ForkServer, tmp_path: Path) -> None:
    """One that vLLM has; tests/unit/test_gateway_flags.py goes through all of them, and those nobody has."""
    folder = random_checkpoint("mixtral", tmp_path / "m")
    ports = [f"--{name}={port}" for name, port in zip(("port", "admin-port"), free_ports(2), strict=True)]
    arguments = ["serve", str(folder), *ports, "--enable-lora"]
    _one_sentence(forkserver.run(COMMAND_LINE, arguments, TIMEOUT_S), "lora")


def test_quantised_experts_are_refused(tmp_path: Path) -> None:
    method = "mxfp4"
    folder = make_checkpoint("mixtral", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    _one_sentence(_serve(str(folder)), method)


@pytest.mark.parametrize(
    ("end", "dtype", "stored"),
    [("experts.3.w2.weight", torch.int8, "I8"), ("self_attn.o_proj.weight", torch.float8_e4m3fn, "F8_E4M3")],
    ids=["experts", "attention"],
)
def test_weights_of_another_type_are_refused(
    end: str, dtype: torch.dtype, stored: str, tmp_path: Path
) -> None:
    """Whose config.json does not say so: the engine would take the codes for numbers."""
    folder = make_checkpoint("mixtral", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(end))
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
    _one_sentence(_serve(str(folder)), f"{name} is {stored}, but")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "m")
    ports = [f"--{name}={port}" for name, port in zip(("port", "admin-port"), free_ports(2), strict=True)]
    _one_sentence(_serve(str(folder), *ports, "--kv-cache-bytes=10000000"), "has no tokenizer")
