"""Demonstrations: true, in the form of a rollout, with tool output that is not trained on."""

import re

import pytest

from rlsys.data import reasoning_gym_problems
from rlsys.demonstrations import Demonstration, arithmetic_demonstrations
from rlsys.errors import ConfigError, DataError
from rlsys.types import Problem

PROBLEMS = reasoning_gym_problems(tasks={"chain_sum": {}, "products": {}}, size=40, seed=0)
CALL = re.compile(
    r"<think>\n[^`]*\n```python\n(?P<code>.+)\n```\n```output\n(?P<output>.+)\n```\n[^`]*</think>\n\\boxed\{(?P<answer>.+)\}"
)
DIRECT = re.compile(r"<think>\n[^`]*</think>\n\\boxed\{(?P<answer>.+)\}")
VERIFICATION = re.compile(r"verif|double check|wait|however|let me check", re.IGNORECASE)


def demonstrations(**options: float) -> list[Demonstration]:
    return arithmetic_demonstrations(PROBLEMS, **{"size": 200, "seed": 0, "tool_share": 0.4, **options})


def test_a_share_of_them_calls_python_and_all_are_true() -> None:
    calls = 0
    for demonstration in demonstrations():
        found = CALL.fullmatch(demonstration.text) or DIRECT.fullmatch(demonstration.text)
        assert found is not None
        assert found["answer"] == demonstration.problem.answer
        if found.re is CALL:
            calls += 1
            assert str(eval(found["code"])) == found["output"] == found["answer"]
    assert calls == 80


def test_only_tool_output_is_not_trained_on() -> None:
    for demonstration in demonstrations():
        untrained = [text for text, trained in demonstration.segments if not trained]
        expected = [f"```output\n{demonstration.problem.answer}\n```\n"] if "```python" in demonstration.text else []
        assert untrained == expected


def test_a_call_ends_its_segment_where_a_rollout_stops_to_run_it() -> None:
    for demonstration in demonstrations(tool_share=1.0):
        assert len(demonstration.segments) == 3
        assert demonstration.segments[0][0].endswith("\n```\n")


def test_they_think_in_several_words_of_verification() -> None:
    found = [VERIFICATION.findall(demonstration.text) for demonstration in demonstrations()]
    assert {word.lower() for words in found for word in words} >= {
        "verif",
        "double check",
        "wait",
        "however",
        "let me check",
    }
    assert sum(map(bool, found)) > len(found) / 2


def test_they_are_deterministic_and_go_through_all_problems_before_repeating() -> None:
    assert demonstrations(size=40) == demonstrations(size=40)
    assert demonstrations(size=40) != demonstrations(size=40, seed=1)
    assert {demonstration.problem.id for demonstration in demonstrations(size=40)} == {p.id for p in PROBLEMS}


def test_a_problem_without_an_expression_is_an_error_that_names_it() -> None:
    problem = Problem(id="p1", prompt=({"role": "user", "content": "?"},), answer="1")
    with pytest.raises(DataError, match=r"'p1' has no metadata\['expression'\]"):
        arithmetic_demonstrations([problem], size=1, seed=0, tool_share=1.0)


def test_no_problems_or_an_impossible_share_is_an_error() -> None:
    with pytest.raises(ConfigError, match="got 0 and"):
        arithmetic_demonstrations([], size=1, seed=0)
    with pytest.raises(ConfigError, match=r"and 1\.5"):
        demonstrations(tool_share=1.5)
