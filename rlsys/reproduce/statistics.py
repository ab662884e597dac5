"""What a few seeds can say: means with Student-t intervals, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

Verdict = Literal["as the paper", "opposite", "not decided (interval holds 0)", "not decided (too few seeds)"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with half the width of its 95 % interval, which takes at least two numbers."""

    mean: float
    half_width: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean of independent numbers and its interval, t * s / sqrt(n) to each side; None where there is no number."""
    if not values:
        return None
    count = len(values)
    if count == 1:
        return Estimate(mean=values[0], half_width=None, count=1)
    half_width = student_t(count - 1) * stdev(values) / math.sqrt(count)
    return Estimate(mean=fmean(values), half_width=half_width, count=count)


def verdict(difference: Estimate | None) -> Verdict:
    """What the interval of a difference says of a claim that it is above 0."""
    if difference is None or difference.half_width is None:
        return "not decided (too few seeds)"
    if difference.mean - difference.half_width > 0:
        return "as the paper"
    return "opposite" if difference.mean + difference.half_width < 0 else "not decided (interval holds 0)"


def student_t(degrees: int) -> float:
    """The number that |t| of so many degrees of freedom stays below with a probability of 95 %.

    By bisection of the distribution's finite sums for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    low, high = 0.0, 13.0  # the largest, of one degree, is 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """Probability that |t| of a Student-t variable is smaller than this."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for index in range(degrees // 2):
        total += term
        term *= cosine**2 * (2 * index + 1 + odd) / (2 * index + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
