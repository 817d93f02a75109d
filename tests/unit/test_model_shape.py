"""Reading a checkpoint's shape, and refusing with one sentence what cannot be served."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tarragon.models.headers import INDEX_NAME
from tarragon.models.layouts import SparseRule
from tarragon.models.shape import ModelError, MoeModel, read_model
from tarragon.testing.checkpoints import KINDS, make_checkpoint

EXPERTS, HIDDEN, INTERMEDIATE = 2, 8, 4

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "hidden_act": "silu",
}


def expert_name(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"


def tiny_tensors() -> dict[str, torch.Tensor]:
    shapes = {
        "w1": (INTERMEDIATE, HIDDEN),
        "w2": (HIDDEN, INTERMEDIATE),
        "w3": (INTERMEDIATE, HIDDEN),
    }
    return {
        expert_name(layer, expert, part): torch.ones(shape, dtype=torch.bfloat16)
        for layer in range(2)
        for expert in range(EXPERTS)
        for part, shape in shapes.items()
    }


def write_tiny(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, *, drop: str = "", **settings: Any
) -> Path:
    """A hand-made Mixtral of two layers; ``settings`` change config.json, ``drop`` removes a tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | settings))
    tensors = tiny_tensors() if tensors is None else tensors
    save_file({name: t for name, t in tensors.items() if name != drop}, folder / "model.safetensors")
    return folder


def shard(folder: Path) -> None:
    """Split model.safetensors of a tiny checkpoint by layer, with an index."""
    (folder / "model.safetensors").unlink()
    tensors = tiny_tensors()
    weight_map = {name: f"model-0000{int('layers.1' in name) + 1}-of-00002.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(folder: Path) -> str:
    """The sentence with which ``folder`` is refused."""
    with pytest.raises(ModelError) as caught:
        read_model(folder)
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    return sentence


# ------------------------------------------------------------------ what is served


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(kind: str, tmp_path: Path) -> None:
    model = read_model(make_checkpoint(kind, tmp_path / kind, layers=3, hidden=64, intermediate=96))
    dense_first = kind.startswith("deepseek")
    gpt_oss = kind == "gpt_oss"
    assert model.moe_layers == ((1, 2) if dense_first else (0, 1, 2))
    assert (model.layers, model.experts, model.top_k) == (3, 8, 2)
    assert (model.hidden, model.intermediate, model.vocab, model.positions_max) == (64, 96, 2048, 4096)
    assert model.activation == ("swigluoai" if gpt_oss else "silu")
    assert model.has_bias is gpt_oss
    assert model.dtype == "bfloat16"
    biases = 2 * 96 + 64 if gpt_oss else 0
    assert model.expert_bytes == 2 * (3 * 64 * 96 + biases)
    assert model.experts_total == 8 * len(model.moe_layers)
    assert model.position(2) == (1 if dense_first else 2)
    size = sum(path.stat().st_size for path in (tmp_path / kind).glob("*.safetensors"))
    assert 0 < size - model.weight_bytes < 64 << 10  # the rest is the header


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "olmoe"])
def test_fused_experts_are_read_like_separate_ones(kind: str, tmp_path: Path) -> None:
    separate = read_model(make_checkpoint(kind, tmp_path / "separate"))
    fused = read_model(make_checkpoint(kind, tmp_path / "fused", original_names=False))
    assert fused == MoeModel(**{**_fields(separate), "path": fused.path})


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v2", "deepseek_v3"])
def test_fused_experts_that_the_engine_cannot_load_are_refused(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(kind, tmp_path / kind, original_names=False)
    assert "save_original_format=True" in refusal(folder)


@pytest.mark.parametrize(("dtype", "item_bytes"), [("float16", 2), ("float32", 4)])
def test_other_types_of_weights(dtype: str, item_bytes: int, tmp_path: Path) -> None:
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in tiny_tensors().items()}
    model = read_model(write_tiny(tmp_path / "m", tensors))
    assert model.dtype == dtype
    assert model.expert_bytes == 3 * HIDDEN * INTERMEDIATE * item_bytes


