"""The products around the decode kernel of latent attention do not depend on the batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tarragon.attention.latent import LatentAttention, _products, _Projection

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


def test_decoding_does_not_depend_on_the_number_of_threads() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    generator = torch.Generator().manual_seed(16)
    lengths = torch.randint(100, 700, (16,), generator=generator, dtype=torch.int32)
    cache = torch.randn(16 * 64, 16, 576, generator=generator).bfloat16()
    queries = torch.randn(16, HEADS, 576, generator=generator).bfloat16()
    blocks = torch.arange(16 * 64).view(16, 64)
    metadata = SimpleNamespace(decode=SimpleNamespace(block_table=blocks, seq_lens=lengths))

    def decoded(threads: int) -> torch.Tensor:
        attention = LatentAttention.__new__(LatentAttention)
        attention.kv_lora_rank, attention.scale = LATENT, 0.1
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            rows, _ = attention.forward_mqa(queries, cache, metadata, None)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        return rows

    assert torch.equal(decoded(1), decoded(2))
