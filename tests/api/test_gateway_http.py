"""The gateway's process over HTTP, with an orchestrator and attention workers that are only played."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.forkserver import Forked, ForkServer

from tarragon.boot import Boot, socket_address
from tarragon.cluster import free_ports
from tarragon.config import Config
from tarragon.messages import Control, Hello, Peer, Peers, Ready, Report, Stop, Table, Welcome
from tarragon.testing.fake_attention import FakeAttention
from tarragon.transport.local import AsyncConnection, AsyncServer, serve_async

WAIT_S = 120.0
KEY = "secret-key"


def make_model(folder: Path) -> int:
    """Write a Mixtral's config and a tokenizer of single bytes; return the number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(folder)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "torch_dtype": "bfloat16",
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return len(words)


class Stage:
    """An event loop in a thread, in which the orchestrator and the workers are played."""

    def __init__(self, boot: Boot, vocabulary: int) -> None:
        self.boot, self.vocabulary = boot, vocabulary
        self.heard: list[Control] = []
        self.orchestrator: AsyncConnection | None = None
        self.workers: dict[str, FakeAttention] = {}
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._server: AsyncServer = self.run(self._listen())

    def close(self) -> None:
        """Close everything here and now, and not when the loop gets to it in the middle of another test."""

        async def end() -> None:
            for fake in self.workers.values():
                fake.close()
            self._server.close()
            await self._server.wait_closed()
            # Handlers of workers, those that were killed as well, close their connections as they end.
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        try:
            self.run(end())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(WAIT_S)
            self.loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def tell(self, message: Control) -> None:
        assert self.orchestrator is not None
        self.run(self.orchestrator.send_control(message))

    def worker(self, worker_id: str, epoch: int) -> FakeAttention:
        """Start a worker (in the place of an older one) and tell the gateway."""
        fake = FakeAttention(worker_id, epoch, max_model_len=256, vocabulary=self.vocabulary, step_s=0.01)
        self.run(fake.listen(socket_address(self.boot.cluster, f"{worker_id}.{epoch}"), self.boot.secret))
        self.workers[worker_id] = fake
        self.tell_peers()
        return fake

    def kill(self, worker_id: str) -> None:
        fake = self.workers.pop(worker_id)

        async def close() -> None:
            fake.close()

        self.run(close())
        self.tell_peers()

    def kill_busy(self) -> tuple[str, int]:
        """Kill a worker in the middle of its texts; returns its name and how many these were."""

        async def close() -> tuple[str, int]:
            worker_id = next(name for name, fake in self.workers.items() if fake._running)
            fake = self.workers.pop(worker_id)
            texts = len(fake._running)  # in the loop: none begins or ends before the worker is gone
            fake.close()
            return worker_id, texts

        killed: tuple[str, int] = self.run(close())
        self.tell_peers()
        return killed

    def tell_peers(self) -> None:
        self.tell(Peers(peers=[self.peer(fake) for fake in self.workers.values()]))

    def peer(self, fake: FakeAttention) -> Peer:
        worker_id, epoch = fake.facts.worker_id, fake.facts.epoch
        address = socket_address(self.boot.cluster, f"{worker_id}.{epoch}")
        return Peer(worker_id=worker_id, role="attention", epoch=epoch, address=address)

    def count(self, kind: type[Any]) -> int:
        return sum(isinstance(message, kind) for message in self.heard)

    async def _listen(self) -> AsyncServer:
        return await serve_async(
            self.boot.orchestrator_address,
            self.boot.secret,
            self._serve,
            frame_bytes_max=1 << 24,
            handshake_timeout_s=5.0,
        )

    async def _serve(self, connection: AsyncConnection) -> None:
        while (message := await connection.recv_control()) is not None:
            self.heard.append(message)
            if isinstance(message, Hello):
                self.orchestrator = connection
                empty = Table(version=1, workers=[], candidates=[])
                await connection.send_control(Welcome(table=empty, peers=[]))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


