"""Where do the packed experts of a host lie? Once, in memory that all its expert workers map.

The node agent makes it before it forks anybody; it has no name, outlives every worker and ends with the
agent. Whoever needs an expert first packs it there; for all others it is a matter of mapping pages. So a
worker that dies has no weights to free, its replacement has none to load, and a shadow costs no memory.

It is one more thing that the expert workers of a host have in common, so none can write to it by mistake: it
is mapped read-only, except for the pages of a slot while that is filled, and what is written then is the
same whoever writes it. The other processes have not even that. Workers that each have a device's memory of
their own cannot share: there, and with ``share_expert_memory`` off, every worker holds copies (5.3).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

from tarragon.experts.pages import HUGE_BYTES, AlignedMapping, address_of, protect, writable
from tarragon.messages import ExpertId
from tarragon.models.shape import DTYPE_BYTES, MoeModel


def part_shapes(model: MoeModel) -> list[tuple[int, ...]]:
    """Shapes of one expert's w13 and w2, and of b13 and b2 if it has biases."""
    hidden, intermediate = model.hidden, model.intermediate
    weights: list[tuple[int, ...]] = [(2 * intermediate, hidden), (hidden, intermediate)]
    return weights + ([(2 * intermediate,), (hidden,)] if model.has_bias else [])


class HostMemory:
    """Room for every expert of a model; sparse, so what nobody packed takes no memory.

    Raises OSError if the system does not grant that much.
    """

    def __init__(self, model: MoeModel) -> None:
        self.model = model
        item = DTYPE_BYTES[model.dtype]
        self._slot_bytes = [math.prod(shape) * item for shape in part_shapes(model)]
        sizes = [slot_bytes * model.experts for slot_bytes in self._slot_bytes]
        self._part_bytes = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]
        self._mapping = AlignedMapping(len(model.moe_layers) * sum(self._part_bytes))
        self.slots = self._mapping.buffer
        self._packed = mmap.mmap(-1, model.experts_total)
        protect(address_of(self._packed), len(self._packed), mmap.PROT_READ)

    def offset(self, layer: int, part: int) -> int:
        """Where in ``slots`` a layer's tensor [E, ...] of this part begins; parts as in ``part_shapes``."""
        return layer * sum(self._part_bytes) + sum(self._part_bytes[:part])

    def is_packed(self, expert: ExpertId) -> bool:
        """Whether all of its parts are there, complete."""
        return bool(self._packed[expert.layer * self.model.experts + expert.expert])

    def set_packed(self, expert: ExpertId) -> None:
        """To be called after its last byte was written: it stays so for good."""
        with writable(address_of(self._packed), len(self._packed)):
            self._packed[expert.layer * self.model.experts + expert.expert] = 1

    def compact(self, experts: Iterable[ExpertId]) -> None:
        """Put what is packed into huge pages, so that mapping and unmapping it cost next to nothing.

        It takes milliseconds for each 2 MiB, in which nobody can read there: not to be called while others
        compute. Kernels before 6.1 refuse, then the pages stay small.
        """
        found: set[int] = set()
        for expert in experts:
            for part, slot_bytes in enumerate(self._slot_bytes):
                start = self.offset(expert.layer, part) + expert.expert * slot_bytes
                found.update(range(start // HUGE_BYTES, (start + slot_bytes) // HUGE_BYTES + 1))
        for index in sorted(found):
            self._mapping.collapse(index)

    def close(self) -> None:
        """Unmap it in this process. No tensor over it may be used any more: that would be a crash."""
        self._mapping.close()
        self._packed.close()
