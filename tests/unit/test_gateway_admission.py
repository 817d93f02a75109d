"""What a request must pass before the server sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import msgspec
import pytest
from pydantic import AliasChoices, BaseModel, Field

from tarragon.gateway.admission import Admission, known_parameters, model_names
from tarragon.gateway.limits import Limits


class Workers:
    def __init__(self, *, was_available: bool = True, available: bool = True) -> None:
        self.was_available = was_available
        self.available = asyncio.Event()
        if available:
            self.available.set()


class Server:
    """Stands for vLLM's server: notes the bodies that reach it and answers 200."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"] if scope["method"] == "POST" else b"")
        await send({"type": "http.response.start", "status": 200, "headers": []})


def admission(server: Server, workers: Workers, **changes: Any) -> Admission:
    settings: dict[str, Any] = {
        "parameters": {
            "/v1/completions": frozenset(
                [
                    "prompt",
                    "messages",
                    "n",
                    "temperature",
                    "stop",
                    "bad_words",
                    "logit_bias",
                    "stop_token_ids",
                    "response_format",
                    "structured_outputs",
                    "tools",
                ]
            ),
            "/tokenize": frozenset({"prompt"}),
        },
        "body_bytes_max": 1000,
        "body_timeout_s": 5.0,
        "limits": Limits(
            prompt_tokens=9,
            texts=8,
            prompts=4,
            stop_strings=3,
            stop_string_chars=10,
            token_lists=5,
            grammar_bytes=60,
            tools_bytes=80,
        ),
        "waiting_max": 1,
        "wait_s": 0.2,
    }
    return Admission(server, workers=workers, **(settings | changes))


async def ask(
    app: Admission, path: str, *chunks: bytes, method: str = "POST", headers: Any = ()
) -> tuple[int, Any]:
    """Return the status and the error of one request whose body comes in ``chunks``."""
    answer: list[MutableMapping[str, Any]] = []
    left = list(chunks) or [b""]

    async def receive() -> MutableMapping[str, Any]:
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message: MutableMapping[str, Any]) -> None:
        answer.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    await app(scope, receive, send)
    body = json.loads(answer[1]["body"])["error"] if len(answer) > 1 else None
    return answer[0]["status"], body


def test_a_good_request_reaches_the_server_unchanged() -> None:
    async def run() -> None:
        server = Server()
        app = admission(server, Workers())
        assert await ask(app, "/v1/completions", b'{"prompt"', b': "x"}') == (200, None)
        assert await ask(app, "/metrics", method="GET") == (200, None)
        assert server.bodies == [b'{"prompt": "x"}', b""]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "parameter", "message"),
    [
        (b'{"prompt": "x", "temprature": 1}', "temprature", "did you mean 'temperature'?"),
        (b'{"qqq": 1}', "qqq", "unknown parameter 'qqq'"),
        (b'{"' + b"z" * 500 + b'": 1}', "z" * 100, "unknown parameter"),
        (b'{"prompt": "x", "n": 9}', "n", "n must be at most 8, but is 9"),
        (b'{"prompt": ' + b"[" * 3000, None, "nested too deeply"),
        (b'{"prompt": ["a", "b", "c", "d", "e"]}', "prompt", "prompt must be at most 4, but are 5"),
        (b'{"prompt": [[1], [2], [3], [4], [5]]}', "prompt", "but are 5"),
        (b'{"messages": [[], [], [], [], []]}', "messages", "but are 5"),
        (b'{"prompt": [ 1,2,3,4,5,6,7,8,9,10]}', "prompt", "is 9 tokens, but prompt has 10"),
        (b'{"stop": ["a", "b", "c", "d"]}', "stop", "at most 3 entries, but has 4"),
        (b'{"stop": "0123456789a"}', "stop", "at most 10 characters, but has 11"),
        (b'{"bad_words": ["0123456789a"]}', "bad_words", "at most 10 characters"),
        (b'{"stop_token_ids": [1, 2, 3, 4, 5, 6]}', "stop_token_ids", "at most 5 entries, but has 6"),
        (b'{"logit_bias": {"1":1,"2":1,"3":1,"4":1,"5":1,"6":1}}', "logit_bias", "at most 5 entries"),
        (b'{"response_format": {"a": "' + b"x" * 60 + b'"}}', "response_format", "60 bytes of JSON, but has"),
        (b'{"structured_outputs": {"regex": "' + b"x" * 60 + b'"}}', "structured_outputs", "60 bytes"),
        (b'{"tools": ["' + b"x" * 90 + b'"]}', "tools", "80 bytes of JSON"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(body: bytes, parameter: str | None, message: str) -> None:
    async def run() -> None:
        server = Server()
        status, error = await ask(admission(server, Workers(), body_bytes_max=5000), "/v1/completions", body)
        assert (status, error["param"], error["code"]) == (400, parameter, 400)
        assert message in error["message"]
        assert server.bodies == []

    asyncio.run(run())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"n": "many"}',
        b'"x"',
        b'{"stop": 5, "bad_words": [7], "logit_bias": [], "prompt": {"a": 1}, "messages": null}',
        b'{"prompt": [1, 2, 3, 4, 5, 6, 7], "messages": [{}, {}, {}, {}, {}], "stop": ["a", "b"]}',
    ],
)
def test_malformed_bodies_are_left_to_the_server(body: bytes) -> None:
    async def run() -> None:
        server = Server()
        assert await ask(admission(server, Workers()), "/v1/completions", body) == (200, None)
        assert server.bodies == [body]

    asyncio.run(run())


