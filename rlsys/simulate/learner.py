"""The learner in virtual time: a policy step takes the time of its tokens, publishing that of its bytes."""

from __future__ import annotations

import asyncio
from typing import Any

from rlsys.config import Config
from rlsys.learner_group import LearnerGroup
from rlsys.simulate.config import SimulateConfig
from rlsys.simulate.worker import Process
from rlsys.weights import WeightPlan

PLAN = WeightPlan(names=["weights"], dtype_names=["bfloat16"], shapes=[[1]])
"""One tensor stands for all."""


class SimulatedRank(Process):
    """All learner ranks as one."""

    def __init__(self, model: SimulateConfig, config: Config) -> None:
        super().__init__("learner rank 0", call_seconds=config.cluster.call_seconds)
        self._model, self._count = model, config.learners.count

    async def learn(self, tokens: int) -> None:
        """One policy step on so many tokens of prompts and responses."""
        await asyncio.sleep(self._model.learner_seconds(tokens, self._count))

    async def rendezvous(self) -> tuple[str, int]:
        """Where workers would meet the learner."""
        return "simulated", 0

    async def open_weights(self, *_: Any, **__: Any) -> None:
        """Meet the workers; the time is part of publishing."""

    async def send_weights(self) -> dict[str, int]:
        """The weights go over the network; the checksums are those that workers find."""
        await asyncio.sleep(self._model.transfer_seconds)
        return dict.fromkeys(PLAN.names, 0)

    async def published_weights(self) -> None:
        """No memory is shared: engines and learner are on several hosts."""

    async def close(self) -> None:
        """The end, when asked politely."""


class SimulatedLearners(LearnerGroup):
    """The real group of ranks, with its way to publish weights, on one that only takes time."""

    def __init__(self, model: SimulateConfig, config: Config) -> None:
        super().__init__([SimulatedRank(model, config)], PLAN, config)

    async def learn(self, tokens: int) -> None:
        """One policy step on so many tokens; stands for `step`."""
        async with self.at_rest:
            self.is_ahead = True
            await self._ranks[0].call("learn", tokens)
