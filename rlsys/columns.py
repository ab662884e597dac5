"""How the columns of a row become a problem. Every error names file, row, column and fix."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlsys.errors import ConfigError, DataError
from rlsys.tables import Row, did_you_mean
from rlsys.types import Message, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column a part of a problem comes from; dots reach into nested columns, as in `reward_model.ground_truth`.

    Exactly one of `question` and `messages` is given. `answer`, `source` and `id` may be None: then there is no
    answer, the source is the file's name, and the id that and the row's number. `metadata` maps its keys to columns.
    """

    question: str | None = None
    messages: str | None = None
    answer: str | None = None
    source: str | None = None
    id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    answer_pattern: str = ""
    instruction: str = ""

    def __post_init__(self) -> None:
        if (self.question is None) == (self.messages is None):
            raise ConfigError(
                "give either `question` (a column of text) or `messages` (a column of chat messages), "
                f"got {self.question!r} and {self.messages!r}"
            )
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ConfigError(f"answer_pattern {self.answer_pattern!r} is no regular expression: {error}") from error
        if self.answer_pattern and not groups:
            raise ConfigError(f"answer_pattern {self.answer_pattern!r} has no group; put (...) around the answer")


def problems_of(rows: Iterable[Row], columns: Columns, *, name: str, limit: int | None) -> list[Problem]:
    """The problems of the first `limit` rows; `name` is for ids and the source where no column has them."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    problems = []
    places: dict[str, str] = {}
    for number, place, row in itertools.islice(rows, limit):
        problem = _problem(number, place, row, columns, name)
        if (other := places.setdefault(problem.id, place)) != place:
            raise DataError(f"{place}: the id {problem.id!r} is taken by {other}; `id` needs a column of unique values")
        problems.append(problem)
    return problems


def _problem(number: str, place: str, row: Mapping[str, Any], columns: Columns, name: str) -> Problem:
    def text(option: str) -> str | None:
        column = getattr(columns, option)
        return None if column is None else _text(value_of(row, column, option, place), column, place)

    if columns.messages is None:
        prompt: tuple[Message, ...] = ({"role": "user", "content": text("question")},)
    else:
        prompt = _messages(value_of(row, columns.messages, "messages", place), columns.messages, place)
    answer = text("answer")
    return Problem(
        id=text("id") or f"{name}-{number}",
        prompt=_instructed(prompt, columns.instruction, place),
        answer=answer if answer is None else _final_answer(answer, columns.answer_pattern),
        source=text("source") or name,
        metadata={
            key: value_of(row, column, "metadata", place, empty=True) for key, column in columns.metadata.items()
        },
    )


def value_of(row: Mapping[str, Any], column: str, option: str, place: str, *, empty: bool = False) -> Any:
    """What stands in a column; `empty` says whether it may be nothing. `option` is what named it, for the message."""
    value, found = _reach(row, column)
    if found and (empty or value is not None):
        return value
    known = sorted(_names(row))
    near = did_you_mean(difflib.get_close_matches(column, known, n=1, cutoff=0.4))
    what = f"column {column!r} is empty" if found else f"no column {column!r}{near}"
    shown = ", ".join(known[:30]) + (", ..." if len(known) > 30 else "")
    raise DataError(f"{place}: {what}; set the option `{option}` to another of the columns: {shown}")


def _reach(row: Mapping[str, Any], column: str) -> tuple[Any, bool]:
    """(value, whether it exists); a column whose own name has dots comes before what they would reach."""
    if column in row:
        return row[column], True
    first, dot, rest = column.partition(".")
    while dot:
        if isinstance(inner := row.get(first), Mapping):
            value, found = _reach(inner, rest)
            if found:
                return value, True
        more, dot, rest = rest.partition(".")
        first = f"{first}.{more}"
    return None, False


def _names(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in row.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")


def _text(value: Any, column: str, place: str) -> str:
    """A text as it is, a number as it is written, lists and objects as JSON."""
    if isinstance(value, list | dict):
        try:
            return json.dumps(value, ensure_ascii=False)
        except TypeError as error:
            raise DataError(f"{place}: column {column!r} is neither text nor a JSON value: {error}") from error
    if isinstance(value, bytes):
        raise DataError(f"{place}: column {column!r} holds bytes, not text")
    return str(value)


def _messages(value: Any, column: str, place: str) -> tuple[Message, ...]:
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        # Tables give every message every key, empty where it has none.
        messages = tuple({key: part for key, part in message.items() if part is not None} for message in value)
        if all("role" in message and "content" in message for message in messages):
            return messages
    raise DataError(
        f'{place}: column {column!r} must be a list of messages {{"role": ..., "content": ...}}, got {value!r:.200}; '
        "if it is a text, name it with `question` instead of `messages`"
    )


def _instructed(prompt: tuple[Message, ...], instruction: str, place: str) -> tuple[Message, ...]:
    """The prompt with the instruction behind its last message of the user."""
    if not instruction:
        return prompt
    for index in reversed(range(len(prompt))):
        message = prompt[index]
        if message["role"] == "user" and isinstance(message["content"], str):
            told = {**message, "content": f"{message['content']}\n{instruction}"}
            return (*prompt[:index], told, *prompt[index + 1 :])
    raise DataError(f"{place}: no message of the user with a text, which `instruction` could be appended to")


def _final_answer(text: str, pattern: str) -> str:
    found = re.search(pattern, text) if pattern else None
    return (found.group(1) or "" if found else text).strip()
