"""Credit assignment within a group: pure functions from rewards [G] to advantages [G]."""

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
