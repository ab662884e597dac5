"""A run from its configuration to its summary: check, connect, go through the stages, say what came out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from rlsys import cluster
from rlsys.chat import load_tokenizer
from rlsys.config import ClusterConfig, Config
from rlsys.console import Console
from rlsys.driver import Driver, DriverLock
from rlsys.errors import CheckpointError, ConfigError
from rlsys.fleet import rollout_demand
from rlsys.function_tool import check_tool
from rlsys.gauges import METRICS, readings
from rlsys.learner_group import learner_demand, with_critic_ranks
from rlsys.plugins import build, check_options, resolve
from rlsys.pool import pool_demands
from rlsys.records import RunDirectory
from rlsys.report import plot_curves
from rlsys.reward_terms import check_reward, grades_groups
from rlsys.scaling import Scaling
from rlsys.scratch import build_scratch_model
from rlsys.selection import resolve_selections
from rlsys.stages import Interrupted, Run, stage_of
from rlsys.status import Status
from rlsys.thoughts import Thoughts

_OPTIMIZERS = {
    **{stage: f"{stage}.optimizer" for stage in ("sft", "preference", "reward_model", "rl")},
    "tpo": "tpo.preference.optimizer",
}
"""The stages that have learners, and where the settings of their optimizers stand."""


class Session:
    """A connection to Ray that outlives a run, so that runs which follow one another share it."""

    def __init__(self) -> None:
        self._connected: ClusterConfig | None = None

    def connect(self, config: ClusterConfig) -> None:
        """Join the cluster of `config`; nothing where that is done."""
        if config == self._connected:
            return
        self.close()
        cluster.connect(config)
        self._connected = config

    def close(self) -> None:
        """Leave it; a cluster that was started on this machine ends with all its processes."""
        if self._connected is not None:
            self._connected = None
            cluster.disconnect()


def train(
    config: Config,
    *,
    resume: bool = False,
    fresh: bool = False,
    console: Console | None = None,
    session: Session | None = None,
) -> dict[str, Any]:
    """Run all stages and return the summary; a `session` stays connected afterwards.

    Raises:
        RlsysError: with one clear message.
        Interrupted: the user stopped it; `resume` goes on from there.
    """
    console = console or Console()
    check(config)
    with DriverLock.take(Path(config.run_dir), job=cluster.job_id(), tell=console.say) as lock:
        directory = RunDirectory.open(config, resume=resume, fresh=fresh)
        if cluster.in_job() and not directory.folder.is_absolute():
            console.say(
                f"warning: this job runs in a temporary folder, and so does {directory.folder}: its results go with "
                "it; set run_dir to an absolute path that the nodes share"
            )
        own = Session()
        try:
            return asyncio.run(_train(config, directory, console, session or own, lock.driver, resume=resume))
        finally:
            own.close()
            directory.close()


def check(config: Config) -> None:
    """Find what is wrong before anything is started: references, options, tokenizer, data.

    Raises:
        RlsysError: names the place and the fix.
    """
    for index, reward in enumerate(config.rewards):
        check_reward(reward, place=f"rewards.{index}")
    for index, tool in enumerate(config.tools):
        check_tool(tool, place=f"tools.{index}")
    if config.chat.tool_format == "fenced" and len(config.tools) > 1:
        raise ConfigError("chat.tool_format=fenced knows one tool, python; use chat.tool_format=template for several")
    for name in ("train", "held_out"):
        source = getattr(config.data, name)
        check_options(resolve(source.use, place=f"data.{name}.use"), source.options, place=f"data.{name}")
    for place, made in (
        ("sft.demonstrations", config.sft.demonstrations),
        ("sft.held_out", config.sft.held_out),
        ("preference.pairs", config.preference.pairs),
        ("reward_model.pairs", config.reward_model.pairs),
    ):
        if made is not None:
            check_options(resolve(made.use, place=f"{place}.use"), made.options, place=place, given=1)
    _check_samples(config)
    resolve(config.preference.loss, place="preference.loss")
    resolve(config.tpo.preference.loss, place="tpo.preference.loss")
    if config.chat.thought is not None:
        Thoughts(config.chat.thought)  # says what is wrong with its prompt
    for place, reference in (("rl.advantage", config.rl.advantage), ("rl.loss", config.rl.loss)):
        resolve(reference, place=place)
    resolve_selections(config.rl.selections)
    _check_siblings(config)
    resolve(config.actors.use, place="actors.use")
    _check_learner(config)
    if config.model.path is not None:
        load_tokenizer(config.model.path)


def _check_siblings(config: Config) -> None:
    """What ends or parts siblings before all of them are graded does not go with a reward that compares them."""
    spread = config.actors.siblings == "spread"
    comparing = [
        reward.name
        for index, reward in enumerate(config.rewards)
        if grades_groups(resolve(reward.use, place=f"rewards.{index}.use"))
    ]
    if comparing and config.rl.give_up_after:
        raise ConfigError(
            f"rl.give_up_after={config.rl.give_up_after} ends siblings before all are graded, but reward "
            f"{comparing[0]!r} compares all of them; set rl.give_up_after=0"
        )
    if comparing and spread:
        raise ConfigError(
            f"actors.siblings=spread lets several workers write and grade the siblings of a problem, but reward "
            f"{comparing[0]!r} compares all of them; set actors.siblings=together"
        )
    if spread and config.rl.give_up_after:
        raise ConfigError("rl.give_up_after goes by the first siblings in one engine; set actors.siblings=together")


def _check_samples(config: Config) -> None:
    for name, stage in config.samples.items():
        place = f"samples.{name}"
        # Says what is wrong with its options.
        sampler = build(stage.sampler.use, stage.sampler.options, place=f"{place}.sampler")
        if name in config.stages and hasattr(sampler, "check_config"):
            sampler.check_config(config, place=f"{place}.sampler")
        if stage.problems is not None:
            source = resolve(stage.problems.use, place=f"{place}.problems.use")
            check_options(source, stage.problems.options, place=f"{place}.problems")
        for index, plug_in in enumerate(stage.filters):
            where = f"{place}.filters.{index}"
            check_options(resolve(plug_in.use, place=f"{where}.use"), plug_in.options, place=where, given=1)


def _check_learner(config: Config) -> None:
    """Options of the learner class and the optimizers of the run's stages, where the class can judge them."""
    learner_class = resolve(config.learners.use, place="learners.use")
    places = [_OPTIMIZERS[stage] for stage in config.stages if stage in _OPTIMIZERS]
    optimizers = {place: attrgetter(place)(config) for place in places}
    if "rl" in config.stages and config.rl.critic is not None:
        optimizers["rl.critic.optimizer"] = config.rl.critic.optimizer
    if hasattr(learner_class, "check_config"):
        learner_class.check_config(config.learners, optimizers)
        if "rl" in config.stages and config.rl.critic is not None:
            learner_class.check_config(with_critic_ranks(config).learners, {})


