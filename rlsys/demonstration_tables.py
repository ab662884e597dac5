"""Demonstrations from the rows of tables: a column of answers, or one of whole chats."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlsys.columns import value_of
from rlsys.data import dataset_problems
from rlsys.demonstrations import Demonstration, Turns
from rlsys.errors import ConfigError, DataError
from rlsys.tables import rows_of
from rlsys.types import Message, Problem


def response_rows(
    *,
    path: str,
    name: str | None,
    split: str | None,
    question: str | None,
    messages: str | None,
    response: str,
    instruction: str,
    limit: int | None,
) -> list[Demonstration]:
    """One demonstration for each row: a prompt and a column of text."""
    rows = dataset_problems(
        path=path,
        name=name,
        split=split,
        question=question,
        messages=messages,
        answer=None,
        metadata={_RESPONSE: response},
        instruction=instruction,
        limit=limit,
    )
    found = []
    for row in rows:
        text = row.metadata[_RESPONSE]
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{path}: row {row.id!r}: column {response!r} must be a text, got {text!r:.80}; set the option "
                "`response` to another column, or leave it out where `messages` holds whole chats"
            )
        problem = Problem(id=row.id, prompt=row.prompt, source=row.source)
        found.append(Demonstration(problem=problem, segments=((text, True),)))
    return found


def chat_rows(
    *,
    path: str,
    name: str | None,
    split: str | None,
    question: str | None,
    messages: str | None,
    turns: Turns,
    instruction: str,
    limit: int | None,
) -> list[Demonstration]:
    """The demonstrations of a column of chats."""
    if messages is None or question is not None or instruction:
        raise ConfigError(
            f"{path}: give `response` (a column of answers, beside `question` or `messages`), or only `messages` (a "
            "column of whole chats), to which no `instruction` can be added"
        )
    if turns not in ("all", "last", "each"):
        raise ConfigError(f"{path}: turns is {turns!r}; known: all, last, each")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    called = "-".join(filter(None, (Path(path).stem, name, split)))
    found = []
    for number, place, row in itertools.islice(rows_of(path, name, split), limit):
        chat = _chat(value_of(row, messages, "messages", place), messages, place)
        found += _demonstrations(chat, turns, f"{called}-{number}", called, place)
    if not found:
        raise DataError(f"{path}: no row in it; each is one chat")
    return found


def _demonstrations(chat: tuple[Message, ...], turns: Turns, name: str, source: str, place: str) -> list[Demonstration]:
    """The chat up to the assistant's last turn, as one demonstration or as one for each of its turns."""
    mine = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    if not mine:
        raise DataError(f"{place}: the chat has no turn of the assistant, so there is nothing to learn")
    if mine[0] == 0:
        raise DataError(f"{place}: the chat begins with the assistant; a message before it has to be the prompt")
    spans = {"all": [(mine[0], mine[-1])], "last": [(mine[-1], mine[-1])], "each": [(at, at) for at in mine]}
    return [
        Demonstration(
            problem=Problem(id=name if turns != "each" else f"{name}-{begin}", prompt=chat[:begin], source=source),
            turns=chat[begin : end + 1],
        )
        for begin, end in spans[turns]
    ]


def _chat(value: Any, column: str, place: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise DataError(
            f'{place}: column {column!r} must be a list of messages {{"role": ..., "content": ...}}, got {value!r:.200}'
        )
    return tuple(_message(message, column, place) for message in value)


def _message(given: Mapping[str, Any], column: str, place: str) -> Message:
    """A message without the empty keys that tables give it; a call of tools may stand without a text."""
    message = {key: part for key, part in given.items() if part is not None}
    if message.get("tool_calls"):
        message = {"content": "", **message, "tool_calls": [_call(call) for call in message["tool_calls"]]}
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str | list):
        raise DataError(f"{place}: column {column!r}: a message needs `role` and `content`, got {given!r:.200}")
    return message


def _call(call: Any) -> Any:
    """A call as chat templates expect it: OpenAI's arguments are JSON in a text, templates write JSON themselves."""
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


_RESPONSE = "response"
