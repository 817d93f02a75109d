"""When does a worker say that it is not exact?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tarragon.attention.exact import inexact_reason


def reason(*, eager: bool = True, mla: bool = False) -> str:
    return inexact_reason(SimpleNamespace(enforce_eager=eager, use_mla=mla))


def test_what_is_proved_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "0")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert reason() == reason(mla=True) == ""


def test_what_is_not_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "0")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert "latent attention" in reason(mla=True)
    assert "--no-enforce-eager" in reason(eager=False)
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "1")
    assert "VLLM_CPU_ATTN_SPLIT_KV" in reason()
