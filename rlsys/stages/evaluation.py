"""Measuring a policy on held-out problems: as a stage of its own, and before, during and after training."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from rlsys.config import SamplingConfig
from rlsys.errors import TrainingStalledError
from rlsys.fleet import RolloutFleet
from rlsys.rollout import mean_metrics
from rlsys.stages.collection import RewardFailures, count_dropped
from rlsys.stages.common import Run, load_problems, record_isolation
from rlsys.types import Problem, RolloutGroup


async def evaluate(
    run: Run, fleet: RolloutFleet, problems: Sequence[Problem], *, stage: str, step: int
) -> dict[str, float]:
    """Measure the policy on held-out problems, record every rollout, return the means.

    With `eval.greedy` there is a greedy answer to each problem besides, logged as `stage/greedy`; its accuracy stands
    among the means.
    """
    settings = run.config.eval
    chosen, more = problems[: settings.max_problems], {}
    if settings.greedy:
        name, sampling = f"greedy-{stage}-{step}", replace(settings.sampling, temperature=0.0, top_p=1.0)
        groups = await answered(run, fleet, chosen, size=1, name=name, sampling=sampling)
        found = record(run, groups, stage=stage, step=step, kind="greedy", what="greedy held-out")
        more = {"accuracy_greedy": found["accuracy"]}
    groups = await answered(run, fleet, chosen, size=settings.samples_per_problem, name=f"eval-{stage}-{step}")
    return record(run, groups, stage=stage, step=step, more=more)


async def answered(
    run: Run,
    fleet: RolloutFleet,
    problems: Sequence[Problem],
    *,
    size: int,
    name: str,
    what: str = "held-out",
    sampling: SamplingConfig | None = None,
) -> list[RolloutGroup]:
    """The graded answers of the policy to these problems; `name` begins their ids.

    They are sampled as `eval.sampling` says, where nothing else is given.
    """
    sampling = sampling or run.config.eval.sampling
    with run.console.counting(f"evaluating on {len(problems)} {what} problems", total=len(problems)) as tick:

        async def group_of(problem: Problem) -> RolloutGroup:
            group = await fleet.act(problem, size=size, sampling=sampling, group_id=f"{name}-{problem.id}")
            tick()
            return group

        return list(await asyncio.gather(*(group_of(problem) for problem in problems)))


def record(
    run: Run,
    groups: Sequence[RolloutGroup],
    *,
    stage: str,
    step: int,
    kind: str = "eval",
    what: str = "held-out",
    more: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Write down these answers and return their means, with `more` numbers, which are logged as `stage/kind`.

    Raises:
        TrainingStalledError: too many could not be graded, or there is none.
    """
    failures = RewardFailures(run.config.max_failed_rewards)
    for group in groups:
        failures.add(group)
    failures.check(f"the evaluation on {what} problems after {stage} step {step}")
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        raise TrainingStalledError(
            f"none of the {len(groups)} {what} problems could be measured: {groups[0].dropped if groups else {}}"
        )
    run.directory.write_rollouts(f"{stage}-{kind}-{step:06d}", groups)
    dropped = count_dropped(groups)
    metrics = {
        **mean_metrics(rollouts),
        "problems": float(len(groups)),
        "not_measured": float(dropped.total()),
        **(more or {}),
        **{f"dropped/{kind}": float(count) for kind, count in dropped.items()},
    }
    run.directory.forget(f"{stage}/{kind}", step)  # an attempt may have been killed before anybody knew of its line
    run.directory.log(f"{stage}/{kind}", step, metrics)
    run.console.say(
        f"{stage} step {step}: {what} accuracy {metrics['accuracy']:.3f}, tool rate {metrics['tool_rate']:.2f}, "
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
    run.directory.update_summary(**{key: metrics[key] for key in ("accuracy", "tool_rate", "response_tokens")})
    return model
