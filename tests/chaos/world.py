"""A small system on real Ray actors that faults can strike: workers with the fake engine, learners without a model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from chaos_plugins import numbered_problems
from faults import Faults

from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.types import RolloutGroup
from rlsys.workers import WorkerState

T = TypeVar("T")
SIZE = 2
"""Siblings in a group."""
PATIENCE = 90.0
"""So long a test waits for what must come, before it fails instead of hanging: a new worker takes a few seconds."""

YAML = """
name: chaos
run_dir: {folder}/run
stages: [rl]
model: {{path: {model}}}
data:
  train: {{use: "chaos_plugins:numbered_problems", options: {{size: 64}}}}
  held_out: {{use: "chaos_plugins:numbered_problems", options: {{size: 2, first: 1000}}}}
rewards: [{{name: score, use: "chaos_plugins:score"}}]
actors:
  count: 2
  cpus: 0.1
  use: "chaos_plugins:FaultyRolloutActor"
  engine: "chaos_plugins:FaultyEngine"
  max_rollouts: 8
  max_model_tokens: 256
  start_seconds: 120
  sync_seconds: 10
  watch_seconds: 0.3
  answer_seconds: 6
  stall_seconds: 6
  wait_seconds: 60
  engine_options: {{faults: {folder}/faults, tokens_per_second: 200, seed: 0}}
learners:
  count: 1
  cpus: 0.1
  use: "chaos_plugins:FakeLearner"
  options: {{faults: {folder}/faults}}
cluster: {{call_seconds: 30}}
rl:
  steps: 6
  groups_per_step: 2
  group_size: 2
  checkpoint_every: 2
  max_logprob_gap: 1.0e+9
  sampling: {{max_response_tokens: 64}}
eval: {{sampling: {{max_response_tokens: 64}}}}
trackers: []
"""


def configured(folder: Path, model: str, *overrides: str) -> Config:
    """The configuration of a run in `folder`, whose faults are ordered there too."""
    path = folder / "chaos.yaml"
    path.write_text(YAML.format(folder=folder, model=model))
    return load_config(path, list(overrides))


@dataclass
class World:
    """A live fleet and its learner, and the faults that were ordered."""

    config: Config
    fleet: Any
    learners: Any
    faults: Faults
    runner: asyncio.Runner
    version: int = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """On the loop that the fleet lives on, and not for ever."""
        return self.runner.run(asyncio.wait_for(coroutine, 3 * PATIENCE))

    async def roll(self, numbers: Iterable[int], *, size: int = SIZE) -> list[RolloutGroup]:
        """Act on these problems side by side."""
        sampling = replace(self.config.rl.sampling, max_response_tokens=64)
        problems = [numbered_problems(size=1, first=number)[0] for number in numbers]
        acts = (self.fleet.act(problem, size=size, sampling=sampling, group_id=problem.id) for problem in problems)
        return list(await asyncio.gather(*acts))

    async def publish(self) -> None:
        """Give all workers the next version."""
        await self.learners.publish(self.fleet, self.version + 1)
        self.version += 1

    def states(self) -> list[tuple[WorkerState, int]]:
        """State and version of every worker."""
        return [(worker.state, worker.version) for worker in self.fleet.roster.workers.values()]

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Return when it holds."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{what} did not come: {self.states()}, {list(self.fleet.events)[-8:]}") from None

    async def whole(self) -> None:
        """Return when there are as many workers as there should be and all hold the published weights."""
        wanted = [(WorkerState.HEALTHY, self.version)] * self.config.actors.count
        await self.until(lambda: self.states() == wanted, "a whole fleet")


def check_groups(groups: Sequence[RolloutGroup], *, newest: int, size: int = SIZE) -> None:
    """Every group has all its siblings, and no token that a version wrote which was never published."""
    for group in groups:
        assert (len(group.rollouts), group.dropped) == (size, {}), group.problem.id
        for rollout in group.rollouts:
            written = rollout.versions[rollout.loss_mask]
            assert (written >= 0).all()
            assert (np.diff(written) >= 0).all(), "versions within a rollout only grow"
            assert written.max() <= newest


def wait_for_end(processes: Sequence[psutil.Process], *, seconds: float = 30.0) -> None:
    """See that these processes end."""
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if alive(process)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def alive(process: psutil.Process) -> bool:
    """Whether it runs, or is stopped; one that nobody has buried yet does not count."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_blocks() -> list[str]:
    """Shared memory that has a name and so outlives who made it: weights are in memory without one."""
    return [path.name for path in Path("/dev/shm").glob("*rlsys*")]
