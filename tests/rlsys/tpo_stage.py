"""Thought preference optimization without engines and learners: a policy that is one number, and a run in a folder.

The number is how many of its answers are good. `FakeLearners` move it by a step's pairs, `FakeFleet` answers by it.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from rlsys.chat import Chat
from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.console import Console
from rlsys.records import RunDirectory
from rlsys.scratch import byte_tokenizer
from rlsys.stages import Run, stage_of
from rlsys.types import Problem, Rollout, RolloutGroup, TrainBatch

YAML = """
name: fake
trackers: []
stages: [tpo]
seed: 3
model: {path: MODEL}
chat: {thought: {prompt: "{message} T: R:", thought_mark: "T:", response_mark: "R:"}}
data:
  train: {use: "tests.rlsys.tpo_stage:numbered", options: {size: 40}}
  held_out: {use: "tests.rlsys.tpo_stage:numbered", options: {size: 6, first: 1000}}
rewards: [{use: "tests.rlsys.tpo_stage:good"}]
actors: {count: 1, max_model_tokens: 256}
tpo:
  iterations: 3
  problems_per_iteration: 8
  samples_per_problem: 4
  validation_problems: 8
  problems_per_part: 3
  max_problems_in_flight: 3
  sampling: {temperature: 0.8, top_p: 0.95, max_response_tokens: 64}
  preference: {epochs: 2, pairs_per_step: 4, checkpoint_every: 1, optimizer: {lr: 0.1}}
eval: {sampling: {max_response_tokens: 64}}
"""

TOKENIZER = byte_tokenizer(max_length=4096)
STAGE_MODULE = sys.modules["rlsys.stages.tpo"]  # `rlsys.stages.tpo` is the stage itself


def numbered(*, size: int, first: int = 0) -> list[Problem]:
    """Problems by number."""
    return [
        Problem(id=f"p{number}", prompt=({"role": "user", "content": f"{number}?"},), answer="good")
        for number in range(first, first + size)
    ]


def good(_problem: Problem, response: str) -> float:
    """Whether the response begins with the word."""
    return float(response.startswith("good"))


class Comparing:
    """A reward that compares siblings; the fake fleet does so itself."""

    def score_group(self, group: RolloutGroup) -> list[float]:
        raise NotImplementedError(group)


class Longest:
    """1 for the longest sibling, 0 for the others."""

    def score_group(self, group: RolloutGroup) -> list[float]:
        lengths = [len(rollout.response) for rollout in group.rollouts]
        return [float(length == max(lengths)) for length in lengths]


class World:
    """What the fakes share, and what they saw."""

    def __init__(self) -> None:
        self.skill = 0.0
        """Of the weights that the engines hold."""
        self.lr = 0.1
        self.calls: Counter[str] = Counter()
        self.acted: list[str] = []
        """The ids of groups that were asked for, in order."""
        self.trained: list[list[str]] = []
        """What stands in the batches of the steps."""
        self.before_act: Callable[[str], Any] = lambda _group: None
        self.before_step: Callable[[int], Any] = lambda _step: None
        self.failing = 0.0
        self.compared: list[RolloutGroup] = []


class FakeFleet:
    """Engines that write good answers as often as their weights say, by a coin that the group's id decides."""

    world: ClassVar[World]

    def __init__(self, config: Config, model_path: str) -> None:
        self.chat = Chat.load(model_path, [], config.chat)
        self.thinks = config.chat.thought is not None
        self.world.calls["fleets"] += 1
        self.world.skill = skill_of(Path(model_path))

    @classmethod
    async def start(cls, config: Config, model_path: str) -> FakeFleet:
        return cls(config, model_path)

    async def isolation(self) -> dict[str, str]:
        return {}

    async def begin_at(self, version: int) -> None:  # noqa: ARG002
        self.world.calls["begin_at"] += 1

    async def act(self, problem: Problem, *, size: int, sampling: Any, group_id: str, **_: Any) -> RolloutGroup:  # noqa: ARG002
        await asyncio.sleep(0)
        self.world.before_act(group_id)
        self.world.acted.append(group_id)
        if self.world.failing and random.Random(f"fails {group_id}").random() < self.world.failing:
            return RolloutGroup(problem=problem, rollouts=(), dropped={"reward_error: the judge spoke Latin": size})
        rollouts = tuple(self._rollout(problem, random.Random(f"{group_id} {number}")) for number in range(size))
        return RolloutGroup(problem=problem, rollouts=rollouts)

    async def compare(self, group: RolloutGroup) -> RolloutGroup:
        """Better than the mean is more than a half."""
        self.world.compared.append(group)
        marks = [good(group.problem, rollout.response) for rollout in group.rollouts]
        mean = sum(marks) / len(marks)
        graded = (replace(one, reward=0.5 + mark - mean) for one, mark in zip(group.rollouts, marks, strict=True))
        return replace(group, rollouts=tuple(graded))

    def _rollout(self, problem: Problem, coin: random.Random) -> Rollout:
        text = ("good" if coin.random() < self.world.skill else "bad") + "!" * coin.randint(0, 5)
        if self.thinks:
            text = f"T: hm{'m' * coin.randint(0, 9)} R:{text}" if coin.random() < 0.9 else f"T: {text}"
        prompt, written = self.chat.render(problem), [*self.chat.encode(text), TOKENIZER.eos_token_id]
        tokens = np.array([*prompt, *written], np.int32)
        rollout = Rollout(
            tokens=tokens,
            loss_mask=np.arange(len(tokens)) >= len(prompt),
            logprobs=np.zeros(len(tokens), np.float32),
            versions=np.zeros(len(tokens), np.int32),
            response=text,
            transcript=TOKENIZER.decode(tokens.tolist()),
            metrics={"tool_calls": 0.0},
        )
        hidden = self.chat.hide_thought(rollout)
        score = good(problem, hidden.response)
        return replace(hidden, reward=score, metrics={**hidden.metrics, "correct": score})

    async def close(self) -> None:
        self.world.calls["fleets closed"] += 1


