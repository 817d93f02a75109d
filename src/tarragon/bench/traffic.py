"""`tarragon bench traffic`: what moves between an attention worker and the others in a few layers (fig. 8).

Under a steady load of decoding streams one attention worker records what it sends to expert workers, what
they answer, and the checkpoint segments that it writes (refe/traffic.py). Shown are bytes by time over a few
layers; counted are the share of the segments that lies in the gaps, that is, after a layer's rows are out
and before its last answer is in, and the bytes of each flow by token and layer against the formulas of
appendix C. On one host the link is shared memory: a movement is a copy into it, an answer is dated when the
attention worker notices it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from tarragon.bench import output
from tarragon.bench.checkpoint import segment_bytes
from tarragon.bench.load import LoadError, closed_loop, fail_on_error
from tarragon.bench.progress import Bar
from tarragon.bench.stats import percentile, summary
from tarragon.bench.workloads import PROMPT_TOKENS, VOCABULARY_MAX, Workload
from tarragon.cluster import Cluster, ClusterError
from tarragon.models.demo import ensure_demo_model
from tarragon.models.shape import MoeModel, read_model
from tarragon.refe.traffic import FLOWS, FROM_EXPERTS, SEGMENTS, TO_EXPERTS, Movement

QUICK_LAYERS: Final = 4
WORKER: Final = "aw-0"
EVENTS_MAX: Final = 4_096
SLOTS: Final = 160
"""Bars of the picture."""
TOKENS_MAX: Final = 1_000
_WARM_TOKENS: Final = 8
_COLOURS: Final = ("#1b6e4b", "#5b7fb5", "#d08a2e")


class Exchange(NamedTuple):
    """One layer of one step."""

    out: Movement
    answers: list[Movement]
    segments: list[Movement]

    @property
    def gap_s(self) -> float:
        """From the last row out to the last answer in."""
        return max(answer.end_s for answer in self.answers) - self.out.end_s


def parser() -> argparse.ArgumentParser:
    options = output.parser("traffic", __doc__)
    options.add_argument("--streams", type=int, default=16)
    options.add_argument("--seconds", type=float, default=8.0, help="of decoding before it is looked at")
    options.add_argument("--layers-shown", type=int, default=4)
    options.add_argument("--quick", action="store_true", help="few streams, the demo model's first layers")
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.quick:
        options.streams, options.seconds = min(options.streams, 8), min(options.seconds, 5.0)
        options.layers = options.layers or (None if options.model else QUICK_LAYERS)
    model = options.model or ensure_demo_model(layers=options.layers)
    try:
        with (
            Bar("traffic", options.seconds) as bar,
            Cluster(model, 2, 2, traffic_events_max=EVENTS_MAX) as ours,
        ):
            bar.doing("decoding")
            movements = asyncio.run(observe(ours, model.name, options))
            bar.done(options.seconds)
        metrics = conclude(
            exchanges(movements), read_model(model), segment_bytes(model), options.layers_shown
        )
    except (ClusterError, LoadError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    settings = {
        "model": model.name,
        "attention_workers": 2,
        "expert_workers": 2,
        "streams": options.streams,
        "worker": WORKER,
    }
    output.write(output.result("traffic", settings, metrics), options.json)
    print(report(metrics))
    output.plot(options.plot, lambda axes: draw(axes, metrics))
    return 0


async def observe(cluster: Cluster, model: str, options: argparse.Namespace) -> list[Movement]:
    """What the worker remembers while all streams decode. Raises LoadError if they ended before."""
    streams = options.streams
    warm = Workload(0, VOCABULARY_MAX, PROMPT_TOKENS, _WARM_TOKENS, greedy=True)
    fail_on_error(await closed_loop(warm, cluster.url, model, range(streams), streams))
    steady = Workload(1, VOCABULARY_MAX, PROMPT_TOKENS, TOKENS_MAX, greedy=True)
    running = asyncio.create_task(closed_loop(steady, cluster.url, model, range(streams), streams))
    await asyncio.sleep(options.seconds)
    status = await asyncio.to_thread(cluster.status)
    if running.done():
        raise LoadError("the streams ended while they were observed: ask for fewer --seconds")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    found = next(worker.get("traffic", []) for worker in status["workers"] if worker["id"] == WORKER)
    return [Movement(*one) for one in found]


# ------------------------------------------------------------------ accounting


def exchanges(movements: Sequence[Movement]) -> list[Exchange]:
    """The layers whose beginning and end were recorded, in order; segments count to the layer they follow."""
    found: list[Exchange] = []
    for one in movements:
        if one.flow == TO_EXPERTS:
            found.append(Exchange(one, [], []))
        elif found:
            (found[-1].answers if one.flow == FROM_EXPERTS else found[-1].segments).append(one)
    return [one for one in found[:-1] if one.answers]


def conclude(
    layers: Sequence[Exchange], shape: MoeModel, formula: dict[str, float], layers_shown: int
) -> dict[str, Any]:
    """Bytes against appendix C, the gaps, and the movements of a few layers. Raises LoadError without any."""
    layers_shown = min(layers_shown, max(1, len(shape.moe_layers) - 1))  # within one step, if it can be
    if len(layers) <= layers_shown:
        raise LoadError(f"{WORKER} recorded {len(layers)} layers only: it had hardly anything to do")
    token_rows = formula["experts_bytes_per_token"] / len(shape.moe_layers) / 2
    tokens = sum(layer.out.bytes for layer in layers) / token_rows
    flows = ([one.out for one in layers], *_by_kind(layers))
    expected = (token_rows, token_rows, formula["checkpoint_bytes_per_token"] / shape.layers)
    span_s = layers[-1].out.start_s - layers[0].out.start_s
    in_gaps = sum(
        one.bytes for layer in layers for one in layer.segments if one.end_s <= layer.out.end_s + layer.gap_s
    )
    segments = sum(one.bytes for one in flows[SEGMENTS])
    return {
        "layers": len(layers),
        "tokens_per_layer": tokens / len(layers),
        "bytes_per_token_and_layer": {
            name: {"moved": sum(one.bytes for one in flow) / tokens, "formula": formula_bytes}
            for name, flow, formula_bytes in zip(FLOWS, flows, expected, strict=True)
        },
        "checkpoints_over_experts": {
            "moved": segments / max(1.0, sum(one.bytes for flow in flows[:SEGMENTS] for one in flow)),
            "formula": expected[SEGMENTS] / (2 * token_rows),
        },
        "segment_bytes_in_gaps": in_gaps / segments if segments else 0.0,
        "gap_us": _spread([1e6 * layer.gap_s for layer in layers]),
        "segment_us": _spread([1e6 * (one.end_s - one.start_s) for one in flows[SEGMENTS]]),
        "gap_share_of_time": sum(layer.gap_s for layer in layers) / span_s,
        "shown": shown(layers, layers_shown),
    }


def _by_kind(layers: Sequence[Exchange]) -> tuple[list[Movement], list[Movement]]:
    return (
        [answer for layer in layers for answer in layer.answers],
        [segment for layer in layers for segment in layer.segments],
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {**summary(values), "p95": percentile(values, 0.95)} if values else {}


def shown(layers: Sequence[Exchange], count: int) -> dict[str, Any]:
    """A run of layers of one step whose length is the median of all such runs; times in ms from its start.

    One in which segments are written, if there is one: a write has those of several layers.
    """
    runs = [layers[at : at + count + 1] for at in range(len(layers) - count)]
    runs = [run for run in runs if run[-1].out.layer > run[0].out.layer] or runs
    runs = [run for run in runs if any(layer.segments for layer in run[:-1])] or runs
    run = sorted(runs, key=lambda run: run[-1].out.start_s - run[0].out.start_s)[len(runs) // 2]
    start_s, end_s = run[0].out.start_s, run[-1].out.start_s
    movements = [one for layer in run[:-1] for one in (layer.out, *layer.answers, *layer.segments)]
    return {
        "length_ms": 1e3 * (end_s - start_s),
        "gaps_ms": [
            [1e3 * (layer.out.end_s - start_s), 1e3 * (layer.out.end_s + layer.gap_s - start_s)]
            for layer in run[:-1]
        ],
        "movements": [
            [one.flow, one.layer, 1e3 * (one.start_s - start_s), 1e3 * (one.end_s - start_s), one.bytes]
            for one in movements
        ],
    }


def slots(found: dict[str, Any], count: int) -> list[list[float]]:
    """Bytes of each flow in each of ``count`` slots of equal length; a movement is spread over its time."""
    width_ms = found["length_ms"] / count
    sums = [[0.0] * count for _ in FLOWS]
    for flow, _, start_ms, end_ms, size in found["movements"]:
        first, last = (min(count - 1, max(0, int(at / width_ms))) for at in (start_ms, end_ms))
        for slot in range(first, last + 1):
            inside_ms = min(end_ms, (slot + 1) * width_ms) - max(start_ms, slot * width_ms)
            share = inside_ms / (end_ms - start_ms) if last > first else 1.0
            sums[int(flow)][slot] += size * share
    return sums


# ------------------------------------------------------------------ showing


def report(metrics: dict[str, Any]) -> str:
    rows: list[list[Any]] = [
        [name, found["moved"], found["formula"]]
        for name, found in metrics["bytes_per_token_and_layer"].items()
    ]
    over = metrics["checkpoints_over_experts"]
    rows.append(["checkpoints over AW-EW traffic", over["moved"], over["formula"]])
    lines = [
        output.table(["bytes of a token and layer", "moved", "formula (appendix C)"], rows),
        f"{metrics['layers']} layers of {metrics['tokens_per_layer']:.1f} tokens: "
        f"{100 * metrics['gap_share_of_time']:.0f} % of the time the rows are out, "
        f"median {metrics['gap_us']['median']:.0f} us a layer; "
        f"{100 * metrics['segment_bytes_in_gaps']:.0f} % of the segments' bytes are written within",
    ]
    if metrics["segment_us"]:
        lines.append(f"a write of segments takes {metrics['segment_us']['median']:.0f} us (median)")
    return "\n".join(lines)


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """KB by time over a few layers, a row for each flow; shaded where rows are out and answers not yet in."""
    figure, found = axes.figure, metrics["shown"]
    axes.remove()
    panels = figure.subplots(len(FLOWS), 1, sharex=True)
    width_ms = found["length_ms"] / SLOTS
    at = [(slot + 0.5) * width_ms for slot in range(SLOTS)]
    for panel, name, colour, sums in zip(panels, FLOWS, _COLOURS, slots(found, SLOTS), strict=True):
        for start_ms, end_ms in found["gaps_ms"]:
            panel.axvspan(start_ms, end_ms, color="#eeeeee")
        panel.bar(at, [size / 1e3 for size in sums], width_ms, color=colour)
        panel.set_title(name, fontsize="small", loc="left", color=colour)
        panel.set_xlim(0, found["length_ms"])
    panels[1].set_ylabel(f"KB in {1e3 * width_ms:.0f} us")
    panels[-1].set_xlabel("ms (shaded: a layer's rows are out, its answers not yet in)")
