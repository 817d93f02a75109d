"""Which benchmarks make up the evaluation, with which sizes, and what each is planned to take.

Planned seconds were taken on two cores without AMX. The sizes of a full run add up to less than
FULL_BUDGET_S, those of --quick to less than QUICK_BUDGET_S; what does not fit into what is left is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from tarragon.bench import (
    ablation,
    batchsize,
    checkpoint,
    costmodel,
    failover_report,
    profile,
    restore,
    shadow,
    steady,
    steady_report,
    traffic,
)

FULL_BUDGET_S: Final = 5_400.0
QUICK_BUDGET_S: Final = 600.0
LIMIT_OVER_PLAN: Final = 1.8
LIMIT_MARGIN_S: Final = 30.0
"""A benchmark is stopped after LIMIT_OVER_PLAN times what it is planned to take, and this much more."""

Result = Mapping[str, Any]


class Part(NamedTuple):
    """One run of one benchmark."""

    key: str
    """Name of its files and of its section's anchor."""
    bench: str
    title: str
    paper: str
    """Where the paper has it."""
    full: str
    """Arguments of a full run."""
    full_s: float
    quick: str | None
    """The same for --quick; None if it is too long for that, however small."""
    quick_s: float
    table: Callable[[Result], str]
    """Text made of its JSON alone; raises KeyError or ValueError if that is not whole."""

    def arguments(self, quick: bool) -> list[str]:
        wanted = self.quick if quick else self.full
        assert wanted is not None
        return wanted.split()

    def planned_s(self, quick: bool) -> float:
        return self.quick_s if quick else self.full_s

    def limit_s(self, quick: bool, left_s: float) -> float:
        """How long it may take at most when so much of the budget is left."""
        return min(left_s, LIMIT_OVER_PLAN * self.planned_s(quick) + LIMIT_MARGIN_S)


def _metrics(table: Callable[[dict[str, Any]], str]) -> Callable[[Result], str]:
    return lambda result: table(result["metrics"])


_FAILOVER: Final = "--layers 4 --trials 5 --control-s 20 --role"
_FAILOVER_QUICK: Final = "--quick --trials 1 --control-s 0 --role"
PARTS: Final = (
    Part(
        "costmodel",
        "costmodel",
        "What a failure costs, by the model and here",
        "2.2.2, table 1, fig. 4, appendix A",
        "--layers 4",
        300.0,
        "--quick --points 16",
        90.0,
        _metrics(costmodel.table),
    ),
    Part(
        "failover-expert",
        "failover",
        "An expert worker is killed under load",
        "7.2, fig. 9 (c)",
        f"{_FAILOVER} expert --baseline-trials 2",
        290.0,
        f"{_FAILOVER_QUICK} expert --baseline-trials 0",
        60.0,
        lambda result: failover_report.table(dict(result)),
    ),
    Part(
        "failover-attention",
        "failover",
        "An attention worker is killed under load",
        "7.2, fig. 9 (b)",
        f"{_FAILOVER} attention --baseline-trials 2",
        310.0,
        f"{_FAILOVER_QUICK} attention --baseline-trials 0",
        50.0,
        lambda result: failover_report.table(dict(result)),
    ),
    Part(
        "steady",
        "steady",
        "Latency and tokens/s over the request rate",
        "7.3, figs. 10, 11",
        "--open --layers 4 --rounds 2 --window-s 10",
        1_320.0,
        "--open --quick --workloads random --sides decoupled --loads 0.6 --window-s 5",
        55.0,
        _metrics(steady_report.report),
    ),
    Part(
        "steady-closed",
        "steady",
        "Tokens/s of so many streams against monolithic vLLM",
        "7.3",
        "--requests-per-stream 1",
        1_130.0,
        None,  # vLLM compiles for minutes, whatever the load
        0.0,
        lambda result: steady.table(dict(result)),
    ),
    Part(
        "profile",
        "profile",
        "Where a decode step's time goes",
        "behind 7.3",
        "",
        60.0,
        "--layers 4 --streams 8 --seconds 4",
        25.0,
        _metrics(profile.report),
    ),
    Part(
        "ablation",
        "ablation",
        "Without one part of the protection after the other",
        "appendix F, fig. 15",
        "--layers 4 --loads 0.5 1.2 --rounds 5 --window-s 7",
        850.0,
        "--quick --rounds 1",
        65.0,
        _metrics(ablation.table),
    ),
    Part(
        "checkpoint",
        "checkpoint",
        "Tokens/s by the way to checkpoint",
        "7.4",
        "--rounds 6 --pair-rounds 2 --steps-s 120",
        330.0,
        "--quick --rounds 1 --pair-rounds 2 --window-s 1.5 --steps-s 8",
        35.0,
        _metrics(checkpoint.report),
    ),
    Part(
        "restore",
        "restore",
        "Going on elsewhere, against computing again",
        "7.4, fig. 12",
        "--trials 1",
        220.0,
        "--quick",
        45.0,
        _metrics(restore.report),
    ),
    Part(
        "traffic",
        "traffic",
        "What moves within a few layers",
        "6.1, fig. 8, appendix C",
        "",
        50.0,
        "--quick",
        22.0,
        _metrics(traffic.report),
    ),
    Part(
        "batchsize",
        "batchsize",
        "Rows that an expert gets at once",
        "appendix B, fig. 13 (a)",
        "",
        90.0,
        "--quick --concurrency 1 8",
        30.0,
        _metrics(batchsize.table),
    ),
    Part(
        "shadow",
        "shadow",
        "An expert's latency, and a shadow beside it",
        "appendices B, D, figs. 13 (b), 14",
        "--calls 8",
        150.0,
        "--layers 4 --rounds 5 --calls 6 --total 64",
        25.0,
        _metrics(shadow.table),
    ),
)


def planned(quick: bool) -> tuple[Part, ...]:
    """What a run consists of."""
    return tuple(part for part in PARTS if not quick or part.quick is not None)
