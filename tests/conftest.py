"""What the tests share: plug-ins on the path of every process, and one real stack for the whole session."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

PLUGINS = str(Path(__file__).parent / "plugins")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [PLUGINS, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, PLUGINS)

T = TypeVar("T")

STACK_YAML = """
name: stack
model:
  scratch: {hidden_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 1, intermediate_size: 128, max_length: 512}
data:
  train: {use: "stack_plugins:words_problems", options: {size: 64}}
  held_out: {use: "stack_plugins:words_problems", options: {size: 8}}
rewards: [{name: digits, use: "stack_plugins:share_of_digits"}]
actors: {count: 1, cpus: 0.5, max_model_tokens: 512, sync_seconds: 120}
learners: {count: 2, cpus: 0.5, use: "stack_plugins:CorruptingLearner"}
rl: {optimizer: {lr: 1.0e-2}, sampling: {temperature: 0.7, max_response_tokens: 48}}
eval: {sampling: {max_response_tokens: 48}}
"""


@dataclass
class Stack:
    """A live rollout actor with its vLLM engine and two FSDP2 ranks on a real Ray cluster of this machine."""

    config: Any
    model: str
    fleet: Any
    learners: Any
    runner: asyncio.Runner
    version: int = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run on the loop that the actors' handles live on."""
        return self.runner.run(coroutine)

    def publish(self) -> int:
        """Publish the learner's weights as the next version."""
        self.run(self.learners.publish(self.fleet, self.version + 1))
        self.version += 1
        return self.version


def hold_shared_head_twice(path: Path) -> None:
    """Make it one of those checkpoints that hold the head and the embedding it shares: engines keep the two apart."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def on_ray() -> Iterator[asyncio.Runner]:
    """A real Ray cluster of this machine for all tests that need one: the loop that handles of its actors live on."""
    from rlsys import cluster
    from rlsys.config import ClusterConfig

    with asyncio.Runner() as runner:
        cluster.connect(ClusterConfig())
        try:
            yield runner
        finally:
            cluster.disconnect()


@pytest.fixture(scope="session")
def stack(on_ray: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One engine and one learner group for all tests that need them."""
    from rlsys.config_file import load_config
    from rlsys.fleet import RolloutFleet
    from rlsys.learner_group import LearnerGroup
    from rlsys.scratch import build_scratch_model

    folder = tmp_path_factory.mktemp("stack")
    (folder / "stack.yaml").write_text(STACK_YAML)
    config = load_config(folder / "stack.yaml")
    assert config.model.scratch is not None
    model = str(build_scratch_model(folder / "model", config.model.scratch))
    hold_shared_head_twice(folder / "model" / "model.safetensors")

    async def start() -> tuple[Any, Any]:
        fleet, learners = await asyncio.gather(
            RolloutFleet.start(config, model),
            LearnerGroup.start(
                config, model, optimizer=config.rl.optimizer, total_steps=100, loss=config.rl.loss, with_reference=False
            ),
        )
        learners.serve(fleet)
        return fleet, learners

    fleet, learners = on_ray.run(start())
    yield Stack(config=config, model=model, fleet=fleet, learners=learners, runner=on_ray)
    on_ray.run(learners.close())
    on_ray.run(fleet.close())
