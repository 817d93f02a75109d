"""What the streams of a run looked like around one moment: gaps, stalls, tokens per second (7.2). Pure.

Times are seconds on one monotonic clock; results are milliseconds or seconds as their names say.
A *gap* is the time between two tokens of one stream. The *stall* of a fault is the largest gap that was
open at any time between the fault and the end of its window, less the median gap before the fault.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from tarragon.bench.stats import percentile

BIN_S: Final = 0.1
FIRST_S: Final = 1.0
"""The part of a window that belongs to the fault itself; what comes later is the recovery's doing."""


@dataclass
class Trace:
    """One request and the arrival time of each of its tokens at the reader."""

    index: int
    """Number of the request in its workload."""
    due_s: float
    """When it arrived, by the workload's plan."""
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str = ""
    attempts: int = 1
    """How often the request was sent; more than once only where a baseline replays it."""
    ended_s: float | None = None

    def take(self, position: int, token: int, now_s: float) -> None:
        """Token ``position`` of the current attempt came: new, or the same as in an earlier attempt."""
        if position == len(self.tokens):
            self.tokens.append(token)
            self.times_s.append(now_s)
        elif self.tokens[position] != token:
            self.error = f"the replay gave another token at position {position}"

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times_s)]

    def live_at(self, moment_s: float) -> bool:
        """Whether a reader had begun to read this stream, and had not read all of it."""
        begun = bool(self.times_s) and self.times_s[0] <= moment_s
        return begun and (self.ended_s is None or self.ended_s > moment_s)


class Gap(NamedTuple):
    """The time between two tokens of request ``stream``."""

    stream: int
    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


def gaps(traces: Iterable[Trace], now_s: float) -> list[Gap]:
    """All gaps, by their end; of a stream that has not ended, also the one that is open ``now_s``."""
    found = []
    for trace in traces:
        times = trace.times_s
        found += [Gap(trace.index, a, b) for a, b in itertools.pairwise(times)]
        if times and trace.ended_s is None and times[-1] < now_s:
            found.append(Gap(trace.index, times[-1], now_s))
    return sorted(found, key=lambda gap: gap.end_s)


def open_between(found: Iterable[Gap], start_s: float, end_s: float) -> list[Gap]:
    """Gaps that were open at some time of the window, with their whole length."""
    return [gap for gap in found if gap.end_s > start_s and gap.start_s < end_s]


def ended_between(found: Iterable[Gap], start_s: float, end_s: float) -> list[Gap]:
    return [gap for gap in found if start_s < gap.end_s <= end_s]


def gap_figures(found: Sequence[Gap]) -> dict[str, float]:
    """Median, P95 and largest of gaps; zeros if there are none."""
    lengths_ms = [1e3 * gap.length_s for gap in found]
    return {
        "median_ms": percentile(lengths_ms, 0.5),
        "p95_ms": percentile(lengths_ms, 0.95),
        "largest_ms": max(lengths_ms, default=0.0),
        "gaps": len(lengths_ms),
    }


def tokens_per_s(traces: Iterable[Trace], start_s: float, end_s: float) -> float:
    count = sum(start_s < at <= end_s for trace in traces for at in trace.times_s)
    return count / (end_s - start_s)


# ------------------------------------------------------------------ around a fault


def around_fault(
    traces: Sequence[Trace], fault_s: float, end_s: float, *, before_s: float, held: Collection[int] = ()
) -> dict[str, Any]:
    """What one fault did to the streams, from ``before_s`` before it to ``end_s`` (full capacity).

    ``held`` are the requests that the lost worker held, if it was one that holds requests.
    """
    all_gaps = gaps(traces, end_s)
    before = ended_between(all_gaps, fault_s - before_s, fault_s)
    median_ms = gap_figures(before)["median_ms"]
    after = open_between(all_gaps, fault_s, end_s)
    result = {
        "before": {
            **gap_figures(before),
            "tokens_per_s": tokens_per_s(traces, fault_s - before_s, fault_s),
        },
        "after": {**gap_figures(after), "tokens_per_s": tokens_per_s(traces, fault_s, end_s)},
        **stall(after, fault_s, median_ms),
        "stall_first_second_ms": stall(
            open_between(all_gaps, fault_s, min(end_s, fault_s + FIRST_S)), fault_s, median_ms
        )["stall_ms"],
        "streams_live": sum(trace.live_at(fault_s) for trace in traces),
        "resume_ms": resumes(traces, fault_s, end_s),
        "first_token_ms": first_tokens(traces, fault_s, end_s),
    }
    if held:
        theirs = [gap for gap in after if gap.stream in held]
        others = [gap for gap in after if gap.stream not in held]
        result["held"] = {"streams": len(held), **stall(theirs, fault_s, median_ms)}
        result["others"] = {**gap_figures(others), **stall(others, fault_s, median_ms)}
    return result