async def _train(
    config: Config, directory: RunDirectory, console: Console, session: Session, driver: Driver, *, resume: bool
) -> dict[str, Any]:
    # Ray's workers are other processes and perhaps other nodes: paths must not depend on where the driver stands.
    model = _starting_model(config, directory.folder)
    unfinished = [stage for stage in config.stages if directory.finished_model(stage) is None]
    if resume and not unfinished:
        raise CheckpointError(
            f"{directory.folder} is finished: all of {config.stages} are done; begin anew with --fresh"
        )
    stop = asyncio.Event()
    run = Run(config=config, directory=directory, console=console, stop=stop)
    status = Status(config, directory, console, run.live, driver=driver)
    try:
        async with status.shown(stopped=Interrupted):
            with console.waiting("starting Ray"):
                session.connect(config.cluster)
            status.export = partial(_export, cluster.Exporter(METRICS))
            with _stopped_by_signals(stop, console):
                await cluster.require(_demands(config, unfinished), wait_seconds=config.cluster.wait_seconds)
                async with _scaling(run, driver).watched():
                    model = await _all_stages(run, model)
    finally:
        directory.update_summary()
        plot_curves(directory)
    summary = directory.update_summary(model=str(model))
    console.table(f"{config.name}: {directory.folder}", summary)
    return summary


async def _all_stages(run: Run, model: Path) -> Path:
    """One stage after the other, those that are not finished; returns the last one's model."""
    for stage in run.config.stages:
        finished = run.directory.finished_model(stage)
        if finished is not None:
            run.console.say(f"{stage}: finished before, not run again")
            model = finished
            continue
        run.live.enter(stage)
        model = await _unless_stopped(stage_of(run.config, stage)(run, model), run.stop)
        link_model(run.directory.folder, model)  # first: a run that is killed here does the stage again
        run.directory.finish(stage, model)
    return model


def _scaling(run: Run, driver: Driver) -> Scaling:
    return Scaling(
        run.config,
        run.directory.folder,
        run.live,
        driver=driver.token,
        demands=lambda stage: _demands(run.config, [stage]),
        no_room=cluster.no_room,
        ask_for=cluster.ask_for,
        tell=run.console.say,
    )


def _export(exporter: cluster.Exporter, status: Mapping[str, Any]) -> None:
    exporter.export(readings(status), {"run": status["run"], "stage": status["stage"]})


async def _unless_stopped(stage: Any, stop: asyncio.Event) -> Path:
    """Await a stage; once `stop` is set it has a minute to reach a checkpoint and end by itself."""
    task = asyncio.ensure_future(stage)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=60)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=30)
            raise Interrupted("before a step was finished")
        model: Path = task.result()
        return model
    finally:
        stopping.cancel()


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event, console: Console) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM, as a job is stopped) asks for a clean end; a second one ends at once."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        console.say("stopping: finishing the step that is being learned, then saving (again to stop at once)")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _demands(config: Config, stages: list[str]) -> list[cluster.Demand]:
    """What the stages need at one time."""
    demands = []
    acting = set(stages) - {"sft", "preference", "reward_model"}
    if any(_has_rollout_actors(config, stage) for stage in acting):
        demands.append(rollout_demand(config))
    if acting:
        demands += pool_demands(config)
    if _OPTIMIZERS.keys() & set(stages):
        demands.append(learner_demand(config))
    if "rl" in stages and config.rl.critic is not None:
        demands.append(learner_demand(with_critic_ranks(config), what="critic rank"))
    return demands


def _has_rollout_actors(config: Config, stage: str) -> bool:
    if stage not in config.samples:
        return True
    sampler = resolve(config.samples[stage].sampler.use, place=f"samples.{stage}.sampler.use")
    return bool(getattr(sampler, "uses_rollout_actors", True))


def _starting_model(config: Config, folder: Path) -> Path:
    if config.model.scratch is None:
        assert config.model.path is not None
        path = Path(config.model.path)
        return path.resolve() if path.exists() else path
    built = (folder / "scratch").resolve()
    if not (built / "config.json").exists():
        build_scratch_model(built, config.model.scratch)
    return built


def link_model(folder: Path, model: Path) -> None:
    """Point `RUN/model` at the newest stage's model."""
    link = folder / "model"
    partial = folder / "model.partial"
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(model.resolve(), folder.resolve()))
    os.replace(partial, link)
