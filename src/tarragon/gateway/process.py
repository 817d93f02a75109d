"""The gateway's process: vLLM's OpenAI server in front, attention workers behind, the orchestrator beside."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
import uvloop
from starlette.middleware import Middleware
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.loggers import StatLoggerManager

from tarragon import tracing
from tarragon.boot import Boot
from tarragon.config import SERVER_STARTED_POLL_S
from tarragon.gateway import flags, grammar_standby, wire
from tarragon.gateway.admission import Admission, known_parameters
from tarragon.gateway.authentication import guarded
from tarragon.gateway.client import Client, RequestFailed
from tarragon.gateway.control import Control
from tarragon.gateway.grammar_trials import GrammarTrials
from tarragon.gateway.grammar_zygote import vllm_compiler
from tarragon.gateway.limits import Limits
from tarragon.gateway.metrics import GatewayCollector
from tarragon.gateway.route_table import only_served
from tarragon.security import exposure
from tarragon.security.keys import api_keys

TASKS: Final = ("generate",)


def main(boot: Boot) -> None:
    """Serve until told to stop. Raises FlagError, ModelRefused or OSError if it cannot start."""
    torch.set_num_threads(1)  # the cores belong to the workers
    exposure.check(boot.config, boot.engine_args)
    args = flags.serve_args(boot)
    vllm_config = flags.engine_config(boot)
    helpers = grammar_standby.fork(boot.config, lambda: vllm_compiler(vllm_config))
    listen_address, sock = setup_server(args, reuse_port=False)
    try:
        uvloop.run(serve(boot, args, vllm_config, listen_address, sock, helpers))
    finally:
        sock.close()
        helpers.close()


async def serve(
    boot: Boot, args: Namespace, vllm_config: Any, listen_address: str, sock: Any, helpers: socket.socket
) -> None:
    """Build the server and run it; accepts connections before any attention worker is ready."""
    client = Client(boot, vllm_config.model_config.max_model_len)
    engine = build_engine(vllm_config, args, client)
    engine.trials = GrammarTrials(helpers, boot.config.grammar_helper_silence_s)
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(QuietFailures())
    app = build_app(args, TASKS, vllm_config.model_config)
    app.router.routes[:] = only_served(app.router.routes)
    # Appended, not added: the innermost middleware runs after authentication.
    keys = (*api_keys(boot.config), *(args.api_key or ()), os.environ.get(exposure.VLLM_API_KEY, ""))
    app.user_middleware[:] = [
        *guarded(app.user_middleware, [key for key in keys if key], args.allowed_origins),
        admission(boot, client, app),
    ]
    app.middleware_stack = None  # to be built anew with the first request
    await init_app_state(engine, app.state, args, TASKS)
    control = Control(boot, listen_address, client, on_stop=stop)
    running = asyncio.get_running_loop().create_task(control.run(started(app)))
    try:
        shutdown = await serve_http(app, sock=sock, **server_settings(args))
        engine.shutdown()
        await shutdown
    finally:
        running.cancel()
        tracing.close()


class Engine(AsyncLLM):  # type: ignore[misc]
    """vLLM's front end, which sees no grammar that was not tried before."""

    trials: GrammarTrials

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        await self.trials.check(params)
        return await super().add_request(request_id, prompt, params, *args, **kwargs)


def build_engine(vllm_config: Any, args: Namespace, client: Client) -> Engine:
    """Return vLLM's asynchronous front end over ``client``; there is no engine in this process."""
    EngineCoreClient.make_async_mp_client = staticmethod(lambda *_args, **_kwargs: client)
    describe = StatLoggerManager.log_engine_initialized
    # vLLM describes its KV cache in the metrics at once; ours is known with the first worker.
    StatLoggerManager.log_engine_initialized = lambda _self: None
    engine: Engine = Engine.from_vllm_config(
        vllm_config=vllm_config,
        enable_log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        disable_log_stats=args.disable_log_stats,
    )

    def describe_cache(facts: wire.Facts) -> None:
        cache = vllm_config.cache_config
        cache.num_gpu_blocks, cache.block_size = facts.num_gpu_blocks, facts.block_size
        cache.kv_cache_size_tokens = facts.kv_cache_size_tokens
        cache.kv_cache_max_concurrency = facts.kv_cache_max_concurrency
        if engine.logger_manager is not None:
            describe(engine.logger_manager)

    client.on_first_facts = describe_cache
    client.on_failed = fail_in(engine.output_processor)
    return engine


def fail_in(output_processor: Any) -> Callable[[str, RequestFailed], Iterable[str]]:
    """Return a function that ends a request in vLLM's front end with an error of its own."""

    def fail(request_id: str, error: RequestFailed) -> Iterable[str]:
        state = output_processor.request_states.get(request_id)
        if state is None:
            return ()
        queue = state.queue
        whole = request_id if state.parent_req is None else state.parent_req.request_id
        ended: list[str] = output_processor.abort_requests([whole], internal=True)
        queue.put(error)  # takes the place of the "aborted" that was just put
        return ended

    return fail


def admission(boot: Boot, client: Client, app: Any) -> Middleware:
    config = boot.config
    GatewayCollector(client).register()
    return Middleware(
        Admission,
        workers=client,
        parameters=known_parameters(app.routes),
        body_bytes_max=config.http_body_bytes_max,
        body_timeout_s=config.http_body_timeout_s,
        limits=Limits.of(config, client.max_model_len),
        waiting_max=config.request_queue_max,
        wait_s=config.attention_unavailable_timeout_s,
    )


def server_settings(args: Namespace) -> dict[str, Any]:
    """Return the settings of the HTTP server, as vLLM derives them from its arguments."""
    import vllm.envs as envs
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

    names = (
        "host port ssl_keyfile ssl_certfile ssl_ca_certs ssl_cert_reqs ssl_ciphers enable_ssl_refresh "
        "h11_max_incomplete_event_size h11_max_header_count"
    )
    settings = {name: getattr(args, name) for name in names.split()}
    log_config = get_uvicorn_log_config(args)
    if log_config is not None:
        settings["log_config"] = log_config
    return settings | {
        "log_level": args.uvicorn_log_level,
        "access_log": not args.disable_uvicorn_access_log,
        "timeout_keep_alive": envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
    }


async def started(app: Any) -> None:
    """Return once the server accepts connections."""
    while not (hasattr(app.state, "server") and app.state.server.started):  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(SERVER_STARTED_POLL_S)


class QuietFailures(logging.Filter):
    """Says in one line what vLLM logs with a traceback: a request that the gateway ended on purpose."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, RequestFailed):
            record.msg, record.args, record.exc_info = f"A stream ended: {error}", (), None
        return True


def stop(why: str) -> None:
    """Let vLLM's server shut down as it does on SIGTERM."""
    print(f"gateway: {why}", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