class FakeLearners:
    """Learners whose weights are one number that grows with every step."""

    world: ClassVar[World]

    def __init__(self, model: str) -> None:
        self.model, self.skill, self.steps = model, skill_of(Path(model)), 0
        self.world.calls["learners"] += 1

    @classmethod
    async def start(cls, config: Config, model: str, **_: Any) -> FakeLearners:  # noqa: ARG003
        return cls(model)

    def serve(self, fleet: FakeFleet) -> None:  # noqa: ARG002
        self.world.calls["served"] += 1

    async def publish(self, fleet: FakeFleet, version: int) -> dict[str, float]:  # noqa: ARG002
        self.world.skill = self.skill
        return {}

    async def infer(self, batch: TrainBatch, **_: Any) -> list[NDArray[np.float32]]:
        return [np.where(rollout.loss_mask, -1.0, 0.0).astype(np.float32) for rollout in batch.rollouts]

    async def step(self, batch: TrainBatch, **_: Any) -> dict[str, float]:
        self.world.before_step(self.steps)
        self.world.trained.append([TOKENIZER.decode(rollout.tokens.tolist()) for rollout in batch.rollouts])
        self.skill = min(1.0, self.skill + self.world.lr)
        self.steps += 1
        return {"loss": 1.0, "skipped_in_a_row": 0.0}

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights.json").write_text(json.dumps([self.skill, self.steps]))

    async def saved(self) -> None:
        return None

    async def load(self, folder: Path) -> None:
        self.skill, self.steps = json.loads((folder / "weights.json").read_text())

    async def export(self, folder: Path) -> None:
        write_model(folder, self.skill)

    async def close(self) -> None:
        self.world.calls["learners closed"] += 1


def write_model(folder: Path, skill: float) -> Path:
    """A model folder, as far as anybody looks into it here."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"skill": skill}))
    return folder


def skill_of(folder: Path) -> float:
    return float(json.loads((folder / "config.json").read_text())["skill"])


@contextmanager
def faked() -> Iterator[World]:
    """Everybody who would start actors starts the fakes."""
    found = World()
    with pytest.MonkeyPatch.context() as patch:
        for fake in (FakeFleet, FakeLearners):
            patch.setattr(fake, "world", found, raising=False)
        patch.setattr(STAGE_MODULE, "RolloutFleet", FakeFleet)
        patch.setattr("rlsys.stages.offline.LearnerGroup", FakeLearners)
        # Slow and not what is tested here; one test draws.
        patch.setattr("rlsys.chat.load_tokenizer", lambda _: TOKENIZER)
        patch.setattr("rlsys.length_report.plot_lengths", lambda *_: None)
        patch.setattr(STAGE_MODULE, "plot_iterations", lambda _: None)
        yield found


def configured(folder: Path, *overrides: str, skill: float = 0.3) -> Config:
    """A run in this folder that begins with a model of this skill."""
    model = write_model(folder / "seed", skill)
    (folder / "fake.yaml").write_text(YAML.replace("MODEL", str(model)))
    return load_config(folder / "fake.yaml", [f"run_dir={folder / 'run'}", *overrides])


def run_stage(config: Config, *, resume: bool = False, with_run: Callable[[Run], Any] = lambda _run: None) -> Path:
    """Run the stage; `with_run` is called before it begins."""

    async def running() -> Path:
        directory = RunDirectory.open(config, resume=resume, fresh=False)
        run = Run(config=config, directory=directory, console=Console(), stop=asyncio.Event())
        with_run(run)
        return await stage_of(config, "tpo")(run, Path(str(config.model.path)))

    return asyncio.run(running())


def lines(config: Config, stage: str) -> list[Mapping[str, Any]]:
    """What a stage logged."""
    return RunDirectory(Path(config.run_dir), trackers=()).metrics(stage)


class Killed(BaseException):
    """In the place of a driver that is killed: nobody tries again."""
