"""Reinforcement learning without engines and learners: weights that are the list of what they were trained on.

`FakeLearners` append the problems of each step to their weights, save them and leave them as their model, so the model
says which problems it was trained on, in which order. `FakeFleet` answers with the version that it was given last.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.console import Console
from rlsys.records import RunDirectory
from rlsys.stages import Run, stage_of
from rlsys.types import Problem, Rollout, RolloutGroup, TrainBatch
from rlsys.workers import Roster

YAML = """
name: fake
trackers: []
stages: [rl]
seed: 3
model: {path: MODEL}
data:
  train: {use: "tests.rlsys.rl_stage:numbered", options: {size: 500}}
  held_out: {use: "tests.rlsys.rl_stage:numbered", options: {size: 2, first: 1000}}
rewards: [{use: "pool_plugins:zero"}]
rl:
  steps: 8
  groups_per_step: 2
  group_size: 2
  checkpoint_every: 3
  skip_uninformative: true
"""

STAGE_MODULE = sys.modules["rlsys.stages.rl"]  # `rlsys.stages.rl` is the stage itself


def numbered(*, size: int, first: int = 0) -> list[Problem]:
    """Problems by number."""
    return [Problem(id=str(n), prompt=({"role": "user", "content": "?"},)) for n in range(first, first + size)]


def rollout(problem: Problem, *, reward: float, version: int, not_finite: float | None = None) -> Rollout:
    """One token of the prompt, which says the problem, and one that the policy wrote."""
    return Rollout(
        tokens=np.array([int(problem.id), 0], np.int32),
        loss_mask=np.array([False, True]),
        logprobs=np.array([0.0, -1.0], np.float32),
        versions=np.array([-1, version], np.int32),
        reward=reward,
        metrics={} if not_finite is None else {"not_finite": not_finite},
    )


class World:
    """What the fakes share, and what they saw."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.before: Callable[[str, int], Any] = lambda _what, _step: None
        """Called with what is about to happen (step, publish, save, saved, load, start, act, evaluate, export) and the
        step that the learner has reached; raises what is to go wrong."""
        self.rewards: Callable[[Problem], tuple[float, ...]] = lambda _: (0.0, 1.0)
        self.not_finite: Callable[[Problem], Mapping[int, float]] = lambda _: {}
        """Of a problem's siblings by number: tokens without a finite log-prob."""
        self.turns: Callable[[], int] = lambda: 1
        self.asked: list[Mapping[str, Any]] = []
        self.said: list[str] = []
        self.noted: list[tuple[str, str]] = []
        self.published: list[int] = []
        self.begun: list[int] = []
        """The first version that each learner published."""


class FakeFleet:
    """Engines that know the version they were given last."""

    world: ClassVar[World]

    def __init__(self) -> None:
        self.roster = Roster(target=1, capacity=64)
        self.roster.joined("engine")
        self.roster.started("engine")
        self.busy = 0

    @classmethod
    async def start(cls, config: Config, model_path: str) -> FakeFleet:  # noqa: ARG003
        cls.world.calls["fleets"] += 1
        cls.world.before("start", -1)
        return cls()

    async def isolation(self) -> dict[str, str]:
        return {}

    def note(self, name: str, what: str) -> None:
        self.world.noted.append((name, what))

    async def act(self, problem: Problem, *, group_id: str, **asked: Any) -> RolloutGroup:
        began = self.roster.version
        if group_id.startswith("rl-"):
            self.world.asked.append({"group_id": group_id, **asked})
            self.world.before("act", began)
        else:
            self.world.before("evaluate", began)
        for _ in range(self.world.turns()):
            await asyncio.sleep(0)
        rewards, broken = self.world.rewards(problem), self.world.not_finite(problem)
        rollouts = tuple(
            rollout(problem, reward=reward, version=began, not_finite=broken.get(number))
            for number, reward in enumerate(rewards)
        )
        return RolloutGroup(problem=problem, rollouts=rollouts)

    async def close(self) -> None:
        self.world.calls["fleets closed"] += 1


