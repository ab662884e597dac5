"""What every stage needs: the run, its problems, batches, checkpoints."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rlsys.checkpoint import CheckpointStore
from rlsys.config import Config
from rlsys.console import Console
from rlsys.errors import DataError
from rlsys.fleet import LearnerGroup
from rlsys.plugins import resolve
from rlsys.records import RunDirectory
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


def load_problems(config: Config, which: str) -> list[Problem]:
    """The problems of `data.train` or `data.held_out`."""
    plug_in = getattr(config.data, which)
    problems: list[Problem] = resolve(plug_in.use, place=f"data.{which}.use")(**plug_in.options)
    if not problems:
        raise DataError(f"data.{which} gave no problem")
    return problems


def endless(items: Sequence[_T], *, seed: int, skip: int) -> Iterator[_T]:
    """The items for ever, shuffled anew in each epoch; the order depends on the seed alone, so `skip` resumes it."""
    first_epoch, offset = divmod(skip, len(items))
    for epoch in itertools.count(first_epoch):
        order = np.random.default_rng([seed, epoch]).permutation(len(items))
        for index in order[offset if epoch == first_epoch else 0 :]:
            yield items[int(index)]


def assemble(rollouts: Sequence[Rollout], advantages: Sequence[float]) -> TrainBatch:
    """A batch with one advantage for all tokens of a rollout."""
    return TrainBatch(
        rollouts=tuple(rollouts),
        advantages=tuple(
            np.full(len(rollout), advantage, dtype=np.float32)
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ),
        num_tokens=sum(rollout.num_trained_tokens for rollout in rollouts),
    )


async def save_checkpoint(store: CheckpointStore, learners: LearnerGroup, step: int, state: dict[str, Any]) -> None:
    """Write a whole checkpoint or none."""
    draft = store.draft(step)
    await learners.save(draft / "learner")
    store.commit(draft, step=step, state=state)
