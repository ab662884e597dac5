"""The same kills on real engines: vLLM, whose own process may die or stop while its Ray actor lives."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos_plugins import numbered_problems

from rlsys.config import SamplingConfig
from rlsys.scratch import build_scratch_model
from rlsys.workers import WorkerState
from tests.chaos.world import PATIENCE, alive, check_groups, wait_for_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ENGINE = "VLLM::EngineCor"  # as the kernel cuts it

YAML = """
name: real
model:
  scratch: {hidden_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 1, intermediate_size: 128, max_length: 512}
data:
  train: {use: "stack_plugins:words_problems", options: {size: 64}}
  held_out: {use: "stack_plugins:words_problems", options: {size: 8}}
rewards: [{name: digits, use: "stack_plugins:share_of_digits"}]
actors:
  {count: 2, cpus: 0.2, use: "chaos_plugins:TellingRolloutActor", max_model_tokens: 512, sync_seconds: 60,
   watch_seconds: 1, answer_seconds: 30, stall_seconds: 10, start_seconds: 300, wait_seconds: 300}
learners: {count: 1, cpus: 0.2}
"""


class Real:
    """Two workers with real engines, and one FSDP2 rank."""

    def __init__(self, config: Any, fleet: Any, learners: Any, runner: asyncio.Runner) -> None:
        self.config, self.fleet, self.learners, self.runner = config, fleet, learners, runner
        self.version = 0
        self.seen: set[psutil.Process] = set()

    async def processes(self) -> dict[str, list[psutil.Process]]:
        """Of each worker: its own, then those that it started."""
        found = {}
        for actor in self.fleet.actors:
            told = await actor.call("processes", seconds=60)
            found[actor.name] = [psutil.Process(pid) for pid, _ in told]
            self.seen |= set(found[actor.name])
        return found

    async def publish(self) -> None:
        await self.learners.publish(self.fleet, self.version + 1)
        self.version += 1

    async def roll(self, count: int, *, tokens: int = 300) -> list[Any]:
        sampling = SamplingConfig(temperature=1.0, max_response_tokens=tokens)
        problems = numbered_problems(size=count)
        acts = (self.fleet.act(problem, size=2, sampling=sampling, group_id=problem.id) for problem in problems)
        return list(await asyncio.gather(*acts))

    async def whole(self) -> None:
        """Return when two workers hold the published weights."""
        async with asyncio.timeout(3 * PATIENCE):
            while [(w.state, w.version) for w in self.fleet.roster.workers.values()] != [
                (WorkerState.HEALTHY, self.version)
            ] * 2:
                await asyncio.sleep(0.2)


@pytest.fixture(scope="module")
def live_real(on_ray: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """One for all tests of this module; afterwards no process of it is left."""
    from rlsys.config_file import load_config
    from rlsys.fleet import RolloutFleet
    from rlsys.learner_group import LearnerGroup

    folder: Path = tmp_path_factory.mktemp("real")
    (folder / "real.yaml").write_text(YAML)
    config = load_config(folder / "real.yaml")
    assert config.model.scratch is not None
    model = str(build_scratch_model(folder / "model", config.model.scratch))

    async def start() -> Real:
        fleet, learners = await asyncio.gather(
            RolloutFleet.start(config, model),
            LearnerGroup.start(config, model, optimizer=config.rl.optimizer, total_steps=9, loss=config.rl.loss),
        )
        learners.serve(fleet)
        real = Real(config, fleet, learners, on_ray)
        await real.publish()
        await real.processes()
        return real

    real = on_ray.run(start())
    try:
        yield real
        on_ray.run(real.processes())
    finally:
        on_ray.run(real.learners.close())
        on_ray.run(real.fleet.close())
    wait_for_end(list(real.seen))


@pytest.fixture
def real(live_real: Real) -> Real:
    """Whole before each test."""
    live_real.runner.run(live_real.whole())
    return live_real


@pytest.mark.parametrize(
    ("whose", "number", "serving"),
    [
        ("actor", signal.SIGKILL, False),
        ("actor", signal.SIGKILL, True),
        ("actor", signal.SIGSTOP, True),
        ("engine", signal.SIGKILL, False),
        ("engine", signal.SIGKILL, True),
        ("engine", signal.SIGSTOP, True),  # one that has nothing to do is found out when it has
    ],
)
def test_a_real_worker_that_is_struck_is_replaced_nothing_is_lost_and_no_process_is_left(
    real: Real, whose: str, number: signal.Signals, serving: bool
) -> None:
    async def main() -> None:
        joined = real.fleet.roster.num_joined
        (*_, (_, processes)) = (await real.processes()).items()
        victim = processes[0] if whose == "actor" else next(p for p in processes if p.name().startswith(ENGINE))
        rolling = asyncio.create_task(real.roll(12)) if serving else None
        if serving:
            await asyncio.sleep(0.5)
        os.kill(victim.pid, number)
        check_groups(await rolling if rolling else await real.roll(4), newest=real.version)
        async with asyncio.timeout(3 * PATIENCE):
            while real.fleet.roster.num_joined == joined:
                await asyncio.sleep(0.2)
        await real.whole()
        await real.publish()
        check_groups(await real.roll(4, tokens=32), newest=real.version)
        await asyncio.to_thread(wait_for_end, processes)
        assert not any(map(alive, processes))

    real.runner.run(main())
