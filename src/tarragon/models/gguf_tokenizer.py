"""Rebuilds Hugging Face tokenizer files from the tokenizer inside a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

_CONTROL: Final = 3
"""The type of a token that is never part of a text."""
_ROLES: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(metadata: Mapping[str, Any], directory: Path, *, positions_max: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) into ``directory``.

    ``metadata`` is the GGUF file's: a byte-level BPE ("gpt2") split as "smollm".
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    build_tokenizer(metadata).save(str(directory / "tokenizer.json"))
    ids = {role: int(metadata[f"tokenizer.ggml.{key}_token_id"]) for role, key in _ROLES.items()}
    config = {
        # Takes tokenizer.json as it is; the GPT-2 class would replace the splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions_max,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **{f"{role}_token": tokens[token_id] for role, token_id in ids.items()},
        "chat_template": metadata["tokenizer.chat_template"],
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer itself: digits one by one, then GPT-2's words, then merges of bytes."""
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    pairs = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer
