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
from rlsys.scratch import CHAT_TEMPLATE, PAD, TURN_END, TURN_START, ScratchModel, build_scratch_model
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
    tokenizer = ascii_tokenizer(max_length=TINY.max_length)
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


def ascii_tokenizer(*, max_length: int) -> Any:
    """One token for each printable ASCII character, tab and newline, and three special tokens: 100 in all."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [byte_level.pre_tokenize_str(character)[0][0] for character in "\t\n" + "".join(map(chr, range(32, 127)))]
    special = (PAD, TURN_START, TURN_END)
    inner = Tokenizer(models.BPE({text: index for index, text in enumerate((*special, *letters))}, []))
    inner.pre_tokenizer, inner.decoder = byte_level, decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == 100
    return tokenizer


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