def stall(found: Sequence[Gap], fault_s: float, median_ms: float) -> dict[str, float]:
    """The largest of the gaps less the median, and when it began, in seconds after the fault."""
    worst = max(found, key=lambda gap: gap.length_s, default=None)
    if worst is None:
        return {"stall_ms": 0.0, "stall_began_s": 0.0}
    return {
        "stall_ms": max(0.0, 1e3 * worst.length_s - median_ms),
        "stall_began_s": worst.start_s - fault_s,
    }


def resumes(traces: Iterable[Trace], fault_s: float, end_s: float) -> dict[str, float]:
    """From the fault to the next token, over the streams that were being read."""
    waits_ms = []
    for trace in traces:
        if trace.live_at(fault_s):
            following = next((at for at in trace.times_s if at > fault_s), end_s)
            waits_ms.append(1e3 * (following - fault_s))
    return {
        "median": percentile(waits_ms, 0.5),
        "p95": percentile(waits_ms, 0.95),
        "max": max(waits_ms, default=0.0),
    }


def first_tokens(traces: Iterable[Trace], start_s: float, end_s: float) -> dict[str, float]:
    """From arrival to first token of requests whose first token was awaited within the window."""
    waits_ms = []
    for trace in traces:
        first_s = trace.times_s[0] if trace.times_s else trace.ended_s or end_s
        if first_s > start_s and trace.due_s < end_s:
            waits_ms.append(1e3 * (min(first_s, end_s) - trace.due_s))
    return {"median": percentile(waits_ms, 0.5), "max": max(waits_ms, default=0.0)}


def series(traces: Sequence[Trace], fault_s: float, start_s: float, end_s: float) -> dict[str, list[float]]:
    """Bins of BIN_S for a picture: time after the fault, tokens/s, median and largest gap that ends there.

    Gaps of a bin without tokens are 0.
    """
    bins = max(1, round((end_s - start_s) / BIN_S))
    tokens = [0] * bins
    lengths_ms: list[list[float]] = [[] for _ in range(bins)]
    for trace in traces:
        for at in trace.times_s:
            if start_s <= at < start_s + bins * BIN_S:
                tokens[min(bins - 1, int((at - start_s) / BIN_S))] += 1
    for gap in gaps(traces, end_s):
        if start_s <= gap.end_s < start_s + bins * BIN_S:
            lengths_ms[min(bins - 1, int((gap.end_s - start_s) / BIN_S))].append(1e3 * gap.length_s)
    return {
        "after_fault_s": [round(start_s - fault_s + (i + 0.5) * BIN_S, 3) for i in range(bins)],
        "tokens_per_s": [round(count / BIN_S, 1) for count in tokens],
        "gap_median_ms": [round(statistics.median(found), 2) if found else 0.0 for found in lengths_ms],
        "gap_largest_ms": [round(max(found, default=0.0), 2) for found in lengths_ms],
    }


# ------------------------------------------------------------------ without a fault, and equality


def windows(traces: Sequence[Trace], start_s: float, end_s: float, length_s: float) -> list[dict[str, float]]:
    """Gap figures of the whole windows of ``length_s`` between two moments: what no fault looks like."""
    all_gaps = gaps(traces, end_s)
    count = int((end_s - start_s) / length_s)
    starts = [start_s + i * length_s for i in range(count)]
    return [gap_figures(open_between(all_gaps, at, at + length_s)) for at in starts]


def differing(ours: Iterable[Trace], undisturbed: Iterable[Trace]) -> list[int]:
    """Requests whose tokens, text or finish reason are not those of the undisturbed run.

    Raises KeyError if the undisturbed run lacks one.
    """
    expected = {trace.index: trace for trace in undisturbed}
    return [
        trace.index
        for trace in ours
        if (trace.tokens, trace.text, trace.finish_reason)
        != (
            expected[trace.index].tokens,
            expected[trace.index].text,
            expected[trace.index].finish_reason,
        )
    ]


def failed(traces: Iterable[Trace], output_tokens: int) -> dict[int, str]:
    """Why each request that did not end as it should did not."""
    faults = {}
    for trace in traces:
        if trace.error:
            faults[trace.index] = trace.error
        elif trace.finish_reason != "length" or len(trace.tokens) != output_tokens:
            faults[trace.index] = f"{len(trace.tokens)} tokens, finish reason {trace.finish_reason}"
    return faults
