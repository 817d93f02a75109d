"""Medians, spreads and intervals of paired measurements."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

BOOTSTRAP_SAMPLES = 2_000
PAIRS_MIN = 5


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics; ``share`` in 0..1; 0.0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    """min, median and max: what a noisy machine lets one say."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


def interval(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % bootstrap interval of ``statistic`` over ``values``."""
    rng = random.Random(seed)
    drawn = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(BOOTSTRAP_SAMPLES))
    return drawn[int(0.025 * BOOTSTRAP_SAMPLES)], drawn[int(0.975 * BOOTSTRAP_SAMPLES) - 1]


def judge(
    ci95: Sequence[float],
    pairs: int,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> str:
    """Whether the whole 95 % interval keeps the bounds: "holds", "does not hold" or "inconclusive".

    An interval of fewer than PAIRS_MIN pairs says nothing: no bootstrap is wider than its few values.
    """
    low, high = ci95
    if pairs < PAIRS_MIN:
        return "inconclusive"
    if at_least <= low and high <= at_most:
        return "holds"
    return "does not hold" if high < at_least or low > at_most else "inconclusive"


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Ratio a/b pair by pair: median, spread, 95 % interval of the median."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, high = interval(ratios)
    return {**summary(ratios), "ci95": [low, high], "pairs": ratios}
