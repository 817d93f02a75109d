"""What does a failure cost (2.2.2)? Equations 1 to 4, and what self-healing leaves of them. Pure.

Symbols, as in the paper: a model has L layers; a request has decoded i - 1 tokens and fails in layer l of the
i-th (1 <= l <= L, i >= 1). T_w is the time to start a worker anew. t_pre and t_dec are the times of one layer
for one request: in a prefill of its whole prompt, and in a decode step for one token. g_pre and g_dec are the
same in GPU-time per worker, and M is the number of workers that compute again. Times are seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple


class Profile(NamedTuple):
    """The constants of one deployment (table 1)."""

    worker_start_s: float
    """T_w."""
    prefill_layer_s: float
    """t_pre."""
    decode_layer_s: float
    """t_dec."""
    prefill_layer_cost: float = 0.0
    """g_pre, in GPU-time; the paper gives no unit."""
    decode_layer_cost: float = 0.0
    """g_dec, in the same unit."""


PAPER_LAYERS: Final = 32
"""Mixtral-8x7B (2.2.2)."""
PAPER_WORKERS: Final = 16
"""M: 16 workers in either deployment (2.2.2); equation 3 counts all of them for a lost AW, too."""
PAPER_PROMPT_TOKENS: Final = 128
"""Observation 2 names it; that table 1 was profiled with it is assumed."""
PAPER_MONOLITHIC: Final = Profile(24.0, 1.68e-3, 0.58e-3, 0.010, 0.0028)
"""Table 1, vLLM."""
PAPER_DECOUPLED: Final = Profile(18.5, 2.18e-3, 0.85e-3, 0.006, 0.0022)
"""Table 1, MegaScale-Infer."""
PAPER_TOKENS: Final = (1, 64, 128, 256, 512, 1024, 2048)
"""Where figure 4 is computed here. Its own range is in the picture, not in the text: assumed."""


def layers_decoded(layers: int, layer: int, token: int) -> int:
    """(i - 1) L + l: decode layers up to layer ``layer`` (l) of token ``token`` (i) of a model of L layers.

    Raises ValueError for a point that does not exist.
    """
    if not 1 <= layer <= layers or token < 1:
        raise ValueError(f"there is no layer {layer} of {layers} in token {token}")
    return (token - 1) * layers + layer


def replay_s(profile: Profile, layers: int, layer: int, token: int) -> float:
    """L t_pre + [(i - 1) L + l] t_dec: seconds to compute everything up to (l, i) again (in equation 1)."""
    decoded = layers_decoded(layers, layer, token)
    return layers * profile.prefill_layer_s + decoded * profile.decode_layer_s


def stall_of_replay_s(profile: Profile, layers: int, layer: int, token: int) -> float:
    """Equation 1: T_stall of a monolithic worker or of a decoupled AW, in seconds: T_w and the replay."""
    return profile.worker_start_s + replay_s(profile, layers, layer, token)


def stall_of_expert_worker_s(profile: Profile) -> float:
    """Equation 2: T_stall of a decoupled EW, in seconds: T_w + t_dec, wherever it failed."""
    return profile.worker_start_s + profile.decode_layer_s


def cost_of_replay(profile: Profile, workers: int, layers: int, layer: int, token: int) -> float:
    """Equation 3: G of a monolithic worker or of a decoupled AW, in GPU-time: M times the replay."""
    decoded = layers_decoded(layers, layer, token)
    return workers * (layers * profile.prefill_layer_cost + decoded * profile.decode_layer_cost)


def cost_of_expert_worker(profile: Profile) -> float:
    """Equation 4: G of a decoupled EW, in GPU-time: g_dec, one layer on one worker."""
    return profile.decode_layer_cost


# ------------------------------------------------------------------ what self-healing leaves of it


def stall_of_restore_s(
    profile: Profile, layers: int, rows: int, restore_s_per_row: float, detect_s: float
) -> float:
    """T_stall of an AW whose requests go on elsewhere from their checkpoints, in seconds (3.1, 6.2).

    The paper says it in words ("roughly one decoding layer at the current frontier"): no T_w and no replay,
    but ``detect_s`` to find out, restoring ``rows`` positions, and the L layers of the token under way again.
    """
    return detect_s + rows * restore_s_per_row + layers * profile.decode_layer_s


def stall_of_reroute_s(profile: Profile, detect_s: float) -> float:
    """T_stall of an EW whose rows go to a shadow, in seconds (5.1): finding out, and t_dec once more."""
    return detect_s + profile.decode_layer_s


# ------------------------------------------------------------------ observations (1) to (3)


class Check(NamedTuple):
    """One of the paper's statements, as something that can fail."""

    statement: str
    figure: float
    """What decides."""
    wanted: str
    holds: bool


