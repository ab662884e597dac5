"""The real engine and weights that another process shares: what it computes with afterwards is its own copy of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlsys.actors.engine import VllmEngine
from rlsys.config import ActorsConfig
from rlsys.learners.host import free_port
from rlsys.learners.sender import SharedSender, open_sender
from rlsys.scratch import ScratchModel, build_scratch_model
from rlsys.shared_weights import SharedWriter
from rlsys.types import Completion
from rlsys.weights import GLOO_BACKEND, WeightGroup, WeightPlan, checksum

MODEL = ScratchModel(hidden_size=64, num_heads=2, num_kv_heads=1, intermediate_size=128, initializer_range=0.1)
GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 16, "stop": [], "ignore_eos": True}


@dataclass
class Host:
    """An engine, and memory as a learner on this host has it."""

    engine: VllmEngine
    runner: asyncio.Runner
    memory: SharedWriter
    plan: WeightPlan
    first: dict[str, Tensor]

    def write(self, weights: dict[str, Tensor]) -> dict[str, int]:
        with self.memory.writing() as put:
            for name, tensor in weights.items():
                put(name, tensor)
        return {name: checksum(tensor) for name, tensor in weights.items()}

    def load(self, weights: dict[str, Tensor]) -> dict[str, int]:
        """Publish these and let the engine read them without any meeting."""
        sums = self.write(weights)
        self.runner.run(self.engine.pause())
        received = self.runner.run(self.engine.receive_weights(self.plan, published=self.memory.published))
        self.runner.run(self.engine.resume(self.memory.coming.serial))
        assert received == sums
        return received

    def says(self) -> Completion:
        found: Completion = self.runner.run(self.engine.generate([5, 6, 7, 8], sampling=GREEDY))
        return found


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = build_scratch_model(tmp_path_factory.mktemp("model"), MODEL)
    first = load_file(Path(folder) / "model.safetensors")
    plan = WeightPlan(
        names=list(first), dtype_names=["float32"] * len(first), shapes=[list(t.shape) for t in first.values()]
    )
    with asyncio.Runner() as runner:

        async def start() -> VllmEngine:
            config = ActorsConfig(max_rollouts=4, max_model_tokens=512, sync_seconds=20.0)
            engine = VllmEngine(model_path=str(folder), config=config, seed=0)
            await engine.start()
            return engine

        engine = runner.run(start())
        memory = SharedWriter(plan)
        yield Host(engine=engine, runner=runner, memory=memory, plan=plan, first=first)
        memory.close()
        engine.close()


def others(weights: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


def same(one: Completion, other: Completion) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.allclose(one.logprobs, other.logprobs, atol=1e-6)


def test_an_engine_that_met_nobody_reads_what_was_published(host: Host) -> None:
    born_with = host.says()
    host.load(others(host.first))
    assert not same(host.says(), born_with)
    host.load(host.first)
    assert same(host.says(), born_with)


def test_a_prompt_that_was_read_with_other_weights_is_read_again(host: Host) -> None:
    prompt = [token % 200 for token in range(300)]  # more than two blocks of the cache, which are large on a CPU

    def says() -> Completion:
        found: Completion = host.runner.run(host.engine.generate(prompt, sampling=GREEDY))
        return found

    host.load(host.first)
    expected = says()
    assert same(says(), expected), "from the cache"
    host.runner.run(host.engine._llm.reset_prefix_cache())
    host.load(others(host.first))
    assert not same(says(), expected)
    host.load(host.first)
    assert same(says(), expected)


def test_what_the_learner_writes_next_does_not_reach_a_loaded_engine(host: Host) -> None:
    host.load(host.first)
    before = host.says()
    for seed in (1, 2, 3):
        host.write(others(host.first, seed))
    assert same(host.says(), before)


def test_an_engine_whose_transfer_failed_midway_takes_the_next_one(host: Host) -> None:
    host.load(host.first)
    expected = host.says()
    wrong = replace(host.plan, shapes=[*host.plan.shapes[:-1], [1, 2, 3]])
    missing = replace(host.memory.coming, serial=10**6)
    for plan, place in ((host.plan, missing), (wrong, host.memory.published)):
        host.runner.run(host.engine.pause())
        with pytest.raises(Exception, match="weights"):
            host.runner.run(host.engine.receive_weights(plan, published=place))
    host.load(host.first)
    assert same(host.says(), expected)


def test_learner_and_engine_on_one_host_use_shared_memory_by_themselves(host: Host) -> None:
    group = WeightGroup(master_address="127.0.0.1", master_port=free_port(), world_size=2)

    async def exchange() -> tuple[Any, dict[str, int], dict[str, int]]:
        meeting = asyncio.to_thread(
            open_sender, GLOO_BACKEND, group, seconds=20, device=torch.device("cpu"), memory=host.memory
        )
        sender, _ = await asyncio.gather(meeting, host.engine.open_weights(group, rank=1))
        await host.engine.pause()
        sending = asyncio.to_thread(sender.send, list(others(host.first, 7).items()))
        sent, received = await asyncio.gather(sending, host.engine.receive_weights(host.plan))
        await host.engine.resume(9)
        return sender, sent, received

    sender, sent, received = host.runner.run(exchange())
    assert isinstance(sender, SharedSender)
    assert sent == received
    expected = host.says()
    host.load(others(host.first, 7))
    assert same(host.says(), expected)


def test_a_transfer_that_breaks_in_the_middle_is_followed_by_one_that_succeeds(host: Host) -> None:
    """Some layers have all of the wrong weights by then, the next a part of them."""
    host.load(host.first)
    expected = host.says()
    middle = len(host.plan.names) // 2
    names = [*host.plan.names[:middle], "model.of_another.weight"]
    plan = WeightPlan(names=names, dtype_names=["float32"] * len(names), shapes=[*host.plan.shapes[:middle], [4]])
    memory = SharedWriter(plan)
    with memory.writing() as put:
        for name, shape in zip(names, plan.shapes, strict=True):
            put(name, torch.full(shape, float("nan")))
    host.runner.run(host.engine.pause())
    with pytest.raises(Exception, match="of_another"):
        host.runner.run(host.engine.receive_weights(plan, published=memory.published))
    memory.close()
    host.load(host.first)
    assert same(host.says(), expected)
