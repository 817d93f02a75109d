"""What would `tarragon serve` do? The placement and the memory of every worker, with nothing started."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tarragon.agent import preflight
from tarragon.config import Config
from tarragon.messages import Role
from tarragon.models.shape import MoeModel
from tarragon.orchestrator.planning import ExpertShape, Planner
from tarragon.routing.placement import Placement


class WorkerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker will hold. Everything in bytes but ``threads`` and the numbers of experts."""

    id: str
    role: Role
    threads: int
    primaries: int = 0
    shadows: int = 0
    weights_bytes: int = 0
    """Attention workers: everything but the experts. Expert workers: their primaries."""
    shadow_bytes: int = 0
    kv_cache_bytes: int = 0
    checkpoint_bytes: int = 0
    """The worker's bucket in the checkpoint store's memory."""
    overhead_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        kept = self.weights_bytes + self.shadow_bytes + self.kv_cache_bytes + self.checkpoint_bytes
        return kept + self.overhead_bytes


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster that is not started."""

    model: MoeModel
    workers: list[WorkerPlan]
    placement: Placement
    available_bytes: int
    """Memory of this host that can be used without swapping."""
    refusal: str
    """Why it cannot run here, and what would fit; "" if it can."""

    @property
    def needed_bytes(self) -> int:
        return sum(worker.total_bytes for worker in self.workers)


def plan(config: Config, model: MoeModel, available_bytes: int, cores: int) -> Plan:
    """Decide as `tarragon serve` does. Raises PlacementError if the experts do not fit on their workers."""
    shape = ExpertShape(len(model.moe_layers), model.experts, model.expert_bytes)
    placement = Planner(config, shape).first()
    experts_bytes = model.experts_total * model.expert_bytes
    other_bytes = model.weight_bytes - experts_bytes
    try:
        preflight.check_memory(config, other_bytes, experts_bytes, available_bytes)
        refusal = ""
    except preflight.PreflightError as error:
        refusal = str(error)
    attention = [
        WorkerPlan(
            id=f"aw-{index}",
            role="attention",
            threads=config.threads("attention", cores),
            weights_bytes=other_bytes,
            kv_cache_bytes=config.kv_cache_bytes_granted,
            checkpoint_bytes=config.kv_cache_bytes_granted if config.checkpoint_mode == "segments" else 0,
            overhead_bytes=config.worker_overhead_bytes,
        )
        for index in range(config.attention_workers)
    ]
    expert = [_expert_worker(config, model, placement, name, cores) for name in placement.workers]
    return Plan(
        model=model,
        workers=attention + expert,
        placement=placement,
        available_bytes=available_bytes,
        refusal=refusal,
    )


def _expert_worker(
    config: Config, model: MoeModel, placement: Placement, worker_id: str, cores: int
) -> WorkerPlan:
    held = [
        placement.holder_ids(expert.layer, expert.expert)[0] == worker_id
        for expert in placement.assigned(worker_id)
    ]  # True for a primary
    return WorkerPlan(
        id=worker_id,
        role="expert",
        threads=config.threads("expert", cores),
        primaries=sum(held),
        shadows=len(held) - sum(held),
        weights_bytes=sum(held) * model.expert_bytes,
        shadow_bytes=0 if config.share_expert_memory else (len(held) - sum(held)) * model.expert_bytes,
        overhead_bytes=config.worker_overhead_bytes,
    )


# ------------------------------------------------------------------ as JSON


def as_json(found: Plan) -> dict[str, Any]:
    """The contract of `tarragon serve MODEL --dry-run --json`."""
    placement = found.placement
    holders = [
        [list(placement.holder_ids(layer, e)) for e in range(found.model.experts)] for layer in _layers(found)
    ]
    return {
        "fits": not found.refusal,
        "reason": found.refusal,
        "memory_needed_bytes": found.needed_bytes,
        "memory_available_bytes": found.available_bytes,
        "model": msgspec.to_builtins(found.model),
        "workers": [
            {**msgspec.to_builtins(worker), "total_bytes": worker.total_bytes} for worker in found.workers
        ],
        "experts": {
            "total": found.model.experts_total,
            "with_shadow": sum(len(ids) > 1 for row in holders for ids in row),
        },
        "placement": holders,
    }


def _layers(found: Plan) -> range:
    return range(len(found.model.moe_layers))


# ------------------------------------------------------------------ for people


def show(found: Plan, console: Console) -> None:
    """Print the placement and the memory of each worker."""
    model = found.model
    console.print(
        f"{model.path}: {model.architecture}, {model.layers} layers, {len(model.moe_layers)} of them with "
        f"{model.experts} experts (top {model.top_k}) of {_mb(model.expert_bytes)} MB each",
        highlight=False,
        soft_wrap=True,
    )
    console.print(placement_table(found))
    console.print(memory_table(found))
    console.print(
        f"{_mb(found.needed_bytes)} MB are needed, {_mb(found.available_bytes)} MB are available",
        highlight=False,
    )


def placement_table(found: Plan) -> Table:
    """One row per MoE layer: which experts each worker is the primary of, and in brackets its shadows."""
    table = Table(box=SIMPLE, title="experts: primaries (shadows)", title_justify="left")
    table.add_column("layer", justify="right")
    for worker_id in found.placement.workers:
        table.add_column(worker_id)
    for layer, model_layer in enumerate(found.model.moe_layers):
        table.add_row(str(model_layer), *(_cell(found, layer, name) for name in found.placement.workers))
    return table


def memory_table(found: Plan) -> Table:
    """One row per worker, in MB."""
    table = Table(
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
        title="memory of each worker, in MB",
        title_justify="left",
    )
    table.add_column("worker")
    for title in ("threads", "weights", "shadows", "KV cache", "checkpoints", "overhead", "total"):
        table.add_column(title, justify="right", no_wrap=True)
    for worker in found.workers:
        parts = (
            worker.weights_bytes,
            worker.shadow_bytes,
            worker.kv_cache_bytes,
            worker.checkpoint_bytes,
            worker.overhead_bytes,
            worker.total_bytes,
        )
        table.add_row(worker.id, str(worker.threads), *(_mb(part) if part else "" for part in parts))
    return table


def _cell(found: Plan, layer: int, worker_id: str) -> str:
    holders = [found.placement.holder_ids(layer, expert) for expert in range(found.model.experts)]
    primaries = ranges(expert for expert, ids in enumerate(holders) if ids[0] == worker_id)
    shadows = ranges(expert for expert, ids in enumerate(holders) if worker_id in ids[1:])
    return f"{primaries} ({shadows})" if shadows else primaries


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: 0-3,5."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _mb(count_bytes: int) -> str:
    return f"{count_bytes / 1e6:,.1f}"