def observation_growth(profile: Profile, workers: int, layers: int, tokens: Sequence[int]) -> list[Check]:
    """Observation 1: stall and wasted computation grow rapidly with i. "Rapidly" is made precise here:

    the stall at the last of ``tokens`` is at least twice that at the first, and the computation grows by at
    least nine tenths of the growth of i over the upper half of the range; both grow at every point.
    """
    stalls = [stall_of_replay_s(profile, layers, layers, token) for token in tokens]
    costs = [cost_of_replay(profile, workers, layers, layers, token) for token in tokens]
    grows = all(a < b for found in (stalls, costs) for a, b in itertools.pairwise(found))
    middle = len(tokens) // 2
    slope = (costs[-1] / costs[middle]) / (tokens[-1] / tokens[middle])
    growth = stalls[-1] / stalls[0]
    span = f"from token {tokens[0]} to {tokens[-1]}"
    return [
        Check(f"the stall grows {span}", growth, "at least 2 times", grows and growth >= 2.0),
        Check(
            f"the wasted computation grows as i does, {tokens[middle]} to {tokens[-1]}",
            slope,
            "at least 0.9 of it",
            grows and slope >= 0.9,
        ),
    ]


def decode_over_prefill(profile: Profile, workers: int, layers: int, token: int) -> float:
    """G after ``token`` tokens over G of a failure at the end of the prefill."""
    prefill = workers * layers * profile.prefill_layer_cost
    return cost_of_replay(profile, workers, layers, layers, token) / prefill


def observation_decoding(
    profile: Profile, workers: int, layers: int, *, expected: float | None = None
) -> Check:
    """Observation 2: with 64 tokens decoded, recovery costs about 19 times that of a failed prefill.

    Table 1 gives that figure for G of the monolithic deployment (18.9); "about" is half a unit here. Without
    ``expected`` only the statement's point is checked: decoding dominates, so the ratio is above 2.
    """
    ratio = decode_over_prefill(profile, workers, layers, 64)
    statement = "recovery after 64 tokens over recovery of a prefill"
    if expected is None:
        return Check(statement, ratio, "above 2", ratio > 2.0)
    return Check(statement, ratio, f"{expected:g} within 0.5", abs(ratio - expected) <= 0.5)


def observation_constant(profile: Profile, layers: int, tokens: Sequence[int]) -> list[Check]:
    """Observation 3: a lost EW costs the same wherever it fails, next to nothing in computation; T_w stays.

    The share of T_w in its stall is at least 0.99, and its computation at most 1 % of a lost AW's on a single
    worker even at the first of ``tokens``.
    """
    share = profile.worker_start_s / stall_of_expert_worker_s(profile)
    waste = cost_of_expert_worker(profile) / cost_of_replay(profile, 1, layers, layers, tokens[0])
    return [
        Check("the worker's start in the stall of a lost EW", share, "at least 0.99", share >= 0.99),
        Check("computation of a lost EW over a lost AW's", waste, "at most 0.01", waste <= 0.01),
    ]
