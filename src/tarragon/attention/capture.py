"""Where does the engine write its KV cache? There its rows are taken, and there they are put back (6.1, 6.2).

The cache's own layout depends on the kernels; a copy out of it and back is not exact. So the raw K,V rows
that the attention backend is given are kept, and restoring gives the same rows to the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, NamedTuple

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from tarragon.checkpoint.bucket import BucketShape
from tarragon.checkpoint.restore import RowKind
from tarragon.checkpoint.writer import Checkpointer, Noted

Update = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
_plain_latent_update: Final = CPUMLAImpl.do_kv_cache_update


class CachedLayer(NamedTuple):
    """One layer that writes a KV cache."""

    kind: RowKind
    impl: Any
    """The engine's attention of this layer."""
    update: Update
    """Writes key [T, ...] and value [T, ...] into the slots [T] of the engine's cache, as the engine does."""


class Capture:
    """The process's seam between the engine's attention layers and its checkpointer."""

    noted: ClassVar[Noted | None] = None
    """Takes the rows of the step under way; None if they are not wanted."""
    at_once: ClassVar[Callable[[], None] | None] = None
    """Called after each note where the rows' memory is used again within the step (a compiled engine)."""


def _note(place: int | None, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """The engine wrote these rows of its ``place``-th cached layer; runs once a layer, with cold caches."""
    noted = Capture.noted
    if noted is None or place is None:
        return
    noted.places.append(place)
    noted.tensors += key, value, slots
    if Capture.at_once is not None:
        Capture.at_once()


class CapturingImpl(CPUAttentionBackendImpl):
    """vLLM's attention for CPUs, whose cache updates are noted."""

    place: int | None = None
    """Position among the layers that have a cache of their own."""

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        _note(self.place, key, value, slot_mapping)


def install() -> None:
    """Note the updates of latent (MLA) caches as well (once per process)."""

    def update(
        self: Any,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        _plain_latent_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)
        _note(self.place, kv_c_normed, k_pe, slot_mapping.flatten())

    CPUMLAImpl.place = None
    CPUMLAImpl.do_kv_cache_update = update


def cached_layers(runner: Any) -> list[CachedLayer]:
    """The layers of vLLM's model runner that write a KV cache, in the order in which they run.

    Returns nothing for a model that keeps state of another kind as well (Mamba and its like): part of a
    request's state is of no use.
    """
    layers: list[CachedLayer] = []
    groups = {
        name: group
        for group, spec in enumerate(runner.kv_cache_config.kv_cache_groups)
        for name in spec.layer_names
    }
    for name, module in runner.compilation_config.static_forward_context.items():
        if name not in groups:
            continue
        layer = _cached_layer(module, groups[name], runner.dtype)
        if layer is None:
            return []
        if getattr(module.impl, "kv_sharing_target_layer_name", None) is None:
            layers.append(layer)
    return layers


def watch(runner: Any, checkpointer: Checkpointer) -> list[CachedLayer]:
    """Have the rows of all cached layers noted from now on; their order is the layers' order in a bucket."""
    layers = cached_layers(runner)
    for place, layer in enumerate(layers):
        layer.impl.place = place
    if not runner.model_config.enforce_eager:
        Capture.at_once = checkpointer.flush
    return layers


def bucket_shape(runner: Any, layers: list[CachedLayer], fingerprint: str) -> BucketShape:
    """The bucket that mirrors the runner's caches."""
    groups = runner.kv_cache_config.kv_cache_groups
    tables = runner.input_batch.block_table
    sizes = tuple(tables[group].block_size for group in range(len(groups)))
    manager_size = max(spec.kv_cache_spec.block_size for spec in groups)
    return BucketShape(
        layers=len(layers),
        slots=runner.kv_cache_config.num_blocks * manager_size,
        row_bytes=max(_row_bytes(layer.kind) for layer in layers),
        records=runner.scheduler_config.max_num_seqs,
        blocks_max=max(tables[group].block_table.np.shape[1] for group in range(len(groups))),
        block_sizes=sizes,
        layer_groups=tuple(layer.kind.group for layer in layers),
        fingerprint=fingerprint,
    )


def _row_bytes(kind: RowKind) -> int:
    elements = torch.Size(kind.key_shape).numel() + torch.Size(kind.value_shape).numel()
    return elements * kind.dtype.itemsize


def _cached_layer(layer: Any, group: int, dtype: torch.dtype) -> CachedLayer | None:
    impl = layer.impl
    if isinstance(impl, CapturingImpl):
        heads = (impl.num_kv_heads, impl.head_size)
        return CachedLayer(RowKind(group, heads, heads, dtype), impl, _attention_update(layer))
    if isinstance(impl, CPUMLAImpl):
        kind = RowKind(group, (impl.kv_lora_rank,), (1, impl.qk_rope_head_dim), dtype)
        return CachedLayer(kind, impl, _latent_update(layer))
    return None


def _attention_update(layer: Any) -> Update:
    def update(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    return update


def _latent_update(layer: Any) -> Update:
    def update(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        layer.impl.do_kv_cache_update(key, value, layer.kv_cache, slots, layer.kv_cache_dtype, layer._k_scale)

    return update
