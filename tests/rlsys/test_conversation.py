"""Chats as sequences: the very text of the template, with exactly what the assistant writes trained."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.chat import Chat
from rlsys.conversation import to_rollout
from rlsys.demonstrations import Demonstration, table_demonstrations
from rlsys.errors import ConfigError, DataError
from rlsys.scratch import byte_tokenizer
from rlsys.types import Problem, Rollout

STRIPS_THINKING = (
    "{% for message in messages %}{% set last = loop.last or messages[loop.index0 + 1:]"
    "|selectattr('role', 'equalto', 'user')|list|length == 0 %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not last %}{{ message['content'].split('</think>\n')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3's: thinking is left out of turns behind which the user speaks again."""

OPENS_THINKING = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{{ message['content'].split('</think>\n')[-1] }}{{ '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>user\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""As R1's distilled models': the prompt opens the thinking, and a turn that is past has none."""

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>\none and one</think>\n2"},
    {"role": "user", "content": "and 2 + 2?"},
    {"role": "assistant", "content": "<think>\ntwo and two</think>\n4"},
]


def chat_with(template: str | None = None) -> Chat:
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return Chat(tokenizer, [])


def pieces(rollout: Rollout, chat: Chat) -> list[tuple[str, bool]]:
    """The rollout's text in runs of (text, whether it trains)."""
    pairs = zip(rollout.tokens.tolist(), rollout.loss_mask.tolist(), strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [(str(chat.tokenizer.decode([token for token, _ in run])), trained) for trained, run in runs]


def table(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def demonstrations(folder: Path, *chats: list[dict[str, Any]], **options: Any) -> list[Demonstration]:
    return table_demonstrations(
        [], path=table(folder, *({"messages": c} for c in chats)), messages="messages", **options
    )


def test_all_turns_of_the_assistant_train_and_nothing_else(tmp_path: Path) -> None:
    chat = chat_with()
    (found,) = demonstrations(tmp_path, CHAT)
    rollout = to_rollout(found, chat)
    whole = chat.tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert "".join(text for text, _ in pieces(rollout, chat)) + "\n" == whole
    assert [text for text, trained in pieces(rollout, chat) if trained] == [
        "<think>\none and one</think>\n2<|im_end|>",
        "<think>\ntwo and two</think>\n4<|im_end|>",
    ]
    assert rollout.tokens[-1] == chat.tokenizer.eos_token_id
    assert set(rollout.versions.tolist()) == {-1}


def test_only_the_last_turn_trains_on_demand(tmp_path: Path) -> None:
    chat = chat_with()
    (found,) = demonstrations(tmp_path, CHAT, turns="last")
    trained = [text for text, trains in pieces(to_rollout(found, chat), chat) if trains]
    assert trained == ["<think>\ntwo and two</think>\n4<|im_end|>"]
    assert "one and one" in pieces(to_rollout(found, chat), chat)[0][0]


def test_each_turn_in_a_sequence_of_its_own_reads_as_it_would_be_generated(tmp_path: Path) -> None:
    chat = chat_with(STRIPS_THINKING)
    first, second = (to_rollout(found, chat) for found in demonstrations(tmp_path, CHAT, turns="each"))
    assert [text for text, trains in pieces(first, chat) if trains] == ["<think>\none and one</think>\n2<|im_end|>"]
    read, written = pieces(second, chat)
    assert written == ("<think>\ntwo and two</think>\n4<|im_end|>", True)
    assert "one and one" not in read[0]
    assert read[0] == chat.tokenizer.apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_what_to_do(tmp_path: Path) -> None:
    chat = chat_with(STRIPS_THINKING)
    (found,) = demonstrations(tmp_path, CHAT)
    with pytest.raises(DataError, match=r"'rows-1': the chat template writes an earlier turn.*`turns` to `each`"):
        to_rollout(found, chat)
    (last,) = demonstrations(tmp_path, CHAT, turns="last")
    assert "two and two" in pieces(to_rollout(last, chat), chat)[-1][0]
    without = [{**message, "content": message["content"].split("</think>\n")[-1]} for message in CHAT]
    (plain,) = demonstrations(tmp_path, without)
    assert len([1 for _, trains in pieces(to_rollout(plain, chat), chat) if trains]) == 2


def test_a_template_that_does_not_continue_its_own_opening_is_refused(tmp_path: Path) -> None:
    (found,) = demonstrations(tmp_path, CHAT[1:3])
    with pytest.raises(DataError, match=r"does not write the assistant's turn behind its own opening.*`response`"):
        to_rollout(found, chat_with(OPENS_THINKING))


def test_thinking_that_the_prompt_opens_is_not_opened_twice(tmp_path: Path) -> None:
    chat = chat_with(OPENS_THINKING)
    path = table(tmp_path, {"question": "1 + 1?", "response": "<think>\none and one</think>\n2"})
    (found,) = table_demonstrations([], path=path, response="response")
    read, written = pieces(to_rollout(found, chat), chat)
    assert read[0].endswith("assistant\n<think>\n")
    assert written == ("one and one</think>\n2<|im_end|>", True)
    plain = chat_with()
    assert pieces(to_rollout(found, plain), plain)[1][0].startswith("<think>\none")


def test_what_tools_say_is_read_and_calls_train() -> None:
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = chat_with(template)
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "1+1"}}}
    turns = (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "python", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    )
    problem = Problem(id="p", prompt=({"role": "user", "content": "1 + 1?"},))
    found = pieces(to_rollout(Demonstration(problem=problem, turns=turns), chat), chat)
    assert [trains for _, trains in found] == [False, True, False, True]
    assert '"code": "1+1"' in found[1][0]
    assert found[2][0] == "\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    assert found[3][0] == "It is 2.<|im_end|>"


