"""Credit assignment: pure functions from the rewards [G] of a group to advantages [G], and the whitening of a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def grpo(rewards: Array) -> Array:
    """`(r - mean) / std` over the siblings; all zeros where the rewards are equal.

    GRPO, DeepSeekMath (arXiv 2402.03300), with the population standard deviation.
    """
    centred = rewards - rewards.mean()
    deviation = float(rewards.std())
    return centred / deviation if deviation > 1e-8 else np.zeros_like(centred)


def dr_grpo(rewards: Array) -> Array:
    """`r - mean` over the siblings, without the division that favours very easy and very hard problems.

    Dr.GRPO (arXiv 2503.20783).
    """
    return np.asarray(rewards - rewards.mean())


def rloo(rewards: Array) -> Array:
    """Each reward minus the mean of its siblings, itself left out: `(r - mean) * G / (G - 1)`.

    RLOO (arXiv 2402.14740). Needs at least two siblings.
    """
    if len(rewards) < 2:
        raise ValueError(f"rloo needs at least 2 siblings, got {len(rewards)}")
    return np.asarray((rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1))


def reward_itself(rewards: Array) -> Array:
    """The rewards as they are: no baseline but that of the batch, with `rl.whiten_advantages`.

    REINFORCE++ (arXiv 2501.03262).
    """
    return rewards


def whiten(advantages: Array) -> Array:
    """`(A - mean) / std` over all rollouts of a batch; all zeros where they are equal.

    REINFORCE++ (arXiv 2501.03262), there over tokens; here every rollout counts once, whatever its length.
    """
    return grpo(advantages)
