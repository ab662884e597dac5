"""Problem sources: what they return, that they keep training and evaluation apart, and what their errors say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.data import jsonl_problems, reasoning_gym_problems, split_of
from rlsys.errors import ConfigError, DataError

TASKS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "products": {"min_digits": 2, "max_digits": 2},
}


def questions(problems: list) -> list[str]:
    return [problem.prompt[-1]["content"] for problem in problems]


def test_problems_are_deterministic_interleaved_and_unique() -> None:
    problems = reasoning_gym_problems(tasks=TASKS, size=101, seed=3)
    assert problems == reasoning_gym_problems(tasks=TASKS, size=101, seed=3)
    assert [problem.source for problem in problems[:4]] == ["chain_sum", "products", "chain_sum", "products"]
    assert len(problems) == len(set(questions(problems))) == len({problem.id for problem in problems}) == 101
    assert problems[0].id.startswith("chain_sum-3-")


def test_answers_are_those_of_the_expressions() -> None:
    for problem in reasoning_gym_problems(tasks=TASKS, size=40, seed=0):
        assert problem.answer == str(eval(problem.metadata["expression"]))
        assert problem.metadata["expression"] in problem.prompt[0]["content"]


@pytest.mark.parametrize("held_out_seed", [0, 1, 17])
def test_training_and_held_out_questions_are_disjoint_for_any_seeds(held_out_seed: int) -> None:
    train = reasoning_gym_problems(tasks=TASKS, size=3000, seed=0)
    held_out = reasoning_gym_problems(tasks=TASKS, size=200, seed=held_out_seed, split="held_out")
    assert len(set(questions(held_out))) == 200
    assert not set(questions(train)) & set(questions(held_out))


def test_the_held_out_share_is_kept_and_its_ends_are_all_or_nothing() -> None:
    texts = [f"What is {number} + 1?" for number in range(20_000)]
    assert abs(sum(split_of(text, 0.1) == "held_out" for text in texts) / len(texts) - 0.1) < 0.01
    assert all(split_of(text, 0.0) == "train" and split_of(text, 1.0) == "held_out" for text in texts[:100])


def test_the_split_of_a_question_is_the_same_in_every_version() -> None:
    held_out = [number for number in range(40) if split_of(f"What is {number} + 1?", 0.1) == "held_out"]
    assert held_out == [7]


def test_the_instruction_is_in_the_prompt_but_does_not_move_the_split() -> None:
    plain = reasoning_gym_problems(tasks=TASKS, size=10, seed=0)
    told = reasoning_gym_problems(tasks=TASKS, size=10, seed=0, instruction="Use Python.")
    assert questions(told) == [f"{question}\nUse Python." for question in questions(plain)]


def test_a_task_that_runs_out_of_questions_says_so() -> None:
    one_digit = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    with pytest.raises(ConfigError, match=r"'chain_sum' has no further held_out question .*lower `size`"):
        reasoning_gym_problems(tasks=one_digit, size=500, seed=0, split="held_out")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"chain_sums": {}}, "unknown reasoning-gym task 'chain_sums' .did you mean 'chain_sum'"),
        ({"chain_sum": {"min_term": 2}}, "unknown option of 'chain_sum' 'min_term' .did you mean 'min_terms'"),
        ({}, "need tasks"),
    ],
)
def test_a_misspelt_task_or_option_is_answered_with_the_nearest_name(tasks: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reasoning_gym_problems(tasks=tasks, size=1, seed=0)


def test_a_misspelt_split_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"unknown split 'heldout' .did you mean 'held_out'"):
        reasoning_gym_problems(tasks=TASKS, size=1, seed=0, split="heldout")  # type: ignore[arg-type]


def written(folder: Path, *rows: object) -> Path:
    path = folder / "sums.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_jsonl_takes_what_follows_the_hashes_else_the_whole_answer(tmp_path: Path) -> None:
    path = written(
        tmp_path, {"question": "2 + 3?", "answer": "2 + 3 is\n#### 5"}, "", {"question": "é?", "answer": 7.5}
    )
    first, second = jsonl_problems(path=path, instruction="Think.")
    assert (first.id, first.answer, first.source) == ("sums-1", "5", "sums")
    assert first.prompt == ({"role": "user", "content": "2 + 3?\nThink."},)
    assert (second.id, second.answer, second.prompt[0]["content"]) == ("sums-3", "7.5", "é?\nThink.")


def test_jsonl_takes_other_columns_another_pattern_and_a_limit(tmp_path: Path) -> None:
    path = written(tmp_path, *[{"problem": f"p{n}", "solution": rf"so \boxed{{{n}}}."} for n in range(5)])
    problems = jsonl_problems(path=path, question="problem", answer="solution", answer_pattern=r"boxed{(\d)}", limit=2)
    assert [problem.answer for problem in problems] == ["0", "1"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{'question': 1}"], r"sums\.jsonl:1: each line must be one JSON object .*not JSON, "),
        ([{"question": "q", "answer": "a"}, "[1, 2]"], r"sums\.jsonl:2: each line must be one JSON object .*\[1, 2\]"),
        ([{"questions": "q", "answer": "a"}], r":1: no column 'question' .did you mean 'questions'.*option `question`"),
        ([{"question": "q", "answer": None}], r":1: no column 'answer'"),
        ([""], r"sums\.jsonl: no problem in it"),
    ],
)
def test_jsonl_errors_name_the_file_the_line_and_the_fix(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        jsonl_problems(path=written(tmp_path, *rows))


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    written(tmp_path, {})
    with pytest.raises(DataError, match=r"sum\.jsonl: no such file .did you mean 'sums\.jsonl'"):
        jsonl_problems(path=tmp_path / "sum.jsonl")


def test_importing_the_sources_imports_nothing_heavy() -> None:
    modules = "rlsys.data, rlsys.demonstrations, rlsys.scratch"
    heavy = "{'torch', 'transformers', 'tokenizers', 'reasoning_gym'}"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert not {heavy} & set(sys.modules)"], check=True)
