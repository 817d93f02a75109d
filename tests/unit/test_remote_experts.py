"""An attention worker serves no model whose experts the engine would compute by itself."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from tarragon.attention.remote_experts import ExpertsStayed, RemoteExperts, check_all_remote


class OfAModel(RoutedExperts):
    """As a model derives it that loads its weights in a way of its own."""


class RemoteOfAModel(RemoteExperts, OfAModel):
    pass


def model(*layers: type[RoutedExperts]) -> torch.nn.Module:
    built = torch.nn.ModuleList()
    for number, kind in enumerate(layers):
        layer = torch.nn.Module.__new__(kind)
        torch.nn.Module.__init__(layer)
        layer.layer_name = f"model.layers.{number}.mlp.experts"
        built.append(layer)
    return built


def test_all_elsewhere() -> None:
    built = model(RemoteExperts, RemoteOfAModel)
    built[0].e_score_correction_bias = torch.nn.Parameter(torch.zeros(2))  # type: ignore[index]
    check_all_remote(built, (0, 1))


@pytest.mark.parametrize(
    ("layers", "moe_layers"),
    [
        ((RemoteExperts, OfAModel), (0, 1)),
        ((RemoteExperts, RoutedExperts), (0, 1)),
        ((RemoteExperts, OfAModel), (0,)),
        ((RemoteExperts,), (0, 1)),
        ((RemoteExperts,), (1,)),
        ((), (0,)),
    ],
)
def test_a_layer_stayed(layers: tuple[type[RoutedExperts], ...], moe_layers: tuple[int, ...]) -> None:
    with pytest.raises(ExpertsStayed, match="computes experts itself"):
        check_all_remote(model(*layers), moe_layers)


def test_weights_stayed() -> None:
    built = model(RemoteExperts)
    built[0].w13_weight = torch.nn.Parameter(torch.zeros(2))  # type: ignore[index]
    with pytest.raises(ExpertsStayed, match="w13_weight"):
        check_all_remote(built, (0,))
