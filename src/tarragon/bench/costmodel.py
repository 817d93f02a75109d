"""`tarragon bench costmodel`: what a failure costs by the paper's model, and what it costs here (2.2.2).

First the curves of figure 4 with the constants of table 1, and the paper's three observations as checks. Then
on real clusters: the model's constants are profiled (a stream alone, workers killed that nobody uses), and
predict the stall of a stream whose worker is killed for real at several tokens. *coarse* is the decoupled
system without resilience, where equations 1 and 2 are to hold; *tarragon* heals itself, and what the
equations leave of its stall is in ``tarragon.costmodel``. A measured stall is the largest gap after the kill
less the usual one. Equation 1 says nothing of the client that has to ask again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any, Final

from tarragon import costmodel as model_of
from tarragon.bench import output
from tarragon.bench.costmodel_trials import Streams, kill, profile, restore_s_per_row
from tarragon.bench.faults import FaultError
from tarragon.bench.load import LoadError
from tarragon.bench.modes import COARSE
from tarragon.bench.owners import ENGINE_ARGS
from tarragon.bench.progress import Bar
from tarragon.bench.stats import summary
from tarragon.cluster import Cluster, ClusterError
from tarragon.costmodel import PAPER_LAYERS, PAPER_TOKENS, PAPER_WORKERS, Check, Profile
from tarragon.models.demo import ensure_demo_model

SYSTEMS: Final[dict[str, dict[str, Any]]] = {"tarragon": {}, "coarse": COARSE}
ROLES: Final = ("attention", "expert")
QUICK_LAYERS: Final = 4
DETECT_S: Final = 0.0
"""The kernel closes a killed worker's sockets at once: that is how its peers find out."""
CARRIES_OVER: Final = (
    "Of the paper's figures its constants carry over to no other machine. What carries over is the form: "
    "which stalls grow with the token, which hold the worker's start, and which neither. Streams run alone, "
    "so a stall has no queueing in it; a worker that starts beside them takes its share of the cores, which "
    "no equation has in it."
)
_PLAN_START_S: Final = 20.0
_PLAN_KILL_S: Final = 10.0


def parser() -> argparse.ArgumentParser:
    options = output.parser("costmodel", __doc__)
    options.add_argument(
        "--points", type=int, nargs="+", help="tokens before the kill (default: 16 64 256; quick: 16 128)"
    )
    options.add_argument("--trials", type=int, help="kills of each role at each point (default: 2; quick: 1)")
    options.add_argument("--prompt-tokens", type=int, default=model_of.PAPER_PROMPT_TOKENS)
    options.add_argument("--quick", action="store_true", help="near points, one trial, the first layers")
    return options


