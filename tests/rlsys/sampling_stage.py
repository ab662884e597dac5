"""A sampling stage without engines: a run in a folder, problems by number, samplers that do as they are told."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.console import Console
from rlsys.demonstrations import Demonstration
from rlsys.records import RunDirectory
from rlsys.samplers import Answers, SamplerContext
from rlsys.samples import Sample, read_samples
from rlsys.stages import Run, stage_of
from rlsys.types import Problem

YAML = """
name: sampling
trackers: []
stages: [own]
model: {path: /nowhere}
data:
  train: {use: "tests.rlsys.sampling_stage:numbered", options: {size: 10}}
  held_out: {use: "tests.rlsys.sampling_stage:numbered", options: {size: 1}}
rewards: [{use: "tests.rlsys.sampling_stage:no_reward"}]
samples:
  own:
    sampler: {use: "tests.rlsys.sampling_stage:FakeSampler"}
    samples_per_problem: 2
    problems_per_part: 3
    max_problems_in_flight: 4
"""


def numbered(*, size: int) -> list[Problem]:
    return [problem(number) for number in range(size)]


def problem(number: int, text: str = "") -> Problem:
    return Problem(id=f"p{number}", prompt=({"role": "user", "content": text or f"{number}?"},), answer=str(number))


def no_reward(_problem: Problem, _response: str) -> float:
    return 0.0


def sample(number: int, text: str, *, correct: bool | None = True, tokens: int = 3, **given: Any) -> Sample:
    demonstration = Demonstration(problem=problem(number), segments=((text, True),))
    return Sample(demonstration=demonstration, num_tokens=tokens, correct=correct, reward=float(bool(correct)), **given)


class FakeSampler:
    """Answers each problem with two texts, unless `act` says otherwise; counts what is asked of it."""

    uses_rollout_actors = False
    act: Callable[[int, int], Any] | None = None
    """From a problem's number and how often it was asked before to answers; may raise, and may be awaitable."""
    asked: ClassVar[Counter[int]] = Counter()
    at_once = most_at_once = 0
    starts = closes = 0

    @classmethod
    def reset(cls, act: Callable[[int, int], Any] | None = None) -> None:
        cls.act, cls.asked = act, Counter()
        cls.at_once = cls.most_at_once = cls.starts = cls.closes = 0

    async def start(self, context: SamplerContext) -> None:
        self.provenance = context.provenance
        type(self).starts += 1

    async def sample(self, problem: Problem, *, size: int) -> Answers | Sequence[Sample]:
        kind, number = type(self), int(problem.id[1:])
        before = kind.asked[number]
        kind.asked[number] += 1
        kind.at_once += 1
        kind.most_at_once = max(kind.most_at_once, kind.at_once)
        try:
            await asyncio.sleep(0)
            found = [
                replace(sample(number, f"{number} answer {index}", correct=index == 0), provenance=self.provenance)
                for index in range(size)
            ]
            if kind.act is not None:
                told = kind.act(number, before)
                told = await told if asyncio.iscoroutine(told) else told
                found = found if told is None else told
            return found
        finally:
            kind.at_once -= 1

    async def close(self) -> None:
        type(self).closes += 1


def configured(folder: Path, *overrides: str) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sampling.yaml").write_text(YAML)
    return load_config(folder / "sampling.yaml", [f"run_dir={folder / 'run'}", *overrides])


async def in_stage(
    config: Config, *, resume: bool = False, after: Callable[[Run], Any] | None = None, model: Path = Path("/nowhere")
) -> Path:
    """Run the stage `own`; `after` is called with the run, before it begins."""
    directory = RunDirectory.open(config, resume=resume, fresh=False)
    run = Run(config=config, directory=directory, console=Console(), stop=asyncio.Event())
    if after is not None:
        after(run)
    await stage_of(config, "own")(run, model)
    return directory.stage("own")


def written(folder: Path) -> list[Sample]:
    return read_samples(folder / "samples.parquet")


def part_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "parts").glob("*.parquet"))
