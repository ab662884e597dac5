"""Measuring on held-out problems without engines: what is asked for, what is logged."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import SamplingConfig
from rlsys.config_file import load_config
from rlsys.console import Console
from rlsys.records import RunDirectory
from rlsys.reproduce.results import measured
from rlsys.stages.common import Run
from rlsys.stages.evaluation import evaluate
from rlsys.types import Problem, Rollout, RolloutGroup
from tests.rlsys.sampling_stage import YAML, numbered


class FakeFleet:
    """Is right on problems of even numbers, and greedily on all; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, SamplingConfig]] = []

    async def act(self, problem: Problem, *, size: int, sampling: SamplingConfig, group_id: str) -> RolloutGroup:
        self.asked.append((group_id, size, sampling))
        right = sampling.temperature == 0 or int(problem.id[1:]) % 2 == 0
        rollout = Rollout(
            tokens=np.zeros(3, np.int32),
            loss_mask=np.ones(3, np.bool_),
            logprobs=np.zeros(3, np.float32),
            versions=np.zeros(3, np.int32),
            metrics={"correct": float(right)},
        )
        return RolloutGroup(problem=problem, rollouts=(rollout,) * size)


def evaluated(
    tmp_path: Path, *overrides: str, resume: bool = False
) -> tuple[dict[str, float], FakeFleet, RunDirectory]:
    (tmp_path / "run.yaml").write_text(YAML)
    config = load_config(tmp_path / "run.yaml", [f"run_dir={tmp_path / 'run'}", *overrides])
    directory, fleet = RunDirectory.open(config, resume=resume, fresh=not resume), FakeFleet()

    async def main() -> dict[str, float]:
        run = Run(config=config, directory=directory, console=Console(), stop=asyncio.Event())
        given: Any = fleet
        return await evaluate(run, given, numbered(size=4), stage="eval", step=0)

    return asyncio.run(main()), fleet, directory


def test_sampled_and_greedy_accuracy_stand_in_one_line(tmp_path: Path) -> None:
    settings = ["eval.greedy=true", "eval.samples_per_problem=3", "eval.sampling={temperature: 0.6, top_p: 0.95}"]
    found, fleet, directory = evaluated(tmp_path, *settings)
    assert (found["accuracy"], found["accuracy_greedy"]) == (0.5, 1.0)
    greedy = [(size, one.temperature, one.top_p) for name, size, one in fleet.asked if name.startswith("greedy")]
    sampled = [(size, one.temperature, one.top_p) for name, size, one in fleet.asked if name.startswith("eval")]
    assert (greedy, sampled) == ([(1, 0.0, 1.0)] * 4, [(3, 0.6, 0.95)] * 4)
    assert measured(directory, "accuracy") == 0.5
    assert measured(directory, "accuracy_greedy") == 1.0
    assert measured(directory, "eval/greedy:accuracy") == 1.0
    names = sorted(path.name for path in (directory.folder / "rollouts").iterdir())
    assert names == ["eval-eval-000000.parquet", "eval-greedy-000000.parquet"]


def test_an_attempt_that_was_killed_behind_its_line_leaves_none_beside_the_next_ones(tmp_path: Path) -> None:
    evaluated(tmp_path, "eval.greedy=true")
    _, _, directory = evaluated(tmp_path, "eval.greedy=true", resume=True)
    assert [len(directory.metrics(f"eval/{kind}")) for kind in ("eval", "greedy")] == [1, 1]
    assert len((directory.folder / "metrics.superseded.jsonl").read_text().splitlines()) == 2


def test_without_greedy_nothing_is_asked_twice(tmp_path: Path) -> None:
    found, fleet, _ = evaluated(tmp_path, "eval.max_problems=3")
    assert [size for _, size, _ in fleet.asked] == [1, 1, 1]
    assert "accuracy_greedy" not in found
    assert found["accuracy"] == pytest.approx(2 / 3)
