"""Training on what is there already, without engines: what fine-tuning, preference learning and reward models share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlsys.checkpoint import CheckpointStore, CheckpointWriter
from rlsys.config import OptimizerConfig
from rlsys.conversation import to_rollout as to_rollout
from rlsys.curriculum import endless
from rlsys.learner_group import LearnerGroup, check_finite
from rlsys.stages.common import Interrupted, Run
from rlsys.types import NetworkKind, TrainBatch

_T = TypeVar("_T")
DEFAULT_STEPS = 100
StepData = tuple[TrainBatch, Mapping[str, Any]]
"""The batch of a step, and options of its loss."""


class Schedule(Protocol):
    """The part of a stage's section that all of them have; `num_steps` makes one number of the first two."""

    @property
    def steps(self) -> int | None: ...
    @property
    def epochs(self) -> float | None: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def checkpoint_every(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """A stage: its name, its loss, and how the batch of a step is made. `shown` are the metrics for the progress line.

    `prepare` is awaited once, when the learner holds the model that the stage began with. `measure` is awaited behind
    each step; the numbers that it returns are logged with the step's own. `refine` makes what is logged of what the
    learner says of a step. `finish` is awaited behind the last step, before the learner's model is written.
    """

    name: str
    schedule: Schedule
    steps: int
    loss: str | Callable[..., Any]
    batch: Callable[[int, LearnerGroup], Awaitable[StepData]]
    shown: Sequence[str]
    network: NetworkKind = "policy"
    prepare: Callable[[LearnerGroup], Awaitable[None]] | None = None
    measure: Callable[[int, LearnerGroup], Awaitable[Mapping[str, float]]] | None = None
    refine: Callable[[Mapping[str, float]], dict[str, float]] = dict
    finish: Callable[[int, LearnerGroup], Awaitable[None]] | None = None


def num_steps(schedule: Schedule, num_items: int, per_step: int) -> int:
    """Optimizer steps of a stage: its `steps`, or so many that all items were seen `epochs` times, else 100."""
    if schedule.epochs is not None:
        return max(1, math.ceil(schedule.epochs * num_items / per_step - 1e-9))
    return DEFAULT_STEPS if schedule.steps is None else schedule.steps


async def train_offline(run: Run, model: Path, stage: Offline) -> tuple[Path, dict[str, float]]:
    """All steps, from the newest checkpoint on; returns the folder of the model that is left and the last metrics."""
    config, schedule, name = run.config, stage.schedule, stage.name
    store = CheckpointStore(run.directory.stage(name) / "checkpoints", keep=1)
    metrics: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        with run.console.waiting(f"starting {config.learners.count} learner ranks"):
            learners = await LearnerGroup.start(
                config,
                str(model),
                optimizer=schedule.optimizer,
                total_steps=stage.steps,
                loss=stage.loss,
                network=stage.network,
            )
        stack.push_async_callback(learners.close)
        if stage.prepare is not None:
            with run.console.waiting(f"{name}: preparing"):
                await stage.prepare(learners)
        checkpoint = store.newest(tell=run.console.say)
        step = 0
        if checkpoint is not None:
            await learners.load(checkpoint.folder / "learner")
            step = checkpoint.step
            run.console.say(f"{name}: going on from step {step} ({checkpoint.folder})")
        run.directory.forget_after(name, step)
        writer = await stack.enter_async_context(CheckpointWriter(store, {"learner": learners}, tell=run.console.say))
        with run.console.steps(name, total=stage.steps, done=step) as progress:
            while step < stage.steps:
                batch, options = await stage.batch(step, learners)
                metrics = _meant(await learners.step(batch, temperature=1.0, **options), stage.network)
                check_finite(metrics, schedule.optimizer.max_skipped_steps)
                metrics = stage.refine(metrics)
                step += 1
                if stage.measure is not None:
                    metrics |= await stage.measure(step, learners)
                run.directory.log(name, step, metrics)
                progress.advance(step, **{key: metrics[key] for key in stage.shown if key in metrics})
                if step % schedule.checkpoint_every == 0 or run.stop.is_set():
                    await writer.save(step, {})
                if run.stop.is_set():
                    await writer.finish()
                    raise Interrupted(f"{name} step {step}")
        if stage.finish is not None:
            await writer.finish()
            await stage.finish(step, learners)
        left = run.directory.stage(name) / "model"
        await learners.export(left)
    run.directory.update_summary(**{f"{name}_steps": step})
    return left, metrics


def _meant(metrics: Mapping[str, float], network: NetworkKind) -> dict[str, float]:
    """Without numbers that say nothing here: no engine recorded these tokens, and a scorer has no entropy."""
    void = {"logprob_gap", "logprob_gap_max", *(["entropy"] if network == "scorer" else [])}
    return {name: value for name, value in metrics.items() if name not in void}


def of_step(items: Sequence[_T], step: int, size: int, seed: int) -> list[_T]:
    """The items of this step: all in a new order each epoch, `size` at a time."""
    return list(itertools.islice(endless(items, seed=seed, skip=step * size), size))
