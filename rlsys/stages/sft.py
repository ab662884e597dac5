"""Supervised fine-tuning: learn to imitate demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rlsys.learner_group import LearnerGroup
from rlsys.run_chat import run_chat
from rlsys.stages.common import Run, assemble
from rlsys.stages.offline import Offline, StepData, num_steps, of_step, train_offline
from rlsys.stages.sft_data import sft_data
from rlsys.types import Rollout

_AT_A_TIME = 256
"""Held-out demonstrations that are measured in one call."""


async def sft(run: Run, model: Path) -> Path:
    """Learn to imitate demonstrations; the loss on those that are held out is measured from time to time."""
    config, stage = run.config, run.config.sft
    data = sft_data(config, await run_chat(config, str(model)))
    size = stage.demonstrations_per_step
    steps = num_steps(stage, len(data.train), size)
    run.console.say(f"sft: {data.told}; {steps} steps, {steps * size / len(data.train):.3g} epochs")
    run.directory.update_summary(**{f"sft_{name}": count for name, count in data.counts.items() if count})

    async def batch(step: int, _learners: LearnerGroup) -> StepData:
        return assemble(of_step(data.train, step, size, config.seed), [0.0] * size), {}

    async def measure(step: int, learners: LearnerGroup) -> Mapping[str, float]:
        numbers = {"epoch": step * size / len(data.train)}
        due = step == steps or (stage.held_out_every and step % stage.held_out_every == 0)
        if data.held_out and due:
            numbers["held_out_loss"] = await held_out_loss(learners, data.held_out)
        return numbers

    left, metrics = await train_offline(
        run,
        model,
        Offline(
            name="sft",
            schedule=stage,
            steps=steps,
            loss="rlsys.losses:cross_entropy",
            batch=batch,
            measure=measure,
            shown=("loss", "held_out_loss", "epoch", "lr"),
        ),
    )
    run.directory.update_summary(
        **{f"sft_{name}": metrics[name] for name in ("loss", "held_out_loss") if name in metrics}
    )
    return left


async def held_out_loss(learners: LearnerGroup, rollouts: Sequence[Rollout]) -> float:
    """Mean negative log-likelihood of the tokens that would train, as the loss of a step is."""
    total = 0.0
    for first in range(0, len(rollouts), _AT_A_TIME):
        some = rollouts[first : first + _AT_A_TIME]
        found = await learners.infer(assemble(some, [0.0] * len(some)), temperature=1.0)
        total -= sum(float(logprobs.sum()) for logprobs in found)
    return total / sum(rollout.num_trained_tokens for rollout in rollouts)
