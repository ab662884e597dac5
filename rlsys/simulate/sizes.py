"""How long rollouts are, and what else they take: drawn from distributions, or from those of a real run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.errors import DataError
from rlsys.simulate.config import SimulateConfig

_P99 = 2.3263478740408408
"""The 99th percentile of the standard normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What one rollout takes."""

    prompt: int
    """Tokens."""
    tokens: int
    """That the policy writes."""
    tools: tuple[float, ...]
    """Seconds of each tool call."""
    reward: float
    """Seconds of grading."""


Draw = Callable[[int, int], list[Size]]
"""From the number of a problem and of siblings to the size of each; the same numbers give the same sizes."""


def sigma_of(median: float, p99: float) -> float:
    """The standard deviation of the logarithm of a lognormal number."""
    return math.log(p99 / median) / _P99


def modelled(model: SimulateConfig, *, seed: int) -> Draw:
    """Sizes by the distributions of the `simulate` section."""
    length, call = sigma_of(model.response_tokens, model.response_tokens_p99), 0.0
    if model.tool_calls:
        call = sigma_of(model.tool_seconds, model.tool_seconds_p99)
    common, own = math.sqrt(model.problem_share), math.sqrt(1 - model.problem_share)

    def draw(problem: int, count: int) -> list[Size]:
        random = np.random.default_rng([seed, problem])
        deviations = common * random.standard_normal() + own * random.standard_normal(count)
        tokens = model.response_tokens * np.exp(length * deviations)
        calls = random.poisson(model.tool_calls, count) if model.tool_calls else np.zeros(count, int)
        return [
            Size(
                prompt=model.prompt_tokens,
                tokens=max(1, round(float(tokens[sibling]))),
                tools=tuple((model.tool_seconds * np.exp(call * random.standard_normal(calls[sibling]))).tolist()),
                reward=model.reward_seconds,
            )
            for sibling in range(count)
        ]

    return draw


def of_run(folder: Path, *, seed: int) -> Draw:
    """Sizes of the training rollouts that a run wrote: problem n is the n-th that it trained on, and round again."""
    groups = rollouts_of(folder)

    def draw(problem: int, count: int) -> list[Size]:
        group = groups[(problem - 1) % len(groups)]
        if len(group) == count:
            return list(group)
        return [group[index] for index in np.random.default_rng([seed, problem]).integers(len(group), size=count)]

    return draw


def rollouts_of(folder: Path) -> list[list[Size]]:
    """The groups of all policy steps of a run, in order.

    Raises:
        DataError: it wrote no training rollouts.
    """
    groups: dict[tuple[str, str], list[Size]] = defaultdict(list)
    for path in sorted((folder / "rollouts").glob("rl-step-*.parquet")):
        for row in rows_of(path):
            groups[path.name, row["problem_id"]].append(size_of(row))
    if not groups:
        raise DataError(f"{folder}/rollouts has no rl-step-*.parquet; give the folder of a run with training rollouts")
    return list(groups.values())


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What a file of rollouts says that matters here; its `metrics` are read."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path, columns=["problem_id", "loss_mask", "metrics"]).to_pylist()
    return [{**row, "metrics": json.loads(row["metrics"])} for row in rows]


def size_of(row: Mapping[str, Any]) -> Size:
    """The size of a rollout that a run wrote; its tool calls are taken to be of one length."""
    mask, metrics = row["loss_mask"], row["metrics"]
    calls = int(metrics.get("tool_calls", 0))
    written = sum(mask)
    return Size(
        prompt=mask.index(True) if written else len(mask),
        tokens=max(1, written),
        tools=(metrics.get("tool_seconds", 0.0) / calls,) * calls if calls else (),
        reward=metrics.get("reward_seconds", 0.0),
    )


def draws(model: SimulateConfig, *, seed: int) -> Draw:
    """What `simulate` says."""
    return modelled(model, seed=seed) if model.rollouts is None else of_run(Path(model.rollouts), seed=seed)
