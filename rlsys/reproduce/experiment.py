"""An experiment: a claim, variants of one run that put it to the test, what is measured and what should come out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlsys.config import Config, require
from rlsys.config_file import flatten, read_tree, structure
from rlsys.errors import ConfigError
from rlsys.reproduce.results import check_measure
from rlsys.tables import did_you_mean

SHARED = "shared"
"""The name of the run of the stages that are done once for each seed."""

BUILT_IN = Path(__file__).resolve().parents[1] / "configs" / "miniature"
"""The experiments that come along."""

_OURS = ("name", "run_dir", "seed")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PROBE = 918_273_645  # a seed that nobody writes into a file


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the claim says would come out: one variant has more of a measure than another."""

    better: str
    """The variant that should have the larger number."""
    than: str
    """The one that should have the smaller number."""
    measure: str = "accuracy"
    """Of which measure, one of `measures`."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A claim and the runs that test it."""

    name: str
    """Its name and that of its folder."""
    claim: str
    """One sentence, printed over the table."""
    paper: list[str] = field(default_factory=list)
    """What the paper found, with its source; printed under the table."""
    config: str
    """The run that all variants are variants of; a path, from the experiment's own file."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of a run, merged over `config` for all."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Everything is done once for each."""
    shared: list[str] = field(default_factory=list)
    """Stages that are done once for each seed; the variants begin with the model that they leave."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of a run by variant, merged over `settings`. One key more: `after`, see `begins_after`."""
    measures: list[str] = field(default_factory=lambda: ["accuracy", "response_tokens", "completed_ratio", "tool_rate"])
    """What is read from each variant; see `rlsys.reproduce.results.measured`."""
    compare: list[Comparison] = field(default_factory=list)
    """What the paper says would come out."""

    def __post_init__(self) -> None:
        require(bool(_NAME.fullmatch(self.name)), f"name: {self.name!r} must be letters, digits, _ and -")
        require(bool(self.seeds), "seeds is empty; give at least one, three or more for an interval: seeds: [0, 1, 2]")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds: {self.seeds} has one twice")
        require(bool(self.variants), "variants is empty; give at least one: `variants: {plain: {stages: [rl]}}`")
        require(bool(self.measures), "measures is empty; give at least one, such as accuracy")
        require(len(set(self.measures)) == len(self.measures), f"measures: {self.measures} has one twice")
        for measure in self.measures:
            check_measure(measure)
        self._check_variants()
        for index, comparison in enumerate(self.compare):
            place = f"compare.{index}"
            for name in (comparison.better, comparison.than):
                _choice(f"{place}: unknown variant", name, list(self.variants))
            require(
                comparison.better != comparison.than, f"{place}: {comparison.than!r} is compared with itself; name two"
            )
            _choice(f"{place}: unknown measure", comparison.measure, self.measures)

    def _check_variants(self) -> None:
        known: list[str] = [SHARED] if self.shared else []
        for name, settings in self.variants.items():
            place = f"variants.{name}"
            require(bool(_NAME.fullmatch(name)), f"{place}: the name must be letters, digits, _ and -")
            require(name != SHARED, f"{place}: this is the name of the stages that all variants share; choose another")
            for tree, where in ((self.settings, "settings"), (settings, place)):
                for key in _OURS:
                    require(key not in tree, f"{where}.{key} is set for each run by its seed and variant; leave it out")
            require(
                "stages" in settings or "stages" in self.settings,
                f"{place} has no stages; say what is done: `stages: [rl]`",
            )
            begins = self.begins_after(name)
            if begins is not None:
                _choice(f"{place}.after: unknown variant (it must stand before this one)", begins, known)
                require(
                    "model" not in settings,
                    f"{place}.model: it begins with the model of {begins!r}; for one of its own add `after: null`",
                )
            known.append(name)

    def begins_after(self, variant: str) -> str | None:
        """Whose model a variant begins with: `after` (`shared` or a variant above); None: that of its own settings."""
        default = SHARED if self.shared else None
        begins = self.variants[variant].get("after", default)
        return None if begins is None else str(begins)

    def config_of(self, run: str, seed: int, folder: Path) -> Config:
        """The run of a variant, or of the shared stages, with this seed; `folder` holds all runs of the experiment.

        Raises:
            ConfigError: names the experiment, the variant and the key.
        """
        runs = folder / f"seed-{seed}"
        own: dict[str, Any] = {"name": f"{self.name}-{run}-{seed}", "run_dir": str(runs / run), "seed": seed}
        variant: Mapping[str, Any] = {"stages": self.shared}
        if run != SHARED:
            variant = {key: value for key, value in self.variants[run].items() if key != "after"}
            begins = self.begins_after(run)
            if begins is not None:
                own["model"] = {"path": str(runs / begins / "model"), "scratch": None}
        place = f"{self.name}: {run}"
        try:
            return structure(Config, [read_tree(self.config), self.settings, variant, own], place=place)
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(place) else f"{place}: {text}") from error

    @property
    def runs(self) -> list[str]:
        """What is run for each seed, in order."""
        return [*([SHARED] if self.shared else []), *self.variants]


def load_experiment(path: str | Path) -> Experiment:
    """Read an experiment and check it, with the configuration of each of its runs.

    Raises:
        ConfigError: names the file, the key and the fix.
    """
    path = Path(path)
    tree = read_tree(path)
    for key in ("settings", "variants"):
        tree[key] = _escaped(tree.get(key) or {})
    try:
        experiment = structure(Experiment, [tree], place=str(path))
        experiment = replace(experiment, config=str((path.parent / experiment.config).resolve()))
        for run in experiment.runs:
            _check_seeds(run, experiment.config_of(run, _PROBE, Path("runs")))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return experiment


def find_experiments(only: Sequence[str] = ()) -> list[Experiment]:
    """The experiments of these names, or in these YAML files; all that come along where none is given.

    Raises:
        ConfigError: there is none of that name, or two have the same.
    """
    paths = {path.stem: path for path in sorted(BUILT_IN.glob("*.yaml"))}
    chosen = []
    for name in only or paths:
        own = Path(name)
        chosen.append(own if own.suffix == ".yaml" else paths[_choice("unknown experiment", name, list(paths))])
    experiments = [load_experiment(path) for path in chosen]
    names = [experiment.name for experiment in experiments]
    for name in names:
        require(names.count(name) == 1, f"two experiments are called {name!r}; their runs would lie in one folder")
    return experiments


def _check_seeds(run: str, config: Config) -> None:
    """Refuse a seed that stays the same: then runs of different seeds would not be independent."""
    for key, value in flatten(config).items():
        if key.rpartition(".")[2] == "seed":
            require(
                value == _PROBE, f"{run}: {key} is {value} whatever the run's seed; write `seed: ${{seed}}` in settings"
            )


def _escaped(tree: Any) -> Any:
    """The same with `${...}` left for the run's configuration to fill in."""
    if isinstance(tree, Mapping):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    return tree.replace("${", "\\${") if isinstance(tree, str) else tree


def _choice(what: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        raise ConfigError(f"{what} {value!r}{did_you_mean(near)}; known: {', '.join(known) or 'none'}")
    return value
