"""Credit assignment: pure functions from the rewards [G] of a group to advantages [G], or from those of tokens and a
critic's values to advantages of tokens; and the whitening of a batch.
"""

from __future__ import annotations

from itertools import accumulate

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


def gae(rewards: Array, values: Array, *, gamma: float, lam: float) -> Array:
    """`A_t = delta_t + gamma * lam * A_{t+1}` with `delta_t = r_t + gamma * V_{t+1} - V_t`, all [T].

    Generalised advantage estimation (arXiv 1506.02438). `values` [T] are of the states in which the tokens were
    written; behind the last one nothing more is earned, whether the policy ended the rollout or a budget did.
    `lam=1` gives the discounted return minus the value, `lam=0` the errors delta of the critic.
    """
    if rewards.shape != values.shape or rewards.ndim != 1:
        raise ValueError(f"gae takes as many rewards as values, got the shapes {rewards.shape} and {values.shape}")
    errors = rewards + gamma * np.append(values[1:], 0.0)[: len(values)] - values
    decay = gamma * lam
    backwards = accumulate(errors[::-1].tolist(), lambda later, error: error + decay * later)
    return np.array(list(backwards), dtype=np.float64)[::-1]


def whiten(advantages: Array) -> Array:
    """`(A - mean) / std` over all of a batch; all zeros where they are equal.

    REINFORCE++ (arXiv 2501.03262), there over tokens; here every rollout counts once, whatever its length, but where a
    critic gave each token its own.
    """
    return grpo(advantages)
