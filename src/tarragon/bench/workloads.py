"""What is asked of a server (7.1): a workload says what its n-th request is, the same whenever it is asked.

*Random* is the paper's: prompts of 10 random tokens, 128 generated. *Azure* has varying lengths: those of
the Azure conversation trace, which stands in for the paper's ShareGPT. The trace was taken from far larger
models on far larger machines, so its lengths are scaled by one rule: both lengths of a request divided by
LENGTHS_DIVISOR and rounded up, so that prompts and answers keep their proportion and spread; then at most
PROMPT_TOKENS_MAX and OUTPUT_TOKENS_MAX, and never more than the model's context together. Arrival times are
not the trace's: rates are what the benchmarks vary (poisson.py).
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from tarragon.models.shape import read_model

PROMPT_TOKENS: Final = 10
OUTPUT_TOKENS: Final = 128
"""Lengths of the Random workload."""
LENGTHS_DIVISOR: Final = 8
PROMPT_TOKENS_MAX: Final = 512
OUTPUT_TOKENS_MAX: Final = 128
VOCABULARY_MAX: Final = 40_000
"""Ids beyond are rarely text in any of the models."""
_SPECIAL_TOKENS: Final = 5
"""The first ids of most vocabularies begin and end texts."""
_SEED_STRIDE: Final = 101
"""Workloads of other seeds begin elsewhere in the trace."""
_TRACE: Final = "azure_conversation_2023.csv"


class Lengths(NamedTuple):
    """Tokens of one request."""

    prompt: int
    output: int


@dataclass(frozen=True)
class Workload:
    """Request ``index`` is the same whenever it is asked for: greedy and seeded sampling in turn.

    ``prompt_tokens`` and ``output_tokens`` are the lengths of every request, or the longest where they vary.
    """

    seed: int
    vocabulary: int
    prompt_tokens: int = PROMPT_TOKENS
    output_tokens: int = OUTPUT_TOKENS
    greedy: bool = False
    """No sampling at all."""

    def lengths(self, index: int) -> Lengths:
        return Lengths(self.prompt_tokens, self.output_tokens)

    @property
    def mean(self) -> tuple[float, float]:
        """Tokens of a prompt and of an answer, over many requests."""
        return float(self.prompt_tokens), float(self.output_tokens)

    def body(self, index: int) -> dict[str, Any]:
        """The body of POST /v1/completions for request ``index``, without the model's name."""
        lengths = self.lengths(index)
        rng = random.Random(f"{self.seed}/{index}")
        sampled = index % 2 and not self.greedy
        sampling = {"temperature": 0.8, "top_p": 0.95, "seed": index} if sampled else {"temperature": 0}
        return {
            "prompt": [rng.randrange(_SPECIAL_TOKENS, self.vocabulary) for _ in range(lengths.prompt)],
            "max_tokens": lengths.output,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **sampling,
        }


@dataclass(frozen=True)
class TraceWorkload(Workload):
    """Requests with the lengths of a trace, in its order, again from its beginning after its end."""

    trace: tuple[Lengths, ...] = ()

    def lengths(self, index: int) -> Lengths:
        return self.trace[(_SEED_STRIDE * self.seed + index) % len(self.trace)]

    @property
    def mean(self) -> tuple[float, float]:
        count = len(self.trace)
        return sum(one.prompt for one in self.trace) / count, sum(one.output for one in self.trace) / count


def random_workload(model: Path, *, seed: int = 0, greedy: bool = False) -> Workload:
    """The paper's Random workload, in the vocabulary of ``model``."""
    return Workload(seed, _vocabulary(model), greedy=greedy)


def azure_workload(model: Path, *, seed: int = 0, greedy: bool = False) -> TraceWorkload:
    """Varying lengths from the Azure conversation trace, scaled as this module says."""
    context = read_model(model).positions_max
    trace = tuple(scaled(lengths, context) for lengths in azure_lengths())
    return TraceWorkload(
        seed,
        _vocabulary(model),
        prompt_tokens=max(one.prompt for one in trace),
        output_tokens=max(one.output for one in trace),
        greedy=greedy,
        trace=trace,
    )


WORKLOADS: Final[dict[str, Callable[..., Workload]]] = {"random": random_workload, "azure": azure_workload}


def scaled(lengths: Lengths, context: int) -> Lengths:
    """What a small model on a small machine is asked for in place of ``lengths``."""
    output = min(-(-lengths.output // LENGTHS_DIVISOR), OUTPUT_TOKENS_MAX, context // 2)
    prompt = min(-(-lengths.prompt // LENGTHS_DIVISOR), PROMPT_TOKENS_MAX, context - output)
    return Lengths(max(1, prompt), max(1, output))


@cache
def azure_lengths() -> tuple[Lengths, ...]:
    """The excerpt of the Azure conversation trace that comes with the package, as it was recorded."""
    with resources.files("tarragon.bench").joinpath("data", _TRACE).open(encoding="utf-8") as file:
        return tuple(
            Lengths(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)
        )


def _vocabulary(model: Path) -> int:
    return min(VOCABULARY_MAX, read_model(model).vocab)
