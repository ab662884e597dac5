"""The rollout actor: an engine, tools and rewards in one process, and every rollout a coroutine of its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from rlsys import cluster
from rlsys.chat import Chat
from rlsys.cluster import Actor
from rlsys.config import Config, PooledPlugIn, RewardConfig, SamplingConfig
from rlsys.demonstrations import Segments
from rlsys.errors import RewardError, ToolError
from rlsys.function_tool import build_tool
from rlsys.interfaces import Tool
from rlsys.plugins import build, isolation_of, resolve, run_hook
from rlsys.remote_reward import RemoteGroupReward, RemoteReward, remote_term
from rlsys.remote_tool import RemoteTool
from rlsys.reward_terms import RewardTerm, grade_group, reason
from rlsys.rollout import run_rollout
from rlsys.shared_weights import SharedPlace
from rlsys.types import GIVEN_UP, Problem, Rollout, RolloutGroup
from rlsys.weights import WeightGroup, WeightPlan


class RolloutActor:
    """Carries many rollouts at once. A plain class: Ray only places it."""

    def __init__(self, *, config: Config, model_path: str, index: int) -> None:
        self._config = config
        self._model_path = model_path
        self._index = index
        self._version = 0
        self._pooled: dict[str, RemoteTool | RemoteReward | RemoteGroupReward] = {}
        self._rewards = [self._build_term(f"rewards.{index}", reward) for index, reward in enumerate(config.rewards)]
        self._tools = [self._build_tool(f"tools.{index}", tool) for index, tool in enumerate(config.tools)]

    def _build_term(self, place: str, config: RewardConfig) -> RewardTerm:
        if config.actors is None:
            return RewardTerm.configured(config, build(config.use, config.options, place=place))
        term = remote_term(config, resolve(config.use, place=f"{place}.use"))
        self._pooled[place] = term.reward
        return term

    def _build_tool(self, place: str, config: PooledPlugIn) -> Tool:
        tool = build_tool(config, place=place)
        if config.actors is None:
            return tool
        remote = self._pooled[place] = RemoteTool(tool, config.actors)
        return remote

    @property
    def _plug_ins(self) -> list[Any]:
        return [*(term.reward for term in self._rewards), *self._tools]

    async def start(self) -> str:
        """Start plug-ins and engine; returns the name of the engine's weight transfer back end."""
        for plug_in in self._plug_ins:
            await run_hook(plug_in, "start")
        # Now, because a tool may learn from its server what it is called with.
        self._chat = Chat.load(self._model_path, self._tools, self._config.chat)
        engine_class = resolve(self._config.actors.engine, place="actors.engine")
        self._engine = engine_class(
            model_path=self._model_path, config=self._config.actors, seed=self._config.seed + self._index
        )
        await self._engine.resume(0)
        return str(self._engine.backend)

    async def isolation(self) -> dict[str, str]:
        """The tier of every tool and reward that runs here and has one."""
        found = isolation_of(self._tools)
        for term in self._rewards:
            found |= term.isolation
        return found

    async def pulse(self) -> dict[str, float]:
        """A sign of life: `tokens` written so far, generations that are `running`, whether its node is `leaving`."""
        leaving = await asyncio.to_thread(cluster.node_is_leaving)
        return {**await self._engine.pulse(), "leaving": float(leaving)}

    async def use_actors(self, place: str, actors: Sequence[Actor]) -> None:
        """From now on, use these actors of the plug-in that has this place in the configuration."""
        self._pooled[place].use_actors(actors)

    async def act(
        self,
        problem: Problem,
        *,
        size: int,
        sampling: SamplingConfig,
        group_id: str,
        prefix: Segments = (),
        give_up_after: int = 0,
    ) -> RolloutGroup:
        """`size` graded attempts at the problem, side by side; those that a tool or a reward failed are counted.

        Each goes on behind `prefix`, the beginning of the turn (see `run_rollout`).
        What compares siblings grades last, those that are left. All weigh their terms as of now. With `give_up_after`
        the group may be given up, see `_siblings`: then it has the first so many siblings, the others are counted.
        """
        version = self._version
        attempts = await _siblings(
            (
                run_rollout(
                    problem,
                    engine=self._engine,
                    chat=self._chat,
                    rewards=self._rewards,
                    sampling=sampling,
                    max_model_tokens=self._config.actors.max_model_tokens,
                    rollout_id=f"{group_id}-{number}",
                    policy_step=version,
                    prefix=prefix,
                )
                for number in range(size)
            ),
            give_up_after=give_up_after,
        )
        dropped = Counter({GIVEN_UP: size - len(attempts)} if len(attempts) < size else {})
        rollouts = []
        for attempt in attempts:
            if attempt is None:
                dropped["prompt_too_long"] += 1
            elif isinstance(attempt, RewardError):
                dropped[reason(attempt)] += 1
            elif isinstance(attempt, ToolError):
                dropped[f"tool_error: {attempt}"] += 1
            elif isinstance(attempt, BaseException):
                raise attempt
            else:
                rollouts.append(attempt)
        group = RolloutGroup(problem=problem, rollouts=tuple(rollouts), dropped=dict(dropped))
        return await grade_group(group, self._rewards, step=version)

    async def compare(self, group: RolloutGroup) -> RolloutGroup:
        """The group with what the terms that compare siblings, and these alone, give each as a reward."""
        bare = (replace(rollout, reward=0.0, reward_terms={}) for rollout in group.rollouts)
        return await grade_group(replace(group, rollouts=tuple(bare)), self._rewards, step=self._version)

    async def pause(self) -> None:
        """Freeze generation for a weight update."""
        await self._engine.pause()

    async def resume(self, version: int) -> None:
        """Go on with weights `version`, the number of policy steps so far."""
        self._version = version
        await self._engine.resume(version)

    async def open_weights(self, group: WeightGroup, *, rank: int) -> None:
        """Join the learner's weight transfer group."""
        await self._engine.open_weights(group, rank=rank)

    async def receive_weights(self, plan: WeightPlan, *, published: SharedPlace | None = None) -> dict[str, int]:
        """Receive one set of weights, or read what was `published`; returns the checksum of every tensor."""
        where = {} if published is None else {"published": published}
        received: dict[str, int] = await self._engine.receive_weights(plan, **where)
        return received

    async def close(self) -> None:
        """End the engine's processes and what the plug-ins hold."""
        async with AsyncExitStack() as stack:
            for plug_in in self._plug_ins:
                stack.push_async_callback(run_hook, plug_in, "close")
            self._engine.close()


async def _siblings(
    rollouts: Iterable[Coroutine[Any, Any, Rollout | None]], *, give_up_after: int
) -> list[Rollout | BaseException | None]:
    """What became of each of these rollouts, side by side; of the first `give_up_after` alone, where it gave them up.

    It does once those are graded, all of them, with one reward: then the group would hardly be informative, and the
    others are ended. Those by number decide, not those that end first, and nothing else does: so whether a group is
    given up does not depend on how long its answers are.
    """
    tasks = [asyncio.ensure_future(rollout) for rollout in rollouts]
    first, others = tasks[:give_up_after], tasks[give_up_after:]
    found: list[Rollout | BaseException | None]
    try:
        found = await asyncio.gather(*first, return_exceptions=True)
        rewards = [rollout.reward for rollout in found if isinstance(rollout, Rollout)]
        if give_up_after and len(rewards) == give_up_after and len(set(rewards)) == 1:
            return found
        return found + await asyncio.gather(*others, return_exceptions=True)
    finally:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
