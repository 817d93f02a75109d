"""Typed entrances to the native ops.

All of them release the interpreter lock while they run, check their arguments
(ValueError, TypeError), and are opaque to torch.compile. ``linear``,
``combine``, ``gather_batch`` and ``scatter_batch`` may be traced; ``dispatch``
and ``replay`` return a decision about data and belong outside a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

_loaded = False


def load() -> None:
    """Register the native ops with torch; harmless when done before. Starts no thread.

    Raises:
        NativeError: they are not built for this torch and CPU.
    """
    global _loaded
    if _loaded:
        return
    # Imported here, so that `python -m tarragon.native.build` finds its module not yet imported.
    from tarragon.native.build import NativeError, library_path

    path = library_path()
    if not path.exists():
        raise NativeError(
            "the native kernels are not built for this version and CPU: run `python -m tarragon.native.build`"
        )
    torch.ops.load_library(str(path))
    _loaded = True


@functools.cache
def op(name: str) -> Any:
    """The op itself: looking it up each time costs more than some calls do."""
    load()
    return getattr(torch.ops.tarragon, name).default


def instruction_set() -> str:
    """The arithmetic that results depend on: "avx2+fma", "portable+fma" (the same bits) or "portable"."""
    load()
    return str(torch.ops.tarragon.instruction_set())


# ------------------------------------------------------------------ linear


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """Lay out a weight for ``linear``: panels of 16 outputs, so that it is read as one stream.

    Args:
        weight: [N, K]; bfloat16, float16 or float32.

    Returns:
        [ceil(N / 16), K, 16] in the weight's dtype.
    """
    load()
    packed: torch.Tensor = torch.ops.tarragon.pack_linear.default(weight)
    return packed


def linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
    """``x @ weight.T + bias``, batch-invariant bit for bit.

    Each output is one chain of float32 multiply-adds over k in ascending order, then the bias, then one
    rounding: it depends on its row and the weights alone, not on the other rows, the row's position or the
    number of threads.

    Args:
        x: [..., K] in the weight's dtype; rows may be strided.
        packed: from ``pack_linear``.
        bias: [n] in any of the three dtypes, or None.
        n: outputs N of the weight.

    Returns:
        [..., n] in x's dtype, contiguous.
    """
    out: torch.Tensor = torch.ops.tarragon.linear.default(x, packed, bias, n)
    return out


# ------------------------------------------------------------------ pairs


def dispatch(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    owner: torch.Tensor,
    region_rows: Sequence[torch.Tensor],
    region_ids: Sequence[torch.Tensor],
    pair_slot: torch.Tensor,
    pair_row: torch.Tensor,
    counts: torch.Tensor,
) -> bool:
    """Copy the row of every (token, expert) pair into the region of the expert's host, from row 0 on (4.2).

    Pairs are taken in router order (token by token). Pair p = t * K + k is recorded as lying in row
    ``pair_row[p]`` of slot ``pair_slot[p]``; both are -1 where no slot owns the expert.

    Args:
        x: [T, H], any dtype.
        expert_ids: int32 or int64 [T, K], contiguous.
        owner: int32 [E], expert -> slot, -1 for an expert out of reach.
        region_rows: per slot [capacity, H] in x's dtype; written.
        region_ids: per slot int32 [capacity]; written.
        pair_slot, pair_row: int32 [T * K]; written.
        counts: int32 [slots], rows per slot; written.

    Returns:
        Whether every expert was in reach.

    Raises:
        ValueError: an expert id is out of range, or a region too small; nothing was written.
    """
    load()
    reachable: bool = torch.ops.tarragon.dispatch.default(
        x, expert_ids, owner, region_rows, region_ids, pair_slot, pair_row, counts
    )
    return reachable


def replay(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    owner: torch.Tensor,
    lost_slot: int,
    region_rows: Sequence[torch.Tensor],
    region_ids: Sequence[torch.Tensor],
    starts: torch.Tensor,
    pair_slot: torch.Tensor,
    pair_row: torch.Tensor,
    counts: torch.Tensor,
) -> bool:
    """Copy the pairs that are recorded in ``lost_slot`` to their experts' new hosts (5.1).

    As ``dispatch``, but only for those pairs, and each region is written from row ``starts[slot]`` on.
    ``lost_slot`` -1 stands for the pairs that were out of reach at the dispatch.

    Args:
        starts: int32 [slots].
        counts: int32 [slots], rows appended per slot; written.

    Returns:
        True when all of them have moved; False, and nothing is written, when one is out of reach.

    Raises:
        ValueError: as ``dispatch``, or an expert is still owned by the lost slot; nothing was written.
    """
    load()
    reachable: bool = torch.ops.tarragon.replay.default(
        x, expert_ids, owner, lost_slot, region_rows, region_ids, starts, pair_slot, pair_row, counts
    )
    return reachable


def combine(
    results: Sequence[torch.Tensor],
    pair_slot: torch.Tensor,
    pair_row: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[t] = the sum over k, in router order, of weights[t, k] * the pair's row: wherever it was computed.

    Float32, starting at zero, product and sum rounded apart, and the result rounded once to out's dtype.

    Args:
        results: per slot [*, H] in out's dtype.
        pair_slot, pair_row: int32 [T * K] from ``dispatch``.
        weights: float32 [T, K], contiguous.
        out: [T, H], bfloat16, float16 or float32; written.

    Raises:
        ValueError: a pair lies in no slot, or in a row that its slot does not have.
    """
    load()
    torch.ops.tarragon.combine.default(results, pair_slot, pair_row, weights, out)


