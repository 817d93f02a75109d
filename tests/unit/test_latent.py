"""The products around the decode kernel of latent attention do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from tarragon.attention.latent import _products, _Projection

HEADS, LATENT, SIZE = 4, 512, 32


@pytest.mark.parametrize("rows", [1, 5, 64, 200])
def test_a_row_is_the_same_in_every_batch(rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(HEADS, LATENT, SIZE, generator=generator).bfloat16()
    # As vLLM hands them over: [rows, heads, size], seen head by head.
    x = torch.randn(rows, HEADS, SIZE, generator=generator).bfloat16().transpose(0, 1)
    packed = [_Projection(weight[head]) for head in range(HEADS)]
    together = x.new_empty(HEADS, rows, LATENT)
    _products(together, x, packed)
    for row in range(rows):
        alone = x.new_empty(HEADS, 1, LATENT)
        _products(alone, x[:, row : row + 1], packed)
        assert torch.equal(alone[:, 0], together[:, row])
    expected = torch.bmm(x.float(), weight.float().transpose(1, 2))
    torch.testing.assert_close(together.float(), expected, rtol=1e-2, atol=1e-2)
