"""Stateless randomness: what token i draws depends on (seed, i) alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tarragon.attention.randomness import PositionalGenerator, mix, seed_for_positions


def _draw(seed: int, sent: int, row: int = 0) -> int:
    generators: dict[int, torch.Generator] = {row: torch.Generator()}
    requests = {"r": SimpleNamespace(sampling_params=SimpleNamespace(seed=seed), output_token_ids=[7] * sent)}
    seed_for_positions(generators, ["?"] * row + ["r"], requests)
    return int(torch.randint(0, 2**31, (1,), generator=generators[row]).item())


def test_the_same_seed_and_position_draw_the_same_in_any_row() -> None:
    assert _draw(5, 3) == _draw(5, 3, row=2)


def test_positions_and_seeds_draw_differently() -> None:
    draws = {_draw(seed, sent) for seed in range(20) for sent in range(20)}
    assert len(draws) == 400


def test_negative_and_huge_seeds_are_accepted() -> None:
    for seed in (-1, 0, 2**63 - 1, -(2**63)):
        assert 0 <= mix(seed, 10**6) < 2**63
        _draw(seed, 1)


def test_a_discarded_row_needs_no_rewind() -> None:
    generator = PositionalGenerator()
    generator.set_offset(generator.get_offset() - 4)
