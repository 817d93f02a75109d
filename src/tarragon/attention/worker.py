"""The attention worker's process: take requests from the gateway, step the engine, return tokens."""

from __future__ import annotations

import select
import sys
from typing import Any, cast

import torch
from vllm.v1.engine import EngineCoreOutputs

from tarragon.attention.checkpoints import Checkpoints
from tarragon.attention.control import ControlThread
from tarragon.attention.engine import build_engine, compile_nothing, fingerprint, model_runner, prepare
from tarragon.attention.exact import inexact_reason
from tarragon.attention.failpoints import Failpoints
from tarragon.attention.requests import Requests
from tarragon.attention.runner import AttentionModelRunner
from tarragon.attention.times import TIMES
from tarragon.attention.unreachable import fail_step
from tarragon.boot import Boot
from tarragon.checkpoint.writer import Fenced
from tarragon.config import GRAMMAR_POLL_MS, ROWS_WAIT_S
from tarragon.models.shape import MoeModel, read_model
from tarragon.native.undertaker import spawn_undertaker
from tarragon.refe.engine import ExpertUnreachable, Refe
from tarragon.refe.traffic import TrafficRing
from tarragon.transport.region import DType, RegionShape


def main(boot: Boot) -> None:
    """Run one attention worker until it is told to stop. The process ends with it."""
    from tarragon.gateway.flags import engine_config

    spawn_undertaker()
    model = read_model(boot.model)
    vllm_config = engine_config(boot, model.dtype)
    if vllm_config.model_config.use_mla:
        # The engine's own rotary kernel is wrong for the three-dimensional queries of latent attention
        # (log-probs off by up to 0.5 against transformers); its plain torch form is right.
        vllm_config.compilation_config.custom_ops.append("-rotary_embedding")
    tokens_max = vllm_config.scheduler_config.max_num_batched_tokens
    control, refe = _connect(boot, model, tokens_max)
    if vllm_config.model_config.enforce_eager:
        compile_nothing()
    # Latent attention adds up in an order that depends on the number of threads.
    prepare(refe, model, 1 if vllm_config.model_config.use_mla else boot.threads)
    control.start()
    engine = build_engine(vllm_config, model.moe_layers)
    engine.structured_output_manager.warm_up()
    attempts: dict[str, int] = {}
    checkpoints = Checkpoints(
        engine, model_runner(engine), boot, f"{fingerprint(model)}, {model.path}", attempts
    )
    AttentionModelRunner.checkpoints = checkpoints
    refe.on_gap = checkpoints.writer.use_gap
    refe.on_unreachable = checkpoints.writer.check_seal
    refe.on_abandoned = checkpoints.writer.flush
    checkpoints.writer.traffic = refe.traffic
    control.counters = checkpoints.counters
    control.on_mode = checkpoints.ask_mode
    # Requests may wait for this worker whose rows only the store can show to it.
    checkpoints.wait_for_store(boot.config.store_wait_s, boot.config.store_room_wait_s)
    control.ready(fingerprint(model), inexact_reason(vllm_config.model_config))
    requests = Requests(engine, control, vllm_config, checkpoints.resumer, attempts)
    control.on_failpoint = Failpoints(refe, checkpoints, requests).arm
    serve(engine, refe, control, requests, checkpoints)
    control.stopping.set()


def _connect(boot: Boot, model: MoeModel, tokens_max: int) -> tuple[ControlThread, Refe]:
    pairs_max = tokens_max * model.top_k
    refe = Refe(
        layers=len(model.moe_layers),
        experts=model.experts,
        top_k=model.top_k,
        pairs_max=pairs_max,
        epoch=boot.epoch,
        config=boot.config,
        on_lost=lambda peer, cause: control.lost(peer, cause),
        on_table=lambda version: control.acknowledge(version),
    )
    if boot.config.traffic_events_max:
        element_bytes = getattr(torch, model.dtype).itemsize
        refe.traffic = TrafficRing(boot.config.traffic_events_max, model.hidden * element_bytes)
    region = RegionShape(dtype=cast("DType", model.dtype), hidden=model.hidden, pairs_max=pairs_max)
    control = ControlThread(boot, refe, region)
    return control, refe


def serve(
    engine: Any, refe: Refe, control: ControlThread, requests: Requests, checkpoints: Checkpoints
) -> None:
    """The loop: drain the mailboxes, run one step, send what it produced."""
    poll = select.poll()
    for fd in (refe.fileno(), control.wake_fd):
        poll.register(fd, select.POLLIN)
    try:
        while not control.stopping.is_set():
            if not engine.scheduler.has_requests():
                _wait_for_requests(refe, requests, checkpoints, poll)
            with TIMES.taken("intake_s"):
                requests.take_up()
            checkpoints.resumer.poll()
            checkpoints.prepare()
            if engine.scheduler.has_requests():
                with TIMES.taken("step_s"):
                    outputs = _step(engine, refe, checkpoints)
                with TIMES.taken("deliver_s"):
                    requests.deliver(outputs)
                TIMES.end_step(refe.counters.as_dict())
    except Fenced as error:
        print(f"attention worker: fenced, {error}", file=sys.stderr)
        return
    print("attention worker: told to stop", file=sys.stderr)


def _wait_for_requests(refe: Refe, requests: Requests, checkpoints: Checkpoints, poll: select.poll) -> None:
    """Nothing runs: nobody shall wait for this worker, and it waits until it is told something."""
    refe.end_step()
    refe.beat()  # waiting for a grammar is no hang
    poll.poll(0 if requests.deferred else GRAMMAR_POLL_MS if checkpoints.resumer.waiting else None)
    refe.woken()


def _step(engine: Any, refe: Refe, checkpoints: Checkpoints) -> dict[int, EngineCoreOutputs]:
    """One step of the engine; returns what to send. Raises Fenced."""
    try:
        outputs: dict[int, EngineCoreOutputs]
        outputs, executed = engine.step()
        engine.post_step(executed)
    except ExpertUnreachable as error:
        return fail_step(engine, error)
    if not executed:
        refe.beat()  # nor is waiting for restored rows
        checkpoints.seat.wait_for_rows(ROWS_WAIT_S)
    return outputs
