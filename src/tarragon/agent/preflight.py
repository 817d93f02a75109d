"""What can be known to go wrong before any process is started: ports, memory, sizes, the tokenizer."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from tarragon.config import Config
from tarragon.experts.memory import HostMemory
from tarragon.gateway.flag_table import APPLIES
from tarragon.models.shape import MoeModel

KV_CACHE_BYTES_USEFUL: Final = 64 << 20
"""A smaller cache is not worth proposing."""
KERNEL_TILE: Final = 32
"""vLLM's expert kernels take sizes that are multiples of this; others fail on the worker (see the test)."""
_TOKENIZER_FLAGS: Final = ("--tokenizer", "--skip-tokenizer-init")
_VOCABULARIES: Final = ("tokenizer.json", "*.model", "*.model.v*", "tekken*.json", "vocab.*", "*.tiktoken")
"""Files in which tokenizers of the Hugging Face and Mistral forms keep their tokens; one is enough."""
_PASSING: Final = APPLIES - {"dtype"}
"""vLLM's settings that pass whatever their value; of the types of weights only one passes."""


class PreflightError(ValueError):
    """This host cannot run the cluster that was asked for; the text is one sentence."""


def check_ports(config: Config) -> None:
    """Raise PreflightError unless both TCP ports can be bound."""
    if config.port == config.admin_port:
        raise PreflightError(f"port and admin_port must differ, but both are {config.port}")
    for host, port, flag in (
        (config.host, config.port, "--port"),
        (config.admin_host, config.admin_port, "--admin-port"),
    ):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PreflightError(f"port {port} of {host} is taken: choose another with {flag}") from error
            raise PreflightError(f"cannot listen at {host}:{port}: {error.strerror}") from error


def certainly_pass(engine_args: Sequence[str]) -> bool:
    """Whether all flags of vLLM are written as ones that Tarragon passes on; vLLM judges their values.

    False says nothing: short names, ``--no-...``, harmless values of refused flags and unknown flags are for
    vLLM's own parser, whose import takes seconds.
    """
    flags = [argument for argument in engine_args if argument.startswith("-") and not argument[1:2].isdigit()]
    names = [flag.partition("=")[0].partition(".")[0] for flag in flags]
    return engine_args[:1] == flags[:1] and all(
        name.startswith("--") and name[2:].replace("-", "_") in _PASSING for name in names
    )


def check_tokenizer(folder: Path, engine_args: Sequence[str]) -> None:
    """Raise PreflightError if the checkpoint lacks a tokenizer and no vLLM flag says where another one is.

    A ``tokenizer_config.json`` alone is none: it names a class, but no tokens.
    """
    given = {argument.partition("=")[0].replace("_", "-") for argument in engine_args}
    if given.isdisjoint(_TOKENIZER_FLAGS) and not any(any(folder.glob(name)) for name in _VOCABULARIES):
        raise PreflightError(
            f"{folder} has no tokenizer (such as tokenizer.json): copy the model's own into it, "
            "or say with --tokenizer where one is"
        )


def check_sizes(model: MoeModel) -> None:
    """Raise PreflightError unless the expert kernel can compute with the sizes of ``model``."""
    for size, name in ((model.hidden, "hidden"), (model.intermediate, "intermediate")):
        if size % KERNEL_TILE:
            raise PreflightError(
                f"{model.path}: the {name} size of experts must be a multiple of {KERNEL_TILE} for the "
                f"engine's kernel, but is {size}"
            )


def memory_needed_bytes(config: Config, attention_bytes: int, expert_bytes: int) -> int:
    """Bytes that the cluster will use.

    ``attention_bytes`` are one attention worker's weights, ``expert_bytes``
    all experts once.
    """
    experts = expert_bytes * copies_of_experts(config)
    if config.expert_memory_bytes_max:
        experts = min(experts, config.expert_memory_bytes_max * config.expert_workers)
    workers = config.attention_workers + config.expert_workers
    per_attention = attention_bytes + _copies_of_cache(config) * config.kv_cache_bytes_granted
    return experts + config.attention_workers * per_attention + workers * config.worker_overhead_bytes


def copies_of_experts(config: Config) -> int:
    """How often each expert is in memory: once if it is shared, else with its shadows.

    Those lie on other workers than their primaries: at most as many copies as expert workers (5.3).
    """
    return 1 if config.share_expert_memory else 1 + min(config.shadow_replicas, config.expert_workers - 1)


def expert_memory(config: Config, model: MoeModel) -> HostMemory | None:
    """Memory for the experts of all expert workers, if they share it. Raises PreflightError."""
    if not config.share_expert_memory:
        return None
    try:
        return HostMemory(model)
    except OSError as error:
        raise PreflightError(
            f"the system does not grant {_gb(model.experts_total * model.expert_bytes)} of shared memory for "
            f"the experts ({error.strerror}): --no-share-expert-memory does without"
        ) from error


def memory_available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be used without swapping: the kernel's estimate, or less where a cgroup says so."""
    values = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) << 10
    available = values["MemAvailable"]
    group = root / "sys/fs/cgroup"
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available
    used -= int(stat.get("inactive_file", 0))  # the kernel drops these pages before it refuses any
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def check_memory(config: Config, attention_bytes: int, expert_bytes: int, available_bytes: int) -> None:
    """Raise PreflightError if the cluster does not fit into ``available_bytes``."""
    needed = memory_needed_bytes(config, attention_bytes, expert_bytes)
    if needed > available_bytes:
        fitting = what_fits(config, attention_bytes, expert_bytes, available_bytes)
        copies = copies_of_experts(config)
        raise PreflightError(
            f"{_gb(needed)} of memory are needed ({_gb(expert_bytes)} of experts x {copies}, and "
            f"{config.attention_workers} x ({_gb(attention_bytes)} of other weights + "
            f"{_gb(config.kv_cache_bytes_granted)} of KV cache, as much for its checkpoints)), "
            f"but {_gb(available_bytes)} are available: {fitting}"
        )


def what_fits(config: Config, attention_bytes: int, expert_bytes: int, available_bytes: int) -> str:
    """The smallest change with which the cluster fits: a smaller cache, then fewer shadows, then workers."""
    for replicas in range(min(config.shadow_replicas, config.expert_workers - 1), -1, -1):
        less = replace(config, shadow_replicas=replicas, kv_cache_bytes=0, checkpoint_bytes_max=0)
        room = available_bytes - memory_needed_bytes(less, attention_bytes, expert_bytes)
        cache = room // (config.attention_workers * _copies_of_cache(config))
        if cache >= min(config.kv_cache_bytes, KV_CACHE_BYTES_USEFUL):
            shadows = "" if replicas >= config.shadow_replicas else f" with --shadow-replicas {replicas}"
            return f"--kv-cache-bytes {min(cache, config.kv_cache_bytes)} would fit{shadows}"
    least = replace(config, attention_workers=1, expert_workers=1, kv_cache_bytes=KV_CACHE_BYTES_USEFUL)
    return (
        f"even one attention and one expert worker with {_gb(KV_CACHE_BYTES_USEFUL)} of KV cache need "
        f"{_gb(memory_needed_bytes(least, attention_bytes, expert_bytes))}"
        if memory_needed_bytes(least, attention_bytes, expert_bytes) > available_bytes
        else f"--attention-workers 1 --expert-workers 1 --kv-cache-bytes {KV_CACHE_BYTES_USEFUL} would fit"
    )


def _copies_of_cache(config: Config) -> int:
    """The cache, and its checkpoints."""
    return 2 if config.checkpoint_mode == "segments" else 1


def _gb(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.1f} GB"
