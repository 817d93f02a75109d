"""Randomness without state: token i of a request is drawn from a generator seeded with (seed, i).

Nothing to save, nothing to fast-forward, the same on every attention worker.
"""

from __future__ import annotations

from typing import Any

import torch

_MASK = (1 << 64) - 1


def mix(seed: int, position: int) -> int:
    """SplitMix64's finaliser over (seed, position): 63 bits, well spread for neighbouring inputs."""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


class PositionalGenerator(torch.Generator):
    """A generator that is seeded anew for every token; it has no offset to rewind.

    vLLM rewinds the generators of rows whose sample it discards (unfinished
    chunks of a prompt), which CPU generators cannot do. Here there is nothing
    to rewind.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        """Nothing to set: the state follows from (seed, position) alone."""


def seed_for_positions(generators: dict[int, torch.Generator], req_ids: list[str], requests: Any) -> None:
    """Seed the generator of every row for the token that it is about to draw.

    Args:
        generators: vLLM's row index -> generator; replaced in place where needed.
        req_ids: request id per row.
        requests: request id -> vLLM's CachedRequestState (seed and output so far).
    """
    for row in list(generators):
        generator = generators[row]
        if not isinstance(generator, PositionalGenerator):
            generator = generators[row] = PositionalGenerator()
        state = requests[req_ids[row]]
        generator.manual_seed(mix(state.sampling_params.seed, len(state.output_token_ids)))
