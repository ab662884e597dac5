"""Making data: answers to problems, graded, filtered, and written with where they come from."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rlsys.config import SampleConfig
from rlsys.errors import CheckpointError, ConfigError, DataError, ResourceError, TrainingStalledError
from rlsys.plugins import build, resolve
from rlsys.records import write_json
from rlsys.sample_parts import SampleParts, plan_of
from rlsys.sample_report import filtered, nothing_left, report_of, with_pass_rates
from rlsys.samplers import SKIPPED, Answers, Sampler, SamplerContext
from rlsys.samples import Sample, write_samples
from rlsys.stages.common import Interrupted, Run, load_problems, record_isolation
from rlsys.stages.shortfall import Shortfall
from rlsys.types import Problem

_GRACE_SECONDS = 15.0
"""So long after Ctrl-C answers that are under way may end."""

_TOLD_EVERY_SECONDS = 60.0
_ENDS_THE_STAGE = (ConfigError, DataError, CheckpointError, ResourceError, TrainingStalledError)
_MESSAGE_CHARACTERS = 300


def sampling(name: str) -> Callable[[Run, Path], Awaitable[Path]]:
    """The stage that makes the samples of this name."""
    return partial(_sampling, name)


async def _sampling(name: str, run: Run, model: Path) -> Path:
    stage, place = run.config.samples[name], f"samples.{name}"
    problems = _problems(run, stage, place)
    parts = SampleParts.open(
        run.directory.stage(name) / "parts",
        problems,
        plan_of(run.config, name, model),
        size=stage.problems_per_part,
        place=place,
    )
    todo = [position for position in range(len(problems)) if position not in parts.done]
    if parts.done:
        run.console.say(f"{name}: {len(problems) - len(todo)} of {len(problems)} problems were answered before")
    if todo:
        sampler: Sampler = build(stage.sampler.use, stage.sampler.options, place=f"{place}.sampler")
        context = SamplerContext(
            config=run.config, stage=name, model=model, sampling=stage.sampling, tell=run.console.say
        )
        try:
            with run.console.waiting(f"{name}: starting the sampler"):
                await sampler.start(context)
        except BaseException:
            with suppress(Exception):  # it may not close what it did not start, and why it did not start says more
                await sampler.close()
            raise
        try:
            if (fleet := getattr(sampler, "fleet", None)) is not None:
                await record_isolation(run, fleet)
            await Answering(run, name, sampler, parts, problems).through(todo)
        finally:
            await sampler.close()
    await asyncio.to_thread(_finish, run, name, parts, len(problems))
    return model


def _problems(run: Run, stage: SampleConfig, place: str) -> list[Problem]:
    if stage.problems is None:
        problems = load_problems(run.config, "train")
    else:
        problems = resolve(stage.problems.use, place=f"{place}.problems.use")(**stage.problems.options)
    problems = problems[: stage.max_problems]
    if not problems:
        raise DataError(f"{place}.problems gave no problem")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise DataError(
                f"{place}: two problems have the id {problem.id!r}; answers are told apart by it, so give each its own"
            )
        seen.add(problem.id)
    return problems


class Answering:
    """Answers problems, so many at a time; what is answered is saved whatever happens to the rest."""

    def __init__(self, run: Run, name: str, sampler: Sampler, parts: SampleParts, problems: Sequence[Problem]) -> None:
        self._run, self._name, self._sampler, self._parts, self._problems = run, name, sampler, parts, problems
        self._stage = run.config.samples[name]

    async def through(self, todo: Sequence[int]) -> None:
        """Answer the problems at these places.

        Raises:
            Interrupted: the user stopped it.
            TrainingStalledError: too many answers could not be had, or not be graded.
        """
        shortfall = Shortfall(
            self._run.config, self._name, num_problems=len(self._problems), num_done=len(self._parts.done)
        )
        places = iter(todo)
        self._parts.begin()
        told = time.monotonic()
        with self._run.console.counting(f"{self._name}: sampling", total=len(todo)) as tick:

            async def work() -> None:
                nonlocal told
                for position in places:
                    if self._run.stop.is_set():
                        return
                    answers = await self._answered(self._problems[position])
                    tick()
                    if answers.samples or not _failed(answers):
                        await self._parts.add(position, answers)
                    else:  # not in a part, so that `--resume` tries it again
                        self._parts.note(answers.dropped)
                    shortfall.add(self._problems[position], answers)
                    if time.monotonic() - told > _TOLD_EVERY_SECONDS:
                        told = time.monotonic()
                        self._run.console.say(f"{self._name}: {self._parts.told}")

            count = min(self._in_flight(), len(todo))
            await self._all([asyncio.create_task(work()) for _ in range(count)])

    def _in_flight(self) -> int:
        """Enough problems to keep the sampler busy; more would only wait there, and their deadlines would run."""
        actors = self._run.config.actors
        has_engines = getattr(self._sampler, "uses_rollout_actors", True)
        capacity = getattr(self._sampler, "capacity", actors.count * actors.max_rollouts if has_engines else None)
        most = self._stage.max_problems_in_flight
        return most if capacity is None else min(most, 2 * capacity // self._stage.samples_per_problem + 1)

    async def _all(self, tasks: list[asyncio.Task[None]]) -> None:
        working = asyncio.gather(*tasks)
        stopping = asyncio.create_task(self._run.stop.wait())
        try:
            waited: set[asyncio.Future[Any]] = {working, stopping}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                await asyncio.wait({working}, timeout=_GRACE_SECONDS)
            if working.done():
                await working
            if self._run.stop.is_set():
                raise Interrupted(f"{self._name}: {self._parts.told}")
        finally:
            for task in (*tasks, stopping):
                task.cancel()
            await asyncio.gather(*tasks, stopping, working, return_exceptions=True)
            await self._parts.save()

    async def _answered(self, problem: Problem) -> Answers:
        """The answers to a problem, tried again where that fails as a whole."""
        size, seconds = self._stage.samples_per_problem, self._stage.problem_seconds
        for _ in range(self._stage.retries + 1):
            try:
                async with asyncio.timeout(seconds) as limit:
                    return _checked(await self._sampler.sample(problem, size=size), size)
            except _ENDS_THE_STAGE:
                raise
            except Exception as error:  # of an engine, or of a user's sampler
                late = isinstance(error, TimeoutError) and limit.expired()
                said = (
                    f"no answer within {seconds:g} s (problem_seconds)" if late else f"{type(error).__name__}: {error}"
                )
        return Answers(samples=(), dropped={f"failed: {said[:_MESSAGE_CHARACTERS]}": size})


def _failed(answers: Answers) -> bool:
    """Whether trying again could help."""
    return any(not reason.startswith(("reward_", "prompt_too_long", SKIPPED)) for reason in answers.dropped)


def _checked(found: Any, size: int) -> Answers:
    answers = found if isinstance(found, Answers) else Answers(samples=found)
    samples = list(answers.samples)
    if not all(isinstance(sample, Sample) for sample in samples):
        raise TypeError(f"the sampler gave {found!r:.80}, not samples")
    missing = size - len(samples) - sum(answers.dropped.values())
    unsaid = {"not_given: the sampler gave fewer answers": missing} if missing > 0 else {}
    return Answers(samples=samples, dropped={**answers.dropped, **unsaid})


def _finish(run: Run, name: str, parts: SampleParts, num_problems: int) -> None:
    """Filter what was sampled, write it and say what it is."""
    stage, folder = run.config.samples[name], run.directory.stage(name)
    samples = with_pass_rates(parts.samples())
    kept, steps = filtered(samples, stage.filters, place=f"samples.{name}")
    report = report_of(
        samples,
        kept,
        steps,
        num_problems=num_problems,
        dropped=parts.dropped,
        messages=parts.messages,
        seconds=parts.seconds,
    )
    write_json(folder / "report.json", {"stage": name, "sampler": stage.sampler.use, **report})
    if not kept:
        raise DataError(f"samples.{name}: {nothing_left(steps, parts.dropped, parts.messages)}")
    write_samples(folder / "samples.parquet", kept, about={"report": report})
    run.directory.forget_after(name, -1)
    metrics = _metrics(report)
    run.directory.log(name, 0, metrics)
    removed = ", ".join(f"{step.filter} removed {step.given - step.left}" for step in steps)
    lost = ", ".join(f"{kind} {count}" for kind, count in parts.dropped.items())
    run.console.say(
        f"{name}: {len(kept)} of {len(samples)} samples kept"
        + (f"; {removed}" if removed else "")
        + (f"; dropped: {lost}" if lost else "")
        + f"; report: {folder / 'report.json'}"
    )
    seen = {f"{name}_{key}": metrics[key] for key in ("correct", "response_tokens") if key in metrics}
    run.directory.update_summary(**{f"{name}_samples": len(kept), **seen})


def _metrics(report: dict[str, Any]) -> dict[str, float]:
    """The numbers of a report that are worth a line among the run's metrics."""
    found = {key: report[key] for key in ("problems", "samples", "kept", "acceptance", "correct", "tokens_per_second")}
    found |= {"tokens": report["tokens"]["written"], "response_tokens": report["lengths"]["written"]["mean"]}
    found |= {f"removed/{index}_{step['filter']}": step["removed"] for index, step in enumerate(report["filters"])}
    found |= {f"dropped/{kind}": about["answers"] for kind, about in report["dropped"].items()}
    return {key: float(value) for key, value in found.items() if value is not None}
