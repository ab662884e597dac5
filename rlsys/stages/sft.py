"""Supervised fine-tuning: learn to imitate demonstrations."""

from __future__ import annotations

from pathlib import Path

from rlsys.chat import Chat
from rlsys.fleet import LearnerGroup
from rlsys.plugins import resolve
from rlsys.stages.common import Run, assemble, load_problems
from rlsys.stages.offline import Offline, StepData, of_step, to_rollout, train_offline


async def sft(run: Run, model: Path) -> Path:
    """Learn to imitate demonstrations."""
    config, stage = run.config, run.config.sft
    assert stage.demonstrations is not None
    make = resolve(stage.demonstrations.use, place="sft.demonstrations.use")
    demonstrations = make(load_problems(config, "train"), **stage.demonstrations.options)
    chat = Chat.load(str(model), [], config.chat)
    rollouts = [to_rollout(demonstration, chat) for demonstration in demonstrations]
    size = stage.demonstrations_per_step

    async def batch(step: int, _learners: LearnerGroup) -> StepData:
        return assemble(of_step(rollouts, step, size, config.seed), [0.0] * size), {}

    left, _ = await train_offline(
        run,
        model,
        Offline(name="sft", schedule=stage, loss="rlsys.losses:cross_entropy", batch=batch, shown=("loss", "lr")),
    )
    return left
