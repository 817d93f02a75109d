"""A tiny dense model in a GGUF file, as llama.cpp's converter writes one: what upcycling is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 3, 64, 96, 4, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "i n"]
TOKENS = SPECIAL + BYTES + [merge.replace(" ", "") for merge in MERGES]
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def reference_llama() -> Any:
    """A random dense model in the Hugging Face implementation, which the GGUF file is made from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    # The model has the numbers that its file holds: what is compared later is not the quantisation.
    for name, weight in model.state_dict().items():
        if weight.ndim == 2:
            kind = Q4_1 if ".mlp." in name else Q8_0
            stored = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
            weight.copy_(torch.from_numpy(stored))
    return model


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order in which llama.cpp's converter writes rows of q and k: j beside j + head_dim/2 of a head."""
    order = [
        head * HEAD_DIM + half * (HEAD_DIM // 2) + j
        for head in range(heads)
        for j in range(HEAD_DIM // 2)
        for half in range(2)
    ]
    return weight[order]


def write_gguf(path: Path, model: Any) -> None:
    """Write ``model`` with its feed-forward matrices in Q4_1 and the other matrices in Q8_0."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    state = model.state_dict()
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    add_quantised(writer, "token_embd", state["model.embed_tokens.weight"], Q8_0)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for layer in range(LAYERS):
        source, target = f"model.layers.{layer}", f"blk.{layer}"
        norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
        for ours, theirs in norms.items():
            writer.add_tensor(f"{target}.{theirs}.weight", state[f"{source}.{ours}.weight"].numpy())
        for ours, theirs in names.items():
            weight = state[f"{source}.self_attn.{ours}.weight"]
            if ours in ("q_proj", "k_proj"):
                weight = permute(weight, HEADS if ours == "q_proj" else KV_HEADS)
            add_quantised(writer, f"{target}.{theirs}", weight, Q8_0)
        for ours, theirs in parts.items():
            weight = state[f"{source}.mlp.{ours}.weight"]
            add_quantised(writer, f"{target}.{theirs}", weight, Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_quantised(writer: Any, name: str, weight: torch.Tensor, kind: Any) -> None:
    """Add one matrix in the quantised form ``kind``."""
    writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
