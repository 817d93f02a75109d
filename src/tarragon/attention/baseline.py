"""Pause-checkpoint-resume: the training-style way, which Tarragon's segments are compared with (7.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Snapshot:
    """Copies every block that a running request holds, of all layers, while inference stands still.

    Nothing is restored from it: it costs what the scheme costs, into memory that is there already.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._copies: dict[int, torch.Tensor] = {}
        self.bytes_copied = 0

    def take(self) -> None:
        """Copy it all now."""
        batch = self._runner.input_batch
        for group, spec in enumerate(self._runner.kv_cache_config.kv_cache_groups):
            table = batch.block_table[group]
            held = [
                table.block_table.np[row, : table.num_blocks_per_row[row]] for row in range(batch.num_reqs)
            ]
            blocks = torch.unique(torch.from_numpy(np.concatenate(held)).long())
            for name in spec.layer_names:
                self._copy(self._runner.compilation_config.static_forward_context[name].kv_cache, blocks)

    def _copy(self, cache: torch.Tensor, blocks: torch.Tensor) -> None:
        key = cache.data_ptr()
        if key not in self._copies:
            self._copies[key] = torch.empty_like(cache)
        target = self._copies[key][: len(blocks)]
        torch.index_select(cache, 0, blocks, out=target)
        self.bytes_copied += target.nbytes
