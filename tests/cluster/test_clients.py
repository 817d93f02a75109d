"""Real clients against a real cluster: the openai package and `vllm bench serve`."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import openai
import pytest
from tests.forkserver import ForkServer
from tests.workload import SMALL_LAYERS

from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_models_are_listed(client: openai.OpenAI, model_name: str) -> None:
    assert model_name in [model.id for model in client.models.list()]


def test_a_stream_says_the_same_as_the_whole(client: openai.OpenAI, model_name: str) -> None:
    whole = client.chat.completions.create(model=model_name, messages=MESSAGES, temperature=0, max_tokens=24)
    parts = client.chat.completions.create(
        model=model_name,
        messages=MESSAGES,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(parts)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_logprobs_belong_to_the_tokens(client: openai.OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(
        model=model_name, messages=MESSAGES, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert token.logprob <= 0
        assert token.token == token.top_logprobs[0].token


def test_siblings_differ_and_a_seed_repeats_them(client: openai.OpenAI, model_name: str) -> None:
    def three(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=model_name, messages=MESSAGES, temperature=1.0, seed=seed, n=3, max_tokens=16
        )
        return [choice.message.content for choice in answer.choices]

    first = three(11)
    assert len(set(first)) == 3
    assert three(11) == first
    assert three(12) != first


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, model_name: str) -> None:
    free = client.completions.create(model=model_name, prompt="One two", temperature=0, max_tokens=32)
    text = free.choices[0].text
    stop = text[5:8]
    cut = client.completions.create(
        model=model_name, prompt="One two", temperature=0, max_tokens=32, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_a_json_schema_binds_the_answer(client: openai.OpenAI, model_name: str) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"enum": [1, 2, 3]}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model_name,
        messages=MESSAGES,
        temperature=1.0,
        seed=3,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert found["colour"] in ("red", "green")
    assert found["count"] in (1, 2, 3)


def test_penalties_change_the_text(client: openai.OpenAI, model_name: str) -> None:
    def ask(penalty: float) -> str:
        answer = client.completions.create(
            model=model_name, prompt="a a a a", temperature=0, max_tokens=32, frequency_penalty=penalty
        )
        return answer.choices[0].text

    assert ask(0.0) != ask(2.0)


def bench_serve(arguments: Sequence[str]) -> int:
    """The body of `vllm bench serve`: the engine's wheel cannot run its own command line.

    That looks for the metadata of a distribution named "vllm".
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args(list(arguments)))
    return 0


def test_vllm_bench_serve_completes(
    cluster: Cluster, forkserver: ForkServer, model_name: str, tmp_path: Path
) -> None:
    result = forkserver.run(
        "tests.cluster.test_clients:bench_serve",
        [
            f"--base-url={cluster.url}",
            "--backend=openai",
            f"--model={model_name}",
            f"--tokenizer={_demo_folder()}",
            "--dataset-name=random",
            "--random-input-len=12",
            "--random-output-len=16",
            "--num-prompts=8",
            "--save-result",
            f"--result-dir={tmp_path}",
            "--result-filename=result.json",
        ],
        240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["completed"] == 8
    assert found["total_output_tokens"] == 8 * 16


def _demo_folder() -> Path:
    return ensure_demo_model(layers=SMALL_LAYERS)


def test_metrics_have_the_engine_s_names_and_ours(cluster: Cluster) -> None:
    with urllib.request.urlopen(f"{cluster.url}/metrics", timeout=30) as response:
        text = response.read().decode()
    assert re.search(r"^vllm:generation_tokens_total\{.*\} [1-9]", text, re.M)
    assert re.search(r"^tarragon_", text, re.M)
