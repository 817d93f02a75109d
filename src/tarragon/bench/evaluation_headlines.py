"""The paper's headlines beside what was measured here: one row each, made of the benchmarks' results. Pure.

The paper's numbers are quoted with their sections and never compared with: what is compared are the sides of
one run on one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from tarragon.bench.failover_report import times_ours

Results = Mapping[str, Mapping[str, Any]]
"""The JSON of each part that has one, by its key."""


class Headline(NamedTuple):
    """One row of the page's table."""

    what: str
    section: str
    theirs: str
    part: str
    """Key of the part whose result it is."""
    ours: Callable[[Mapping[str, Any]], str]
    """Raises KeyError, IndexError or TypeError if the result is not whole."""


def _ratio(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['median']:.2f} ({low:.2f} to {high:.2f}, n={found['n']})"


def _stall(metrics: Mapping[str, Any]) -> str:
    stall = metrics.get("stall_judged_ms", metrics["stall_ms"])
    text = f"{stall['median']:.0f} ms ({stall['min']:.0f} to {stall['max']:.0f}, {stall['n']} trials)"
    baseline = metrics["baseline"].get("tarragon", {})
    if "stall_ms" not in baseline:
        return f"{text}; no cold restart in this run"
    seconds, ratio = baseline["stall_ms"]["median"] / 1e3, baseline["ratio_of_stalls"]["median"]
    return f"{text}; cold restart of all: {seconds:.1f} s, {times_ours(ratio)}"


def _claim(side: str) -> Callable[[Mapping[str, Any]], str]:
    def ours(metrics: Mapping[str, Any]) -> str:
        if "error" in metrics["sides"].get(side, {}):
            return f"did not run here: {metrics['sides'][side]['error']}"
        if side not in metrics["ratios"]:
            return "left out of this run"
        ratio = metrics["ratios"][side]["tokens_per_s"]
        claim = next(one for one in metrics["claims"] if one["ratio"] == ratio)
        return f"ratio of tokens/s {_ratio(ratio)}: {claim['verdict']}"

    return ours


def _latency(metrics: Mapping[str, Any]) -> str:
    found = metrics["ratios"]["decoupled"]
    return f"ratio of TTFT {_ratio(found['ttft_median_ms'])}, of TBT {_ratio(found['tbt_median_ms'])}"


def _gate(metrics: Mapping[str, Any]) -> str:
    streams, found = max(metrics["by_concurrency"].items(), key=lambda item: int(item[0]))
    verdict = (
        f": at least {found['gate']['ratio_min']:.2f} {found['gate']['verdict']}" if "gate" in found else ""
    )
    return f"{streams} streams: {_ratio(found['ratio'])}{verdict}"


def _variants(metrics: Mapping[str, Any]) -> str:
    found = [
        (name, side["verdict"], side["ratio"]["median"])
        for rates in metrics["rates"].values()
        for sides in rates.values()
        for name, side in sides.items()
        if name != "tarragon"
    ]
    verdicts = [verdict for _, verdict, _ in found]
    name, _, ratio = max(found, key=lambda one: abs(one[2] - 1.0))
    counted = ", ".join(
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in ("holds", "inconclusive", "does not hold")
        if verdict in verdicts
    )
    return f"largest deviation {ratio - 1:+.1%} ({name}); of {len(found)} comparisons {counted}"


def _segments(metrics: Mapping[str, Any]) -> str:
    cost = metrics["cost"]
    found = [_cost("of tokens/s", cost, cost["median"], cost["n"])]
    if "step_cost" in metrics:  # the steps were enough
        steps = {"of a step's time": "step_cost", "of the CPU time per token": "step_cpu_cost"}
        found += [
            _cost(what, metrics[name], metrics[name]["mean"], metrics["step_pairs"])
            for what, name in steps.items()
        ]
    return "at most 1 %: " + "; ".join(found)


def _cost(what: str, cost: Mapping[str, Any], middle: float, pairs: float) -> str:
    low, high = cost["ci95"]
    return f"{what} {middle:.2%} ({low:.2%} to {high:.2%}, n={pairs:.0f}) {cost['verdict']}"


def _pause(metrics: Mapping[str, Any]) -> str:
    found = metrics["pause-8"]["ratio"]
    low, high = found["ci95"]
    return f"{1 / found['median']:.2f} times slower ({1 / high:.2f} to {1 / low:.2f}, n={found['n']})"


