"""A model folder for fake engines, and a live fleet that the tests of a module share and strike one after another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from faults import Faults

from rlsys.scratch import byte_tokenizer
from tests.chaos.world import World, configured, shared_blocks, wait_for_end


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder without weights: all that a fake engine and a chat ask of one."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    about = {"model_type": "qwen2", "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(about))
    return str(folder)


@pytest.fixture(scope="module")
def live_world(on_ray: asyncio.Runner, model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two workers and one learner rank; afterwards none of their processes is left."""
    from rlsys.fleet import RolloutFleet
    from rlsys.learner_group import LearnerGroup

    folder = tmp_path_factory.mktemp("world")
    config = configured(folder, model)
    faults = Faults(folder / "faults")

    async def start() -> World:
        fleet, learners = await asyncio.gather(
            RolloutFleet.start(config, model),
            LearnerGroup.start(config, model, optimizer=config.rl.optimizer, total_steps=100, loss=config.rl.loss),
        )
        learners.serve(fleet)
        world = World(config=config, fleet=fleet, learners=learners, faults=faults, runner=on_ray)
        await world.publish()
        return world

    world = on_ray.run(start())
    try:
        yield world
    finally:
        started = faults.processes()
        on_ray.run(world.learners.close())
        on_ray.run(world.fleet.close())
    wait_for_end(started)
    assert not shared_blocks()


@pytest.fixture
def world(live_world: World) -> Iterator[World]:
    """It is whole before each test and after it."""
    live_world.run(live_world.whole())
    yield live_world
    live_world.faults.withdraw()
    live_world.run(live_world.whole())
