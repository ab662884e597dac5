"""Who answers the problems of a sampling stage: the policy itself or another model, on the rollout actors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlsys import __version__
from rlsys.config import Config, SamplingConfig
from rlsys.fleet import RolloutFleet
from rlsys.run_chat import run_chat
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
            "max_tool_calls": self.sampling.max_tool_calls,
            "rlsys": __version__,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }


SKIPPED = "skipped_"
"""Reasons that begin so are no failures: there was nothing to make an answer of, and trying again would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers to one problem, and by reason how many there are not, as in `RolloutGroup.dropped`."""

    samples: Sequence[Sample]
    dropped: Mapping[str, int] = field(default_factory=dict)


class Sampler(Protocol):
    """Answers problems. Any class of this shape works.

    One that needs no rollout actors says so with `uses_rollout_actors = False`: then the run does not ask for them. It
    may have a `capacity`, the answers that it writes at one time (without: what the rollout actors carry): no more is
    asked of it than twice that. With a method `check_config(config, *, place)` it refuses, by a ConfigError and before
    anything is started, a run that it could not answer in.
    """

    async def start(self, context: SamplerContext) -> None:
        """Get ready; raises where that cannot be."""

    async def sample(self, problem: Problem, *, size: int) -> Answers | Sequence[Sample]:
        """Up to `size` answers; fewer where some could not be had.

        An exception fails this problem: it is tried again, then left out and counted. A ConfigError, DataError or
        TrainingStalledError ends the stage.
        """
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
        path = str(context.model)
        if self._model is not None:  # other processes stand elsewhere
            path = str(Path(self._model).resolve()) if Path(self._model).exists() else self._model
        self._chat = await run_chat(context.config, path)
        self._provenance = {**context.provenance, "sampler": "policy", "model": path}
        self.fleet = await RolloutFleet.start(context.config, path)

    async def sample(self, problem: Problem, *, size: int) -> Answers:
        """One group of rollouts."""
        group = await self.fleet.act(
            problem, size=size, sampling=self._context.sampling, group_id=f"{self._context.stage}-{problem.id}"
        )
        samples = [sample_of(problem, rollout, self._chat, provenance=self._provenance) for rollout in group.rollouts]
        return Answers(samples=samples, dropped=group.dropped)

    async def close(self) -> None:
        """End the rollout actors; nothing where they did not start."""
        if (fleet := getattr(self, "fleet", None)) is not None:
            await fleet.close()
