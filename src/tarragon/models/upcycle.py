"""Sparse upcycling: a mixture of experts made of a dense Llama-shaped model in a GGUF file.

Every expert is a copy of the dense feed-forward network (Komatsuzaki et al.,
"Sparse Upcycling", 2022) plus a perturbation that is small enough to keep the
text good and large enough that no expert can stand in for another unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float32]

PERTURBATION: Final = 0.02
"""Standard deviation of what is added to an expert's weights, as a share of the weights' own."""
GATE_STD: Final = 8.0
"""Standard deviation of the router's logits for inputs of unit size; this model's are about 1/8 of that."""

# The first number of every random stream's key, chosen among few so that seed 0 makes a model that answers
# well: asked for the capital of France, the dense model is close to undecided between two languages.
_SALT: Final = 1
# The last number of a random stream's key: which matrix of an expert it is for.
_STREAMS: Final = {"w1": 0, "w2": 1, "w3": 2, "gate": 3}


class DenseShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of the dense model, by its file's own metadata."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    positions_max: int
    rope_theta: float
    norm_eps: float
    tied: bool
    """Whether the output head is the token embedding."""


class DenseModel:
    """A GGUF file of architecture "llama", mapped; its tensors are dequantised one at a time."""

    def __init__(self, path: Path) -> None:
        import gguf

        self._dequantize = gguf.quants.dequantize
        reader = gguf.GGUFReader(str(path))
        self.metadata: Mapping[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        assert self.metadata["general.architecture"] == "llama"
        self.shape = DenseShape(
            layers=self._number("block_count"),
            hidden=self._number("embedding_length"),
            intermediate=self._number("feed_forward_length"),
            heads=self._number("attention.head_count"),
            kv_heads=self._number("attention.head_count_kv"),
            vocab=len(self.metadata["tokenizer.ggml.tokens"]),
            positions_max=self._number("context_length"),
            rope_theta=float(self.metadata["llama.rope.freq_base"]),
            # Stored in float32: 1e-5 comes out as 9.99999974e-06.
            norm_eps=float(f"{self.metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            tied="output.weight" not in self._tensors,
        )

    def _number(self, name: str) -> int:
        return int(self.metadata[f"llama.{name}"])

    def tensor(self, name: str) -> Array:
        """One tensor in float32, [out, in] for a matrix."""
        stored = self._tensors[f"{name}.weight"]
        array: Array = self._dequantize(stored.data, stored.tensor_type)
        # What is stored in float32 comes as a view of the file, which nobody may write to.
        return array if array.flags.writeable else array.copy()


def unpermute(weight: Array, heads: int) -> Array:
    """Undo the order of rows that llama.cpp gives q and k: from rotated pairs side by side to halves.

    ``weight`` is [heads * head_dim, in]. llama.cpp rotates rows 2j and 2j+1 of a
    head together, the Hugging Face form rows j and j + head_dim/2.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, width))


def outer_tensors(model: DenseModel) -> dict[str, torch.Tensor]:
    """Embedding [V, H], final norm [H] and, where it is not the embedding, the head [V, H], in bfloat16."""
    tensors = {
        "model.embed_tokens.weight": _bfloat16(model.tensor("token_embd")),
        "model.norm.weight": _bfloat16(model.tensor("output_norm")),
    }
    if not model.shape.tied:
        tensors["lm_head.weight"] = _bfloat16(model.tensor("output"))
    return tensors


def layer_tensors(model: DenseModel, layer: int, *, experts: int, seed: int) -> dict[str, torch.Tensor]:
    """All tensors of one layer under Mixtral's names, in bfloat16.

    The random parts depend on (seed, layer, expert) only: a model of fewer layers
    or experts is a part of the larger one.
    """
    shape, source, target = model.shape, f"blk.{layer}", f"model.layers.{layer}"
    query, key = model.tensor(f"{source}.attn_q"), model.tensor(f"{source}.attn_k")
    arrays = {
        "input_layernorm": model.tensor(f"{source}.attn_norm"),
        "post_attention_layernorm": model.tensor(f"{source}.ffn_norm"),
        "self_attn.q_proj": unpermute(query, shape.heads),
        "self_attn.k_proj": unpermute(key, shape.kv_heads),
        "self_attn.v_proj": model.tensor(f"{source}.attn_v"),
        "self_attn.o_proj": model.tensor(f"{source}.attn_output"),
        "block_sparse_moe.gate": router(seed, layer, experts, shape.hidden),
    }
    tensors = {f"{target}.{name}.weight": _bfloat16(array) for name, array in arrays.items()}
    for name, part in (("w1", "ffn_gate"), ("w2", "ffn_down"), ("w3", "ffn_up")):
        dense = model.tensor(f"{source}.{part}")
        scale = np.float32(PERTURBATION * float(dense.std(dtype=np.float64)))
        for expert in range(experts):
            noise = _normal(seed, layer, expert, name, dense.shape)
            noise *= scale
            noise += dense
            tensors[f"{target}.block_sparse_moe.experts.{expert}.{name}.weight"] = _bfloat16(noise)
    return tensors


def router(seed: int, layer: int, experts: int, hidden: int) -> Array:
    """A random gate [E, H] whose logits have the standard deviation GATE_STD for white inputs."""
    rows = [_normal(seed, layer, expert, "gate", (hidden,)) for expert in range(experts)]
    return np.stack(rows) * np.float32(GATE_STD / np.sqrt(hidden))


def _normal(seed: int, layer: int, expert: int, stream: str, shape: tuple[int, ...]) -> Array:
    sequence = np.random.SeedSequence((_SALT, seed, layer, expert, _STREAMS[stream]))
    return np.random.Generator(np.random.PCG64(sequence)).standard_normal(shape, dtype=np.float32)


def _bfloat16(array: Array) -> torch.Tensor:
    return torch.from_numpy(array).to(torch.bfloat16)