def test_shards_are_followed_by_the_index(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    whole = read_model(folder)
    shard(folder)
    # A file that the index does not name is none of the checkpoint's.
    (folder / "other.safetensors").write_bytes(b"junk")
    assert read_model(folder) == whole


def test_weights_of_a_further_prediction_layer_do_not_count(tmp_path: Path) -> None:
    tensors = tiny_tensors() | {expert_name(2, 0, "w1"): torch.ones(1, dtype=torch.int8)}
    assert read_model(write_tiny(tmp_path / "m", tensors)).moe_layers == (0, 1)


def test_sparse_rules_of_the_engine() -> None:
    assert SparseRule().layers(3) == (0, 1, 2)
    assert SparseRule(decoder_sparse_step=2).layers(5) == (1, 3)
    assert SparseRule(mlp_only_layers=frozenset({0, 2})).layers(4) == (1, 3)
    assert SparseRule(first_k_dense_replace=3).layers(5) == (3, 4)
    assert SparseRule(first_k_dense_replace=1, moe_layer_freq=2).layers(6) == (2, 4)
    assert SparseRule(first_k_dense_replace=9).layers(4) == ()


# ------------------------------------------------------------------ what is refused: config.json


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "not a folder" in refusal(tmp_path / "absent")


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert "config.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_broken_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"architectures": ["LlamaForCausalLM"], "num_local_experts": None},
            "LlamaForCausalLM has no experts",
        ),
        (
            {"architectures": ["DbrxForCausalLM"]},
            r"DbrxForCausalLM is not supported; supported are Mixtral.*\(docs/architectures\.md\)",
        ),
        (
            {"architectures": ["Ernie4_5_MoeForCausalLM"], "num_local_experts": None, "moe_num_experts": 64},
            "Ernie4_5_MoeForCausalLM is not supported; supported are",
        ),
        (
            {"architectures": ["Llama4X"], "num_local_experts": None, "text_config": {"num_experts": 16}},
            "Llama4X is not supported; supported are",
        ),
        ({"architectures": None}, "does not name an architecture"),
        ({"architectures": [["MixtralForCausalLM"]]}, "not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"\(fp8\) are not supported yet"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"\(mxfp4\) are not supported yet"),
        ({"compression_config": {"format": "int-quantized"}}, r"\(unknown\) are not supported yet"),
        ({"hidden_act": "gelu"}, "activation 'gelu' are not supported"),
        ({"num_local_experts": None}, "has no num_local_experts or num_experts"),
        ({"num_local_experts": 0}, "num_local_experts in config.json must be a whole number above 0"),
        ({"hidden_size": "8"}, "hidden_size in config.json must be a whole number"),
        ({"hidden_size": True}, "hidden_size in config.json must be a whole number"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"num_experts_per_tok": 3}, "selects 3 of only 2 experts"),
        ({"first_k_dense_replace": 2}, "none of the 2 layers has experts"),
        ({"mlp_only_layers": "all"}, "which layers have experts"),
        ({"moe_layer_freq": -1}, "which layers have experts"),
    ],
)
def test_a_config_that_cannot_be_served(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert re.search(words, refusal(write_tiny(tmp_path / "m", **settings)))


def test_modelopt_quantisation(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    (folder / "hf_quant_config.json").write_text("{}")
    assert "ModelOpt" in refusal(folder)


@pytest.mark.parametrize("key", ["swiglu_limit", "swiglu_alpha"])
def test_a_gpt_oss_with_another_activation(key: str, tmp_path: Path) -> None:
    folder = make_checkpoint("gpt_oss", tmp_path / "m", layers=1)
    config = json.loads((folder / "config.json").read_text())
    read_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {key: 1.0}))
    assert key in refusal(folder)


