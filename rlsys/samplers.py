"""Who answers the problems of a sampling stage: the policy itself or another model, on the rollout actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlsys.chat import Chat
from rlsys.config import Config, SamplingConfig
from rlsys.fleet import RolloutFleet
from rlsys.samples import Sample, sample_of
from rlsys.types import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerContext:
    """What a sampler is started with: the run's configuration, its stage, and the model that the stage begins with."""

    config: Config
    stage: str
    model: Path
    sampling: SamplingConfig
    tell: Callable[[str], None]

    @property
    def provenance(self) -> dict[str, Any]:
        """What every sample of this stage has in its provenance."""
        return {
            "run": self.config.name,
            "stage": self.stage,
            "seed": self.config.seed,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_response_tokens": self.sampling.max_response_tokens,
        }


class Sampler(Protocol):
    """Answers problems. Any class of this shape works."""

    async def start(self, context: SamplerContext) -> None:
        """Get ready; raises where that cannot be."""

    async def sample(self, problem: Problem, *, size: int) -> Sequence[Sample]:
        """Up to `size` answers; fewer where some could not be had."""
        ...

    async def close(self) -> None:
        """End what was started."""


class PolicySampler:
    """The model that the stage begins with, or the one in `model`, with the run's tools and rewards."""

    def __init__(self, *, model: str | None = None) -> None:
        self._model = model

    async def start(self, context: SamplerContext) -> None:
        """Start the rollout actors."""
        self._context = context
        path = str(context.model) if self._model is None else self._model
        self._chat = Chat.load(path, [], context.config.chat)
        self._provenance = {**context.provenance, "sampler": "policy", "model": path}
        self.fleet = await RolloutFleet.start(context.config, path)

    async def sample(self, problem: Problem, *, size: int) -> list[Sample]:
        """One group of rollouts."""
        group = await self.fleet.act(
            problem, size=size, sampling=self._context.sampling, group_id=f"{self._context.stage}-{problem.id}"
        )
        return [sample_of(problem, rollout, self._chat, provenance=self._provenance) for rollout in group.rollouts]

    async def close(self) -> None:
        """End the rollout actors."""
        await self.fleet.close()
