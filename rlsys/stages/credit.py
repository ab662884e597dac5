"""Credit of a policy step: from rewards, KL penalties and a critic's values to an advantage for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.advantages import gae, whiten
from rlsys.errors import ConfigError
from rlsys.kl import estimate
from rlsys.stage_config import CriticConfig, RlConfig
from rlsys.types import Rollout, RolloutGroup

Numbers = NDArray[np.float32]
"""One number for each token of a rollout, [T], 0 where none trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What the rollouts of a policy step train with, in their order, and what is to be logged of it (`metrics`).

    `advantages` are of each token, `means` of each rollout; `values` are what a critic gave, `returns` what it learns.
    """

    advantages: list[Numbers]
    means: list[float]
    returns: Sequence[Numbers] = ()
    values: Sequence[Numbers] = ()
    metrics: dict[str, float] = field(default_factory=dict)


def trained_tokens(rollout: Rollout) -> NDArray[np.bool_]:
    """Where the learner trains, [T]: what the policy wrote but a token that has none before it."""
    mask = rollout.loss_mask.copy()
    mask[:1] = False
    return mask


def kl_penalties(
    rollouts: Sequence[Rollout], logprobs: Sequence[Numbers], reference: Sequence[Numbers], estimator: Any
) -> list[NDArray[np.float64]]:
    """The KL estimates of all tokens of each rollout, [T], 0 where none trains."""
    return [
        np.where(trained_tokens(rollout), estimate(current, frozen, estimator), 0.0)
        for rollout, current, frozen in zip(rollouts, logprobs, reference, strict=True)
    ]


def of_groups(
    groups: Sequence[RolloutGroup],
    advantage: Callable[[NDArray[np.float64]], Any],
    stage: RlConfig,
    penalties: Sequence[NDArray[np.float64]] | None = None,
) -> Credit:
    """One advantage for all tokens of a rollout, by comparing it with its siblings.

    `penalties`, one array [T] for each rollout, are taken from the rewards: each rollout's sum.

    Raises:
        ConfigError: `rl.advantage` did not make one finite number of each reward.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    costs = iter([0.0] * len(rollouts) if penalties is None else [penalty.sum() for penalty in penalties])
    parts = []
    for group in groups:
        rewards = group.rewards - [next(costs) for _ in group.rollouts]
        part = np.asarray(advantage(rewards), dtype=np.float64)
        if part.shape != rewards.shape or not np.isfinite(part).all():
            raise ConfigError(
                f"rl.advantage={stage.advantage} made {part.tolist()} of the rewards {rewards.tolist()}; "
                "it must return one finite number for each"
            )
        parts.append(part)
    found = np.concatenate(parts)
    if stage.whiten_advantages:
        found = whiten(found)
    return Credit(
        advantages=[np.full(len(r), value, dtype=np.float32) for r, value in zip(rollouts, found, strict=True)],
        means=[float(value) for value in found],
    )


def of_critic(
    rollouts: Sequence[Rollout],
    values: Sequence[Numbers],
    critic: CriticConfig,
    *,
    whitened: bool,
    penalties: Sequence[NDArray[np.float64]] | None = None,
) -> Credit:
    """Advantages by GAE over the tokens that the policy wrote, and returns: advantages plus values, before whitening.

    The reward is earned with the last of them, the penalties with each. What a tool wrote is left out: it is what the
    environment answered, between one action and the next.
    """
    masks = [trained_tokens(rollout) for rollout in rollouts]
    advantages, returns = [], []
    for index, (rollout, mask) in enumerate(zip(rollouts, masks, strict=True)):
        rewards = np.zeros(int(mask.sum()))
        rewards[-1:] = rollout.reward
        if penalties is not None:
            rewards -= penalties[index][mask]
        own = values[index][mask].astype(np.float64)
        advantages.append(gae(rewards, own, gamma=critic.gamma, lam=critic.lam))
        returns.append(advantages[-1] + own)
    every_return = np.concatenate(returns)
    every_value = np.concatenate([value[mask] for value, mask in zip(values, masks, strict=True)])
    if whitened:
        ends = np.cumsum([len(part) for part in advantages])[:-1]
        advantages = np.split(whiten(np.concatenate(advantages)), ends)
    return Credit(
        advantages=[_spread(part, mask) for part, mask in zip(advantages, masks, strict=True)],
        means=[float(part.mean()) if len(part) else 0.0 for part in advantages],
        returns=[_spread(part, mask) for part, mask in zip(returns, masks, strict=True)],
        values=values,
        metrics={
            "critic/value": float(every_value.mean()),
            "critic/return": float(every_return.mean()),
            "critic/explained_variance": _explained(every_return, every_value),
        },
    )


def _spread(part: NDArray[np.float64], mask: NDArray[np.bool_]) -> Numbers:
    whole = np.zeros(len(mask), dtype=np.float32)
    whole[mask] = part
    return whole


def _explained(returns: NDArray[np.float64], values: NDArray[Any]) -> float:
    """1 where the critic foresaw the returns, 0 where it knows no more than their mean; 0 where they do not differ."""
    variance = float(returns.var())
    return 1 - float((returns - values).var()) / variance if variance > 1e-12 else 0.0