def test_latent_attention_of_other_sizes(tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v3", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for key, built_in in (("kv_lora_rank", 512), ("qk_rope_head_dim", 64)):
        assert config[key] == built_in
        (folder / "config.json").write_text(json.dumps({**config, key: built_in // 2}))
        assert f"supports a {key} of {built_in} only, not {built_in // 2}" in refusal(folder)
        del config[key]  # then the class takes the number above
        (folder / "config.json").write_text(json.dumps(config))
        read_model(folder)


# ------------------------------------------------------------------ what is refused: the weights


def test_no_weights(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "holds no safetensors files" in refusal(folder)


def test_pickled_weights(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle files (pytorch_model.bin) only" in refusal(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors" in refusal(folder)


def test_a_shard_that_lacks_what_the_index_promises(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    shard(folder)
    save_file({"other": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    assert re.search(
        r"lacks model\.layers\.1\..*, which model.safetensors.index.json promises", refusal(folder)
    )


@pytest.mark.parametrize("file", ["../m/model.safetensors", "/etc/passwd", "model.bin", 7])
def test_an_index_that_leads_elsewhere(file: object, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": file}}))
    assert "no safetensors file beside it" in refusal(folder)


def test_an_index_without_a_map(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    (folder / INDEX_NAME).write_text('{"weight_map": {}}')
    assert "has no weight_map" in refusal(folder)


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "both copy.safetensors and model.safetensors hold" in refusal(folder)


def test_a_file_cut_short_anywhere(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 97), 7, 8, 9, len(whole) - 1]:
        file.write_bytes(whole[:length])
        assert "model.safetensors is truncated" in refusal(folder), length
    file.write_bytes(whole)
    read_model(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: b"\xff" * 16, "not a safetensors file"),
        (lambda header: _header("[]"), "header is not a JSON object"),
        (lambda header: _header("{"), "header is not JSON"),
        (lambda header: _header(header.replace("BF16", "Q4", 1)), "cannot be understood"),
        (
            lambda header: _header(header.replace('"shape":[4,8]', '"shape":[4,9]', 1)),
            r"\[4, 9\], but has 64 bytes",
        ),
        (lambda header: _header(header.replace('"shape":[4,8]', '"shape":[-4,-8]', 1)), "but has 64 bytes"),
        (lambda header: _header(header.replace('"shape":[4,8]', '"shape":7', 1)), "cannot be understood"),
        (lambda header: _header(header.replace('"dtype"', '"type"', 1)), "cannot be understood"),
    ],
)
def test_a_malformed_header(change: Callable[[str], bytes], words: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    file.write_bytes(change(whole[8 : 8 + length].decode()) + whole[8 + length :])
    assert re.search(words, refusal(folder))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    missing = expert_name(1, 1, "w3")
    assert f"experts of layer 1 lack the tensor {missing}" in refusal(
        write_tiny(tmp_path / "m", drop=missing)
    )


def test_no_expert_tensors_at_all(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", {"model.norm.weight": torch.ones(HIDDEN)})
    assert f"lack the tensor {expert_name(0, 0, 'w1')}" in refusal(folder)


def test_more_experts_than_the_config_says(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", num_local_experts=1)
    assert "more experts than the 1 of config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(INTERMEDIATE, HIDDEN, dtype=torch.int8), "is I8, but experts must be bfloat16"),
        (
            torch.ones(INTERMEDIATE, HIDDEN).to(torch.float8_e4m3fn),
            "is F8_E4M3, but experts must be bfloat16",
        ),
        (torch.ones(INTERMEDIATE, HIDDEN), "is F32, but other experts are BF16"),
        (
            torch.ones(HIDDEN, INTERMEDIATE, dtype=torch.bfloat16),
            r"the shape \[8, 4\], config.json means \[4, 8\]",
        ),
    ],
)
def test_an_expert_of_another_type_or_shape(tensor: torch.Tensor, words: str, tmp_path: Path) -> None:
    name = expert_name(1, 0, "w1")
    sentence = refusal(write_tiny(tmp_path / "m", tiny_tensors() | {name: tensor}))
    assert re.search(re.escape(name) + ".*" + words, sentence)


OTHER_WEIGHTS = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.1.block_sparse_moe.gate.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int32, "I32"),
        (torch.float64, "F64"),
    ],
)
def test_any_weight_of_another_type(name: str, dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", tiny_tensors() | {name: torch.ones(HIDDEN).to(dtype)})
    assert f"{name} is {stored}, but weights must be bfloat16, float16 or float32" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight_scale_inv", "model.layers.1.k.scales"]
)
def test_scales_of_quantised_weights(name: str, tmp_path: Path) -> None:
    tensors = tiny_tensors() | {name: torch.ones(HIDDEN).to(torch.float8_e4m3fn)}
    assert f"{name} is F8_E4M3" in refusal(write_tiny(tmp_path / "m", tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_weights_beside_the_experts_may_have_a_type_of_their_own(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = tiny_tensors() | {name: torch.ones(HIDDEN, dtype=dtype)}
    assert read_model(write_tiny(tmp_path / "m", tensors)).dtype == "bfloat16"


def test_what_is_no_weight_may_be_of_any_type(tmp_path: Path) -> None:
    tensors = tiny_tensors() | {
        "model.embeddings.position_ids": torch.arange(HIDDEN),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(HIDDEN),
        "model.layers.0.self_attn.mask": torch.ones(HIDDEN, dtype=torch.bool),
        "model.layers.2.self_attn.q_proj.weight": torch.ones(HIDDEN, dtype=torch.int8),  # further prediction
    }
    assert read_model(write_tiny(tmp_path / "m", tensors)).moe_layers == (0, 1)


def _fields(model: MoeModel) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.__struct_fields__}


def _header(text: str) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode()