class Gateway:
    def __init__(self, stage: Stage, process: Forked, http: httpx.Client) -> None:
        self.stage, self.process, self.http = stage, process, http
        self.openai = openai.OpenAI(
            base_url=f"{str(http.base_url).rstrip('/')}/v1", api_key=KEY, max_retries=0, timeout=WAIT_S
        )

    def status(self, path: str) -> int:
        return self.http.get(path).status_code

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json={"model": "tiny", **body})

    def metric(self, start: str, *, may_lack: bool = False) -> float:
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith(start)]
        assert lines or may_lack, start
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.fixture(scope="module")
def gateway(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    vocabulary = make_model(folder)
    boot = Boot(
        cluster=f"test-{os.getpid()}-{os.urandom(4).hex()}",
        secret=os.urandom(32),
        worker_id="gateway",
        role="gateway",
        epoch=3,
        model=str(folder),
        config=Config(
            port=free_ports(1)[0],
            attention_unavailable_timeout_s=1.0,
            http_body_bytes_max=100_000,
            grammar_compile_cpu_s_max=2,
            # No test here is about detection, and the workers answer probes in a thread of this process.
            probe_misses_max=250,
            attention_step_ms_max=WAIT_S * 1e3,
        ),
        engine_args=("--enforce-eager", "--api-key", KEY),
    )
    stage = Stage(boot, vocabulary)
    with (folder.parent / "log").open("w") as log:
        process = forkserver.worker(boot, log)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{boot.config.port}",
        headers={"authorization": f"Bearer {KEY}"},
        timeout=WAIT_S,
    ) as http:
        try:
            until(lambda: process.poll() is not None or stage.count(Ready) == 1)
            assert process.poll() is None, (folder.parent / "log").read_text()
            yield Gateway(stage, process, http)
        finally:
            process.kill()
            process.wait()
            stage.close()


def test_it_serves_before_any_worker_is_there(gateway: Gateway) -> None:
    """The first test of this module: the workers come at its end, and the others use them."""
    (hello,) = [message for message in gateway.stage.heard if isinstance(message, Hello)]
    assert (hello.worker_id, hello.role, hello.epoch) == ("gateway", "gateway", 3)
    assert hello.address == str(gateway.http.base_url).rstrip("/")
    for path in ("/health", "/ping"):
        refusal = gateway.http.get(path)
        assert refusal.status_code == 503
        assert "still starting" in refusal.json()["error"]["message"]
    assert next(model.id for model in gateway.openai.models.list()) == "tiny"
    assert gateway.post("/tokenize", prompt="hello").json()["count"] == 5
    refusal = gateway.post("/v1/completions", prompt="hello")
    assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
    with pytest.raises(openai.InternalServerError, match="still starting"):
        gateway.openai.completions.create(model="tiny", prompt="x", stream=True)
    gateway.stage.worker("aw-0", 10)
    gateway.stage.worker("aw-1", 11)
    until(lambda: gateway.status("/health") == 200)
    until(lambda: gateway.metric("tarragon_gateway_attention_workers") == 2)


