"""What a checkpoint is: architecture, MoE layers and the sizes of their experts, without loading a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from tarragon.models.headers import ModelError, StoredTensor, read_json, read_tensors
from tarragon.models.layouts import ARCHITECTURES, Architecture, Dims, Layout, SparseRule

__all__ = ["ModelError", "MoeModel", "find_layout", "read_model"]

DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}

_EXPERT_KEYS: Final = ("num_local_experts", "num_experts", "n_routed_experts")
# The engine's decode kernel of latent attention is compiled for these sizes only; the values are also the
# defaults of a config.json that leaves them out.
_LATENT: Final = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
_QUANTISATION_KEYS: Final = ("quantization_config", "compression_config")
# The engine's kernels have these two numbers of gpt-oss built in.
_SWIGLUOAI: Final = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}

# What quantised tensors are stored in, scales and packed nibbles included; nobody trains weights in these.
_QUANTISED: Final = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4"})
# How names of parameters end. What is none of them (position_ids, counters, masks) may be of any other type.
_PARAMETER_ENDS: Final = ("weight", "bias", "sinks", "_proj")


class MoeModel(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of one MoE checkpoint. H = hidden, I = intermediate, E = experts."""

    path: str
    architecture: str
    """Model class of the engine, such as "MixtralForCausalLM"."""
    model_type: str
    layers: int
    """All layers, dense ones included."""
    moe_layers: tuple[int, ...]
    """Model layers that have routed experts; a position in this tuple is the ``layer`` of an ExpertId."""
    experts: int
    """Routed experts per MoE layer (shared, always-on experts are not counted)."""
    top_k: int
    hidden: int
    intermediate: int
    """Intermediate size of one routed expert."""
    dtype: str
    """Type of the experts' weights as stored: "bfloat16", "float16" or "float32"."""
    activation: str
    """The engine's name of the experts' activation: "silu" or "swigluoai"."""
    has_bias: bool
    expert_bytes: int
    """Bytes of one routed expert's weights (and biases) as stored."""
    vocab: int
    positions_max: int
    weight_bytes: int
    """Bytes of all tensors of the checkpoint."""

    @property
    def experts_total(self) -> int:
        """Routed experts in the whole model."""
        return len(self.moe_layers) * self.experts

    def position(self, model_layer: int) -> int:
        """The ``layer`` of an ExpertId for a model layer; raises ValueError for a dense one."""
        return self.moe_layers.index(model_layer)