# ------------------------------------------------------------------ batches of an expert worker


def gather_batch(
    rows: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    starts: Sequence[int],
    counts: Sequence[int],
    out_rows: torch.Tensor,
    out_ids: torch.Tensor,
) -> int:
    """Put frames of several attention workers side by side (5.2).

    Args:
        rows: per frame the region [capacity, H] in which it lies, contiguous.
        ids: per frame int32 [capacity].
        starts, counts: frame f is rows starts[f] to starts[f] + counts[f].
        out_rows: [batch_max, H]; written.
        out_ids: int32 [batch_max]; written.

    Returns:
        The rows in the batch.

    Raises:
        ValueError: a frame lies outside its region, or the batch is too small; nothing was written.
    """
    load()
    total: int = torch.ops.tarragon.gather_batch.default(rows, ids, starts, counts, out_rows, out_ids)
    return total


def scatter_batch(
    batch: torch.Tensor, starts: Sequence[int], counts: Sequence[int], results: Sequence[torch.Tensor]
) -> None:
    """The way back of ``gather_batch``: frame f's rows of ``batch`` to results[f] from row starts[f] on.

    Args:
        batch: [batch_max, H], contiguous.
        results: per frame the region [capacity, H]; written.

    Raises:
        ValueError: a frame lies outside its region or the batch; nothing was written.
    """
    load()
    torch.ops.tarragon.scatter_batch.default(batch, starts, counts, results)


# ------------------------------------------------------------------ probes


def probe_start(progress: torch.Tensor, epoch: int, channels_max: int) -> None:
    """Start this process's thread that answers probes; to be called after the fork.

    Args:
        progress: int64 [1], read (atomically, as unsigned) for every answer; kept alive by the thread.
        epoch: what probes must name.
        channels_max: most connections at once.

    Raises:
        ValueError: the process answers probes already, or an argument is out of range.
    """
    load()
    torch.ops.tarragon.probe_start.default(progress, epoch, channels_max)


def probe_stop() -> None:
    """End that thread and close its channels; harmless when there is none."""
    load()
    torch.ops.tarragon.probe_stop.default()


def probe_adopt(fd: int) -> None:
    """Answer probes that come in on the socket ``fd``, which is taken over. ValueError: without a thread."""
    load()
    torch.ops.tarragon.probe_adopt.default(fd)


def probe_counters() -> tuple[int, int, int]:
    """Probes answered, channels refused or closed for what they sent, channels open."""
    load()
    answered, refused, channels = torch.ops.tarragon.probe_counters.default()
    return answered, refused, channels
