"""The rollout actor: an engine, tools and rewards in one process, and every rollout a coroutine of its own."""

from __future__ import annotations

import asyncio
from collections import Counter

from rlsys.chat import Chat
from rlsys.config import Config, SamplingConfig
from rlsys.errors import ToolError
from rlsys.function_tool import build_tool
from rlsys.plugins import build
from rlsys.rollout import RewardFailedError, RewardTerm, run_rollout
from rlsys.types import Problem, RolloutGroup
from rlsys.weights import WeightGroup, WeightPlan


class RolloutActor:
    """Carries many rollouts at once. A plain class: Ray only places it."""

    def __init__(self, *, config: Config, model_path: str, index: int) -> None:
        self._config = config
        self._model_path = model_path
        self._index = index
        self._rewards = [
            RewardTerm(
                name=reward.name,
                weight=reward.weight,
                reward=build(reward.use, reward.options, place=f"rewards.{position}"),
            )
            for position, reward in enumerate(config.rewards)
        ]
        self._tools = [build_tool(tool, place=f"tools.{position}") for position, tool in enumerate(config.tools)]

    async def start(self) -> str:
        """Start plug-ins and engine; returns the name of the engine's weight transfer back end."""
        for plug_in in (*(term.reward for term in self._rewards), *self._tools):
            if (start := getattr(plug_in, "start", None)) is not None:
                await start()
        # Now, because a tool may learn from its server what it is called with.
        self._chat = Chat.load(self._model_path, self._tools, self._config.chat)
        from rlsys.actors.engine import VllmEngine

        self._engine = VllmEngine(
            model_path=self._model_path, config=self._config.actors, seed=self._config.seed + self._index
        )
        await self._engine.resume(0)
        return self._engine.backend

    async def act(self, problem: Problem, *, size: int, sampling: SamplingConfig, group_id: str) -> RolloutGroup:
        """`size` graded attempts at the problem, side by side; those that could not be graded are counted instead."""
        attempts = await asyncio.gather(
            *(
                run_rollout(
                    problem,
                    engine=self._engine,
                    chat=self._chat,
                    rewards=self._rewards,
                    sampling=sampling,
                    max_model_tokens=self._config.actors.max_model_tokens,
                    rollout_id=f"{group_id}-{number}",
                )
                for number in range(size)
            ),
            return_exceptions=True,
        )
        dropped: Counter[str] = Counter()
        rollouts = []
        for attempt in attempts:
            if attempt is None:
                dropped["prompt_too_long"] += 1
            elif isinstance(attempt, RewardFailedError):
                dropped[f"reward_error: {attempt}"] += 1
            elif isinstance(attempt, ToolError):
                dropped[f"tool_error: {attempt}"] += 1
            elif isinstance(attempt, BaseException):
                raise attempt
            else:
                rollouts.append(attempt)
        return RolloutGroup(problem=problem, rollouts=tuple(rollouts), dropped=dict(dropped))

    async def pause(self) -> None:
        """Freeze generation for a weight update."""
        await self._engine.pause()

    async def resume(self, version: int) -> None:
        """Go on with weights `version`."""
        await self._engine.resume(version)

    async def open_weights(self, group: WeightGroup, *, rank: int) -> None:
        """Join the learner's weight transfer group."""
        await self._engine.open_weights(group, rank=rank)

    async def receive_weights(self, plan: WeightPlan) -> dict[str, int]:
        """Receive one set of weights; returns the checksum of every tensor."""
        return await self._engine.receive_weights(plan)

    async def close(self) -> None:
        """End the engine's processes and what the rewards hold."""
        self._engine.close()
        for term in self._rewards:
            if (close := getattr(term.reward, "close", None)) is not None:
                close()
