"""The KL penalty to a reference policy outside of the loss: its estimates token by token, and its weight over a run."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlsys.stage_config import RlConfig

_MAX_CHANGE = 0.2
"""The adaptive weight answers at most to an error of so large a share of the target."""


def estimate(
    logprobs: NDArray[Any], reference: NDArray[Any], estimator: Literal["k1", "k2", "k3"]
) -> NDArray[np.float64]:
    """The KL from the reference at each sampled token, with `d = reference - logprobs`, [T].

    k1 is `-d`, unbiased, negative for many tokens; k2 is `d^2 / 2`; k3 is `exp(d) - d - 1`, unbiased and never negative
    (http://joschu.net/blog/kl-approx.html). In a reward none has a gradient of its own, so k1 is as good there as its
    value.
    """
    difference: NDArray[np.float64] = reference.astype(np.float64) - logprobs
    if estimator == "k1":
        return np.asarray(-difference)
    if estimator == "k2":
        return np.asarray(difference**2 / 2)
    return np.asarray(np.exp(difference) - difference - 1)


class KlCoefficient:
    """The weight of the KL penalty from one policy step to the next.

    Constant; or a cosine from `kl_coef` to 0; or adaptive, which multiplies it after every step of n rollouts by
    `1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon`, kl being the mean of a whole rollout (arXiv 1909.08593).
    """

    def __init__(self, config: RlConfig, *, adapted: float | None = None) -> None:
        self._config = config
        self.adapted = config.kl_coef if adapted is None else adapted
        """What the adaptive weight has become: the state of a checkpoint."""

    def at(self, step: int) -> float:
        """The weight of policy step `step`, from 1."""
        if self._config.kl_schedule == "cosine":
            return self._config.kl_coef * 0.5 * (1 + math.cos(math.pi * (step - 1) / self._config.steps))
        return self.adapted

    def observe(self, kl: float, *, num_rollouts: int) -> None:
        """Take in the mean KL, in nats, of the step's rollouts; one that is not finite changes nothing."""
        if self._config.kl_schedule != "adaptive" or not math.isfinite(kl):
            return
        error = max(-_MAX_CHANGE, min(_MAX_CHANGE, kl / self._config.kl_target - 1))
        self.adapted *= 1 + error * num_rollouts / self._config.kl_horizon
