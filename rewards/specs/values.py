"""What a grader sees: `item`, the fields of the problem, and `sample`, the fields of the response; both plain JSON.

The response comes from somebody who wants a good grade. Whatever it holds is read in one pass and in bounded time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from rlsys.rewards.untrusted import behind_thinking
from rlsys.types import Problem

MAX_JSON_CHARACTERS = 200_000
"""Longer text is not read as JSON."""
MAX_JSON_DEPTH = 64
MAX_CALLS = 256
"""Of tool calls in one response; what comes behind them counts as one malformed call."""

Values = Mapping[str, Any]
"""`{"item": ..., "sample": ...}`."""

_CALL_OPEN, _CALL_CLOSE = "<tool_call>", "</tool_call>"
_THINK_MARK = re.compile(r"(</?think>)")


class GradingError(Exception):
    """A rollout that cannot be graded, which says nothing about its quality; `status` is "error" or "timeout"."""

    def __init__(self, message: str, *, status: str = "error") -> None:
        super().__init__(message)
        self.status = status


class AbsentError(Exception):
    """The response lacks what the grader looks at, such as a field of its JSON; it gets the lowest grade."""


def item_of(problem: Problem) -> dict[str, Any]:
    """The fields of a problem; a name in its metadata goes before the problem's own."""
    return {
        "prompt": [dict(message) for message in problem.prompt],
        "answer": problem.answer,
        "reference_answer": problem.answer,
        "id": problem.id,
        "source": problem.source,
        **problem.metadata,
    }


def sample_of(response: str) -> dict[str, Any]:
    """The fields of a response, of which only what stands outside the thinking counts.

    `output_text` is what stands behind the last `</think>` (all of it where there is none, nothing where a `<think>`
    is not closed), without tool calls and stripped; `output_json` its value, None where it is not JSON as `strict_json`
    reads it; `output_tools` the `<tool_call>` blocks of all turns in the shape of OpenAI's `tool_calls`.
    """
    text = _split_calls(behind_thinking(response) or "")[1].strip()
    calls = _split_calls(_outside_thinking(response))[0]
    try:
        value = strict_json(text)
    except ValueError:
        value = None
    return {"output_text": text, "output_json": value, "output_tools": [_call(*call) for call in enumerate(calls)]}


def strict_json(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError for what is not JSON, and for what readers of JSON do not agree on or cannot bear: a key twice in
    one object, NaN and infinities, numbers beyond a float or of more than 4,300 digits, more than `MAX_JSON_DEPTH`
    levels or `MAX_JSON_CHARACTERS` characters.
    """
    if len(text) > MAX_JSON_CHARACTERS:
        raise ValueError(f"{len(text)} characters of JSON; the limit is {MAX_JSON_CHARACTERS}")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return value
    raise ValueError(f"JSON of more than {MAX_JSON_DEPTH} levels")


def plain(value: Any) -> Any:
    """Values of numpy as JSON knows them; for `json.dumps(default=...)`."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number in JSON is too large")
    return value


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _outside_thinking(text: str) -> str:
    """The text of all turns without what stands between `<think>` and its `</think>` or the end.

    Where the chat template opens the thinking, the first `</think>` has no partner: what stands before it is thinking.
    A later one without a partner may follow a call of an earlier turn, and takes nothing away.
    """
    pieces = _THINK_MARK.split(text)
    kept, thinking, closed = [pieces[0]], False, False
    for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if mark == "</think>":
            if not thinking and not closed:
                kept.clear()
            closed = True
        thinking = mark == "<think>"
        if not thinking:
            kept.append(piece)
    return "".join(kept)


def _split_calls(text: str) -> tuple[list[str], str]:
    """The bodies of the tool calls, one that is not closed included, and the text around them."""
    head, *parts = text.split(_CALL_OPEN, MAX_CALLS)
    bodies, around = [], [head]
    for part in parts:
        body, _, behind = part.partition(_CALL_CLOSE)
        bodies.append(body)
        around.append(behind)
    if _CALL_OPEN in around[-1]:
        bodies.append(around.pop())
    return bodies, "".join(around)


def _call(index: int, body: str) -> dict[str, Any]:
    """One entry of `output_tools`; the name is empty, and the arguments are the body, where it cannot be understood."""
    name, arguments = "", body
    try:
        call = strict_json(body)
    except ValueError:
        call = None
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        name, given = call["name"], call.get("arguments", {})
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