def test_calls_of_a_table_have_their_arguments_as_the_template_wants_them(tmp_path: Path) -> None:
    call = {"function": {"name": "python", "arguments": '{"code": "1+1"}'}}
    chat = [
        CHAT[1],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        CHAT[2],
    ]
    (found,) = demonstrations(tmp_path, chat)
    assert found.turns[0]["tool_calls"][0]["function"]["arguments"] == {"code": "1+1"}
    assert found.turns[0]["content"] == ""


def test_messages_behind_the_last_turn_are_left_out(tmp_path: Path) -> None:
    (found,) = demonstrations(tmp_path, [*CHAT, {"role": "user", "content": "thanks"}])
    assert len(found.turns) == 3
    np.testing.assert_array_equal(
        to_rollout(found, chat_with()).tokens, to_rollout(demonstrations(tmp_path, CHAT)[0], chat_with()).tokens
    )


def test_prompts_and_responses_come_from_columns_of_text_or_of_messages(tmp_path: Path) -> None:
    path = table(tmp_path, {"q": "1 + 1?", "a": "2", "m": CHAT[:2]})
    (plain,) = table_demonstrations([], path=path, question="q", response="a", instruction="Box it.")
    assert plain.problem.prompt == ({"role": "user", "content": "1 + 1?\nBox it."},)
    assert plain.segments == (("2", True),)
    (told,) = table_demonstrations([], path=path, messages="m", response="a")
    assert len(told.problem.prompt) == 2


USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "options", "error", "message"),
    [
        ({"m": [USER]}, {"messages": "m"}, DataError, r"rows.jsonl:1: the chat has no turn of the assistant"),
        ({"m": [ASSISTANT, USER]}, {"messages": "m"}, DataError, r"rows.jsonl:1: the chat begins with the assistant"),
        ({"m": []}, {"messages": "m"}, DataError, r"column 'm' must be a list of messages"),
        ({"m": "text"}, {"messages": "m"}, DataError, r"column 'm' must be a list of messages .* got 'text'"),
        ({"m": [{"role": "user"}]}, {"messages": "m"}, DataError, r"a message needs `role` and `content`"),
        ({"m": [USER, ASSISTANT]}, {"messages": "mm"}, DataError, r"no column 'mm' \(did you mean 'm'\?\)"),
        ({"m": [USER, ASSISTANT]}, {"messages": "m", "turns": "first"}, ConfigError, r"turns is 'first'; known: all"),
        ({"m": [USER, ASSISTANT]}, {"messages": "m", "limit": 0}, ConfigError, r"limit must be at least 1, got 0"),
        ({"q": "u"}, {"question": "q"}, ConfigError, r"give `response`"),
        ({"q": "u", "a": 3}, {"question": "q", "response": "a"}, DataError, r"column 'a' must be a text, got 3"),
        ({"q": "u", "a": " "}, {"question": "q", "response": "a"}, DataError, r"column 'a' must be a text, got ' '"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        table_demonstrations([], path=table(tmp_path, row), **options)
