"""How each supported architecture names, shapes and orders its routed experts' weights.

H is the hidden size, I a routed expert's intermediate size, E the number of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Literal

import msgspec

Form = Literal["separate", "fused", "transposed"]


class Dims(msgspec.Struct, frozen=True):
    """Sizes that the shapes of expert tensors are made of."""

    experts: int
    hidden: int
    intermediate: int


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """One way to store experts.

    * "separate": gate [I, H], up [I, H] and down [H, I], each expert's own tensors;
    * "fused": gate_up [E, 2I, H] (gate rows, then up rows) and down [E, H, I];
    * "transposed": gate_up [E, H, 2I] (gate and up columns alternate), down [E, I, H],
      and the biases gate_up_bias [E, 2I] and down_bias [E, H].
    """

    form: Form
    block: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def has_bias(self) -> bool:
        return self.form == "transposed"

    def stem(self, layer: int) -> str:
        """What the names of the expert tensors of model layer ``layer`` begin with."""
        return f"model.layers.{layer}.{self.block}.experts."

    def separate_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Names of gate, up and down of one expert."""
        stem = f"{self.stem(layer)}{expert}."
        return f"{stem}{self.gate}.weight", f"{stem}{self.up}.weight", f"{stem}{self.down}.weight"

    def fused_names(self, layer: int) -> tuple[str, str]:
        """Names of gate_up and down of one layer; a bias is named like its weight, with "_bias" behind."""
        return f"{self.stem(layer)}gate_up_proj", f"{self.stem(layer)}down_proj"

    def expected(self, layer: int, dims: Dims) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that the experts of one layer need, with its shape."""
        e, h, i = dims.experts, dims.hidden, dims.intermediate
        if self.form == "separate":
            for expert in range(e):
                gate, up, down = self.separate_names(layer, expert)
                yield from ((gate, (i, h)), (up, (i, h)), (down, (h, i)))
            return
        gate_up, down = self.fused_names(layer)
        if self.form == "fused":
            yield from ((gate_up, (e, 2 * i, h)), (down, (e, h, i)))
        else:
            yield from ((gate_up, (e, h, 2 * i)), (down, (e, i, h)))
            yield from ((f"{gate_up}_bias", (e, 2 * i)), (f"{down}_bias", (e, h)))


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about one model class of the engine."""

    layouts: tuple[Layout, ...]
    intermediate_key: str
    """Setting of config.json that holds I."""
    activation: str = "silu"
    """The engine's name of the experts' activation."""
    fused_loads: bool = True
    """Whether the engine itself can load a checkpoint of this class whose experts are fused."""


_PROJ = Layout(form="separate", block="mlp")
_FUSED = Layout(form="fused", block="mlp")
_QWEN = Architecture(layouts=(_PROJ, _FUSED), intermediate_key="moe_intermediate_size")
_DEEPSEEK = Architecture(layouts=(_PROJ, _FUSED), intermediate_key="moe_intermediate_size", fused_loads=False)

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "MixtralForCausalLM": Architecture(
        layouts=(
            Layout(form="separate", block="block_sparse_moe", gate="w1", up="w3", down="w2"),
            _FUSED,
        ),
        intermediate_key="intermediate_size",
        fused_loads=False,
    ),
    "OlmoeForCausalLM": Architecture(layouts=(_PROJ, _FUSED), intermediate_key="intermediate_size"),
    "Qwen2MoeForCausalLM": _QWEN,
    "Qwen3MoeForCausalLM": _QWEN,
    "DeepseekV2ForCausalLM": _DEEPSEEK,
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "GptOssForCausalLM": Architecture(
        layouts=(Layout(form="transposed", block="mlp"),),
        intermediate_key="intermediate_size",
        activation="swigluoai",
    ),
}


class SparseRule(msgspec.Struct, frozen=True, kw_only=True):
    """Which layers are sparse, in the settings of config.json; the engine's own rules."""

    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    decoder_sparse_step: int = 1
    mlp_only_layers: frozenset[int] = frozenset()

    def layers(self, total: int) -> tuple[int, ...]:
        """Those of ``total`` model layers whose feed-forward part has routed experts, in order."""
        return tuple(
            layer
            for layer in range(self.first_k_dense_replace, total)
            if layer % self.moe_layer_freq == 0
            and (layer + 1) % self.decoder_sparse_step == 0
            and layer not in self.mlp_only_layers
        )
