"""Small random checkpoints of every supported architecture, in the form that their authors publish.

Real weights hide rounding errors behind confident predictions. These are the
hardest case instead: every logit is close to every other, so that the smallest
difference anywhere in the model soon changes the text.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

LOGIT_STD: Final = 0.25
"""Standard deviation of the logits: with 2,048 tokens, no token gets more than about 0.2 %."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of one random checkpoint; ``intermediate`` is that of one routed expert."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    head_dim: int
    vocab: int
    positions_max: int

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 2)


def _common(sizes: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.positions_max,
        "num_experts_per_tok": sizes.top_k,
        # No token ends a text: a run is as long as the test asks.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _mixtral(sizes: Sizes) -> dict[str, Any]:
    return {
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.intermediate,
        "num_local_experts": sizes.experts,
    }


def _qwen3_moe(sizes: Sizes) -> dict[str, Any]:
    return {
        "head_dim": sizes.head_dim,
        "intermediate_size": 2 * sizes.hidden,
        "moe_intermediate_size": sizes.intermediate,
        "num_experts": sizes.experts,
        "norm_topk_prob": True,
    }


def _qwen2_moe(sizes: Sizes) -> dict[str, Any]:
    return {
        "intermediate_size": 2 * sizes.hidden,
        "moe_intermediate_size": sizes.intermediate,
        "shared_expert_intermediate_size": 2 * sizes.intermediate,
        "num_experts": sizes.experts,
    }


def _olmoe(sizes: Sizes) -> dict[str, Any]:
    return {"intermediate_size": sizes.intermediate, "num_experts": sizes.experts}


def _deepseek(sizes: Sizes) -> dict[str, Any]:
    # The first layer is dense, two groups of experts compete, and one expert is always on.
    return {
        "num_key_value_heads": sizes.heads,
        "intermediate_size": 2 * sizes.hidden,
        "moe_intermediate_size": sizes.intermediate,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": sizes.head_dim,
        "v_head_dim": sizes.head_dim,
        "num_nextn_predict_layers": 0,
    }


def _deepseek_v2(sizes: Sizes) -> dict[str, Any]:
    return _deepseek(sizes) | {
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    }


def _deepseek_v3(sizes: Sizes) -> dict[str, Any]:
    return _deepseek(sizes) | {
        "q_lora_rank": 96,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }


def _gpt_oss(sizes: Sizes) -> dict[str, Any]:
    return {
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.intermediate,
        "num_local_experts": sizes.experts,
        "sliding_window": 64,
    }


_RECIPES: Final = {
    "mixtral": ("Mixtral", _mixtral),
    "qwen2_moe": ("Qwen2Moe", _qwen2_moe),
    "qwen3_moe": ("Qwen3Moe", _qwen3_moe),
    "olmoe": ("Olmoe", _olmoe),
    "deepseek_v2": ("DeepseekV2", _deepseek_v2),
    "deepseek_v3": ("DeepseekV3", _deepseek_v3),
    "gpt_oss": ("GptOss", _gpt_oss),
}

KINDS: Final = tuple(_RECIPES)


def make_checkpoint(
    kind: str,
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 128,
    intermediate: int = 64,
    head_dim: int = 32,
    vocab: int = 2048,
    positions_max: int = 4096,
    dtype: str = "bfloat16",
    original_names: bool = True,
) -> Path:
    """Write a random checkpoint and return its folder; it has no tokenizer (see ``skip_tokenizer_init``).

    Weights depend on ``seed`` and on their own name only, so that two calls give
    equal bytes. ``layers`` counts all layers; the first one of the DeepSeek kinds
    is dense. ``original_names=False`` keeps the fused tensors that transformers 5
    has in memory instead of the names that checkpoints are published with.

    Raises ValueError for a kind that is not in KINDS.
    """
    if kind not in _RECIPES:
        raise ValueError(f"unknown kind of checkpoint {kind!r}: choose one of {', '.join(KINDS)}")
    # Imported here: it takes seconds, and only the writer needs it.
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = Sizes(
        layers=layers,
        experts=experts,
        top_k=top_k,
        hidden=hidden,
        intermediate=intermediate,
        head_dim=head_dim,
        vocab=vocab,
        positions_max=positions_max,
    )
    stem, recipe = _RECIPES[kind]
    config = getattr(transformers, f"{stem}Config")(**(_common(sizes) | recipe(sizes)))
    with torch.device("meta"):
        model = getattr(transformers, f"{stem}ForCausalLM")(config)
    model = model.to_empty(device="cpu").to(getattr(torch, dtype))
    _fill(model, seed, transposed_experts=kind == "gpt_oss")
    model.save_pretrained(directory, save_original_format=original_names)
    return directory


def _fill(model: Any, seed: int, *, transposed_experts: bool) -> None:
    """Give every tensor of the state (norms, biases and sinks too) its own seeded values."""
    for name, tensor in model.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        mean, std = _moments(name, tensor, transposed_experts=transposed_experts)
        tensor.copy_(noise * std + mean)


def _moments(name: str, tensor: torch.Tensor, *, transposed_experts: bool) -> tuple[float, float]:
    """Mean and standard deviation that keep activations of unit size through every layer."""
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith("sinks"):
        return 0.0, 1.0
    if name.endswith(("bias", "_bias")):
        return 0.0, 0.1
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    fan_in = tensor.shape[-2] if tensor.ndim == 3 and transposed_experts else tensor.shape[-1]
    scale = LOGIT_STD if name.startswith("lm_head") else 1.0
    return 0.0, scale / math.sqrt(fan_in)
