"""The model from nothing: loads like any other, is the same for the same seed, and its tokenizer loses no character."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.data import reasoning_gym_problems
from rlsys.demonstrations import arithmetic_demonstrations
from rlsys.errors import ConfigError
from rlsys.scratch import MARKS, WORDS, ScratchModel, build_scratch_model

SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 96}
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_scratch_model(tmp_path_factory.mktemp("scratch"), ScratchModel(**SMALL))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_the_folder_loads_as_a_small_tied_float32_model(folder: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.model_type, model.dtype) == ("qwen2", torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) <= model.config.vocab_size
    assert model.config.max_position_embeddings == 512
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.encode("<|im_end|>")[0]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        build_scratch_model(tmp_path / name, ScratchModel(**SMALL, seed=seed))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    "text", [PRINTABLE, "  a  b ,c . don't I 'm", "é ☃ \t 日本", "".join(MARKS), "".join(WORDS), " "]
)
@pytest.mark.parametrize("skip", [False, True])
def test_decoding_gives_the_text_back_exactly(tokenizer: Any, text: str, skip: bool) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=skip) == text


def test_characters_and_marks_are_one_token_each(tokenizer: Any) -> None:
    assert all(len(tokenizer.encode(text)) == 1 for text in (*PRINTABLE, *MARKS, *WORDS, "<|im_start|>", "<|im_end|>"))
    assert len(tokenizer.encode("12+34")) == 5


def test_end_of_turn_is_skipped_in_text_but_marks_are_not(tokenizer: Any) -> None:
    tokens = tokenizer.encode("<think>\n</think>\n\\boxed{1}<|im_end|>")
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "<think>\n</think>\n\\boxed{1}"


def test_a_turn_tokenized_in_segments_is_the_turn_tokenized_at_once(tokenizer: Any) -> None:
    tasks = {"chain_sum": {}, "products": {}}
    for demonstration in arithmetic_demonstrations(
        reasoning_gym_problems(tasks=tasks, size=50, seed=0), size=50, seed=0
    ):
        pieces = [token for text, _ in demonstration.segments for token in tokenizer.encode(text)]
        assert pieces == tokenizer.encode(demonstration.text)


def test_decoding_token_by_token_adds_up_to_the_text(tokenizer: Any) -> None:
    text = "<think>\nLet me check with Python.\n```python\n1 + 2\n```\n"
    assert "".join(tokenizer.decode([token]) for token in tokenizer.encode(text)) == text


def test_the_chat_template_is_chatml_and_opens_the_assistant_turn(tokenizer: Any) -> None:
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "tool")]
    turns = "".join(f"<|im_start|>{role}\n{role[0]}<|im_end|>\n" for role in ("system", "user", "assistant", "tool"))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == turns
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == turns + "<|im_start|>assistant\n"


def test_sizes_that_do_not_divide_are_an_error_that_names_them() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size 100 must be a multiple of 2 \* num_heads \(3\)"):
        ScratchModel(hidden_size=100, num_heads=3, num_kv_heads=3)
