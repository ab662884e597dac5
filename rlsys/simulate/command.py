"""What `rlsys simulate` does: read a configuration or a real run, simulate, print tables that say *simulated*."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.errors import ConfigError
from rlsys.simulate.config import SimulateConfig
from rlsys.simulate.fit import Measured, fit, measured
from rlsys.simulate.simulation import Simulated, simulate, without_faults

_WITHIN = 0.10
"""A model that is closer than this to a real run's step time stands for it."""


def run(
    config: Path | None,
    overrides: Sequence[str] = (),
    *,
    workers: int | None = None,
    learner_gpus: int | None = None,
    faults: float | None = None,
    steps: int | None = None,
    fitted: Path | None = None,
) -> Simulated:
    """Simulate and print.

    Without a configuration it is that of the run `fitted`, and the result stands beside what the run measured.

    Raises:
        ConfigError, DataError: there is nothing to simulate, or it cannot mean anything.
    """
    console = Console(highlight=False)
    logging.getLogger("rlsys").setLevel(logging.ERROR)  # that workers die is what was asked for
    real = None
    if config is None:
        if fitted is None:
            raise ConfigError("give a configuration to simulate, or a run with --fit")
        real = measured(fitted)
    loaded = load_config(fitted / "config.yaml" if config is None and fitted else Path(str(config)), overrides)
    if fitted is not None:
        loaded = replace(loaded, simulate=fit(fitted))
        _print_model(console, loaded.simulate, fitted)
    loaded = _changed(loaded, workers=workers, learner_gpus=learner_gpus, faults=faults)
    loaded = replace(loaded, rl=replace(loaded.rl, steps=steps or (real.steps if real else 20)))
    columns = {"simulated": simulate(without_faults(loaded))}
    model = loaded.simulate
    if model is not None and model.hours_between_deaths is not None:
        columns["simulated, with faults"] = simulate(loaded)
    console.print(_title(loaded))
    console.print(table_of(columns))
    if real is not None:
        console.print(comparison(real, columns["simulated"]))
    return list(columns.values())[-1]


def _changed(config: Config, *, workers: int | None, learner_gpus: int | None, faults: float | None) -> Config:
    """The configuration with other numbers of workers and ranks, and with workers that die."""
    actors, learners = config.actors, config.learners
    if workers is not None:
        highest = None if actors.max is None else max(actors.max, workers)
        actors = replace(actors, count=workers, min=min(actors.min, max(1, workers)), max=highest)
    if learner_gpus is not None:
        learners = replace(learners, count=learner_gpus)
    model = config.simulate or SimulateConfig()
    if faults is not None:
        model = replace(model, hours_between_deaths=faults)
    return replace(config, actors=actors, learners=learners, simulate=model)


def _title(config: Config) -> str:
    actors, learners, stage = config.actors, config.learners, config.rl
    return (
        f"simulated, not measured: {config.name}, {actors.count} rollout workers, {learners.count} learner ranks, "
        f"{stage.groups_per_step} x {stage.group_size} rollouts a step, max_staleness {stage.max_staleness}"
    )


def table_of(columns: Mapping[str, Simulated]) -> Table:
    """One column for each simulated run."""
    table = Table()
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    rows = [_rows(one) for one in columns.values()]
    for name in rows[0]:
        table.add_row(name, *(row[name] for row in rows))
    return table


def _rows(one: Simulated) -> dict[str, str]:
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(one.dropped.items()))
    return {
        "a policy step takes": f"{one.step_seconds:.2f} s",
        "  waiting for rollouts": f"{one.rollout_seconds:.2f} s",
        "  learning": f"{one.learn_seconds:.2f} s",
        "  publishing": f"{one.publish_seconds:.2f} s",
        "trained tokens": f"{one.tokens_per_second:,.0f}/s",
        "trained groups": f"{one.groups_per_second:.3g}/s",
        "engines that generate nothing": f"{one.engine_idle:.1%}",
        "engines' places in use": f"{one.engine_fill:.1%}",
        "learner that does not learn": f"{one.learner_idle:.1%}",
        "staleness, mean and most": f"{one.staleness_mean:.2f}, {one.staleness_max}",
        "whole run": f"{one.seconds / 60:.1f} min",
        "workers lost": str(one.deaths),
        "groups given to another worker": str(one.redispatched),
        "groups dropped": dropped or "0",
        "processor: driver and models": f"{one.driver_share:.2%} of a core",
    }


def comparison(real: Measured, one: Simulated) -> Table:
    """A real run beside its simulation."""
    off = one.step_seconds / real.step_seconds - 1
    verdict = "within" if abs(off) <= _WITHIN else "NOT within"
    table = Table("", "measured", "simulated", "off by", caption_justify="left")
    table.caption = f"step time {verdict} {_WITHIN:.0%}"
    for name in ("step_seconds", "rollout_seconds", "learn_seconds", "publish_seconds", "tokens_per_second"):
        was, found = getattr(real, name), getattr(one, name)
        table.add_row(name.replace("_", " "), f"{was:.3g}", f"{found:.3g}", f"{found / was - 1:+.1%}" if was else "")
    return table


def _print_model(console: Console, model: SimulateConfig | None, folder: Path) -> None:
    assert model is not None
    defaults = {field.name: field.default for field in fields(SimulateConfig)}
    changed = {name: value for name, value in asdict(model).items() if value != defaults[name]}
    console.print(f"# from {folder}; for a configuration", markup=False)
    console.print(yaml.safe_dump({"simulate": changed}, sort_keys=False), markup=False)
