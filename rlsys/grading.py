"""Grading a file of responses with any reward: to try a grader on data of one's own before a run depends on it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rlsys.errors import DataError, RewardError
from rlsys.interfaces import RewardResult
from rlsys.plugins import run_hook
from rlsys.reward_terms import RewardTerm
from rlsys.types import Problem, Rollout, RolloutGroup

_FIELDS = ("response", "answer", "prompt", "id", "source")
"""The keys of a line that are not the problem's metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """What one line got; where the reward failed, `status` is "error" or "timeout", `message` says how, no score."""

    score: float | None
    status: str
    extracted: str | None
    seconds: float
    message: str | None = None

    def to_json(self) -> str:
        """One line of JSON, without a message where there is none."""
        fields = {name: getattr(self, name) for name in ("score", "status", "extracted", "seconds", "message")}
        return json.dumps({key: value for key, value in fields.items() if key != "message" or value is not None})


def read_responses(path: Path) -> list[tuple[Problem, str]]:
    """The lines of a JSONL file: `response`, mostly `answer`, and perhaps `prompt` (a text or messages), `id`
    and `source`.

    Raises:
        DataError: the file is missing, empty, or a line of it (named) is not of that form.
    """
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    rows = [_row(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise DataError(f'{path} has no line; write one {{"response": ..., "answer": ...}} for each')
    return rows


def _row(line: str, path: Path, number: int) -> tuple[Problem, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not valid JSON ({error})") from error
    if not isinstance(row, Mapping) or not isinstance(row.get("response"), str):
        raise DataError(f'{path}:{number}: every line needs a text under "response"')
    answer, prompt = row.get("answer"), row.get("prompt", "")
    if not isinstance(answer, str | int | float | None):
        raise DataError(f'{path}:{number}: "answer" must be a text or a number, got {type(answer).__name__}')
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f'{path}:{number}: "prompt" must be a text or a list of messages')
    try:
        problem = Problem(
            id=str(row.get("id", f"line {number}")),
            prompt=tuple(messages),
            answer=None if answer is None else str(answer),
            source=str(row.get("source", "")),
            metadata={key: value for key, value in row.items() if key not in _FIELDS},
        )
    except ValueError as error:
        raise DataError(f"{path}:{number}: {error}") from error
    return problem, row["response"]


def grade_rows(
    reward: Any,
    rows: list[tuple[Problem, str]],
    output: Path,
    *,
    tell: Callable[[], None],
    timeout_seconds: float = 60.0,
) -> list[Graded]:
    """Grade one after the other, so that `seconds` are those of each alone, and write a line for each to `output`.

    A reward that grades groups is given those lines together that follow one another with the same id or prompt. A line
    stands in the file as soon as it is known; then `tell` is called.
    """
    with output.open("w") as file:
        return asyncio.run(_grade_rows(reward, rows, file, tell, timeout_seconds))


async def _grade_rows(
    reward: Any, rows: list[tuple[Problem, str]], file: TextIO, tell: Callable[[], None], timeout_seconds: float
) -> list[Graded]:
    term = RewardTerm(name="reward", reward=reward, timeout_seconds=timeout_seconds)
    graded: list[Graded] = []
    try:
        await run_hook(reward, "start")
        for siblings in _siblings(rows) if term.grades_groups else ([row] for row in rows):
            for result in await _grade(term, siblings):
                graded.append(result)
                file.write(result.to_json() + "\n")
                file.flush()
                tell()
    finally:
        await run_hook(reward, "close")
    return graded


def _siblings(rows: list[tuple[Problem, str]]) -> list[list[tuple[Problem, str]]]:
    groups: list[list[tuple[Problem, str]]] = []
    for problem, response in rows:
        last = groups[-1][0][0] if groups else None
        asked = any(message["content"] for message in problem.prompt)
        if last is not None and (problem.id == last.id or (asked and problem.prompt == last.prompt)):
            groups[-1].append((problem, response))
        else:
            groups.append([(problem, response)])
    return groups


async def _grade(term: RewardTerm, siblings: list[tuple[Problem, str]]) -> list[Graded]:
    """Results for one response, or for all of a group."""
    problem = siblings[0][0]
    rollouts = tuple(_rollout(response) for _, response in siblings)
    started = time.perf_counter()
    failure: RewardError | None = None
    results: list[RewardResult] = []
    try:
        if term.grades_groups:
            results = await term.grade_group(RolloutGroup(problem=problem, rollouts=rollouts))
        else:
            results = [await term.grade(problem, rollouts[0])]
    except RewardError as error:
        failure = error
    seconds = round(time.perf_counter() - started, 6)
    if failure is not None:
        failed = Graded(score=None, status=failure.status, extracted=None, seconds=seconds, message=str(failure))
        return [failed] * len(siblings)
    return [Graded(score=r.score, status=r.status, extracted=r.extracted, seconds=seconds) for r in results]


def _rollout(response: str) -> Rollout:
    none = np.zeros(0, np.int32)
    return Rollout(
        tokens=none, loss_mask=none.astype(np.bool_), logprobs=none.astype(np.float32), versions=none, response=response
    )


def summary_rows(graded: list[Graded]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """For each status and for all: count, share, mean score, median and greatest seconds."""
    statuses = sorted({result.status for result in graded}, key=lambda s: -sum(r.status == s for r in graded))
    for name in (*statuses, "all"):
        chosen = [result for result in graded if name in (result.status, "all")]
        scores = [result.score for result in chosen if result.score is not None]
        seconds = [result.seconds for result in chosen]
        yield (
            name,
            f"{len(chosen):,}",
            f"{len(chosen) / len(graded):.1%}",
            f"{np.mean(scores):.3f}" if scores else "-",
            f"{1e3 * np.median(seconds):.2f}",
            f"{1e3 * max(seconds):.1f}",
        )
