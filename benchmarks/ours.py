"""Our side as the benchmarks set it up: tiny untrained models, problems, configurations, actors that ignore `eos`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.actors.rollout import RolloutActor
from rlsys.config import (
    ActorsConfig,
    Config,
    DataConfig,
    EvalConfig,
    LearnersConfig,
    ModelConfig,
    OptimizerConfig,
    PlugIn,
    RewardConfig,
    RlConfig,
    SamplingConfig,
)
from rlsys.data import reasoning_gym_problems
from rlsys.interfaces import Engine
from rlsys.scratch import ScratchModel, build_scratch_model, byte_tokenizer
from rlsys.types import Completion, Problem

TINY = ScratchModel(hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=4, intermediate_size=704, max_length=2048)
"""3.3 million parameters."""


def tiny_model(folder: Path) -> Path:
    """The tiny model with the project's own byte tokenizer (about 330 tokens)."""
    return build_scratch_model(folder, TINY)


def stopping_model(folder: Path) -> Path:
    """The tiny model with a vocabulary of exactly 100 (printable ASCII): chance ends a text after about 100 tokens.

    The tied embeddings are scaled down: an untrained model then predicts nearly the uniform distribution, instead of
    repeating its last token, and the lengths are close to geometric.
    """
    import torch
    from transformers import AutoModelForCausalLM

    build_scratch_model(folder, TINY)
    printable = "\t\n" + "".join(map(chr, range(32, 127)))
    tokenizer = byte_tokenizer(words=(), characters=printable, max_length=TINY.max_length)
    assert len(tokenizer) == 100
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.2)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    for file in folder.iterdir():
        file.unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def problems(size: int, *, seed: int = 0) -> list[Problem]:
    """Arithmetic problems with prompts of about a hundred characters."""
    tasks = {"chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 2, "max_digits": 4}}
    return reasoning_gym_problems(tasks=tasks, size=size, seed=seed)


def config_for(
    model: Path,
    *,
    max_response_tokens: int,
    max_model_tokens: int,
    engines: int = 2,
    ranks: int = 2,
    lr: float = 1e-6,
    max_rollouts: int = 64,
    actor: str = "rlsys.actors.rollout:RolloutActor",
) -> Config:
    """The quickstart's layout (Ray, rollout actors with one vLLM engine each, FSDP2 ranks), a benchmark's numbers."""
    source = PlugIn(use="benchmarks.ours:problems", options={"size": 8})
    sampling = SamplingConfig(temperature=1.0, max_response_tokens=max_response_tokens)
    return Config(
        name="benchmark",
        stages=["rl"],
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=source, held_out=source),
        actors=ActorsConfig(
            count=engines, cpus=0.5, max_rollouts=max_rollouts, max_model_tokens=max_model_tokens, use=actor
        ),
        learners=LearnersConfig(count=ranks, cpus=0.5),
        rewards=[RewardConfig(name="vowels", use="benchmarks.common:vowel_share")],
        rl=RlConfig(sampling=sampling, optimizer=OptimizerConfig(lr=lr)),
        eval=EvalConfig(sampling=sampling),
    )


class IgnoreEos:
    """An engine whose completions always have `max_tokens` tokens, so that both sides of a race write equally many."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
        """As the engine does, but for the end."""
        return await self._engine.generate(prompt, sampling={**sampling, "ignore_eos": True})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class FixedLengthActor(RolloutActor):
    """A rollout actor on an engine that ignores `eos`; nothing else differs."""

    async def start(self) -> str:
        """As the parent does."""
        backend = await super().start()
        self._engine: Any = IgnoreEos(self._engine)
        return backend
