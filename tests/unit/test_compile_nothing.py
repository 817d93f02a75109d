"""In eager mode nothing is compiled in the middle of a request."""

from __future__ import annotations

from collections.abc import Sequence

from tests.forkserver import ForkServer


def count(_arguments: Sequence[str]) -> int:
    """In a process of its own, as the switch is for all of it: print ranks and what was compiled for them."""
    import torch
    from torch._dynamo.utils import counters
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    from tarragon.attention.engine import compile_nothing

    compile_nothing()
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    ranks = batched_count_greater_than(logits, torch.tensor([[2.0], [0.0]]))
    print(ranks.tolist(), dict(counters["frames"]))
    return 0


def test_log_probs_compile_nothing(forkserver: ForkServer) -> None:
    done = forkserver.run("tests.unit.test_compile_nothing:count", [], 200)
    assert (done.returncode, done.stdout.strip()) == (0, "[2, 3] {}"), done
