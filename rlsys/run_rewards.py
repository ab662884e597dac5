"""The run's rewards for answers that no rollout actor wrote, graded as rollout actors grade theirs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from rlsys.cluster import Actor
from rlsys.config import Config, RewardConfig
from rlsys.errors import RewardError
from rlsys.plugins import build, resolve, run_hook
from rlsys.pool import ActorPool
from rlsys.remote_reward import remote_term
from rlsys.reward_terms import RewardTerm, grade_group, grade_rollout, reason
from rlsys.types import Problem, Rollout, RolloutGroup


class RunRewards:
    """The terms of the reward: in this process, or in actors of their own where the configuration says so."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._terms: list[RewardTerm] = []
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Make and start all of them; raises what a reward raises that cannot work here."""
        for index, reward in enumerate(self._config.rewards):
            place = f"rewards.{index}"
            term = await (self._here if reward.actors is None else self._in_actors)(reward, place)
            self._terms.append(term)

    async def _here(self, config: RewardConfig, place: str) -> RewardTerm:
        reward = build(config.use, config.options, place=place)
        self._stack.push_async_callback(run_hook, reward, "close")
        await run_hook(reward, "start")
        return RewardTerm.configured(config, reward)

    async def _in_actors(self, config: RewardConfig, place: str) -> RewardTerm:
        term = remote_term(config, resolve(config.use, place=f"{place}.use"))
        pool = ActorPool(config, place=place)
        self._stack.push_async_callback(pool.close)
        await pool.start()
        await pool.serve(partial(_use, term.reward))
        return term

    async def grade(self, problem: Problem, rollouts: Sequence[Rollout]) -> RolloutGroup:
        """The answers as a group of siblings; those that a reward failed are dropped and counted.

        Raises:
            TrainingStalledError: a reward failed that is to end the run for it.
        """
        graded = await asyncio.gather(
            *(grade_rollout(problem, rollout, self._terms, step=0) for rollout in rollouts), return_exceptions=True
        )
        dropped: Counter[str] = Counter()
        kept = []
        for result in graded:
            if isinstance(result, RewardError):
                dropped[reason(result)] += 1
            elif isinstance(result, BaseException):
                raise result
            else:
                kept.append(result)
        group = RolloutGroup(problem=problem, rollouts=tuple(kept), dropped=dict(dropped))
        return await grade_group(group, self._terms, step=0)

    async def close(self) -> None:
        """End what was started."""
        await self._stack.aclose()


async def _use(reward: Any, actors: Sequence[Actor]) -> None:
    reward.use_actors(actors)
