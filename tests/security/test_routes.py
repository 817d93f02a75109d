"""Every route of the installed vLLM's server is decided, and only those that are allowed are there."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Mount

from tarragon.boot import Boot
from tarragon.config import Config
from tarragon.gateway.route_table import DENIED, MOUNTS, SERVED, only_served
from tarragon.testing.checkpoints import make_checkpoint


@pytest.fixture(params=["0", "1"], ids=["as shipped", "developers' mode"])
def routes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", request.param)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm.entrypoints.launchers.app import build_app

    flags = importlib.import_module("tarragon.gateway.flags")
    boot = Boot(
        cluster="c",
        secret=bytes(32),
        worker_id="gateway",
        role="gateway",
        epoch=1,
        model=str(make_checkpoint("mixtral", tmp_path / "m")),
        config=Config(),
    )
    args, model = flags.serve_args(boot), flags.engine_config(boot).model_config
    found = list(build_app(args, ("generate",), model).router.routes)
    assert ("/reset_prefix_cache" in {route.path for route in found}) == (request.param == "1")
    return found


def test_every_route_is_decided(routes: list[Any]) -> None:
    assert not set(SERVED) & set(DENIED)
    paths = {route.path for route in routes}
    assert len(paths) > 20
    assert paths - set(SERVED) - set(DENIED) - MOUNTS == set(), "vLLM has routes that nobody has decided"
    assert set(SERVED) - paths == set(), "the table serves routes that vLLM no longer has"


def test_only_the_table_is_served(routes: list[Any]) -> None:
    kept = list(only_served(routes))
    for route in kept:
        if isinstance(route, Mount):
            assert route.path in MOUNTS
        else:
            assert set(route.methods) <= SERVED[route.path]
    for path, methods in SERVED.items():
        found = [route.methods for route in kept if route.path == path and not isinstance(route, Mount)]
        assert set().union(*found) == set(methods), path
    assert not {route.path for route in kept} & set(DENIED)


def test_a_route_with_one_method_too_many_is_not_served() -> None:
    from starlette.routing import Route

    async def end(request: Any) -> None: ...

    wide = Route("/v1/models", end, methods=["GET", "DELETE"])
    websocket = type("Socket", (), {"path": "/v1/realtime"})()
    assert list(only_served([wide, websocket, Mount("/static", routes=[]), Route("/new", end)])) == []
