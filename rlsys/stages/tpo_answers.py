"""The answers of an iteration: sampled by the engines that live through all of them, judged, and saved in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlsys.chat import Chat
from rlsys.config import SampleConfig
from rlsys.fleet import RolloutFleet
from rlsys.sample_parts import SampleParts, plan_of
from rlsys.samplers import Answers, SamplerContext
from rlsys.samples import Sample, sample_of
from rlsys.stages.common import Run
from rlsys.stages.sampling import Answering
from rlsys.types import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answers to each problem, in the order of the problems, and how many are missing by the kind of reason."""

    by_problem: list[list[Sample]]
    dropped: Counter[str]


async def collect_answers(
    run: Run, fleet: RolloutFleet, problems: Sequence[Problem], chat: Chat, *, name: str, model: Path
) -> Answered:
    """Answers to all problems, as a sampling stage of this name would collect them, but of engines that are there.

    Those in finished parts are read instead of made again. Problems that could not be answered at all are missing.

    Raises:
        TrainingStalledError: too many answers could not be had, or not be graded (`max_failed_rewards`).
        DataError: a part is of other problems or settings.
        Interrupted: the user asked for it; what was answered is kept.
    """
    run = replace(run, config=replace(run.config, samples={**run.config.samples, name: _settings(run)}))
    parts = SampleParts.open(
        run.directory.stage(name) / "parts",
        problems,
        plan_of(run.config, name, model),
        size=run.config.tpo.problems_per_part,
        place="tpo",
    )
    todo = [position for position in range(len(problems)) if position not in parts.done]
    if parts.done:
        run.console.say(f"{name}: {len(parts.done)} of {len(problems)} problems were answered before")
    if todo:
        sampler = _FleetSampler(fleet, chat)
        await sampler.start(
            SamplerContext(
                config=run.config, stage=name, model=model, sampling=run.config.tpo.sampling, tell=run.console.say
            )
        )
        await Answering(run, name, sampler, parts, problems).through(todo)
    found: dict[str, list[Sample]] = {}
    for sample in parts.samples():
        found.setdefault(sample.problem.id, []).append(sample)
    return Answered(by_problem=[found.get(problem.id, []) for problem in problems], dropped=parts.dropped)


def _settings(run: Run) -> SampleConfig:
    stage = run.config.tpo
    return SampleConfig(
        samples_per_problem=stage.samples_per_problem,
        sampling=stage.sampling,
        problems_per_part=stage.problems_per_part,
        max_problems_in_flight=stage.max_problems_in_flight,
    )


class _FleetSampler:
    """Answers with engines that somebody else starts and ends."""

    def __init__(self, fleet: RolloutFleet, chat: Chat) -> None:
        self._fleet, self._chat = fleet, chat

    async def start(self, context: SamplerContext) -> None:
        """Learn for what it answers."""
        self._context = context
        self._provenance = {**context.provenance, "sampler": "tpo", "model": str(context.model)}

    async def sample(self, problem: Problem, *, size: int) -> Answers:
        """One group of rollouts."""
        group = await self._fleet.act(
            problem, size=size, sampling=self._context.sampling, group_id=f"{self._context.stage}-{problem.id}"
        )
        samples = [sample_of(problem, rollout, self._chat, provenance=self._provenance) for rollout in group.rollouts]
        return Answers(samples=samples, dropped=group.dropped)

    async def close(self) -> None:
        """Nothing is its own."""
