"""RemoteExperts: takes the place of vLLM's RoutedExperts and sends rows to expert workers (4.2).

Routing, gates and shared experts stay on the attention worker; this layer owns
no weights. It is built wherever a model of vLLM asks for RoutedExperts or a class
derived from it, so that every MoE model gets it without a change to the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.utils import extract_layer_index

from tarragon.refe.engine import Refe


class ExpertsStayed(RuntimeError):
    """The engine's model has experts of its own, so that an expert worker's would never be asked."""


class Weightless(FusedMoEMethodBase):
    """The quantisation method of a layer that holds no expert weights."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Allocate nothing: the weights live on the expert workers."""

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing was loaded."""


class RemoteExperts(RoutedExperts):
    """RoutedExperts whose experts run in other processes."""

    refe: ClassVar[Refe]
    """The process's forwarding engine; set before the model is built."""
    library: ClassVar[torch.library.Library]
    """Registration of the opaque op; must outlive the process's models."""
    layer_positions: ClassVar[dict[int, int]]
    """Model layer index -> position among the MoE layers."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:
        return Weightless(moe_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        """Consume expert weights that were not filtered out before, without touching their pages."""
        for _ in weights:
            pass
        return ()

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows [T, H] in, combined rows [T, H] out; shared experts are the engine's own, and run before."""
        position = self.layer_positions[extract_layer_index(self.layer_name)]
        if self.apply_router_weight_on_input:
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        return torch.ops.tarragon_engine.remote_experts(x, topk_weights, topk_ids, position)


def _remote_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, position: int
) -> torch.Tensor:
    if get_forward_context().attn_metadata is None:
        # vLLM's profiling run: no links exist yet, and the values do not matter.
        return torch.zeros_like(x)
    return RemoteExperts.refe.expert_io(position, topk_ids, x, topk_weights)


def _new(cls: type[RoutedExperts], *args: Any, **kwargs: Any) -> RoutedExperts:
    """``RoutedExperts.__new__``: a layer without weights that is still what the model derived."""
    if issubclass(cls, RemoteExperts):
        remote = cls
    elif cls is RoutedExperts:
        remote = RemoteExperts
    else:
        remote = type(f"Remote{cls.__name__}", (RemoteExperts, cls), {})
    return torch.nn.Module.__new__(remote)


def check_all_remote(model: torch.nn.Module, moe_layers: tuple[int, ...]) -> None:
    """Raise ExpertsStayed unless the experts of exactly ``moe_layers`` of the built model are elsewhere."""
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    remote = [layer for layer in layers if type(layer).forward_modular is RemoteExperts.forward_modular]
    found = sorted(extract_layer_index(layer.layer_name) for layer in remote)
    if found != list(moe_layers) or len(remote) != len(layers):
        raise ExpertsStayed(
            f"the engine computes experts itself: {len(remote)} of {len(layers)} layers are remote"
        )
    # What else such a layer may have is its router's.
    names = [name for layer in remote for name, _ in layer.named_parameters()]
    if weights := [name for name in names if name.startswith(("w13_", "w2_"))]:
        raise ExpertsStayed(f"the engine keeps weights of experts: {', '.join(weights[:3])}")


def register(refe: Refe, moe_layers: tuple[int, ...]) -> None:
    """Make vLLM build RemoteExperts in every MoE model from now on (once per process)."""
    RemoteExperts.refe = refe
    RemoteExperts.layer_positions = {layer: position for position, layer in enumerate(moe_layers)}
    # Not vLLM's out-of-tree registry: it goes by the exact name, and some models derive a class of their own.
    RoutedExperts.__new__ = _new
    # Opaque to torch.compile: the graph is cut neither before nor after it.
    library = torch.library.Library("tarragon_engine", "FRAGMENT")
    library.define(
        "remote_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, SymInt position) -> Tensor"
    )
    library.impl("remote_experts", _remote_experts, "CPU")
    library.impl("remote_experts", lambda x, w, i, p: torch.empty_like(x), "Meta")
    RemoteExperts.library = library