def test_completions_and_chats_of_all_kinds(gateway: Gateway) -> None:
    client = gateway.openai
    plain = client.completions.create(model="tiny", prompt="hello", max_tokens=5, seed=1)
    assert plain.usage is not None
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (5, 5)
    assert plain.choices[0].finish_reason == "length"
    again = client.completions.create(model="tiny", prompt="hello", max_tokens=5, seed=1)
    assert again.choices[0].text == plain.choices[0].text
    several = client.completions.create(model="tiny", prompt="hello", max_tokens=20, n=3)
    assert len({choice.text for choice in several.choices}) == 3, "children have seeds of their own"
    messages: Any = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, seed=2)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=6,
            seed=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == chat.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    text = gateway.post("/detokenize", tokens=[70, 71]).json()["prompt"]
    assert len(text) == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", {"prompt": "x", "temprature": 1}, 400, "did you mean 'temperature'?"),
        ("/v1/completions", {"prompt": "x", "guided_regex": "a"}, 400, "unknown parameter 'guided_regex'"),
        ("/v1/completions", {"prompt": "x" * 300}, 400, "maximum context length is 256 tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": -1}, 400, "max_tokens must be at least 1"),
        ("/v1/completions", {"prompt": "x", "temperature": "warm"}, 400, "valid number"),
        ("/v1/completions", {"prompt": "x", "n": 129}, 400, "n must be at most 128"),
        (
            "/v1/completions",
            {"prompt": "x", "kv_transfer_params": {"do_remote_prefill": True}},
            400,
            "kv_transfer_params is not supported",
        ),
        ("/v1/completions", {"prompt": "x", "model": "an-adapter"}, 404, "does not exist"),
        ("/v1/completions", {"prompt": "x" * 200_000}, 413, "longer than 100000 bytes"),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
                ]
            },
            400,
            "tiny is not a multimodal model",
        ),
        ("/v1/chat/completions", {"messages": [], "functions": []}, 400, "unknown parameter 'functions'"),
        ("/v1/embeddings", {"input": "x"}, 404, "Not Found"),
        ("/invocations", {"prompt": "x"}, 404, "Not Found"),
        ("/scale_elastic_ep", {"new_data_parallel_size": 2}, 404, "Not Found"),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}, 404, "Not Found"),
    ],
)
def test_what_is_not_understood_or_not_supported_is_refused(
    gateway: Gateway, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    refusal = gateway.post(path, **body)
    assert refusal.status_code == status, refusal.text
    assert words in refusal.text


def test_malformed_bodies_are_the_clients_fault(gateway: Gateway) -> None:
    for body in (b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt":' + b"[" * 50_000):
        refusal = gateway.http.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert refusal.status_code == 400, (body[:20], refusal.text)
    assert gateway.http.post("/v1/completions", content=b"{}").status_code == 400


def test_strangers_learn_nothing(gateway: Gateway) -> None:
    for key in ("", "Bearer wrong"):
        answer = gateway.http.post("/v1/completions", json={"nonsense": 1}, headers={"authorization": key})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, 401)
        assert "nonsense" not in answer.text
        assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("key", ["", "Bearer wrong", f"Basic {KEY}", KEY])
def test_everything_but_health_checks_needs_the_key(gateway: Gateway, key: str) -> None:
    """Deny by default: also what vLLM's own list of guarded paths leaves open, and what does not exist."""
    headers = {"authorization": key}
    for path in ("/metrics", "/metrics/", "/version", "/load", "/openapi.json", "/docs", "/v1/models", "/no"):
        assert gateway.http.get(path, headers=headers).status_code == 401, path
    for path in (
        "/tokenize",
        "/detokenize",
        "/v1/completions",
        "/health/x",
        "//health",
        "/reset_prefix_cache",
    ):
        answer = gateway.http.post(path, json={"prompt": "x"}, headers=headers)
        assert answer.status_code == 401, path
    for path in ("/health", "/ping"):
        assert gateway.http.get(path, headers=headers).status_code == 200


def test_with_the_key_everything_is_there(gateway: Gateway) -> None:
    assert "tarragon_stall_seconds_bucket" in gateway.http.get("/metrics").text
    assert gateway.post("/tokenize", prompt="hello").status_code == 200
    assert gateway.status("/version") == 200


HOSTILE_SCHEMA = {
    "type": "object",
    "minProperties": 100,
    "maxProperties": 1000,
    "properties": {f"p{number}": {} for number in range(1500)},
}
"""A compiler of grammars expands it without end."""


def test_a_schema_that_compiles_without_end_is_refused_and_streams_go_on(gateway: Gateway) -> None:
    refusals: list[httpx.Response] = []
    body = {"prompt": "x", "structured_outputs": {"json": HOSTILE_SCHEMA}}
    thread = threading.Thread(target=lambda: refusals.append(gateway.post("/v1/completions", **body)))
    thread.start()
    answered = 0
    while thread.is_alive():
        assert gateway.post("/v1/completions", prompt="x", max_tokens=3).status_code == 200
        answered += 1
    assert answered > 1
    assert refusals[0].status_code == 400
    assert "to compile: make it simpler" in refusals[0].text
    assert gateway.post("/v1/completions", **body).status_code == 400, "the verdict is remembered"


def test_good_and_malformed_grammars(gateway: Gateway) -> None:
    for good in ({"choice": ["a", "b"]}, {"regex": "[ab]+"}, {"json": {"type": "integer"}}):
        assert gateway.post("/v1/completions", prompt="x", max_tokens=2, structured_outputs=good).is_success
    for bad in ({"regex": "((("}, {"grammar": "root := x"}, {"json": "{"}):
        refusal = gateway.post("/v1/completions", prompt="x", structured_outputs=bad)
        assert refusal.status_code == 400, refusal.text


def test_metrics_tell_the_workers_apart(gateway: Gateway) -> None:
    before = {engine: gateway.metric(f'vllm:generation_tokens_total{{engine="{engine}"') for engine in (0, 1)}
    fakes = list(gateway.stage.workers.values())
    for fake in fakes:
        fake.frozen = True
    answers: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(gateway.post("/v1/completions", prompt="x", max_tokens=7))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    until(lambda: gateway.metric("tarragon_gateway_requests_live") == 4)
    for fake in fakes:
        fake.frozen = False
    for thread in threads:
        thread.join(WAIT_S)
    assert [answer.status_code for answer in answers] == [200] * 4
    for engine in (0, 1):
        after = gateway.metric(f'vllm:generation_tokens_total{{engine="{engine}"')
        assert after - before[engine] == 14
        assert gateway.metric(f'vllm:num_requests_running{{engine="{engine}"') == 0
    assert gateway.metric('vllm:cache_config_info{_block_size_resolved="True",block_size="16"') == 2
    assert gateway.stage.count(Report) > 0


def test_a_client_that_leaves_frees_its_worker(gateway: Gateway) -> None:
    with gateway.openai.completions.create(model="tiny", prompt="x", max_tokens=200, stream=True) as stream:
        next(iter(stream))
    until(lambda: gateway.metric("tarragon_gateway_requests_live") == 0)
    until(lambda: any(fake.aborted for fake in gateway.stage.workers.values()))


def test_a_lost_worker_is_not_noticed_in_any_text(gateway: Gateway) -> None:
    stage = gateway.stage
    settings: Any = {"model": "tiny", "prompt": "x", "max_tokens": 150, "seed": 5, "temperature": 1.0}
    expected = gateway.openai.completions.create(**settings, n=3)
    restarted = gateway.metric("tarragon_requests_restarted_total")
    failovers = gateway.metric("tarragon_failovers_total{", may_lack=True)
    step_s = 0.01
    for fake in stage.workers.values():
        fake.step_s = 5 * step_s  # no text shall end while this thread is slow to kill a worker
    stream = gateway.openai.completions.create(
        **settings, n=3, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, usage = ["", "", ""], ["", "", ""], None
    killed, held = "", 0
    for position, chunk in enumerate(stream):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        if position == 20:
            killed, held = stage.kill_busy()
            for fake in stage.workers.values():
                fake.step_s = step_s
    assert texts == [choice.text for choice in expected.choices]
    assert reasons == ["length"] * 3
    assert usage == expected.usage
    assert gateway.metric("tarragon_requests_restarted_total") == restarted + held > 0
    assert gateway.metric("tarragon_failovers_total{") == failovers + 1
    assert gateway.metric("tarragon_stall_seconds_count") == restarted + held
    stage.worker(killed, 30)
    until(lambda: gateway.metric("tarragon_gateway_attention_workers") == 2)


def test_requests_wait_for_a_worker_for_a_while(gateway: Gateway) -> None:
    stage = gateway.stage
    for name in list(stage.workers):
        stage.kill(name)
    until(lambda: gateway.metric("tarragon_gateway_attention_workers") == 0)
    # Nobody is left: still healthy, and requests wait.
    assert gateway.status("/health") == 200
    refusal = gateway.post("/v1/completions", prompt="x")
    assert refusal.status_code == 503
    assert "no attention worker became available within 1 s" in refusal.text
    stage.worker("aw-0", 40)
    answer = gateway.post("/v1/completions", prompt="x", max_tokens=3)
    assert answer.status_code == 200


def test_streams_outlive_the_orchestrator(gateway: Gateway) -> None:
    stage = gateway.stage
    hellos, readies = stage.count(Hello), stage.count(Ready)
    stream = gateway.openai.completions.create(model="tiny", prompt="x", max_tokens=150, stream=True)
    chunks = [next(stream)]
    old = stage.orchestrator
    assert old is not None

    async def hang_up() -> None:
        old.close()

    stage.run(hang_up())
    until(lambda: stage.count(Hello) == hellos + 1)
    until(lambda: stage.count(Ready) == readies + 1)  # a new orchestrator must learn that it serves
    chunks += stream  # its Welcome names no workers, and takes none away
    assert chunks[-1].choices[0].finish_reason == "length"


def test_it_stops_when_told(gateway: Gateway) -> None:
    """The last test of this module."""
    gateway.stage.workers["aw-0"].frozen = True
    outcome: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: outcome.append(gateway.post("/v1/completions", prompt="x", max_tokens=3))
    )
    thread.start()
    until(lambda: gateway.metric("tarragon_gateway_requests_live") == 1)
    gateway.stage.tell(Stop(reason="test"))
    assert gateway.process.wait(WAIT_S) == 0
    thread.join(WAIT_S)
    assert outcome[0].status_code == 503
    assert "shutting down" in outcome[0].text
