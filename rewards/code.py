"""The reward for a program that passes tests."""

from __future__ import annotations

import asyncio
import json
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlsys.interfaces import RewardResult
from rlsys.rewards.code_tests import Test, read_tests
from rlsys.rewards.sandbox import Budget, Sandbox, SandboxError
from rlsys.types import Problem, Rollout

log = logging.getLogger(__name__)

Outcome = Literal["passed", "wrong", "too_slow", "error"]
MAX_PROGRAM_CHARACTERS = 100_000

_PYTHON = ("python", "python3", "py")


class CodeReward:
    """Scores the program in a response by the tests in `problem.metadata["tests"]`.

    The program is the last closed ```python block behind any `</think>`, else the last closed block without a
    language. Tests are a list of

        {"stdin": "3 4", "stdout": "7"}
        {"function": "add", "arguments": [3, 4], "keywords": {}, "expected": 7}

    or, as APPS and verl have them, `{"inputs": [...], "outputs": [...], "fn_name": ...}`; all may be JSON text. A
    function may be a method, `Class.method` or one of the class `Solution`.

    Each test runs in a sandbox session of its own, `max_parallel` at once (one for each CPU by default; all responses
    share these places). Only its input goes in; the output is compared here: standard output by lines, without regard
    to space at their ends, a returned value as JSON; decimals within `tolerance` (relative beyond 1), all else exactly.
    A program that raises, exits with a status other than 0 or is ended does not pass, whatever it wrote before.

    `status` is "correct", "wrong", "no_answer" (no program), "too_slow" (longer than `timeout_seconds` for one test, or
    `total_seconds` for all) or "error" (the sandbox itself failed twice). Only "correct" scores `correct`, all else
    `wrong`. Testing stops at the first failure, in the order of the tests. With `partial` all tests run, and the score
    is in proportion to those that passed. The term "passed" is the share of tests that passed, without `partial` before
    the first failure.

    Seconds are those of running; the deadline of the reward's term in a config counts the wait for a place as well.
    `sandbox` are further options of `rlsys.tools.python:PythonTool`, such as `tier` or `preload`. Raises ValueError
    for a problem with malformed tests.
    """

    def __init__(
        self,
        *,
        partial: bool = False,
        timeout_seconds: float = 5.0,
        total_seconds: float = 30.0,
        max_parallel: int | None = None,
        memory_mb: int = 1024,
        max_output_characters: int = 1_000_000,
        tolerance: float = 1e-6,
        correct: float = 1.0,
        wrong: float = 0.0,
        sandbox: Mapping[str, Any] | None = None,
    ) -> None:
        if not total_seconds > 0:
            raise ValueError(f"total_seconds must be positive, got {total_seconds}")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance}")
        self.partial = partial
        self.total_seconds = total_seconds
        self.tolerance = tolerance
        self.max_output_characters = max_output_characters
        self.correct = correct
        self.wrong = wrong
        self._sandbox = Sandbox(
            Path(__file__).resolve().with_name("code_cell.py"),
            timeout_seconds=timeout_seconds,
            max_parallel=max_parallel,
            options=sandbox or {},
            place="CodeReward.sandbox",
            memory_mb=memory_mb,
            max_output_characters=max_output_characters,
        )

    @property
    def tier(self) -> str | None:
        """How well programs are isolated (see `PythonTool`); None before `start`."""
        return self._sandbox.tier

    async def start(self) -> None:
        """Start the sandbox; RuntimeError where this host cannot isolate programs."""
        await self._sandbox.start()

    async def close(self) -> None:
        """End the sandbox with whatever runs in it."""
        await self._sandbox.close()

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> RewardResult:  # noqa: ARG002
        """Grade one response; see the class."""
        tests = self._tests(problem)
        program = find_program(response)
        if program is None:
            return RewardResult(score=self.wrong, status="no_answer", terms={"passed": 0.0})
        if len(program) > MAX_PROGRAM_CHARACTERS:
            outcomes: Sequence[Outcome] = ["wrong"]
        else:
            outcomes = await self._judge(program, tests)
        share = outcomes.count("passed") / len(tests)
        score = self.wrong + (self.correct - self.wrong) * (share if self.partial else share == 1)
        return RewardResult(
            score=score, status=_status(outcomes), terms={"passed": share}, extracted=program[:MAX_PROGRAM_CHARACTERS]
        )

    def _tests(self, problem: Problem) -> tuple[Test, ...]:
        tests = read_tests(problem)
        for number, test in enumerate(tests):
            if test.length() > self.max_output_characters:
                raise ValueError(
                    f"problem {problem.id!r}: test {number} expects {test.length():,} characters, but only "
                    f"max_output_characters={self.max_output_characters:,} are read; raise that option"
                )
        return tests

    async def _judge(self, program: str, tests: Sequence[Test]) -> list[Outcome]:
        """The outcomes in the order of the tests, without `partial` up to the first failure."""
        budget = Budget(self.total_seconds)
        tasks = [asyncio.create_task(self._try(program, test, budget)) for test in tests]
        outcomes: list[Outcome] = []
        try:
            for task in tasks:
                outcomes.append(await task)
                if outcomes[-1] != "passed" and not self.partial:
                    break
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return outcomes

    async def _try(self, program: str, test: Test, budget: Budget) -> Outcome:
        job = json.dumps({"program": program, **test.job()})
        try:
            ran = await self._sandbox.run(job, budget)
        except SandboxError as error:
            log.warning("a program could not be tested: %s", error)
            return "error"
        if ran.too_slow:
            return "too_slow"
        return "passed" if ran.ok and test.passes(ran.text, self.tolerance) else "wrong"


def _status(outcomes: Sequence[Outcome]) -> str:
    """What is counted: with an error nobody knows how many tests would have passed; else the first failure."""
    failures = [outcome for outcome in outcomes if outcome != "passed"]
    return "error" if "error" in failures else failures[0] if failures else "correct"


def find_program(response: str) -> str | None:
    """The program in a response, by the order that `CodeReward` states; None where there is none or it is blank."""
    answer = response.rpartition("</think>")[2]
    if "<think>" in answer:
        return None
    found: dict[bool, str] = {}
    for language, program in _closed_blocks(answer):
        if language in ("", *_PYTHON):
            found[language != ""] = program
    program = found.get(True, found.get(False, ""))
    return program if program.strip() else None


def _closed_blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block, in one pass; an indented one without its indentation."""
    opening, language, indented = 0, "", False
    body: list[str] = []
    for line in text.split("\n"):
        bare = line.strip()
        rest = bare.lstrip("`")
        ticks = len(bare) - len(rest)
        if opening and not rest and ticks >= opening:
            content = "\n".join(body)
            yield language, textwrap.dedent(content) if indented else content
            opening = 0
        elif opening:
            body.append(line)
        elif ticks >= 3 and "`" not in rest:
            opening, language, indented = ticks, rest.strip().partition(" ")[0].lower(), line.startswith((" ", "\t"))
            body = []
