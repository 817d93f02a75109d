"""Reads single experts' weights from a checkpoint, by mapping its files instead of loading them.

Expert workers load what they are assigned and nothing else; the page cache is
shared, so that the second worker of a host to load an expert reads no disk.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from tarragon.models.headers import ModelError, StoredTensor, read_tensors
from tarragon.models.layouts import ARCHITECTURES
from tarragon.models.shape import DTYPES, MoeModel, find_layout

ExpertTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def expert_stems(model: MoeModel) -> tuple[str, ...]:
    """What the names of all tensors of routed experts begin with, and those of no other tensor."""
    layouts = ARCHITECTURES[model.architecture].layouts
    return tuple({layout.stem(layer) for layout in layouts for layer in model.moe_layers})


class ExpertWeights:
    """Weights of single experts, in the order of rows that the engine's kernels take.

    Tensors that lie in the file as they are needed are views of the mapped file
    (private: writing to one does not reach the file) and keep the mapping alive;
    the others are copies. All are contiguous and of ``model.dtype``. Reading from
    several threads is safe.
    """

    def __init__(self, model: MoeModel) -> None:
        """Map the files that hold experts; raises ModelError if they changed since ``read_model``."""
        self._folder = Path(model.path)
        self._model = model
        architecture = ARCHITECTURES[model.architecture]
        self._tensors = read_tensors(self._folder)
        self._layout = find_layout(architecture, model.moe_layers, self._tensors)
        self._files: dict[str, torch.Tensor] = {}

    def load(self, layer_position: int, expert: int) -> ExpertTensors:
        """Return (w13 [2I, H], w2 [H, I], b13 [2I] or None, b2 [H] or None) of one expert.

        ``layer_position`` counts MoE layers (it is the ``layer`` of an ExpertId).
        For the activation "silu" the rows of w13 are all gates, then all ups; for
        "swigluoai" they alternate (gate 0, up 0, gate 1, ...), and so does b13, as
        the checkpoint has them and as the engine's kernel takes them.
        Raises IndexError when there is no such expert.
        """
        model = self._model
        if not (0 <= layer_position < len(model.moe_layers) and 0 <= expert < model.experts):
            raise IndexError(f"no expert {expert} in MoE layer {layer_position} of {model.path}")
        layer = model.moe_layers[layer_position]
        if self._layout.form == "separate":
            gate, up, down = (self._tensor(name) for name in self._layout.separate_names(layer, expert))
            return torch.cat((gate, up)), down, None, None
        gate_up_name, down_name = self._layout.fused_names(layer)
        w13 = self._tensor(gate_up_name)[expert]
        w2 = self._tensor(down_name)[expert]
        if self._layout.form == "fused":
            return w13, w2, None, None
        b13 = self._tensor(f"{gate_up_name}_bias")[expert]
        b2 = self._tensor(f"{down_name}_bias")[expert]
        return w13.t().contiguous(), w2.t().contiguous(), b13, b2

    def _tensor(self, name: str) -> torch.Tensor:
        """A view of one stored tensor; a copy if its bytes do not lie on a boundary of its type."""
        stored = self._tensors[name]
        raw = self._file(stored)[stored.start : stored.start + stored.nbytes]
        dtype: torch.dtype = getattr(torch, DTYPES[stored.dtype])
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(stored.shape)

    def _file(self, stored: StoredTensor) -> torch.Tensor:
        """The whole mapped file as bytes, mapped on first use."""
        mapped = self._files.get(stored.file)
        if mapped is None:
            path = self._folder / stored.file
            try:
                with path.open("rb") as file:
                    # A private mapping may be written to, which is what torch asks of a buffer.
                    buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise ModelError(f"{path} cannot be mapped: {error}") from error
            mapped = self._files.setdefault(stored.file, torch.frombuffer(buffer, dtype=torch.uint8))
        if mapped.numel() < stored.start + stored.nbytes:
            raise ModelError(f"{self._folder / stored.file} was cut short while it was in use")
        return mapped
