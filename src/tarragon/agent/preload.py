"""What the agent imports before it forks, and which module each role runs."""

from __future__ import annotations

import gc
import importlib
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Final

from tarragon.agent.process import thread_count

WORKER_MODULES: Final[Mapping[str, str]] = {
    "orchestrator": "tarragon.orchestrator.process",
    "attention": "tarragon.attention.worker",
    "expert": "tarragon.experts.worker",
    "gateway": "tarragon.gateway.process",
    "store": "tarragon.checkpoint.process",
}
PRELOAD_MODULES: Final[tuple[str, ...]] = (
    "torch",
    "vllm",
    "vllm.v1.engine.core",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.api_server.entry",
    # These the engine would import when it starts: more than half a second of every worker's start.
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.executor.uniproc_executor",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.compilation.backends",
    "vllm.v1.core.sched.scheduler",
    "vllm.model_executor.layers.quantization.online.base",
    "transformers.integrations.mistral.tokenizer",
    "compressed_tensors",
    "tarragon.attention.worker",
    "tarragon.experts.worker",
    "tarragon.gateway.process",
    "tarragon.checkpoint.process",
)


class PreloadError(RuntimeError):
    """A module that workers need cannot be imported; the text says which, and why."""


def import_all(names: Iterable[str]) -> None:
    """Import modules in the order given; raises PreloadError.

    No garbage is collected meanwhile: almost nothing that an import makes is any, and looking for it in
    five thousand modules costs a tenth of their CPU time or more.
    """
    gc.disable()
    try:
        for name in names:
            try:
                importlib.import_module(name)
            except Exception as error:
                raise PreloadError(f"cannot import {name}: {type(error).__name__}: {error}") from error
    finally:
        gc.enable()


def settle() -> int:
    """Make this process fit to be forked; return its threads, of which there must be one.

    What is alive now is in every worker and never garbage: collections there
    need not look at it, nor copy its pages.
    """
    # One of vLLM's modules looks at every attribute of torch, deprecated ones too.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if "vllm" in sys.modules:
        _replace_kernels()
    gc.collect()
    gc.freeze()
    return thread_count()


def _replace_kernels() -> None:
    """Put vLLM's CPU implementations in the place of Triton kernels, as its worker does when it starts.

    They are looked for at every name of every module: a quarter of a second here, and in no worker.
    """
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = lambda *_: None