def read_model(path: str | Path) -> MoeModel:
    """Read the shape of the checkpoint in the folder ``path`` from its config.json and its files' headers.

    Raises ModelError, whose message is one sentence, when the folder or its
    config.json is missing, the model has no experts or is of an unsupported
    architecture, weights are quantised, of another type, pickled, truncated or
    missing, the engine's kernels do not fit its sizes, or an expert's tensor is
    absent or has another shape or type than the config says.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder with a model")
    config = read_json(folder / "config.json")
    name, architecture = _architecture(folder, config)
    _refuse_quantised(folder, config)
    _check_activation(folder, config, architecture)
    _check_latent(folder, config)
    dims = Dims(
        experts=_integer(folder, config, *_EXPERT_KEYS),
        hidden=_integer(folder, config, "hidden_size"),
        intermediate=_integer(folder, config, architecture.intermediate_key),
    )
    top_k = _integer(folder, config, "num_experts_per_tok")
    if top_k > dims.experts:
        raise ModelError(f"{folder}: config.json selects {top_k} of only {dims.experts} experts")
    layers = _integer(folder, config, "num_hidden_layers")
    moe_layers = _sparse_rule(folder, config).layers(layers)
    if not moe_layers:
        raise ModelError(f"{folder}: by its config.json, none of the {layers} layers has experts")
    tensors = read_tensors(folder)
    layout = find_layout(architecture, moe_layers, tensors)
    if layout.form == "fused" and not architecture.fused_loads:
        raise ModelError(
            f"{folder}: the engine cannot load a {name} whose experts are fused into one tensor a layer: "
            "save it with save_original_format=True"
        )
    dtype, expert_bytes = _check_experts(folder, layout, moe_layers, dims, tensors)
    _check_types(folder, layers, tensors)
    return MoeModel(
        path=str(folder),
        architecture=name,
        model_type=str(config.get("model_type", "")),
        layers=layers,
        moe_layers=moe_layers,
        experts=dims.experts,
        top_k=top_k,
        hidden=dims.hidden,
        intermediate=dims.intermediate,
        dtype=dtype,
        activation=architecture.activation,
        has_bias=layout.has_bias,
        expert_bytes=expert_bytes,
        vocab=_integer(folder, config, "vocab_size"),
        positions_max=_integer(folder, config, "max_position_embeddings"),
        weight_bytes=sum(stored.nbytes for stored in tensors.values()),
    )


def find_layout(
    architecture: Architecture, moe_layers: tuple[int, ...], tensors: Mapping[str, StoredTensor]
) -> Layout:
    """The layout of which the first MoE layer has any tensor; the usual one if there is none at all."""
    one = Dims(experts=1, hidden=1, intermediate=1)
    for layout in architecture.layouts:
        for layer in moe_layers:
            if any(name in tensors for name, _ in layout.expected(layer, one)):
                return layout
    return architecture.layouts[0]


def _architecture(folder: Path, config: Mapping[str, Any]) -> tuple[str, Architecture]:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ModelError(f"{folder}: config.json does not name an architecture")
    for name in names:
        if isinstance(name, str) and name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    if not _mentions_experts(config):
        raise ModelError(
            f"{folder}: {names[0]} has no experts, and only mixture-of-experts models can be served"
        )
    supported = ", ".join(ARCHITECTURES)
    raise ModelError(
        f"{folder}: the architecture {names[0]} is not supported; supported are {supported} "
        "(docs/architectures.md)"
    )


def _mentions_experts(config: Mapping[str, Any]) -> bool:
    """Whether any setting counts experts: families have their own names for it, some a section of its own."""
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    settings = [(key, value) for section in sections for key, value in section.items()]
    return any(value and "expert" in key and "per_tok" not in key for key, value in settings)


def _refuse_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    for key in _QUANTISATION_KEYS:
        settings = config.get(key)
        if settings:
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
            raise ModelError(_quantised(folder, str(method)))
    if (folder / "hf_quant_config.json").exists():
        raise ModelError(_quantised(folder, "ModelOpt"))


def _quantised(folder: Path, method: str) -> str:
    return f"{folder}: quantised experts ({method}) are not supported yet: use a bfloat16 checkpoint"


def _check_activation(folder: Path, config: Mapping[str, Any], architecture: Architecture) -> None:
    # The engine takes silu for all of these whatever config.json says: refuse rather than answer wrongly.
    found = config.get("hidden_act", "silu")
    if found != "silu":
        raise ModelError(f"{folder}: experts with the activation {found!r} are not supported")
    if architecture.activation == "swigluoai":
        for key, built_in in _SWIGLUOAI.items():
            if config.get(key, built_in) != built_in:
                raise ModelError(f"{folder}: the engine's kernels support a {key} of {built_in} only")


def _check_latent(folder: Path, config: Mapping[str, Any]) -> None:
    for key, built_in in _LATENT.items():
        found = config.get(key, built_in)
        if found != built_in:
            raise ModelError(
                f"{folder}: the engine's kernel of latent attention supports a {key} of {built_in} only, "
                f"not {found!r}"
            )


def _check_types(folder: Path, layers: int, tensors: Mapping[str, StoredTensor]) -> None:
    """Check the type of everything that is no expert: the engine would cast bytes of a code to numbers.

    ``layers`` is the number of model layers; those behind them (further prediction) are not loaded.
    """
    for name, stored in tensors.items():
        if stored.dtype in DTYPES or _model_layer(name) >= layers:
            continue
        if stored.dtype in _QUANTISED or name.endswith(_PARAMETER_ENDS):
            raise ModelError(
                f"{folder}: {name} is {stored.dtype}, but weights must be bfloat16, float16 or float32"
            )


def _model_layer(name: str) -> int:
    """The model layer that a tensor belongs to; -1 for those outside of all layers."""
    stem, _, rest = name.partition("model.layers.")
    number = rest.partition(".")[0]
    return int(number) if not stem and number.isdecimal() else -1


def _integer(folder: Path, config: Mapping[str, Any], *keys: str) -> int:
    """The first of ``keys`` that config.json has; it must be a whole number above zero."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if type(value) is not int or value < 1:
                raise ModelError(
                    f"{folder}: {key} in config.json must be a whole number above 0, not {value!r}"
                )
            return value
    raise ModelError(f"{folder}: config.json has no {' or '.join(keys)}")


def _sparse_rule(folder: Path, config: Mapping[str, Any]) -> SparseRule:
    given = {key: config[key] for key in SparseRule.__struct_fields__ if config.get(key) is not None}
    try:
        rule = msgspec.convert(given, SparseRule)
    except msgspec.ValidationError as error:
        raise ModelError(f"{folder}: config.json does not say which layers have experts: {error}") from error
    if rule.first_k_dense_replace < 0 or rule.moe_layer_freq < 1 or rule.decoder_sparse_step < 1:
        raise ModelError(
            f"{folder}: config.json does not say which layers have experts: a number is too small"
        )
    return rule


def _check_experts(
    folder: Path,
    layout: Layout,
    moe_layers: tuple[int, ...],
    dims: Dims,
    tensors: Mapping[str, StoredTensor],
) -> tuple[str, int]:
    """Check every expert tensor of every MoE layer; return their common type and the bytes of one expert."""
    first_type: str | None = None
    for layer in moe_layers:
        for name, shape in layout.expected(layer, dims):
            stored = tensors.get(name)
            if stored is None:
                raise ModelError(f"{folder}: the experts of layer {layer} lack the tensor {name}")
            if stored.dtype not in DTYPES:
                raise ModelError(
                    f"{folder}: {name} is {stored.dtype}, but experts must be bfloat16, float16 or float32"
                )
            if stored.shape != shape:
                raise ModelError(
                    f"{folder}: {name} has the shape {list(stored.shape)}, config.json means {list(shape)}"
                )
            first_type = first_type or stored.dtype
            if stored.dtype != first_type:
                raise ModelError(f"{folder}: {name} is {stored.dtype}, but other experts are {first_type}")
        if layout.form == "separate" and layout.separate_names(layer, dims.experts)[0] in tensors:
            raise ModelError(
                f"{folder}: layer {layer} has more experts than the {dims.experts} of config.json"
            )
    assert first_type is not None
    dtype = DTYPES[first_type]
    numbers = sum(math.prod(shape) for _, shape in layout.expected(moe_layers[0], dims)) // dims.experts
    return dtype, numbers * DTYPE_BYTES[dtype]
