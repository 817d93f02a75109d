"""What came out of simulated runs, and what must never come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

VIOLATIONS_MAX: Final = 20


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times in us of simulated time, except ``event_cost_us``."""

    load: str
    seed: int
    attention_workers: int
    expert_workers: int

    simulated_us: int
    steps: int
    """Forward passes that ended."""
    decode_step_us: float
    """Mean time of a decode step."""
    decode_step_us_by_pace: dict[str, float]
    """The same, by factor of the attention worker's times."""
    decode_step_us_p99: float

    frames: int
    replayed_frames: int
    batches: int
    batch_fill: float
    """Attention workers per decode batch."""
    pairs_per_batch: float
    waits: int
    waits_expired_in_faults: int
    """Waits that reached their bound while a worker had failed."""
    waiting_share: float
    """Share of the expert workers' time in which they were idle and held frames back."""
    busy_share: float
    """Share of the expert workers' time in which they computed."""

    events: int
    event_cost_us: float
    """Real time per event spent in the batcher; 0 if it was not measured."""
    violations: tuple[str, ...]
    """Promises that were broken: empty, or the batcher or the simulator is wrong."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the runs of one load and number of attention workers."""

    load: str
    attention_workers: int
    runs: int
    decode_step_us: float
    batch_fill: float
    waiting_share: float
    busy_share: float
    waits: int
    waits_expired_in_faults: int
    event_cost_us: float
    violations: int


def summarise(reports: Sequence[Report]) -> list[Summary]:
    """Group runs by load and number of attention workers."""
    groups: dict[tuple[str, int], list[Report]] = {}
    for report in reports:
        groups.setdefault((report.load, report.attention_workers), []).append(report)
    return [_summary(load, workers, runs) for (load, workers), runs in sorted(groups.items())]


def _summary(load: str, workers: int, runs: Sequence[Report]) -> Summary:
    def mean(name: str) -> float:
        return float(sum(getattr(run, name) for run in runs)) / len(runs)

    return Summary(
        load=load,
        attention_workers=workers,
        runs=len(runs),
        decode_step_us=mean("decode_step_us"),
        batch_fill=mean("batch_fill"),
        waiting_share=mean("waiting_share"),
        busy_share=mean("busy_share"),
        waits=sum(run.waits for run in runs),
        waits_expired_in_faults=sum(run.waits_expired_in_faults for run in runs),
        event_cost_us=mean("event_cost_us"),
        violations=sum(len(run.violations) for run in runs),
    )


def render(reports: Sequence[Report]) -> str:
    """A table of the summaries, and every violation with the run that showed it."""
    lines = [
        f"{'load':16}{'AWs':>4}{'runs':>6}{'fill':>7}{'step ms':>9}{'busy':>7}{'waiting':>9}"
        f"{'waits':>8}{'expired':>9}{'us/event':>10}{'wrong':>7}"
    ]
    lines += [
        f"{s.load:16}{s.attention_workers:4}{s.runs:6}{s.batch_fill:7.2f}{s.decode_step_us / 1000:9.1f}"
        f"{s.busy_share:7.1%}{s.waiting_share:9.1%}{s.waits:8}{s.waits_expired_in_faults:9}"
        f"{s.event_cost_us:10.1f}{s.violations:7}"
        for s in summarise(reports)
    ]
    lines += [
        f"{r.load}, seed {r.seed}, {r.attention_workers} AW, {r.expert_workers} EW: {violation}"
        for r in reports
        for violation in r.violations
    ]
    return "\n".join(lines)