def test_long_bodies_are_refused_before_they_are_read() -> None:
    async def run() -> None:
        server = Server()
        app = admission(server, Workers())
        status, error = await ask(app, "/v1/completions", headers=[(b"content-length", b"1001")])
        assert (status, error["message"]) == (413, "the body is longer than 1000 bytes")
        # Without an announced length, at the first byte too many.
        status, _ = await ask(app, "/unknown", *[b"x" * 400] * 100)
        assert status == 413
        assert server.bodies == []

    asyncio.run(run())


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def run() -> None:
        server, sent = Server(), []
        app = admission(server, Workers(), body_timeout_s=0.05)

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        async def receive() -> MutableMapping[str, Any]:
            await asyncio.Event().wait()
            return {}

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await asyncio.wait_for(app(scope, receive, send), 5.0)
        assert sent[0]["status"] == 408
        assert server.bodies == []

    asyncio.run(run())


def test_everything_but_generation_is_served_while_starting() -> None:
    async def run() -> None:
        server = Server()
        app = admission(server, Workers(was_available=False, available=False))
        for path, method in (("/health", "GET"), ("/ping", "GET"), ("/v1/completions", "POST")):
            status, error = await ask(app, path, b"{}", method=method)
            assert (status, error["code"]) == (503, 503)
            assert error["message"] == "still starting: no attention worker is ready yet"
        assert (await ask(app, "/v1/models", method="GET"))[0] == 200
        assert (await ask(app, "/tokenize", b'{"prompt": "x"}'))[0] == 200

    asyncio.run(run())


def test_requests_wait_for_a_lost_worker_to_come_back() -> None:
    async def run() -> None:
        server, workers = Server(), Workers(available=False)
        app = admission(server, workers, wait_s=5.0)
        assert (await ask(app, "/health", method="GET"))[0] == 200
        waiting = asyncio.create_task(ask(app, "/v1/completions", b"{}"))
        await asyncio.sleep(0)
        status, error = await ask(app, "/v1/completions", b"{}")
        assert status == 503
        assert "too many requests wait" in error["message"]
        workers.available.set()
        assert (await asyncio.wait_for(waiting, 2.0))[0] == 200
        assert len(server.bodies) == 2  # the health check and the one that waited

    asyncio.run(run())


def test_the_wait_is_bounded_and_frees_its_place() -> None:
    async def run() -> None:
        app = admission(Server(), Workers(available=False))
        for _ in range(2):
            status, error = await asyncio.wait_for(ask(app, "/v1/completions", b"{}"), 2.0)
            assert status == 503
            assert error["message"] == "no attention worker became available within 0.2 s"

    asyncio.run(run())


class Inner(BaseModel):
    plain: int = 0
    renamed: int = Field(0, alias="other")
    choice: int = Field(0, validation_alias=AliasChoices("first", "second"))


class Second(BaseModel):
    more: int = 0


def test_names_of_models_unions_and_aliases_are_known() -> None:
    names = {"plain", "renamed", "other", "choice", "first", "second"}
    assert model_names(Inner) == names
    assert model_names(Inner | Second) == names | {"more"}
    assert model_names(dict[str, int]) == set()


def test_known_parameters_are_read_off_the_routes_of_vllm() -> None:
    from vllm.entrypoints.openai.chat_completion.api_router import router as chat
    from vllm.entrypoints.openai.completion.api_router import router as completion
    from vllm.entrypoints.serve.tokenize.api_router import router as tokenize

    known = known_parameters([*chat.routes, *completion.routes, *tokenize.routes])
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"} <= set(known)
    assert {"prompt", "max_tokens", "ignore_eos", "seed", "stream_options"} <= known["/v1/completions"]
    assert {"messages", "response_format", "tools", "top_k"} <= known["/v1/chat/completions"]
    assert {"prompt", "messages"} <= known["/tokenize"]
    assert all(msgspec.json.encode(name) for names in known.values() for name in names)
