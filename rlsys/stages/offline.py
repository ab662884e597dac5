"""Training on what is there already, without engines: what fine-tuning, preference learning and reward models share."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlsys.chat import Chat
from rlsys.checkpoint import CheckpointStore, CheckpointWriter
from rlsys.config import OptimizerConfig
from rlsys.curriculum import endless
from rlsys.demonstrations import Demonstration
from rlsys.fleet import LearnerGroup, check_finite
from rlsys.stages.common import Interrupted, Run
from rlsys.types import NetworkKind, Rollout, TrainBatch

_T = TypeVar("_T")
StepData = tuple[TrainBatch, Mapping[str, Any]]
"""The batch of a step, and options of its loss."""


class Schedule(Protocol):
    """The part of a stage's section that all of them have."""

    @property
    def steps(self) -> int: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def checkpoint_every(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """A stage: its name, its loss, and how the batch of a step is made. `shown` are the metrics for the progress line.

    `prepare` is awaited once, when the learner holds the model that the stage began with.
    """

    name: str
    schedule: Schedule
    loss: str | Callable[..., Any]
    batch: Callable[[int, LearnerGroup], Awaitable[StepData]]
    shown: Sequence[str]
    network: NetworkKind = "policy"
    prepare: Callable[[LearnerGroup], Awaitable[None]] | None = None


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
                total_steps=schedule.steps,
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
        with run.console.steps(name, total=schedule.steps, done=step) as progress:
            while step < schedule.steps:
                batch, options = await stage.batch(step, learners)
                metrics = _meant(await learners.step(batch, temperature=1.0, **options), stage.network)
                check_finite(metrics, schedule.optimizer.max_skipped_steps)
                step += 1
                run.directory.log(name, step, metrics)
                progress.advance(step, **{key: metrics[key] for key in stage.shown if key in metrics})
                if step % schedule.checkpoint_every == 0 or run.stop.is_set():
                    await writer.save(step, {})
                if run.stop.is_set():
                    await writer.finish()
                    raise Interrupted(f"{name} step {step}")
        left = run.directory.stage(name) / "model"
        await learners.export(left)
    run.directory.update_summary(**{f"{name}_steps": step})
    return left, metrics


def _meant(metrics: Mapping[str, float], network: NetworkKind) -> dict[str, float]:
    """Without numbers that say nothing here: no engine recorded these tokens, and a scorer has no entropy."""
    void = {"logprob_gap", "logprob_gap_max", *(["entropy"] if network == "scorer" else [])}
    return {name: value for name, value in metrics.items() if name not in void}


def to_rollout(demonstration: Demonstration, chat: Chat) -> Rollout:
    """A demonstration on the token axis of a rollout: as it was recorded under the same chat, else each segment
    tokenized by itself as a rollout would be."""
    recorded = demonstration.recorded
    if recorded is not None and recorded.template == chat.fingerprint:
        return _untaught(recorded.tokens, recorded.loss_mask)
    tokens = chat.render(demonstration.problem)
    mask = [False] * len(tokens)
    for text, trained in [*demonstration.segments, (chat.tokenizer.eos_token, True)]:
        ids = chat.encode(text)
        tokens += ids
        mask += [trained] * len(ids)
    return _untaught(np.array(tokens, dtype=np.int32), np.array(mask, dtype=np.bool_))


def _untaught(tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> Rollout:
    """A rollout that no engine of this run wrote."""
    return Rollout(
        tokens=tokens,
        loss_mask=mask,
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        versions=np.full(len(tokens), -1, dtype=np.int32),
    )


def of_step(items: Sequence[_T], step: int, size: int, seed: int) -> list[_T]:
    """The items of this step: all in a new order each epoch, `size` at a time."""
    return list(itertools.islice(endless(items, seed=seed, skip=step * size), size))
