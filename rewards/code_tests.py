"""Tests of programs as values: what goes into the sandbox, and how what comes out is compared, outside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.types import Problem

MAX_NUMBER_CHARACTERS = 64

_SPACE = re.compile(r"(\s+)")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_STDIN_KEYS = ("stdin", "stdout")
_FUNCTION_KEYS = ("function", "arguments", "keywords", "expected")


@dataclass(frozen=True, slots=True, kw_only=True)
class StdinTest:
    """A program reads `stdin` and must write `stdout`."""

    stdin: str
    stdout: str

    def job(self) -> dict[str, Any]:
        """What the sandbox is told."""
        return {"stdin": self.stdin}

    def passes(self, shown: str, tolerance: float) -> bool:
        """Whether what a program has written is right."""
        return same_text(self.stdout, shown, tolerance)

    def length(self) -> int:
        """How many characters a right program shows."""
        return len(self.stdout)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTest:
    """A call of a program's function must return one of `accepted` (JSON values; there is more than one only where
    a data set leaves open whether it has wrapped the value in a list)."""

    function: str
    arguments: Sequence[Any]
    keywords: Mapping[str, Any]
    accepted: tuple[Any, ...]

    def job(self) -> dict[str, Any]:
        """What the sandbox is told."""
        return {"function": self.function, "arguments": self.arguments, "keywords": self.keywords}

    def passes(self, shown: str, tolerance: float) -> bool:
        """Whether the JSON text that was shown is an accepted value."""
        try:
            value = json.loads(shown)
        except (ValueError, RecursionError):
            return False
        return any(same_value(expected, value, tolerance) for expected in self.accepted)

    def length(self) -> int:
        """How many characters a right value has as JSON."""
        return max(len(json.dumps(value)) for value in self.accepted)


Test = StdinTest | FunctionTest


def read_tests(problem: Problem) -> tuple[Test, ...]:
    """The tests in `problem.metadata["tests"]`, of whichever form they have (see `CodeReward`).

    Raises:
        ValueError: there are none, or one of them is malformed; the message names the problem and the test.
    """
    tests = problem.metadata.get("tests")
    try:
        if isinstance(tests, str):
            tests = json.loads(tests)
        if isinstance(tests, Mapping):
            found = _from_columns(tests)
        elif isinstance(tests, Sequence) and not isinstance(tests, str | bytes):
            found = [_from_row(test, f"test {number}") for number, test in enumerate(tests)]
        else:
            raise ValueError(
                'Problem.metadata["tests"] must be a list of tests, or {"inputs": [...], "outputs": [...]}, '
                f"got {tests!r:.100}"
            )
        if not found:
            raise ValueError('Problem.metadata["tests"] is empty; give at least one test')
    except (ValueError, RecursionError) as error:
        raise ValueError(f"problem {problem.id!r}: {error}") from error
    return tuple(found)


def _from_row(test: Any, place: str) -> Test:
    if not isinstance(test, Mapping):
        raise ValueError(f"{place} must be an object, got {test!r:.100}")
    # Tables give every row every key, empty where it has none; None is a value only where it is expected.
    given = {key: value for key, value in test.items() if value is not None}
    keys = _FUNCTION_KEYS if "function" in given else _STDIN_KEYS
    if unknown := sorted(set(given) - set(keys)):
        raise ValueError(f"{place} has {', '.join(map(repr, unknown))}; such a test has {', '.join(keys)}")
    if keys is _STDIN_KEYS:
        for key in keys:
            if not isinstance(given.get(key), str):
                raise ValueError(f"{place}: `{key}` must be a text, got {given.get(key)!r:.100}")
        return StdinTest(stdin=given["stdin"], stdout=given["stdout"])
    if "expected" not in test:
        raise ValueError(f"{place} has no `expected`; give the value that {given['function']!r:.100} must return")
    arguments, keywords = given.get("arguments", []), given.get("keywords", {})
    return _function_test(given["function"], arguments, keywords, (test["expected"],), place)


def _from_columns(tests: Mapping[str, Any]) -> list[Test]:
    """Tests as APPS and verl write them."""
    columns = []
    for key in ("inputs", "outputs"):
        column = tests.get(key)
        if not isinstance(column, Sequence) or isinstance(column, str | bytes):
            raise ValueError(f"`{key}` of the tests must be a list, got {column!r:.100}")
        columns.append(column)
    (inputs, outputs), name = columns, tests.get("fn_name")
    if len(inputs) != len(outputs):
        raise ValueError(f"the tests have {len(inputs)} inputs, but {len(outputs)} outputs")
    make = _from_lines if name is None else _from_call
    return [
        make(name, given, wanted, f"test {number}")
        for number, (given, wanted) in enumerate(zip(inputs, outputs, strict=True))
    ]


def _from_lines(_: Any, given: Any, wanted: Any, place: str) -> Test:
    texts = ["\n".join(text) if _are_texts(text) else text for text in (given, wanted)]
    return _from_row(dict(zip(_STDIN_KEYS, texts, strict=True)), place)


def _from_call(name: Any, given: Any, wanted: Any, place: str) -> Test:
    if not isinstance(given, str):
        # APPS wraps the values of such tests in lists of one, and not always: both readings count.
        wrapped = isinstance(wanted, Sequence) and not isinstance(wanted, str) and len(wanted) == 1
        return _function_test(name, given, {}, (wanted, wanted[0]) if wrapped else (wanted,), place)
    try:
        arguments = [json.loads(line) for line in given.split("\n") if line.strip()]
        value = json.loads(wanted) if isinstance(wanted, str) else wanted
    except ValueError as error:
        raise ValueError(f"{place}: with `fn_name`, a text is one JSON value a line; {error}") from error
    return _function_test(name, arguments, {}, (value,), place)


def _function_test(function: Any, arguments: Any, keywords: Any, accepted: tuple[Any, ...], place: str) -> FunctionTest:
    if not isinstance(function, str) or not function.strip():
        raise ValueError(f"{place}: the function's name must be a text, got {function!r:.100}")
    if not isinstance(arguments, Sequence) or isinstance(arguments, str | bytes):
        raise ValueError(f"{place}: the arguments of {function!r} must be a list, got {arguments!r:.100}")
    if not isinstance(keywords, Mapping) or not all(isinstance(key, str) for key in keywords):
        raise ValueError(f"{place}: the keywords of {function!r} must be an object, got {keywords!r:.100}")
    try:
        values = json.loads(json.dumps([list(arguments), dict(keywords), list(accepted)]))
    except TypeError as error:
        raise ValueError(f"{place}: arguments and expected values must be JSON values; {error}") from error
    return FunctionTest(function=function, arguments=values[0], keywords=values[1], accepted=tuple(values[2]))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def same_value(expected: Any, actual: Any, tolerance: float) -> bool:
    """Whether two JSON values are equal: a decimal within the tolerance, all else exactly; true is not 1.

    An integer is met by no other number; NaN by nothing.
    """
    if isinstance(expected, bool) or isinstance(actual, bool):
        return expected is actual
    if isinstance(expected, int | float) and isinstance(actual, int | float):
        return expected == actual or (isinstance(expected, float) and _close(expected, actual, tolerance))
    if isinstance(expected, list) and isinstance(actual, list):
        return len(expected) == len(actual) and all(map(same_value, expected, actual, [tolerance] * len(expected)))
    if isinstance(expected, dict) and isinstance(actual, dict):
        return expected.keys() == actual.keys() and all(
            same_value(value, actual[key], tolerance) for key, value in expected.items()
        )
    return type(expected) is type(actual) and bool(expected == actual)


def same_text(expected: str, actual: str, tolerance: float) -> bool:
    """Whether two outputs are equal but for space at the ends of lines and empty lines at the end.

    Where a number with a decimal point or an exponent is expected, one within the tolerance will do.
    """
    left, right = _lines(expected), _lines(actual)
    return len(left) == len(right) and all(
        line == other or _same_line(line, other, tolerance) for line, other in zip(left, right, strict=True)
    )


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_line(expected: str, actual: str, tolerance: float) -> bool:
    left, right = _SPACE.split(expected), _SPACE.split(actual)
    return len(left) == len(right) and all(
        word == other or _close_words(word, other, tolerance) for word, other in zip(left, right, strict=True)
    )


def _close_words(expected: str, actual: str, tolerance: float) -> bool:
    if max(len(expected), len(actual)) > MAX_NUMBER_CHARACTERS:
        return False
    if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(actual)) or expected.lstrip("+-").isdigit():
        return False
    return _close(float(expected), float(actual), tolerance)


def _close(expected: float, actual: float, tolerance: float) -> bool:
    """Within the tolerance, relative for numbers beyond 1."""
    try:
        return math.isfinite(expected) and abs(expected - actual) <= tolerance * max(1.0, abs(expected))
    except OverflowError:  # an integer beyond all floats
        return False
