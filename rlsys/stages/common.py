"""What every stage needs: the run, its problems, batches, checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rlsys.config import Aggregation, Config
from rlsys.console import Console
from rlsys.errors import DataError
from rlsys.fleet import RolloutFleet
from rlsys.plugins import resolve
from rlsys.records import RunDirectory
from rlsys.status import Live
from rlsys.types import Problem, Rollout, TrainBatch

_T = TypeVar("_T")


class Interrupted(Exception):
    """The user asked the run to stop; what was done so far is in a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every stage is given."""

    config: Config
    directory: RunDirectory
    console: Console
    stop: asyncio.Event
    live: Live = field(default_factory=Live)


def load_problems(config: Config, which: str) -> list[Problem]:
    """The problems of `data.train` or `data.held_out`."""
    plug_in = getattr(config.data, which)
    problems: list[Problem] = resolve(plug_in.use, place=f"data.{which}.use")(**plug_in.options)
    if not problems:
        raise DataError(f"data.{which} gave no problem")
    return problems


def assemble(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float] | Sequence[NDArray[np.float32]],
    *,
    aggregation: Aggregation = "token",
    constant: int = 1,
    proximal_logprobs: Sequence[NDArray[np.float32]] | None = None,
) -> TrainBatch:
    """A batch with one advantage for all tokens of a rollout, or one for each, [T].

    The learner divides the weighted sum over tokens by their number. So with weights 1 the loss is the mean over
    tokens; with `sequence` it is the mean over rollouts of each one's mean; with `constant` the sum over a rollout's
    tokens is divided by that number, whatever its length, and then the mean is taken over rollouts.
    """
    num_tokens = sum(rollout.num_trained_tokens for rollout in rollouts)
    mean_length = num_tokens / max(1, len(rollouts))

    def weight(rollout: Rollout) -> float:
        if aggregation == "token":
            return 1.0
        return mean_length / (constant if aggregation == "constant" else max(1, rollout.num_trained_tokens))

    return TrainBatch(
        rollouts=tuple(rollouts),
        advantages=tuple(
            np.full(len(rollout), advantage, dtype=np.float32)
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ),
        weights=tuple(weight(rollout) for rollout in rollouts),
        num_tokens=num_tokens,
        proximal_logprobs=None if proximal_logprobs is None else tuple(proximal_logprobs),
    )


async def record_isolation(run: Run, fleet: RolloutFleet) -> None:
    """Write into the summary how well tools isolate what they run, and warn where it is not the best tier.

    From now on those who look on see this fleet, and may scale it.
    """
    run.live.fleet = fleet
    found = await fleet.isolation()
    run.directory.update_summary(**found)
    for name, tier in found.items():
        if tier != "T2":
            tool = name.removeprefix("isolation_")
            run.console.say(f"warning: the tool {tool} runs in the weaker tier {tier}; `rlsys doctor` says what helps")
