"""The picture of `tarragon bench costmodel`: figure 4, and the stalls that were measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tarragon.costmodel import Profile, stall_of_expert_worker_s, stall_of_replay_s

_COLOURS: Final = {"MO": "#555555", "AW": "#a34a28", "EW": "#2b5f8c"}
_ROLES: Final = {"attention": "AW", "expert": "EW"}
_MARKS: Final = {"tarragon": "o", "coarse": "x"}


def picture(metrics: dict[str, Any], file: Path) -> None:
    """Stall and computation over the token by table 1; beside them what was predicted and measured here."""
    figure = Figure(figsize=(14.0, 4.5), layout="constrained")
    stall, cost, here = figure.subplots(1, 3)
    curves = metrics["paper"]["curves"]
    for axes, key, label in ((stall, "stall_s", "stall, s"), (cost, "cost", "re-execution, GPU-time")):
        for worker, values in curves[key].items():
            axes.plot(curves["token"], values, "-", color=_COLOURS[worker], label=worker)
        axes.set_ylabel(label)
    stall.set_ylim(bottom=0)
    cost.set_yscale("log")
    stall.set_title("equations 1 and 2, constants of table 1")
    cost.set_title("equations 3 and 4, constants of table 1")
    draw_here(here, metrics["here"])
    here.set_title("a stream's stall here: predicted and measured")
    for axes in (stall, cost, here):
        axes.set_xlabel("tokens decoded at the failure")
    for axes in (stall, cost):
        axes.legend(fontsize="small")
    here.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(file, dpi=120)


def draw_here(axes: Axes, systems: dict[str, Any]) -> None:
    """Points are measured stalls; lines are the predictions, seconds on a logarithmic scale."""
    for name, found in systems.items():
        for role, worker in _ROLES.items():
            trials = [trial for trial in found["trials"] if trial["role"] == role]
            style: dict[str, Any] = {"color": _COLOURS[worker]}
            axes.plot(
                [trial["token"] for trial in trials],
                [trial["stall_s"] for trial in trials],
                _MARKS[name],
                label=f"{name}, {worker}: measured",
                **style,
            )
            ends = sorted((trial["token"], trial["predicted_s"]) for trial in trials)
            if name == "coarse":
                ends = [(token, _coarse_s(found, role, int(token))) for token, _ in ends]
            line = "--" if name == "coarse" else ":"
            axes.plot(*zip(*ends, strict=True), line, label=f"{name}, {worker}: predicted", **style)
    axes.set_yscale("log")
    axes.set_ylabel("stall, s")


def _coarse_s(found: dict[str, Any], role: str, token: int) -> float:
    profile = Profile(**found["constants"][role])
    if role == "expert":
        return stall_of_expert_worker_s(profile)
    return stall_of_replay_s(profile, found["layers"], 1, token + 1)