def _last_point(metrics: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    points: Mapping[str, Mapping[str, Any]] = metrics["points"]
    return max(points.items(), key=lambda item: int(item[0]))


def _replay(way: str) -> Callable[[Mapping[str, Any]], str]:
    def ours(metrics: Mapping[str, Any]) -> str:
        point, found = _last_point(metrics)
        return f"{found[f'{way}_over_restore']['median']:.0f} times at token {point}"

    return ours


def _restored_share(metrics: Mapping[str, Any]) -> str:
    point, found = _last_point(metrics)
    replayed = found["restored_positions"]["median"] * metrics["formula"]["experts_bytes_per_token"]
    return f"{found['restored_bytes']['median'] / replayed:.2f} at token {point} (replay by formula)"


def _traffic(metrics: Mapping[str, Any]) -> str:
    over = metrics["checkpoints_over_experts"]
    return f"{over['moved']:.3f} moved, {over['formula']:.3f} by the formula for the demo model"


def _gaps(metrics: Mapping[str, Any]) -> str:
    return (
        f"{metrics['gap_share_of_time']:.0%} of the time rows are out; "
        f"{metrics['segment_bytes_in_gaps']:.0%} of the segments' bytes are written then"
    )


def _batches(metrics: Mapping[str, Any]) -> str:
    streams, found = max(metrics["streams"].items(), key=lambda item: int(item[0]))
    most = found["quantiles"]["0.9"]
    return f"{streams} streams: {found['rows_mean']:.1f} rows in the mean, 90 % at most {most:g}"


def _knee(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['knee']['rows']:.0f} rows"


def _sides(side: str) -> Callable[[Mapping[str, Any]], str]:
    def ours(metrics: Mapping[str, Any]) -> str:
        total, found = max(metrics["sides"].items(), key=lambda item: int(item[0]))
        verdict = f": {found['verdict']}" if side == "shadow" else ""
        return f"{total} rows: {_ratio(found[side]['ratio'])}{verdict}"

    return ours


def _observations(metrics: Mapping[str, Any]) -> str:
    theirs = [check["holds"] for check in metrics["paper"]["checks"]]
    ours = [check["holds"] for found in metrics["here"].values() for check in found["checks"]]
    return (
        f"with table 1: {sum(theirs)} of {len(theirs)} checks hold; "
        f"with constants from here: {sum(ours)} of {len(ours)}"
    )


HEADLINES: Final = (
    Headline(
        "Observations (1) to (3) on the cost of a failure", "2.2.2", "stated", "costmodel", _observations
    ),
    Headline(
        "Stall when an expert worker dies",
        "7.2",
        "0.3 s against 64 s, 213 times shorter",
        "failover-expert",
        _stall,
    ),
    Headline(
        "Stall when an attention worker dies",
        "7.2",
        "0.4 s against 64 s, 160 times shorter",
        "failover-attention",
        _stall,
    ),
    Headline(
        "Tokens/s against the decoupled system without resilience",
        "7.3",
        "within 2.8 %",
        "steady",
        _claim("decoupled"),
    ),
    Headline("TTFT and TBT against the same", "7.3", "tracks it closely", "steady", _latency),
    Headline(
        "Tokens/s above vLLM with tensor parallelism", "7.3", "16 ways, higher", "steady", _claim("vllm-tp2")
    ),
    Headline(
        "Tokens/s above vLLM with pipeline parallelism",
        "7.3",
        "16 stages, higher",
        "steady",
        _claim("vllm-pp2"),
    ),
    Headline("Tokens/s above vLLM at its defaults", "not in the paper", "-", "steady", _claim("vllm")),
    Headline("The same with a fixed number of streams", "not in the paper", "-", "steady-closed", _gate),
    Headline(
        "Without checkpoints, detection, routing table",
        "appendix F",
        "less than 3 % apart",
        "ablation",
        _variants,
    ),
    Headline("Cost of incremental checkpoints", "7.4", "1147 of 1148 tokens/s", "checkpoint", _segments),
    Headline("Pause, checkpoint, resume every 8 tokens", "7.4", "2.15 times slower", "checkpoint", _pause),
    Headline("Restoration against parallel replay", "7.4", "10 times faster", "restore", _replay("parallel")),
    Headline(
        "Restoration against sequential replay",
        "7.4",
        "up to 1800 times faster",
        "restore",
        _replay("sequential"),
    ),
    Headline("Bytes moved by restoration, of replay's", "7.4", "about 1/8", "restore", _restored_share),
    Headline("Checkpoint bytes, of AW-EW traffic", "appendix C", "0.125 (Mixtral)", "traffic", _traffic),
    Headline("Segments go into the gaps", "6.1, fig. 8", "stated", "traffic", _gaps),
    Headline("Rows of one expert at once", "appendix B", "mostly below 200 of 821", "batchsize", _batches),
    Headline("Knee of an expert's latency", "appendix B", "256 to 512 rows (A100)", "shadow", _knee),
    Headline(
        "Expert with a shadow that is loaded, of without",
        "appendix D",
        "identical",
        "shadow",
        _sides("shadow"),
    ),
    Headline(
        "Two experts at once, of one", "appendix D", "significant interference", "shadow", _sides("at once")
    ),
)


def rows(results: Results) -> Iterator[list[str]]:
    """What, section, theirs, ours, conditions; "no result" where its part has none."""
    for line in HEADLINES:
        result = results.get(line.part)
        ours, conditions = "no result", ""
        if result is not None:
            conditions = _conditions(result["settings"])
            try:
                ours = line.ours(result["metrics"])
            except (KeyError, IndexError, TypeError, ValueError, StopIteration):
                ours = "not measured in this run"
        yield [line.what, line.section, line.theirs, ours, conditions]


def _conditions(settings: Mapping[str, Any]) -> str:
    model = str(settings.get("model", ""))
    layers = next((part for part in model.split("-") if part.startswith("layers")), "")
    workers = (
        f"{settings['attention_workers']} + {settings['expert_workers']} workers"
        if ("attention_workers" in settings)
        else ""
    )
    rest = [
        f"{settings[key]} {what}"
        for key, what in (("streams", "streams"), ("concurrency", "streams"))
        if key in settings
    ]
    depth = f"{layers.removeprefix('layers')} layers" if layers else "all layers"
    return ", ".join(part for part in (depth, workers, *rest) if part)
