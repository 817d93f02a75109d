"""In eager mode nothing is compiled in the middle of a request."""

from __future__ import annotations

import subprocess
import sys

COUNT = """
import torch
from torch._dynamo.utils import counters
from tarragon.attention.engine import compile_nothing
from vllm.v1.sample.ops.logprobs import batched_count_greater_than

compile_nothing()
logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
print(batched_count_greater_than(logits, torch.tensor([[2.0], [0.0]])).tolist(), dict(counters["frames"]))
"""


def test_log_probs_compile_nothing() -> None:
    """A process of its own: the switch is for all of it."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stdout.strip() == "[2, 3] {}", done.stdout
