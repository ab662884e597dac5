"""Strengths from comparisons: which pairs to compare, and the Bradley-Terry fit that turns the answers into Elo points.

Bradley and Terry (1952), "Rank analysis of incomplete block designs": P(i beats j) = 1 / (1 + exp(s_j - s_i)). The
strengths s are the maximum of the likelihood under a stated prior, found by Newton's method.
"""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
from numpy.typing import NDArray

ELO_PER_STRENGTH = 400.0 / math.log(10.0)
"""Elo points of one unit of strength: 400 points are odds of 10 to 1."""

_MAX_STEPS = 100
_TOLERANCE = 1e-12


def choose_pairs(count: int, *, max_pairs: int | None, seed: str) -> list[tuple[int, int]]:
    """Pairs (i < j) of `count` players: all of them, or so many that nobody is in more than `max_pairs`.

    The chosen ones are neighbours on a ring in seeded order, and their neighbours up to `max_pairs // 2` places away:
    everybody is connected with everybody and plays about as often.
    """
    if max_pairs is None or max_pairs >= count - 1:
        return list(itertools.combinations(range(count), 2))
    if max_pairs < 2:
        raise ValueError(f"max_pairs is {max_pairs}; at least 2, or the players fall into groups never compared")
    ring = list(range(count))
    random.Random(seed).shuffle(ring)
    chosen = {
        tuple(sorted((ring[place], ring[(place + step) % count])))
        for place in range(count)
        for step in range(1, max_pairs // 2 + 1)
    }
    return sorted((first, second) for first, second in chosen)


def fit_strengths(wins: NDArray[np.float64], *, prior_games: float) -> NDArray[np.float64]:
    r"""Strengths [N] that make these results likeliest; `wins` [N, N] says how often row beat column (fractions count).

    Maximises $\sum_{ij} w_{ij} \log f(s_i - s_j) + \frac{a}{2} \sum_i (\log f(s_i) + \log f(-s_i))$, f the logistic
    function: the prior is `prior_games` = a > 0 games of each player against one of strength 0, half of them won. It
    keeps the strengths of the unbeaten and of those that never won finite.
    """
    count = len(wins)
    if wins.shape != (count, count) or not np.isfinite(wins).all() or (wins < 0).any():
        raise ValueError(f"wins must be a square table of finite numbers from 0, got shape {wins.shape}: {wins}")
    if not (math.isfinite(prior_games) and prior_games > 0):
        raise ValueError(f"prior_games is {prior_games}; it must be above 0, or the unbeaten have no finite strength")
    games = wins + wins.T
    strengths = np.zeros(count)
    for _ in range(_MAX_STEPS):
        beats = _logistic(strengths[:, None] - strengths[None, :])
        alone = _logistic(strengths)
        slope = wins.sum(1) - (games * beats).sum(1) + prior_games * (0.5 - alone)
        weights = games * beats * (1 - beats)
        curvature = np.diag(weights.sum(1) + prior_games * alone * (1 - alone)) - weights
        step = np.linalg.solve(curvature, slope)
        step *= min(1.0, 2.0 / max(np.abs(step).max(initial=0.0), _TOLERANCE))  # far from the top a step overshoots
        strengths = strengths + step
        if np.abs(step).max(initial=0.0) < _TOLERANCE:
            break
    return strengths


def _logistic(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + exp(-value)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * value))


def win_probabilities(strengths: NDArray[np.float64], opponent: float) -> NDArray[np.float64]:
    """How likely each wins against an opponent of this strength, [N]."""
    return _logistic(strengths - opponent)
