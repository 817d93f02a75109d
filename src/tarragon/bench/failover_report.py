"""What the trials of `tarragon bench failover` say together. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Final

from tarragon.bench import timeline
from tarragon.bench.stats import interval, percentile, summary
from tarragon.bench.timeline import Trace

GATES_MS: Final = {
    ("expert", "KILL"): 100.0,
    ("expert", "STOP"): 250.0,
    ("attention", "KILL"): 300.0,
    ("attention", "STOP"): 450.0,
}
"""Largest stall, as the median of trials, that is accepted."""


def conclude(metrics: dict[str, Any], role: str, signal: str) -> None:
    """Put what follows from the trials so far into ``metrics``."""
    trials = metrics["trials"]
    if not trials:
        return
    stalls_ms = [trial["stall_ms"] for trial in trials]
    metrics["stall_ms"] = spread(stalls_ms)
    metrics["stall_first_second_ms"] = spread([trial["stall_first_second_ms"] for trial in trials])
    metrics["resume_max_ms"] = spread([trial["resume_ms"]["max"] for trial in trials])
    metrics["full_capacity_s"] = spread([trial["full_capacity_s"] for trial in trials])
    metrics["largest_before_ms"] = spread([trial["before"]["largest_ms"] for trial in trials])
    for part in ("held", "others"):
        found = [trial[part]["stall_ms"] for trial in trials if part in trial]
        if found:
            metrics[f"stall_{part}_ms"] = spread(found)
    judged_ms = judged(trials, role)
    if judged_ms:
        gate_ms = GATES_MS[role, signal]
        holds = statistics.median(judged_ms) <= gate_ms
        metrics["gate"] = {"stall_median_ms_max": gate_ms, "holds": holds}
        metrics["stall_judged_ms"] = spread(judged_ms)
    for found in metrics["baseline"].values():
        if found["trials"]:
            theirs_ms = [trial["stall_ms"] for trial in found["trials"]]
            found["stall_ms"] = spread(theirs_ms)
            found["ratio_of_stalls"] = ratio_of_medians(theirs_ms, judged_ms or stalls_ms)
            found["serving_after_s"] = spread([trial["serving_after_s"] for trial in found["trials"]])


def judged(trials: Sequence[dict[str, Any]], role: str) -> list[float]:
    """The stalls that the gate is about: of all streams, or of those that a lost attention worker held.

    A trial whose attention worker held none says nothing about that.
    """
    if role == "expert":
        return [trial["stall_ms"] for trial in trials]
    return [trial["held"]["stall_ms"] for trial in trials if "held" in trial]


def spread(values: Sequence[float]) -> dict[str, float]:
    """min, median, P95, max and number of trials."""
    return {**summary(values), "p95": percentile(values, 0.95)}


def ratio_of_medians(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Median of theirs over median of ours; the interval covers the spread of ours (theirs are few)."""
    theirs_median, ours_median = statistics.median(theirs), statistics.median(ours)
    low, high = interval(ours)
    return {
        "median": theirs_median / ours_median if ours_median else None,
        "ci95": [theirs_median / high if high else None, theirs_median / low if low else None],
    }


def times_ours(ratio: float | None) -> str:
    """A ratio of medians in words; None is one to no stall at all."""
    return "ours was none" if ratio is None else f"{ratio:.0f} times ours"


def window_s(trials: Sequence[dict[str, Any]]) -> float:
    """How long a trial's window typically was: the control's windows are as long."""
    return float(statistics.median(max(trial["full_capacity_s"], timeline.FIRST_S) for trial in trials))


def control(traces: Sequence[Trace], start_s: float, end_s: float, length_s: float) -> dict[str, Any]:
    """Gaps without a fault, over the whole run and in windows as long as a trial's."""
    length_s = min(length_s, end_s - start_s)
    found = timeline.windows(traces, start_s, end_s, length_s)
    largest = [window["largest_ms"] for window in found]
    stalls = [window["largest_ms"] - window["median_ms"] for window in found]
    all_gaps = timeline.ended_between(timeline.gaps(traces, end_s), start_s, end_s)
    return {
        **timeline.gap_figures(all_gaps),
        "tokens_per_s": timeline.tokens_per_s(traces, start_s, end_s),
        "window_s": length_s,
        "largest_in_window_ms": spread(largest),
        "stall_in_window_ms": spread(stalls),
        "requests": len(traces),
        "failed": {trace.index: trace.error for trace in traces if trace.error},
    }


def promises_kept(result: dict[str, Any]) -> bool:
    """No request failed, every one was compared, and no stream differs."""
    metrics = result["metrics"]
    compared: bool = metrics.get("compared", 0) == metrics.get("requests")
    return compared and not metrics.get("failed") and not metrics.get("differing")


def trial_line(trial: dict[str, Any]) -> str:
    before = trial["before"]
    held = f", of its own streams {trial['held']['stall_ms']:.0f} ms" if "held" in trial else ""
    return (
        f"{trial['victim']}: stall {trial['stall_ms']:.0f} ms{held} (began {trial['stall_began_s']:.2f} s "
        f"after; first second {trial['stall_first_second_ms']:.0f} ms); gaps before: median "
        f"{before['median_ms']:.0f}, P95 {before['p95_ms']:.0f}, largest {before['largest_ms']:.0f} ms; "
        f"full capacity after {trial['full_capacity_s']:.1f} s"
    )


def table(result: dict[str, Any]) -> str:
    """The result in a few lines for a person."""
    metrics, settings = result["metrics"], result["settings"]
    lines = [
        f"{settings['role']} worker, SIG{settings['signal']}, {len(metrics['trials'])} trials, "
        f"{metrics['rate_per_s']:.2f} requests/s of {metrics['capacity_tokens_per_s']:.0f} tokens/s capacity"
    ]
    rows = {
        "stall until full capacity, ms": "stall_ms",
        "stall within the first second, ms": "stall_first_second_ms",
        "stall of streams that it held, ms": "stall_held_ms",
        "stall of the others, ms": "stall_others_ms",
        "largest gap before the fault, ms": "largest_before_ms",
        "full capacity after, s": "full_capacity_s",
    }
    for title, key in rows.items():
        if key in metrics:
            lines.append(f"{title:36} {_spread_text(metrics[key])}")
    if "control" in metrics:
        text = _spread_text(metrics["control"]["stall_in_window_ms"])
        lines.append(f"{'one worker less, no fault, ms':36} {text}")
    for name, found in metrics["baseline"].items():
        if not found["trials"]:
            continue
        times = times_ours(found["ratio_of_stalls"]["median"])
        lines.append(f"{f'cold restart of {name}, ms':36} {_spread_text(found['stall_ms'])}: {times}")
    if gate := metrics.get("gate"):
        verdict = "holds" if gate["holds"] else "does not hold"
        judged_of = f"{gate['stall_median_ms_max']:.0f} ms, {metrics['stall_judged_ms']['n']} trials"
        lines.append(f"gate (median at most {judged_of}): {verdict}")
    else:
        lines.append("gate: no lost worker held a stream")
    lines.append(
        f"{metrics.get('requests', 0)} requests, {len(metrics.get('failed', ()))} failed; "
        f"{metrics.get('compared', 0)} compared, {len(metrics.get('differing', ()))} differ"
    )
    return "\n".join(lines)


def _spread_text(found: dict[str, float]) -> str:
    return (
        f"median {found['median']:.1f}, P95 {found['p95']:.1f} ({found['min']:.1f} to {found['max']:.1f}, "
        f"n={found['n']})"
    )
