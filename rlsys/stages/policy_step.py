"""What one policy step does with the rollouts that were collected: assign credit, then update policy and critic."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.config import Config
from rlsys.kl import KlCoefficient
from rlsys.learner_group import LearnerGroup, check_finite
from rlsys.plugins import resolve
from rlsys.stages.common import assemble
from rlsys.stages.credit import Credit, Numbers, kl_penalties, of_critic, of_groups
from rlsys.types import Rollout, RolloutGroup, TrainBatch

_LOSS_OPTIONS = (
    "clip_low",
    "clip_high",
    "trust_region",
    "correction",
    "correction_limit",
    "correction_floor",
    "entropy_coef",
)
"""Settings of `rl` that the loss is given under the same name."""

_CRITIC_METRICS = ("loss", "clip_fraction", "grad_norm", "lr", "seconds")
"""What a learner says that has a meaning for a critic too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lesson:
    """What the updates of one policy step learn from."""

    step: int
    rollouts: Sequence[Rollout]
    credit: Credit
    proximal: Sequence[Numbers] | None
    kl_coef: float


class PolicyStep:
    """The policy's learners, and where there is one the critic's, as one that learns from groups of rollouts."""

    def __init__(
        self, config: Config, learners: LearnerGroup, critic: LearnerGroup | None, *, kl_coef: float | None = None
    ) -> None:
        self._stage = config.rl
        self._seed = config.seed
        self._learners = learners
        self._critic = critic
        self._advantage = resolve(config.rl.advantage, place="rl.advantage")
        self.kl = KlCoefficient(config.rl, adapted=kl_coef)
        """The weight of the KL penalty; what it has become belongs into a checkpoint."""

    async def take(self, step: int, groups: Sequence[RolloutGroup]) -> tuple[Credit, dict[str, float]]:
        """Learn from the groups of policy step `step` (from 1).

        Returns the credit, and metrics under `learner/`, `critic/` and `seconds/`: of several updates those of the
        first, which sees the policy that sampled, and how far the last one went, `last_ratio` and `last_clip_fraction`.
        """
        started = time.perf_counter()
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        proximal = await self._proximal_logprobs(rollouts)
        kl = await self._kl(rollouts, proximal)
        coefficient = self.kl.at(step)
        credit = await self._credit(groups, rollouts, None if kl is None else [coefficient * part for part in kl])
        assigned = time.perf_counter() - started
        lesson = _Lesson(step=step, rollouts=rollouts, credit=credit, proximal=proximal, kl_coef=coefficient)
        metrics = await self._update(lesson)
        if kl is not None:
            total = float(sum(part.sum() for part in kl))
            metrics["learner/kl"] = total / sum(rollout.num_trained_tokens for rollout in rollouts)
            metrics["learner/kl_rollout"] = total / len(rollouts)
        self.kl.observe(metrics.get("learner/kl_rollout", math.nan), num_rollouts=len(rollouts))
        metrics["learner/kl_coef"] = coefficient
        return credit, {**credit.metrics, **metrics, "seconds/credit": assigned}

    # --- before the updates ------------------------------------------------------------------------------------------

    async def _proximal_logprobs(self, rollouts: Sequence[Rollout]) -> list[Numbers] | None:
        """Of the policy as it is; None where nobody needs them or the only update computes them itself."""
        if self._stage.trust_region == "rollout" or self._stage.updates_per_step == 1:
            return None
        return await self._learners.infer(_unassigned(rollouts), temperature=self._stage.sampling.temperature)

    async def _kl(
        self, rollouts: Sequence[Rollout], proximal: Sequence[Numbers] | None
    ) -> list[NDArray[np.float64]] | None:
        """KL estimates of all tokens where the reward pays for them.

        Of the proximal policy where its log-probs are known, else of the one that wrote the token: it sampled, and
        without staleness and several updates it is also the current one.
        """
        if self._stage.kl_in == "loss" or self._stage.kl_coef == 0:
            return None
        temperature = self._stage.sampling.temperature
        reference = await self._learners.infer(_unassigned(rollouts), temperature=temperature, reference=True)
        logprobs = proximal or [rollout.logprobs for rollout in rollouts]
        return kl_penalties(rollouts, logprobs, reference, self._stage.kl_estimator)

    async def _credit(
        self, groups: Sequence[RolloutGroup], rollouts: Sequence[Rollout], penalties: list[NDArray[np.float64]] | None
    ) -> Credit:
        if self._critic is None or self._stage.critic is None:
            return of_groups(groups, self._advantage, self._stage, penalties)
        values = await self._critic.infer(_unassigned(rollouts), temperature=1.0)
        whitened = self._stage.whiten_advantages
        return of_critic(rollouts, values, self._stage.critic, whitened=whitened, penalties=penalties)

    # --- the updates -------------------------------------------------------------------------------------------------

    async def _update(self, lesson: _Lesson) -> dict[str, float]:
        order = np.random.default_rng([self._seed, lesson.step]).permutation(len(lesson.rollouts))
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        seconds = 0.0
        for part in np.array_split(order, self._stage.updates_per_step):
            if not any(lesson.rollouts[i].num_trained_tokens for i in part):
                continue
            mine, its = await asyncio.gather(
                self._update_policy(lesson, part.tolist()), self._update_critic(lesson, part.tolist())
            )
            seconds += max(mine.pop("seconds", 0.0), its.pop("seconds", 0.0))
            if not first:
                first = {f"learner/{name}": value for name, value in mine.items()}
                first |= {f"critic/{name}": value for name, value in its.items()}
            elif mine:
                last = {f"learner/last_{name}": mine[name] for name in ("ratio", "clip_fraction") if name in mine}
        return {**first, **last, "seconds/learn": seconds}

    async def _update_policy(self, lesson: _Lesson, part: list[int]) -> dict[str, float]:
        stage = self._stage
        if stage.critic is not None and lesson.step <= stage.critic.warmup_steps:
            return {}
        batch = assemble(
            [lesson.rollouts[i] for i in part],
            [lesson.credit.advantages[i] for i in part],
            aggregation=stage.aggregation,
            constant=stage.sampling.max_response_tokens,
            proximal_logprobs=None if lesson.proximal is None else [lesson.proximal[i] for i in part],
        )
        in_loss = stage.kl_in == "loss"
        options: dict[str, Any] = {"kl_coef": lesson.kl_coef, "kl_estimator": stage.kl_estimator} if in_loss else {}
        options |= {name: getattr(stage, name) for name in _LOSS_OPTIONS}
        metrics = await self._learners.step(batch, temperature=stage.sampling.temperature, reference=in_loss, **options)
        check_finite(metrics, stage.optimizer.max_skipped_steps)
        if "kl" in metrics:
            metrics["kl_rollout"] = metrics["kl"] * batch.num_tokens / len(part)
        return metrics

    async def _update_critic(self, lesson: _Lesson, part: list[int]) -> dict[str, float]:
        """The critic learns the returns; its old values stand where a policy has its proximal log-probs."""
        if self._critic is None or self._stage.critic is None:
            return {}
        batch = assemble(
            [lesson.rollouts[i] for i in part],
            [lesson.credit.returns[i] for i in part],
            proximal_logprobs=[lesson.credit.values[i] for i in part],
        )
        metrics = await self._critic.step(batch, temperature=1.0, value_clip=self._stage.critic.clip)
        check_finite(metrics, self._stage.critic.optimizer.max_skipped_steps)
        return {name: metrics[name] for name in _CRITIC_METRICS if name in metrics}


def _unassigned(rollouts: Sequence[Rollout]) -> TrainBatch:
    """The rollouts as a batch that only asks what a network says of them."""
    return assemble(rollouts, [0.0] * len(rollouts))
