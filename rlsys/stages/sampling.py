"""Making data: answers to problems, graded, filtered, and written with where they come from."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlsys.errors import DataError
from rlsys.plugins import build, resolve
from rlsys.samplers import Sampler, SamplerContext
from rlsys.samples import Sample, read_samples, write_samples
from rlsys.stages.common import Interrupted, Run, load_problems
from rlsys.types import Problem


def sampling(name: str) -> Callable[[Run, Path], Awaitable[Path]]:
    """The stage that makes the samples of this name."""
    return partial(_sampling, name)


async def _sampling(name: str, run: Run, model: Path) -> Path:
    stage = run.config.samples[name]
    place = f"samples.{name}"
    if stage.problems is None:
        problems = load_problems(run.config, "train")
    else:
        problems = resolve(stage.problems.use, place=f"{place}.problems.use")(**stage.problems.options)
    problems = problems[: stage.max_problems]
    parts = run.directory.stage(name) / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    todo = [
        (parts / f"part-{first:07d}.parquet", problems[first : first + stage.problems_per_part])
        for first in range(0, len(problems), stage.problems_per_part)
    ]
    todo = [(path, some) for path, some in todo if not path.exists()]
    if todo:
        sampler: Sampler = build(stage.sampler.use, stage.sampler.options, place=f"{place}.sampler")
        context = SamplerContext(
            config=run.config, stage=name, model=model, sampling=stage.sampling, tell=run.console.say
        )
        with run.console.waiting(f"{name}: starting the sampler"):
            await sampler.start(context)
        try:
            await _sample_parts(run, name, sampler, todo)
        finally:
            await sampler.close()
    kept, counts = _filtered(run, name, read_samples(parts))
    write_samples(run.directory.stage(name) / "samples.parquet", kept)
    run.directory.log(name, 0, counts)
    run.directory.update_summary(**{f"{name}_samples": len(kept)})
    return model


async def _sample_parts(run: Run, name: str, sampler: Sampler, todo: list[tuple[Path, list[Problem]]]) -> None:
    """Answer the problems of all parts, several parts at a time, and save each when it is whole."""
    stage = run.config.samples[name]
    places = asyncio.Semaphore(stage.max_problems_in_flight)
    with run.console.counting(f"{name}: sampling", total=sum(len(problems) for _, problems in todo)) as tick:

        async def answered(problem: Problem) -> list[Sample]:
            async with places:
                if run.stop.is_set():
                    raise Interrupted(name)
                samples = await sampler.sample(problem, size=stage.samples_per_problem)
                tick()
                return list(samples)

        async def part(path: Path, problems: list[Problem]) -> None:
            found = await asyncio.gather(*(answered(problem) for problem in problems))
            await asyncio.to_thread(write_samples, path, [sample for samples in found for sample in samples])

        async with asyncio.TaskGroup() as tasks:
            for path, problems in todo:
                tasks.create_task(part(path, problems))


def _filtered(run: Run, name: str, samples: list[Sample]) -> tuple[list[Sample], dict[str, float]]:
    """What all filters keep, and how many each of them removed."""
    counts: dict[str, float] = {"samples": float(len(samples))}
    for index, plug_in in enumerate(run.config.samples[name].filters):
        function: Any = resolve(plug_in.use, place=f"samples.{name}.filters.{index}.use")
        kept = list(function(samples, **plug_in.options))
        counts[f"removed/{index}_{plug_in.use.rpartition(':')[2]}"] = float(len(samples) - len(kept))
        samples = kept
    counts["kept"] = float(len(samples))
    run.console.say(f"{name}: " + ", ".join(f"{key} {value:.0f}" for key, value in counts.items()))
    if not samples:
        raise DataError(f"samples.{name}: no sample is left: {counts}")
    return samples, counts
