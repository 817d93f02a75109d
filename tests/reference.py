"""What transformers computes in float32: the reference for models that Tarragon serves."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import httpx


def reference_log_probs(folder: Path, prompt: list[int]) -> list[float]:
    """Log-prob of each token of ``prompt`` after the first, given those before it."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, :-1].float()
    found = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(prompt[1:]).unsqueeze(1))
    return [float(value) for value in found[:, 0]]


def served_log_probs(url: str, model: str, prompt: list[int]) -> list[float]:
    """The same, as a cluster says."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    entries = answer.json()["choices"][0]["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for entry, token in zip(entries, prompt[1:], strict=True)]


def mean_distance(one: list[float], other: list[float]) -> float:
    """Mean of the absolute differences, in nats."""
    return fmean(abs(a - b) for a, b in zip(one, other, strict=True))
