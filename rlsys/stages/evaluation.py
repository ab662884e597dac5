"""Measuring a policy on held-out problems: as a stage of its own, and before, during and after training."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from rlsys.errors import TrainingStalledError
from rlsys.fleet import RolloutFleet
from rlsys.rollout import mean_metrics
from rlsys.stages.collection import RewardFailures, count_dropped
from rlsys.stages.common import Run, load_problems, record_isolation
from rlsys.types import Problem, RolloutGroup


async def evaluate(
    run: Run, fleet: RolloutFleet, problems: Sequence[Problem], *, stage: str, step: int
) -> dict[str, float]:
    """Measure the policy on these problems, record every rollout, return the means."""
    settings = run.config.eval
    chosen = problems[: settings.max_problems]
    with run.console.counting(f"evaluating on {len(chosen)} held-out problems", total=len(chosen)) as tick:

        async def measured(problem: Problem) -> RolloutGroup:
            group = await fleet.act(
                problem,
                size=settings.samples_per_problem,
                sampling=settings.sampling,
                group_id=f"eval-{stage}-{step}-{problem.id}",
            )
            tick()
            return group

        groups = await asyncio.gather(*(measured(problem) for problem in chosen))
    failures = RewardFailures(run.config.max_failed_rewards)
    for group in groups:
        failures.add(group)
    failures.check(f"the evaluation after {stage} step {step}")
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        raise TrainingStalledError(
            f"none of the {len(chosen)} held-out problems could be measured: {groups[0].dropped}"
        )
    run.directory.write_rollouts(f"{stage}-eval-{step:06d}", groups)
    dropped = count_dropped(groups)
    metrics = {
        **mean_metrics(rollouts),
        "problems": float(len(chosen)),
        "not_measured": float(dropped.total()),
        **{f"dropped/{kind}": float(count) for kind, count in dropped.items()},
    }
    run.directory.log(f"{stage}/eval", step, metrics)
    run.console.say(
        f"{stage} step {step}: held-out accuracy {metrics['accuracy']:.3f}, tool rate {metrics['tool_rate']:.2f}, "
        f"{metrics['response_tokens']:.0f} tokens a response, {metrics['completed_ratio']:.2f} completed"
    )
    return metrics


async def evaluation(run: Run, model: Path) -> Path:
    """Measure the model folder itself, as a user of the trained model would load it."""
    async with AsyncExitStack() as stack:
        with run.console.waiting(f"starting {run.config.actors.count} rollout engines with {model}"):
            fleet = await RolloutFleet.start(run.config, str(model))
        stack.push_async_callback(fleet.close)
        await record_isolation(run, fleet)
        metrics = await evaluate(run, fleet, load_problems(run.config, "held_out"), stage="eval", step=0)
    run.directory.update_summary(accuracy=metrics["accuracy"], tool_rate=metrics["tool_rate"])
    return model
