"""Program-written chains of thought that turn: true, of the kinds that are asked for, and with places for code."""

from __future__ import annotations

import re

import pytest

from rlsys.data import reasoning_gym_problems
from rlsys.demonstrations import Demonstration
from rlsys.errors import ConfigError, DataError
from rlsys.insertions import splits
from rlsys.reproduce.reflections import KINDS, TURNS, reflective_demonstrations
from rlsys.types import Problem

SUMS = {"chain_sum": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}}
PROBLEMS = reasoning_gym_problems(tasks=SUMS, size=40, seed=0)
LINE = re.compile(r"^(?:Wait, |However, )?(-?\d+ [+-] \d+) = (-?\d+)$", re.MULTILINE)


def demonstrations(**shares: float) -> list[Demonstration]:
    return reflective_demonstrations(PROBLEMS, size=120, seed=0, shares=shares)


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_true(kind: str) -> None:
    for one in demonstrations(**{kind: 1}):
        answer = one.problem.answer
        assert one.text.endswith(f"\nVerified.</think>\n\\boxed{{{answer}}}")
        lines = LINE.findall(one.text)
        assert all(eval(left) == int(right) for left, right in lines)
        assert len(lines) in {"direct": (2,), "run": (0, 1), "unrun": (2, 3)}[kind]
        assert kind == "run" or lines[-1][1] == answer


def test_a_direct_one_turns_before_its_last_sum_and_one_with_code_does_not() -> None:
    for one in demonstrations(direct=1):
        places = splits(one.segments, words=["Wait", "However"], split_at="line")
        assert one.text[places[-1].position :].startswith(TURNS)
        assert one.text[: places[-1].position].count(" = ") == 1
    for one in demonstrations(unrun=1):
        assert "```python\n" + one.problem.metadata["expression"] + "\n```\n" in one.text
        assert all(trained for _, trained in one.segments)


def test_only_the_output_of_code_that_was_run_does_not_train() -> None:
    for one in demonstrations(run=1):
        assert [text for text, trained in one.segments if not trained] == [f"```output\n{one.problem.answer}\n```\n"]


def test_shares_are_kept_and_the_same_seed_gives_the_same() -> None:
    found = demonstrations(direct=6, run=3, unrun=1)
    run = sum("```output" in one.text for one in found)
    code = sum("```python" in one.text for one in found)
    assert 24 <= run <= 48
    assert 36 <= code <= 60
    assert found == demonstrations(direct=6, run=3, unrun=1)


@pytest.mark.parametrize("shares", [{}, {"direkt": 1}, {"direct": -1}, {"direct": 0}])
def test_shares_that_cannot_be_meant_are_named(shares: dict[str, float]) -> None:
    with pytest.raises(
        ConfigError, match=rf"need problems and shares of direct, run, unrun.*={re.escape(str(shares))}"
    ):
        demonstrations(**shares)


def test_a_problem_that_is_no_sum_is_an_error_that_names_it() -> None:
    problem = Problem(id="p1", prompt=({"role": "user", "content": "?"},), answer="1")
    with pytest.raises(DataError, match="'p1'"):
        reflective_demonstrations([problem], size=1, seed=0, shares={"direct": 1})