def main(argv: list[str]) -> int:
    """Exit code 1 if one of the paper's observations does not follow from its constants, or a run failed."""
    options = parser().parse_args(argv)
    options.points = options.points or ([16, 128] if options.quick else [16, 64, 256])
    options.trials = options.trials or (1 if options.quick else 2)
    if options.quick:
        options.layers = options.layers or QUICK_LAYERS
    model = options.model or ensure_demo_model(layers=options.layers)
    settings = {
        "model": model.name,
        "points": options.points,
        "trials": options.trials,
        "prompt_tokens": options.prompt_tokens,
        "coarse": COARSE,
    }
    metrics: dict[str, Any] = {"paper": paper(), "here": {}, "carries_over": CARRIES_OVER}
    kills = (len(options.points) + 1) * options.trials * len(ROLES)
    planned_s = len(SYSTEMS) * (_PLAN_START_S + kills * _PLAN_KILL_S)
    try:
        with Bar("costmodel", planned_s) as bar:
            for name in SYSTEMS:
                measure(name, model, options, metrics["here"], bar)
                output.write(output.result("costmodel", settings, metrics), options.json)
    except (ClusterError, FaultError, LoadError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    print(table(metrics))
    if options.plot:
        from tarragon.bench.plots_costmodel import picture

        picture(metrics, options.plot)
    return 0 if all(check["holds"] for check in metrics["paper"]["checks"]) else 1


# ------------------------------------------------------------------ the paper's constants


def paper() -> dict[str, Any]:
    """Figure 4 and the observations, from table 1 and what this module's model assumes."""
    alone, apart = model_of.PAPER_MONOLITHIC, model_of.PAPER_DECOUPLED
    checks = [
        *labelled("MO", model_of.observation_growth(alone, PAPER_WORKERS, PAPER_LAYERS, PAPER_TOKENS)),
        *labelled("AW", model_of.observation_growth(apart, PAPER_WORKERS, PAPER_LAYERS, PAPER_TOKENS)),
        *labelled("MO", [model_of.observation_decoding(alone, PAPER_WORKERS, PAPER_LAYERS, expected=19.0)]),
        *labelled("AW", [model_of.observation_decoding(apart, PAPER_WORKERS, PAPER_LAYERS)]),
        *labelled("EW", model_of.observation_constant(apart, PAPER_LAYERS, PAPER_TOKENS)),
    ]
    return {
        "assumed": {
            "tokens": "figure 4's own range is not in the text",
            "cost unit": "table 1 gives GPU-time without a unit",
            "M for a lost AW": "16, as equation 3 is introduced; appendix A has only one AW compute again",
            "19 times": "G of the monolithic deployment, the only reading of table 1 that gives it (18.9)",
        },
        "monolithic": alone._asdict(),
        "decoupled": apart._asdict(),
        "curves": {
            "token": list(PAPER_TOKENS),
            "stall_s": {
                "MO": [_stall(alone, token) for token in PAPER_TOKENS],
                "AW": [_stall(apart, token) for token in PAPER_TOKENS],
                "EW": [model_of.stall_of_expert_worker_s(apart)] * len(PAPER_TOKENS),
            },
            "cost": {
                "MO": [_cost(alone, token) for token in PAPER_TOKENS],
                "AW": [_cost(apart, token) for token in PAPER_TOKENS],
                "EW": [model_of.cost_of_expert_worker(apart)] * len(PAPER_TOKENS),
            },
        },
        "checks": checks,
    }


def _stall(constants: Profile, token: int) -> float:
    return model_of.stall_of_replay_s(constants, PAPER_LAYERS, PAPER_LAYERS, token)


def _cost(constants: Profile, token: int) -> float:
    return model_of.cost_of_replay(constants, PAPER_WORKERS, PAPER_LAYERS, PAPER_LAYERS, token)


def labelled(worker: str, checks: list[Check]) -> list[dict[str, Any]]:
    return [{"worker": worker, **check._asdict()} for check in checks]


# ------------------------------------------------------------------ here


def measure(name: str, model: Path, options: argparse.Namespace, found: dict[str, Any], bar: Bar) -> None:
    """Profile one system and kill its workers; fills ``found[name]``."""
    length = options.prompt_tokens + max(options.points) + 64
    arguments = [*ENGINE_ARGS, f"--max-model-len={length}"]
    bar.doing(f"starting {name}")
    with Cluster(model, engine_args=arguments, **SYSTEMS[name]) as cluster:
        bar.done(_PLAN_START_S)
        bar.doing(f"{name}: constants")
        streams = Streams(cluster, model, options.prompt_tokens, seed=len(found))
        constants, starts_s = profile(streams, options.trials)
        per_row_s = asyncio.run(restore_s_per_row(streams, options.points[0])) if name == "tarragon" else 0.0
        bar.done(len(ROLES) * options.trials * _PLAN_KILL_S)
        trials: list[dict[str, Any]] = []
        for point in options.points:
            for role in ROLES * options.trials:
                bar.doing(f"{name}: a kill at token {point}")
                trials.append({"role": role, "point": point, **asyncio.run(kill(streams, role, point))})
                bar.done(_PLAN_KILL_S)
    found[name] = {"starts_s": starts_s, **conclude(name, streams.layers, constants, trials, per_row_s)}


def conclude(
    name: str,
    layers: int,
    constants: dict[str, Profile],
    trials: list[dict[str, Any]],
    per_row_s: float,
) -> dict[str, Any]:
    """Predictions beside what was measured, by role and point; the observations with these constants."""
    by_point: dict[str, Any] = {}
    for trial in trials:
        trial["predicted_s"] = predict(name, layers, constants, trial, per_row_s)
        trial["measured_over_predicted"] = trial["stall_s"] / trial["predicted_s"]
    for key in dict.fromkeys((trial["role"], trial["point"]) for trial in trials):
        group = [trial for trial in trials if (trial["role"], trial["point"]) == key]
        by_point[f"{key[0]}, token {key[1]}"] = {
            what: summary([trial[what] for trial in group])
            for what in ("stall_s", "predicted_s", "measured_over_predicted")
        }
    tokens = PAPER_TOKENS
    checks = [
        *labelled("AW", model_of.observation_growth(constants["attention"], 1, layers, tokens)),
        *labelled("AW", [model_of.observation_decoding(constants["attention"], 1, layers)]),
        *labelled("EW", model_of.observation_constant(constants["expert"], layers, tokens)),
    ]
    return {
        "layers": layers,
        "constants": {role: found._asdict() for role, found in constants.items()},
        "restore_s_per_row": per_row_s,
        "trials": trials,
        "by_point": by_point,
        "checks": checks if name == "coarse" else [],
    }


def predict(
    name: str, layers: int, constants: dict[str, Profile], trial: dict[str, Any], per_row_s: float
) -> float:
    """The stall that the model predicts for one kill, in seconds."""
    found = constants[trial["role"]]
    if name == "coarse":
        if trial["role"] == "expert":
            return model_of.stall_of_expert_worker_s(found)
        # It failed in the first layer of the token after those that were read.
        return model_of.stall_of_replay_s(found, layers, 1, int(trial["token"]) + 1)
    if trial["role"] == "expert":
        return model_of.stall_of_reroute_s(found, DETECT_S)
    return model_of.stall_of_restore_s(found, layers, int(trial["rows"]), per_row_s, DETECT_S)


def table(metrics: dict[str, Any]) -> str:
    """The result for a person."""
    checks = [("table 1", check) for check in metrics["paper"]["checks"]]
    rows: list[list[Any]] = []
    for name, found in metrics["here"].items():
        checks += [("here, coarse", check) for check in found["checks"]]
        for what, figures in found["by_point"].items():
            stall, ratio = figures["stall_s"], figures["measured_over_predicted"]
            predicted = figures["predicted_s"]["median"]
            rows.append(
                [
                    f"{name}: {what}",
                    1e3 * predicted,
                    1e3 * stall["median"],
                    1e3 * stall["max"],
                    ratio["median"],
                ]
            )
    lines = [
        f"{'holds' if check['holds'] else 'does not hold'}: {of}, {check['worker']}: {check['statement']}: "
        f"{check['figure']:.3g} (wanted: {check['wanted']})"
        for of, check in checks
    ]
    heads = ["killed worker", "predicted ms", "measured ms", "at most", "measured/predicted"]
    return "\n".join([*lines, "", output.table(heads, rows), "", metrics["carries_over"]])