class FakeLearners:
    """Learners whose weights are the problems that they were trained on, step by step."""

    world: ClassVar[World]

    def __init__(self, network: str) -> None:
        self.network, self.weights = network, list[list[int]]()
        self.has_published = False

    @classmethod
    async def start(cls, config: Config, model: str, *, network: str = "policy", **_: Any) -> FakeLearners:  # noqa: ARG003
        cls.world.calls[f"{network}s"] += 1
        cls.world.before("start", 0)
        return cls(network)

    def _before(self, what: str) -> None:
        if self.network == "policy":
            self.world.before(what, len(self.weights))

    def serve(self, fleet: FakeFleet) -> None:  # noqa: ARG002
        self.world.calls["served"] += 1

    async def publish(self, fleet: FakeFleet, version: int) -> dict[str, float]:
        assert version == len(self.weights)
        await asyncio.sleep(0)
        self._before("publish")
        fleet.roster.synced(["engine"], version)
        self.world.published.append(version)
        if not self.has_published:
            self.world.begun.append(version)
            self.has_published = True
        return {"total": 0.0, "pause": 0.0}

    async def infer(self, batch: TrainBatch, **_: Any) -> list[Any]:
        return [np.zeros(len(rollout), np.float32) for rollout in batch.rollouts]

    async def step(self, batch: TrainBatch, **_: Any) -> dict[str, float]:
        await asyncio.sleep(0)
        self._before("step")
        self.weights.append(sorted({int(rollout.tokens[0]) for rollout in batch.rollouts}))
        return {"loss": 1.0, "skipped_in_a_row": 0.0, "seconds": 0.0}

    async def reset_reference(self) -> None:
        self.world.calls["reset_reference"] += 1

    async def save(self, folder: Path) -> None:
        self._before("save")
        folder.mkdir(parents=True)
        (folder / "weights.json").write_text(json.dumps(self.weights))

    async def saved(self) -> None:
        await asyncio.sleep(0)
        self._before("saved")

    async def load(self, folder: Path) -> None:
        self.weights = json.loads((folder / "weights.json").read_text())
        self._before("load")

    async def export(self, folder: Path) -> None:
        self._before("export")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.json").write_text(json.dumps(self.weights))

    async def close(self) -> None:
        self.world.calls[f"{self.network}s closed"] += 1


class FakeConsole(Console):
    """Remembers what it said."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def say(self, text: str) -> None:
        self._world.said.append(text)
        super().say(text)


@contextmanager
def faked() -> Iterator[World]:
    """Everybody who would start actors starts the fakes."""
    found = World()

    async def require(_demands: Any, *, wait_seconds: float) -> None:  # noqa: ARG001
        found.calls["require"] += 1

    with pytest.MonkeyPatch.context() as patch:
        for fake in (FakeFleet, FakeLearners):
            patch.setattr(fake, "world", found, raising=False)
        patch.setattr(STAGE_MODULE, "RolloutFleet", FakeFleet)
        patch.setattr("rlsys.stages.rl_recovery.LearnerGroup", FakeLearners)
        patch.setattr("rlsys.cluster.require", require)
        yield found


def configured(folder: Path, *overrides: str) -> Config:
    """A run in this folder."""
    (folder / "fake.yaml").write_text(YAML.replace("MODEL", str(folder)))
    return load_config(folder / "fake.yaml", [f"run_dir={folder / 'run'}", *overrides])


def run_stage(
    world: World, config: Config, *, resume: bool = False, with_run: Callable[[Run], Any] = lambda _run: None
) -> list[list[int]]:
    """Run the stage; `with_run` is called before it begins. Returns what the model was trained on, step by step."""

    async def running() -> Path:
        directory = RunDirectory.open(config, resume=resume, fresh=False)
        run = Run(config=config, directory=directory, console=FakeConsole(world), stop=asyncio.Event())
        with_run(run)
        async with asyncio.timeout(60):
            left = await stage_of(config, "rl")(run, Path(str(config.model.path)))
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return left

    trained: list[list[int]] = json.loads((asyncio.run(running()) / "weights.json").read_text())
    return trained


def lines(config: Config, stage: str = "rl") -> list[dict[str, Any]]:
    """What a stage logged."""
    return RunDirectory(Path(config.run_dir), trackers=()).metrics(stage)


def uneven(seed: int) -> Callable[[], int]:
    """How long a group takes, by a coin."""
    coin = random.Random(seed)
    return lambda: coin.randrange(25)
