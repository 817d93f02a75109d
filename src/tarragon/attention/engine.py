"""vLLM's engine core inside this process, with the experts elsewhere."""

from __future__ import annotations

import os
from typing import Any

import torch

from tarragon import native
from tarragon.attention import capture, exact, grammars, latent, remote_experts, runner, tiles
from tarragon.models.expert_weights import expert_stems
from tarragon.models.shape import MoeModel
from tarragon.refe.engine import Refe


def prepare(refe: Refe, model: MoeModel, threads: int) -> None:
    """Put Tarragon's parts into vLLM's seams. Once per process, before the engine is built."""
    torch.set_num_threads(threads)
    native.load()
    exact.install()
    tiles.install()
    latent.install()
    capture.install()
    runner.install()
    grammars.install()
    remote_experts.register(refe, model.moe_layers)
    _skip_expert_weights(model)
    _form_no_groups()


def compile_nothing() -> None:
    """Have functions run as they are that vLLM wants compiled even in eager mode.

    The first request for log-probs would stop a worker for seconds, and every worker that goes on with it
    after a failure once more; cold and on busy cores it took 26 s, which looks like a hang.
    """
    torch.compiler.set_stance("force_eager")


def build_engine(vllm_config: Any, moe_layers: tuple[int, ...]) -> Any:
    """Build vLLM's EngineCore (scheduler, paged KV cache, model) in this process.

    Raises ExpertsStayed, and whatever vLLM raises for a model or flags that it cannot serve.
    """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    class Alone(UniProcExecutor):
        """Meets nobody: its rendezvous is in memory, where vLLM's is a file that a killed process leaves."""

        def _distributed_args(self) -> tuple[str, int, int]:
            _, rank, local_rank = super()._distributed_args()
            return f"file:///proc/self/fd/{os.memfd_create('tarragon-rendezvous')}", rank, local_rank

    engine = EngineCore(vllm_config, Alone, log_stats=True)
    remote_experts.check_all_remote(model_runner(engine).model, moe_layers)
    return engine


def model_runner(engine: Any) -> Any:
    """The runner of the engine's only worker, which is in this process."""
    return engine.model_executor.driver_worker.worker.model_runner


def fingerprint(model: MoeModel) -> str:
    """What must be equal for two workers to give the same bits (exactness)."""
    from vllm.version import __version__ as vllm_version

    isa = "amx" if torch.cpu._is_amx_tile_supported() else torch.backends.cpu.get_cpu_capability()
    return f"vllm {vllm_version}, torch {torch.__version__}, {isa}, {native.instruction_set()}, {model.dtype}"


def _form_no_groups() -> None:
    """Let the world, which is this process alone, stand for every group that vLLM forms in it.

    It forms sixteen, and gloo has a thread for each that wakes a hundred times a second (epoll, 10 ms):
    with two workers 3,200 times, and each time a thread that computes may lose its core.
    """
    torch.distributed.new_group = lambda *_args, **_kwargs: torch.distributed.group.WORLD


def _skip_expert_weights(model: MoeModel) -> None:
    """Make vLLM's loader pass over every tensor of routed experts before it reads it: none is local."""
    from vllm.model_executor.model_loader import weight_utils

    stems = expert_stems(model)
    weight_utils.should_skip_weight = lambda name, local_expert_ids: name.startswith(stems)
