"""The runs of experiments: one after the other, resumable, a failed one in the way of those that need it only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlsys.config import Config
from rlsys.config_file import to_yaml
from rlsys.console import Console
from rlsys.errors import DataError, RlsysError
from rlsys.records import RunDirectory, move_aside
from rlsys.reproduce.experiment import SHARED, Experiment
from rlsys.reproduce.report import show, write
from rlsys.reproduce.results import Failure, Results, compared, measured
from rlsys.run import Session, check
from rlsys.run import train as train_run
from rlsys.stages import Interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of an experiment: a variant, or the shared stages, with one seed."""

    run: str
    seed: int
    config: Config
    after: str | None
    """The run of the same seed whose model it begins with."""

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.config.run_dir)

    @property
    def directory(self) -> RunDirectory:
        """What it has written."""
        return RunDirectory(self.folder, trackers=())

    @property
    def begun(self) -> bool:
        """Whether there is anything of it."""
        return (self.folder / "config.yaml").exists()

    @property
    def finished(self) -> bool:
        """Whether all its stages are done."""
        return self.begun and all(self.directory.finished_model(stage) is not None for stage in self.config.stages)

    @property
    def changed(self) -> bool:
        """Whether what there is was made with other settings."""
        return self.begun and (self.folder / "config.yaml").read_text() != to_yaml(self.config)


def jobs_of(experiment: Experiment, folder: Path) -> list[Job]:
    """All runs of an experiment in the order in which they are made: seed by seed, what is shared first."""
    return [
        Job(
            run=run,
            seed=seed,
            config=experiment.config_of(run, seed, folder / experiment.name),
            after=None if run == SHARED else experiment.begins_after(run),
        )
        for seed in experiment.seeds
        for run in experiment.runs
    ]


def reproduce(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    seeds: Sequence[int] = (),
    console: Console | None = None,
    train: Callable[..., Any] = train_run,
) -> list[Results]:
    """Make all runs that are not finished, write and show the tables; what failed is in the results.

    Args:
        experiments: What to run.
        folder: Each experiment has a folder in it, and each run one in that.
        seeds: In place of those of the experiments.
        console: Where to say what goes on.
        train: What makes a run.

    Raises:
        ConfigError: a run cannot be meant; before anything is started.
        Interrupted: the user stopped it; the same call goes on from there.
    """
    console = console or Console()
    chosen = [replace(experiment, seeds=list(seeds) or experiment.seeds) for experiment in experiments]
    every = {experiment.name: jobs_of(experiment, folder) for experiment in chosen}
    for jobs in every.values():
        for job in jobs:
            _check(job, jobs)
    session, found = Session(), []
    try:
        for experiment in chosen:
            jobs = every[experiment.name]
            console.say(f"\n{experiment.name}: {experiment.claim} {len(jobs)} runs in {folder / experiment.name}")
            failures = _run_all(jobs, session, console, train)
            results = collect(experiment, jobs, failures)
            write(results, folder)
            show(results, console)
            found.append(results)
    finally:
        session.close()
    return found


def _check(job: Job, jobs: Sequence[Job]) -> None:
    """Check a run before the model that it begins with is made: with the model at the root of its chain instead."""
    root = job
    while root.after is not None:
        root = _of_same_seed(jobs, root, root.after)
    try:
        check(replace(job.config, model=root.config.model))
    except RlsysError as error:
        raise type(error)(f"{job.config.name}: {error}") from error


def _run_all(
    jobs: Sequence[Job], session: Session, console: Console, train: Callable[..., Any]
) -> dict[tuple[str, int], str]:
    """Make the runs; returns why those failed that did, by run and seed."""
    _set_changed_aside(jobs, console)
    failures: dict[tuple[str, int], str] = {}
    for number, job in enumerate(jobs, 1):
        key, label = (job.run, job.seed), f"[{number}/{len(jobs)}] {job.config.name}"
        if job.after is not None and (job.after, job.seed) in failures:
            failures[key] = f"not run, because {job.after} failed"
            console.say(f"{label}: {failures[key]}")
            continue
        if job.finished:
            console.say(f"{label}: finished before, not run again")
            continue
        console.say(label)
        try:
            train(job.config, resume=job.begun, console=console, session=session)
        except Interrupted:
            console.say("the same command goes on from here")
            raise
        except Exception as error:  # plug-ins run in it, and the other variants do not depend on this one
            failures[key] = str(error) if isinstance(error, RlsysError) else f"{type(error).__name__}: {error}"
            console.say(f"{label} failed: {failures[key]}")
            session.close()  # nothing of it may take room from the next run
    return failures


def _set_changed_aside(jobs: Sequence[Job], console: Console) -> None:
    """Rename what was made with other settings, and what began with its model; the last ones first.

    So at no time, even if this is stopped in the middle, does a run stand beside a model that it did not begin with.
    """
    changed: list[Job] = []
    for job in jobs:
        before = job.after is not None and _of_same_seed(jobs, job, job.after) in changed
        if before or job.changed:
            changed.append(job)
    for job in reversed(changed):
        if job.folder.exists():
            console.say(f"{job.folder} was made with other settings: it is kept beside, and made anew")
            move_aside(job.folder)


def _of_same_seed(jobs: Sequence[Job], job: Job, run: str) -> Job:
    return next(other for other in jobs if (other.run, other.seed) == (run, job.seed))


def collect(experiment: Experiment, jobs: Sequence[Job], failures: dict[tuple[str, int], str]) -> Results:
    """Read what the runs measured; one that lacks a measure has failed, too."""
    values: dict[str, dict[str, dict[int, float]]] = {
        variant: {measure: {} for measure in experiment.measures} for variant in experiment.variants
    }
    seconds: dict[str, dict[int, float]] = {run: {} for run in experiment.runs}
    for job in jobs:
        if not job.folder.exists():
            continue
        directory = job.directory
        seconds[job.run][job.seed] = float(directory.summary().get("wall_seconds", 0.0))
        if job.run == SHARED or (job.run, job.seed) in failures:
            continue
        for measure in experiment.measures:
            try:
                values[job.run][measure][job.seed] = measured(directory, measure)
            except DataError as error:
                failures.setdefault((job.run, job.seed), str(error))
    return Results(
        name=experiment.name,
        claim=experiment.claim,
        paper=experiment.paper,
        seeds=experiment.seeds,
        values=values,
        findings=[compared(one.better, one.than, one.measure, values) for one in experiment.compare],
        seconds=seconds,
        failures=[Failure(run=run, seed=seed, message=message) for (run, seed), message in failures.items()],
    )
