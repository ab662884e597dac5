"""Samples as data: nothing is lost on the way through a file, and what is no such file is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlsys.chat import Chat
from rlsys.config import ChatConfig, PlugIn
from rlsys.demonstrations import Demonstration, Recorded, sample_demonstrations
from rlsys.errors import ConfigError, DataError
from rlsys.function_tool import FunctionTool
from rlsys.samples import read_about, read_samples, sample_of, write_samples
from rlsys.scratch import byte_tokenizer
from rlsys.stages.offline import to_rollout
from rlsys.types import Problem, Rollout
from tests.rlsys.sampling_stage import problem, sample

TOKENIZER = byte_tokenizer()
CHAT = Chat(TOKENIZER, [])
PROBLEM = Problem(
    id="p", prompt=({"role": "user", "content": "1 + 1?"},), answer="2", source="sums", metadata={"level": 3}
)


def generated(*, finish: str = "stop", end: bool = True) -> Rollout:
    """A call, its output and an answer, as an engine and a tool left them."""
    pieces = [("Let me check\n```python\n1+1\n```\n", True), ("```output\n2\n```\n", False), ("\\boxed{2}", True)]
    tokens, mask = CHAT.render(PROBLEM), []
    mask = [False] * len(tokens)
    for text, trained in pieces:
        ids = CHAT.encode(text)
        tokens, mask = [*tokens, *ids], [*mask, *[trained] * len(ids)]
    if end:
        tokens, mask = [*tokens, TOKENIZER.eos_token_id], [*mask, True]
    return Rollout(
        tokens=np.array(tokens, np.int32),
        loss_mask=np.array(mask, np.bool_),
        logprobs=np.zeros(len(tokens), np.float32),
        versions=np.zeros(len(tokens), np.int32),
        reward=0.5,
        finish_reason=finish,  # type: ignore[arg-type]
        metrics={"correct": 1.0, "tool_calls": 1.0},
    )


def test_a_rollout_as_a_sample_has_its_turn_in_segments_without_the_end() -> None:
    found = sample_of(PROBLEM, generated(), CHAT, provenance={"seed": 1})
    assert found.demonstration.segments == (
        ("Let me check\n```python\n1+1\n```\n", True),
        ("```output\n2\n```\n", False),
        ("\\boxed{2}", True),
    )
    assert (found.correct, found.reward, found.finish_reason) == (True, 0.5, "stop")
    assert found.num_tokens == generated().num_trained_tokens


def test_a_sample_trains_on_the_very_tokens_that_were_generated_and_elsewhere_on_its_text() -> None:
    rollout = generated()
    found = sample_of(PROBLEM, rollout, CHAT, provenance={}).demonstration
    again = to_rollout(found, CHAT)
    np.testing.assert_array_equal(again.tokens, rollout.tokens)
    np.testing.assert_array_equal(again.loss_mask, rollout.loss_mask)
    other = Chat(byte_tokenizer(words=[]), [])
    spelled = to_rollout(found, other)
    assert len(spelled) > len(rollout)
    assert other.tokenizer.decode(spelled.tokens.tolist()) == TOKENIZER.decode(rollout.tokens.tolist())


def test_what_was_cut_off_has_no_end_of_turn_in_its_recorded_tokens() -> None:
    rollout = generated(finish="length", end=False)
    found = sample_of(PROBLEM, rollout, CHAT, provenance={})
    assert found.finish_reason == "length"
    np.testing.assert_array_equal(to_rollout(found.demonstration, CHAT).tokens, rollout.tokens)
    other = Chat(byte_tokenizer(words=[]), [])
    assert to_rollout(found.demonstration, other).tokens[-1] != other.tokenizer.eos_token_id


def test_a_rollout_in_which_nothing_was_written_has_an_empty_turn() -> None:
    prompt = np.array(CHAT.render(PROBLEM), np.int32)
    nothing = np.zeros(len(prompt), np.bool_)
    silent = Rollout(
        tokens=prompt, loss_mask=nothing, logprobs=nothing.astype(np.float32), versions=nothing.astype(np.int32)
    )
    found = sample_of(PROBLEM, silent, CHAT, provenance={})
    assert (found.demonstration.segments, found.num_tokens) == ((), 0)


def test_nothing_is_lost_on_the_way_through_a_file(tmp_path: Path) -> None:
    recorded = sample_of(PROBLEM, generated(), CHAT, provenance={"seed": 1, "filters": ["correct"]})
    plain = sample(7, "from a teacher\nin lines \u2211", correct=None, metrics={"status/x/ok": 1.0})
    path = tmp_path / "samples.parquet"
    write_samples(path, [recorded, plain], about={"report": {"kept": 2}})
    first, second = read_samples(path)
    mine, theirs = recorded.demonstration.recorded, first.demonstration.recorded
    assert mine is not None
    assert theirs is not None
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
    np.testing.assert_array_equal(mine.loss_mask, theirs.loss_mask)
    assert (theirs.tokens.dtype, theirs.loss_mask.dtype, theirs.template) == (np.int32, np.bool_, mine.template)
    bare = replace(recorded, demonstration=replace(recorded.demonstration, recorded=None))
    assert replace(first, demonstration=replace(first.demonstration, recorded=None)) == bare
    assert second == plain
    assert read_about(path) == {"report": {"kept": 2}}
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_without_samples_and_a_folder_of_parts(tmp_path: Path) -> None:
    write_samples(tmp_path / "part-000000.parquet", [])
    write_samples(tmp_path / "part-000001.parquet", [sample(1, "one")])
    assert [found.text for found in read_samples(tmp_path)] == ["one"]


def test_files_that_hold_no_samples_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"samples.parquet: no such file"):
        read_samples(tmp_path / "samples.parquet")
    write_samples(tmp_path / "samples.parquet", [])
    with pytest.raises(DataError, match=r"no such file \(did you mean 'samples.parquet'\?\)"):
        read_samples(tmp_path / "sampels.parquet")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty: no .parquet file is in this folder"):
        read_samples(empty)
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"text.parquet: not a Parquet file of samples, or damaged"):
        read_samples(tmp_path / "text.parquet")
    pq.write_table(pa.Table.from_pylist([{"question": "1 + 1?"}]), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other.parquet row 1: no sample \(KeyError: 'problem_id'\)"):
        read_samples(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other.parquet: not a Parquet file of samples"):
        read_about(tmp_path / "other.parquet")


def test_recorded_tokens_and_mask_share_one_axis() -> None:
    with pytest.raises(ValueError, match="share one token axis"):
        Recorded(tokens=np.zeros(2, np.int32), loss_mask=np.zeros(3, np.bool_), template="")


def test_demonstrations_are_the_answers_of_one_or_more_files(tmp_path: Path) -> None:
    for name, numbers in (("a", range(4)), ("b", range(4, 6))):
        write_samples(tmp_path / f"{name}.parquet", [sample(number, f"answer {number}") for number in numbers])
    paths = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    every = sample_demonstrations([], path=paths)
    assert [found.text for found in every] == [f"answer {number}" for number in range(6)]
    assert every[0] == Demonstration(problem=problem(0), segments=(("answer 0", True),))
    assert sample_demonstrations([], path=paths[0], limit=2) == every[:2]
    drawn = sample_demonstrations([], path=paths, limit=3, seed=1)
    assert drawn == sample_demonstrations([], path=paths, limit=3, seed=1)
    assert drawn != every[:3]
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        sample_demonstrations([], path=paths, limit=0)


def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


def half(number: int) -> float:
    """Half a number."""
    return number / 2


def test_the_fingerprint_tells_chats_apart_whose_templates_render_other_tools() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ message['role'] }}: "
        "{{ message['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chats = [
        Chat(tokenizer, tools, tool_format="template") for tools in ([], [FunctionTool(double)], [FunctionTool(half)])
    ]
    assert len({chat.fingerprint for chat in chats}) == 3
    assert chats[0].fingerprint == Chat(tokenizer, []).fingerprint
    assert json.dumps("Twice a number.") in chats[1].transcribe(PROBLEM.prompt, opens_turn=True)


def test_the_chat_of_a_run_has_its_tools_where_the_template_renders_them(tmp_path: Path) -> None:
    import asyncio

    from rlsys.run_chat import run_chat
    from tests.rlsys.sampling_stage import configured

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ message['content'] }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    config = replace(
        configured(tmp_path),
        chat=ChatConfig(tool_format="template"),
        tools=[PlugIn(use="tests.rlsys.test_samples:double")],  # type: ignore[list-item]
    )
    chat = asyncio.run(run_chat(config, str(tmp_path / "model")))
    assert "Twice a number." in TOKENIZER.decode(chat.render(PROBLEM))
    fenced = asyncio.run(run_chat(replace(config, chat=ChatConfig()), str(tmp_path / "model")))
    assert "Twice a number." not in TOKENIZER.decode(fenced.render(PROBLEM))
