"""A tiny model from a config, not from a hub: Qwen2 with random weights and a byte tokenizer.

The result is an ordinary model folder: everything that loads a pretrained model loads it, so a first run needs no
download and no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ("<think>\n", "</think>\n", "```python\n", "```output\n", "\n```\n", "\\boxed{")
"""Texts that are one token each, so that a tiny model need not learn to spell them. They decode to themselves."""

WORDS = (
    *("user", "system", "assistant", "tool", "State", "Solve", "Give", "Let", "Wait", "However", "Verified"),
    *(" the", " final", " answer", " to", " following", " arithmetic", " problem", " multiplication", " only"),
    *(" result", " as", " your", " me", " verify", " check", " double", " with", " Python", " this", " can", " do"),
    *(" in", " my", " head", " one", " is", " easy", " know", " yes", " + ", " - ", " * ", " =", ": "),
)
"""Frequent words of the arithmetic problems and demonstrations: with one token each, sequences are three times shorter.
Operators are in it with their spaces, so that an expression is half as long to copy."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as Qwen writes it; any role (system, user, assistant, tool) is written as it is named."""


@dataclass(frozen=True, kw_only=True)
class ScratchModel:
    """A model to be made from nothing."""

    hidden_size: int = 128
    """Width of the residual stream; the head size is `hidden_size / num_heads`."""

    num_layers: int = 2
    """Number of transformer blocks; to copy a text, a model needs at least two."""

    num_heads: int = 4
    """Number of query heads; vLLM on CPUs needs a head size (`hidden_size / num_heads`) of 32, 64, 80, ..."""

    num_kv_heads: int = 4
    """Number of key and value heads; must divide `num_heads`."""

    intermediate_size: int = 384
    """Width inside the feed-forward layers."""

    max_length: int = 512
    """Longest sequence in tokens."""

    initializer_range: float = 0.08
    """Standard deviation of the random weights, about `1 / sqrt(hidden_size)`: with the 0.02 of large models the
    attention of a narrow one begins almost uniform, and it learns to copy several times later."""

    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""

    words: list[str] = field(default_factory=lambda: list(WORDS))
    """Texts that become one token each, next to the 256 bytes and the chat and fence marks."""

    seed: int = 0
    """Seed of the random weights."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads ({self.num_heads}), "
                f"num_heads a multiple of num_kv_heads ({self.num_kv_heads})"
            )


def build_scratch_model(folder: str | Path, model: ScratchModel = ScratchModel()) -> Path:
    """Writes the model, its tokenizer and its generation config into `folder` and returns the folder.

    The same `model` gives the same bytes of weights. float32, with tied embeddings.
    """
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    folder = Path(folder)
    tokenizer = byte_tokenizer(words=[*MARKS, *model.words], max_length=model.max_length)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=model.max_length,
        initializer_range=model.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        network = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    network.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)  # type: ignore[no-untyped-call]
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer(
    *, words: Sequence[str] = (*MARKS, *WORDS), characters: str | None = None, max_length: int = 512
) -> Any:
    """A transformers tokenizer: one token per byte (or only for these ASCII `characters`), and one per word.

    It is Qwen2's byte-level BPE without merges, because transformers loads that class for a Qwen2 model whatever the
    folder says. Decoding gives any text back exactly.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = (PAD, TURN_START, TURN_END)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if characters is None:
        alphabet = sorted(byte_level.alphabet())
    else:
        alphabet = [byte_level.pre_tokenize_str(character)[0][0] for character in characters]
    inner = Tokenizer(models.BPE({text: index for index, text in enumerate((*special, *alphabet))}, []))
    inner.pre_tokenizer = byte_level
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    inner.add_tokens([AddedToken(text, normalized=False) for text in words])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
