"""Supervised fine-tuning: learn to imitate demonstrations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np

from rlsys.chat import Chat
from rlsys.checkpoint import CheckpointStore
from rlsys.demonstrations import Demonstration
from rlsys.fleet import LearnerGroup, check_finite
from rlsys.plugins import resolve
from rlsys.stages.common import Interrupted, Run, assemble, endless, load_problems, save_checkpoint
from rlsys.types import Rollout, TrainBatch


def to_rollout(demonstration: Demonstration, chat: Chat) -> Rollout:
    """A demonstration on the token axis of a rollout, each segment tokenized by itself as a rollout would be."""
    tokens = chat.render(demonstration.problem)
    mask = [False] * len(tokens)
    for text, trained in [*demonstration.segments, (chat.tokenizer.eos_token, True)]:
        ids = chat.encode(text)
        tokens += ids
        mask += [trained] * len(ids)
    return Rollout(
        tokens=np.array(tokens, dtype=np.int32),
        loss_mask=np.array(mask, dtype=np.bool_),
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        versions=np.full(len(tokens), -1, dtype=np.int32),
    )


async def sft(run: Run, model: Path) -> Path:
    """Learn to imitate demonstrations."""
    config, stage = run.config, run.config.sft
    assert stage.demonstrations is not None
    make = resolve(stage.demonstrations.use, place="sft.demonstrations.use")
    demonstrations = make(load_problems(config, "train"), **stage.demonstrations.options)
    chat = Chat.load(str(model), [], config.chat)
    rollouts = [to_rollout(demonstration, chat) for demonstration in demonstrations]
    store = CheckpointStore(run.directory.stage("sft") / "checkpoints", keep=1)
    async with AsyncExitStack() as stack:
        with run.console.waiting(f"starting {config.learners.count} learner ranks"):
            learners = await LearnerGroup.start(
                config,
                str(model),
                optimizer=stage.optimizer,
                total_steps=stage.steps,
                loss="rlsys.losses:cross_entropy",
            )
        stack.push_async_callback(learners.close)
        checkpoint = store.newest(tell=run.console.say)
        step = 0
        if checkpoint is not None:
            await learners.load(checkpoint.folder / "learner")
            step = checkpoint.step
            run.console.say(f"sft: going on from step {step} ({checkpoint.folder})")
        run.directory.forget_after("sft", step)
        with run.console.steps("sft", total=stage.steps, done=step) as progress:
            while step < stage.steps:
                batch = _sft_batch(rollouts, step, stage.demonstrations_per_step, config.seed)
                metrics = await learners.step(batch, temperature=1.0)
                check_finite(metrics, stage.optimizer.max_skipped_steps)
                step += 1
                run.directory.log("sft", step, metrics)
                progress.advance(step, loss=metrics["loss"], lr=metrics["lr"])
                if step % stage.checkpoint_every == 0 or run.stop.is_set():
                    await save_checkpoint(store, learners, step, {})
                if run.stop.is_set():
                    raise Interrupted(f"sft step {step}")
        left = run.directory.stage("sft") / "model"
        await learners.export(left)
    run.directory.update_summary(sft_steps=step)
    return left


def _sft_batch(rollouts: Sequence[Rollout], step: int, size: int, seed: int) -> TrainBatch:
    """The batch of this step: the demonstrations in a new order each epoch, `size` at a time."""
    stream = endless(rollouts, seed=seed, skip=step * size)
    return assemble(list(itertools.islice(stream, size)), [0.0] * size)
