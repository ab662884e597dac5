"""A grader that is Python code: it runs in the sandbox, and what the policy wrote is its data."""

from __future__ import annotations

import ast
import json
import math
import secrets

from rlsys.errors import ToolError
from rlsys.interfaces import RewardResult, ToolResult
from rlsys.rewards.specs.services import Services
from rlsys.rewards.specs.spec import Spec
from rlsys.rewards.specs.values import GradingError, Values, plain
from rlsys.tools.python import MAX_CODE_CHARACTERS, PythonSession

MAX_DATA_CHARACTERS = 4_000_000
"""Of the JSON of sample and item together."""
PART_CHARACTERS = 100_000  # of data in one call; its spelling as a literal at most doubles it

_READ = """
import json as _grader_json
_grader_sample, _grader_item = _grader_json.loads("".join(_grader_parts))
"""
_TELL = """
import builtins as _grader_builtins, numbers as _grader_numbers
if not isinstance(_grader_grade, _grader_numbers.Real):
    raise TypeError("grade() must return a number, got " + type(_grader_grade).__name__)
_grader_builtins.print({marker!r} + _grader_builtins.repr(_grader_builtins.float(_grader_grade)) + {marker!r})
"""


class PythonGrader:
    """`source` defines `grade(sample, item)`, which returns the score.

    Every grading has an interpreter of its own. Time and memory are those of the sandbox, for each of: running
    `source`, calling `grade`. The result is told between two marks that are drawn after `grade` has returned, so that
    nothing printed before can pass for it. That holds as long as `source` does not run what the response says:
    whoever's code runs in the interpreter can write the grade. The public format's `image_tag` is accepted and has no
    meaning: what the sandbox's Python has installed can be imported.
    """

    absent = RewardResult(score=0.0)

    def __init__(self, spec: Spec, services: Services) -> None:
        spec.check_keys(("source",), ("image_tag",))
        self._source = spec.text("source")
        if len(self._source) > MAX_CODE_CHARACTERS:
            raise spec.wrong("source", f"has {len(self._source)} characters; the limit is {MAX_CODE_CHARACTERS}")
        _check_source(spec, self._source)
        self._services = services

    async def start(self) -> None:
        """Start the sandbox, which proves that it holds."""
        await self._services.python.start()

    async def grade(self, values: Values) -> RewardResult:
        """Run the code; GradingError where it raises, hangs or returns anything but a finite number."""
        parts = _parts(values)
        session = await self._services.python.open(f"grader-{values['item'].get('id')}")
        try:
            for part in parts:
                await self._run(session, part)
            await self._run(session, self._source)
            await self._run(session, "_grader_grade = grade(_grader_sample, _grader_item)")
            marker = secrets.token_hex(16)
            told = await self._run(session, _TELL.format(marker=marker))
        except ToolError as error:
            raise GradingError(str(error)) from error
        finally:
            await session.close()
        return RewardResult(score=_number(told.text, marker))

    async def _run(self, session: PythonSession, code: str) -> ToolResult:
        result = await session.call({"code": code})
        if not result.ok:
            late = result.seconds >= self._services.python.timeout_seconds
            raise GradingError(f"the grader's code failed: {result.text}", status="timeout" if late else "error")
        return result


def _check_source(spec: Spec, source: str) -> None:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise spec.wrong("source", f"is not Python: {error}") from error
    grades = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "grade"]
    arguments = grades[-1].args if grades else None
    if arguments is None or len(arguments.posonlyargs) + len(arguments.args) != 2 or arguments.kwonlyargs:
        raise spec.wrong("source", "must define `def grade(sample, item)` with exactly these two parameters")


def _parts(values: Values) -> list[str]:
    """Cells that hand sample and item over: ASCII literals only, so that no text can end its literal."""
    try:
        data = json.dumps([values["sample"], values["item"]], default=plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise GradingError(f"problem {values['item'].get('id')!r} cannot be written as JSON: {error}") from error
    if len(data) > MAX_DATA_CHARACTERS:
        raise GradingError(f"sample and item have {len(data)} characters of JSON; the limit is {MAX_DATA_CHARACTERS}")
    pieces = [data[begin : begin + PART_CHARACTERS] for begin in range(0, len(data), PART_CHARACTERS)]
    return ["_grader_parts = []", *(f"_grader_parts.append({piece!r})" for piece in pieces), _READ]


def _number(text: str, marker: str) -> float:
    pieces = text.split(marker)
    try:
        score = float(pieces[1]) if len(pieces) == 3 else math.nan
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise GradingError(f"the grader's code returned no finite number: {text[:200]}")
    return score
