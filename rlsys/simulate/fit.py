"""The numbers of the models from a real run: its `metrics.jsonl` and the rollouts that it wrote."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.errors import DataError
from rlsys.simulate.config import SimulateConfig
from rlsys.simulate.sizes import Size, rows_of, size_of

_NEEDED = ("seconds/step", "seconds/rollout", "seconds/learn", "seconds/publish")
_INSTANT = 1e9
"""Prompt tokens per second where reading prompts is part of what was measured for decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run measured, over its policy steps but the first, in which everything is cold."""

    config: Config
    steps: int
    step_seconds: float
    rollout_seconds: float
    learn_seconds: float
    publish_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One policy step of a run: its line and what each of its rollouts took."""

    line: dict[str, Any]
    rollouts: list[tuple[Size, float]]
    """Sizes, and the seconds of generation alone."""

    @property
    def tokens(self) -> int:
        """Of prompts and responses, as a learner counts them."""
        return sum(size.prompt + size.tokens for size, _ in self.rollouts)

    @property
    def written(self) -> int:
        """Tokens that the policy wrote."""
        return sum(size.tokens for size, _ in self.rollouts)


def measured(folder: Path) -> Measured:
    """What a run says of itself.

    Raises:
        DataError: it has no policy step behind the first, or lacks what is needed of them.
    """
    return _measured(_config_of(folder), _steps_of(folder))


def fit(folder: Path) -> SimulateConfig:
    """The `simulate` section that stands for the machine and the policy of a run.

    A token of a rollout that is one of n on its engine took a + b n seconds: a and b are the least squares over all
    rollouts, neither below 0. Reading prompts is in there. The same for the seconds of a policy step over its tokens.

    Raises:
        DataError: the run has too little to say, or it is not one from which this can be told.
    """
    config, steps = _config_of(folder), _steps_of(folder)
    _check_fit(config, steps)
    seen = _measured(config, steps)
    a, b = _decode(config, steps)
    constant, slope = _least_squares(
        np.array([[1.0, step.tokens] for step in steps]), np.array([step.line["seconds/learn"] for step in steps])
    )
    return replace(
        config.simulate or SimulateConfig(),
        decode_seconds=max(a, 1e-6),
        decode_seconds_per_rollout=b,
        prefill_tokens_per_second=_INSTANT,
        rollouts=str(folder),
        uninformative=0.0,
        learn_seconds=constant,
        learn_seconds_per_token=slope * config.learners.count,
        step_seconds=max(0.0, seen.step_seconds - seen.rollout_seconds - seen.learn_seconds - seen.publish_seconds),
        weight_bytes=0.0,
        sync_seconds=seen.publish_seconds,
        hours_between_deaths=None,
    )


def _config_of(folder: Path) -> Config:
    return load_config(folder / "config.yaml")


def _steps_of(folder: Path) -> list[_Step]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise DataError(f"{path} is missing; give the folder of a run")
    lines = [line for text in path.read_text().splitlines() if (line := json.loads(text))["stage"] == "rl"]
    found = [_Step(line=line, rollouts=_rollouts(folder, line["step"])) for line in lines[1:]]
    found = [step for step in found if step.rollouts and all(name in step.line for name in _NEEDED)]
    if not found:
        raise DataError(
            f"{folder} has no policy step of reinforcement learning behind the first one, with its rollouts"
        )
    return found


def _rollouts(folder: Path, step: int) -> list[tuple[Size, float]]:
    path = folder / "rollouts" / f"rl-step-{step:06d}.parquet"
    return [_timed(row) for row in rows_of(path)] if path.exists() else []


def _timed(row: dict[str, Any]) -> tuple[Size, float]:
    metrics = row["metrics"]
    return size_of(row), max(0.0, metrics["rollout_seconds"] - metrics.get("tool_seconds", 0.0))


def _measured(config: Config, steps: list[_Step]) -> Measured:
    def mean(name: str) -> float:
        return float(np.mean([step.line.get(name, 0.0) for step in steps]))

    seconds = mean("seconds/step") - mean("seconds/eval")
    return Measured(
        config=config,
        steps=len(steps),
        step_seconds=seconds,
        rollout_seconds=mean("seconds/rollout") + mean("seconds/drain"),
        learn_seconds=mean("seconds/learn"),
        publish_seconds=mean("seconds/publish"),
        tokens_per_second=float(np.mean([step.written for step in steps])) / seconds,
    )


def _decode(config: Config, steps: list[_Step]) -> list[float]:
    """The a and b of a token's `a + b n` seconds."""
    rows: list[tuple[float, float]] = []
    seconds: list[float] = []
    for step in steps:
        lengths = np.array([size.tokens for size, _ in step.rollouts])
        # All begin together; at its k-th token a rollout is beside those that are longer than k.
        beside = np.minimum.outer(lengths, lengths).sum(1) / config.actors.count
        rows += zip(lengths.tolist(), beside.tolist(), strict=True)
        seconds += [generated for _, generated in step.rollouts]
    return _least_squares(np.array(rows), np.array(seconds))


def _check_fit(config: Config, steps: list[_Step]) -> None:
    """Refuse a run in which rollouts also waited for one another, which nobody wrote down."""
    rollouts = config.rl.groups_per_step * config.rl.group_size
    if config.rl.max_staleness:
        raise DataError(
            f"the run has rl.max_staleness={config.rl.max_staleness}: its rollouts ran beside those of other steps. "
            "Take the numbers from a synchronous run (rl.max_staleness=0); they serve for any other"
        )
    if rollouts > config.actors.count * config.actors.max_rollouts:
        raise DataError(
            f"the run has {rollouts} rollouts in a step, more than its engines generate at once (actors.count * "
            f"actors.max_rollouts = {config.actors.count * config.actors.max_rollouts}); take one with fewer"
        )
    if any(step.line.get(f"dropped_groups/{kind}", 0.0) for step in steps for kind in ("uninformative", "given_up")):
        raise DataError("the run dropped groups, whose rollouts it did not write; set rl.skip_uninformative=false")


def _least_squares(columns: NDArray[np.float64], values: NDArray[np.float64]) -> list[float]:
    """The factors, none below 0, with which the columns [N, K] come closest to the values [N]; K is small."""
    best, least = np.zeros(columns.shape[1]), float((values**2).sum())
    for chosen in itertools.product((False, True), repeat=columns.shape[1]):
        some = columns[:, chosen] / np.abs(columns[:, chosen]).max(0)
        factors = np.linalg.lstsq(some, values, rcond=None)[0]
        error = float(((some @ factors - values) ** 2).sum())
        if (factors >= 0).all() and error < least:
            best, least = np.zeros(columns.shape[1]), error
            best[list(chosen)] = factors / np.abs(columns[:, chosen]).max(0)
    return [float(factor) for factor in best]
