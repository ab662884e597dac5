"""Problem sources: what they return, that they keep training and evaluation apart, and what their errors say."""

import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlsys.data import dataset_problems, jsonl_problems, reasoning_gym_problems, split_of
from rlsys.errors import ConfigError, DataError
from rlsys.types import Problem

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
        ([{"question": "q", "answer": None}], r":1: column 'answer' is empty"),
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
    heavy = "{'torch', 'transformers', 'tokenizers', 'reasoning_gym', 'pyarrow', 'datasets'}"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert not {heavy} & set(sys.modules)"], check=True)


@pytest.mark.parametrize("task", ["acre", "gsm_symbolic", "list_functions", "word_ladder"])
def test_tasks_that_prepare_all_their_questions_are_no_flood(task: str) -> None:
    problems = reasoning_gym_problems(tasks={task: {}}, size=3, seed=0)
    assert len(set(questions(problems))) == 3


def test_a_task_without_further_questions_says_so() -> None:
    sequence = {"list_functions": {}}
    with pytest.raises(ConfigError, match=r"'list_functions' has no question after the first 20000; lower `size`"):
        reasoning_gym_problems(tasks=sequence, size=40_000, seed=0)


def test_a_task_that_knows_no_answer_gives_none() -> None:
    (problem,) = reasoning_gym_problems(tasks={"graph_color": {}}, size=1, seed=0)
    assert problem.answer is None
    assert "puzzle" in problem.metadata


# --- data sets by their columns --------------------------------------------------------------------------------------

VERL_ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"split": "train", "index": 7, "nested": {"deep": [1, 2]}},
}
VERL_OPTIONS = {"messages": "prompt", "answer": "reward_model.ground_truth", "source": "data_source"}


def parquet(folder: Path, *rows: dict, name: str = "train.parquet") -> str:
    path = folder / name
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def test_verls_schema_needs_two_lines_of_options(tmp_path: Path) -> None:
    (problem,) = dataset_problems(path=parquet(tmp_path, VERL_ROW), **VERL_OPTIONS, metadata=["ability", "extra_info"])
    assert problem == Problem(
        id="train-1",
        prompt=tuple(VERL_ROW["prompt"]),
        answer="5",
        source="openai/gsm8k",
        metadata={"ability": "math", "extra_info": VERL_ROW["extra_info"]},
    )


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "lines.json", "csv"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path: Path, suffix: str) -> None:
    rows = [{"question": f'é {n}, "{n}"\n?', "answer": f"so\n#### {n}", "key": f"k{n}"} for n in range(3)]
    path = tmp_path / f"sums.{suffix}"
    if suffix == "parquet":
        parquet(tmp_path, *rows, name=path.name)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif suffix == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["question", "answer", "key"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    problems = dataset_problems(path=str(path), id="key", metadata={"again": "key"}, instruction="Think.", limit=2)
    assert [(p.id, p.answer, p.metadata, p.source) for p in problems] == [
        (f"k{n}", f"{n}", {"again": f"k{n}"}, path.stem) for n in range(2)
    ]
    assert questions(problems) == [f'é {n}, "{n}"\n?\nThink.' for n in range(2)]


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, unable to reach the network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def test_a_saved_data_set_is_read_by_split(tmp_path: Path, data_sets: Any) -> None:
    def made(*numbers: int) -> Any:
        return data_sets.Dataset.from_list([{**VERL_ROW, "reward_model": {"ground_truth": f"{n}"}} for n in numbers])

    both = data_sets.DatasetDict({"train": made(1, 2), "test": made(3)})
    both.save_to_disk(tmp_path / "both")
    made(4).save_to_disk(tmp_path / "one")
    data_sets.DatasetDict({"only": made(5)}).save_to_disk(tmp_path / "only")

    def answers(folder: str, **more: Any) -> list[tuple[str, str | None]]:
        problems = dataset_problems(path=str(tmp_path / folder), **VERL_OPTIONS, **more)
        return [(problem.id, problem.answer) for problem in problems]

    assert answers("both") == answers("both", limit=2) == [("both-1", "1"), ("both-2", "2")]
    assert answers("both", split="test") == [("both-test-1", "3")]
    assert answers("one") == [("one-1", "4")]
    assert answers("only") == [("only-1", "5")]
    with pytest.raises(DataError, match=r"both: no split 'tests' .did you mean 'test'.*; set `split` to one of train"):
        answers("both", split="tests")
    with pytest.raises(ConfigError, match=r"one: it has one part only; leave `split: train` out"):
        answers("one", split="train")
    with pytest.raises(ConfigError, match=r"both: a folder of `save_to_disk` has no names; leave `name: main` out"):
        answers("both", name="main")
    with pytest.raises(DataError, match=r"both test row 1: no column 'prompts' .did you mean 'prompt'"):
        dataset_problems(path=str(tmp_path / "both"), split="test", messages="prompts")


def test_a_folder_of_files_is_a_data_set(tmp_path: Path, data_sets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_sets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "sums"
    folder.mkdir()
    parquet(folder, {"question": "1 + 1?", "answer": "2"}, name="train-00000-of-00001.parquet")
    parquet(folder, {"question": "2 + 2?", "answer": "4"}, name="test-00000-of-00001.parquet")
    assert [problem.answer for problem in dataset_problems(path=str(folder))] == ["2"]
    (problem,) = dataset_problems(path=str(folder), split="test")
    assert (problem.id, problem.answer, problem.source) == ("sums-test-1", "4", "sums-test")


@pytest.mark.usefixtures("data_sets")
def test_a_data_set_that_is_nowhere_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nobody/nothing: no data set can be opened .no folder of this name is here"):
        dataset_problems(path="nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no data set can be opened: "):
        dataset_problems(path=str(tmp_path / "empty"))


def test_without_the_library_files_work_and_folders_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(dataset_problems(path=parquet(tmp_path, VERL_ROW), **VERL_OPTIONS)) == 1
    for path in (str(tmp_path), "openai/gsm8k"):
        with pytest.raises(ConfigError, match=r"it needs the package `datasets`; .*pip install 'rlsys\[data\]'"):
            dataset_problems(path=path)


def test_dots_reach_into_columns_and_a_column_with_dots_comes_first(tmp_path: Path) -> None:
    row = {"q": "?", "a": {"b": {"c": "deep"}, "b.c": "less deep"}, "a.b": {"c": "first"}, "x": {"y": 1}, "x.y": 2}
    path = str(written(tmp_path, row))
    metadata = {"nested": "x.y", "whole": "x"}
    assert [
        (problem.answer, problem.metadata)
        for column in ("a.b.c", "x.y")
        for problem in dataset_problems(path=path, question="q", answer=column, metadata=metadata)
    ] == [("less deep", {"nested": 2, "whole": {"y": 1}}), ("2", {"nested": 2, "whole": {"y": 1}})]


def test_columns_of_other_types_become_text(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": answer} for answer in (7, 0, True, [1, "é"], {"inputs": ["1"]}, " x ")]
    problems = dataset_problems(path=str(written(tmp_path, *rows)))
    assert [problem.answer for problem in problems] == ["7", "0", "True", '[1, "é"]', '{"inputs": ["1"]}', "x"]


def test_a_problem_may_have_no_answer_and_empty_metadata(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"question": "q", "tests": None}, {"question": "r", "tests": "[]"})
    first, second = dataset_problems(path=path, answer=None, metadata=["tests"])
    assert (first.answer, first.metadata, second.metadata) == (None, {"tests": None}, {"tests": "[]"})


def test_the_instruction_stands_behind_the_last_message_of_the_user(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "name": "e"},
    ]
    path = parquet(tmp_path, {"prompt": messages})
    (problem,) = dataset_problems(path=path, messages="prompt", answer=None, instruction="Think.")
    assert problem.prompt == (*messages[:2], {"role": "user", "content": "c\nThink."}, messages[3])


def test_another_pattern_finds_the_answer_and_none_keeps_it_whole(tmp_path: Path) -> None:
    path = str(written(tmp_path, {"question": "q", "answer": "#### 1 or (2)"}))
    for pattern, answer in ((r"\((\d)\)", "2"), ("", "#### 1 or (2)"), (r"no(t)", "#### 1 or (2)")):
        (problem,) = dataset_problems(path=path, answer_pattern=pattern)
        assert problem.answer == answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": "prompt", "question": "q"}, r"give either `question` .* or `messages`.*'q' and 'prompt'"),
        ({"answer_pattern": "("}, r"answer_pattern '\(' is no regular expression: "),
        ({"answer_pattern": "####"}, r"answer_pattern '####' has no group; put \(...\) around"),
        ({"limit": 0}, r"limit must be at least 1, got 0"),
        ({"split": "train"}, r"train\.parquet: a file has no splits; leave `split: train` out"),
        ({"name": "main"}, r"train\.parquet: a file has no names; leave `name: main` out"),
    ],
)
def test_options_without_sense_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    path = parquet(tmp_path, {"question": "q", "answer": "a"})
    with pytest.raises(ConfigError, match=message):
        dataset_problems(path=path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "reward_model.ground_truht"}, r"(?s)row 1: no column .*did you mean 'reward_model\.ground_truth'"),
        ({"answer": "reward_model.ground_truth.x"}, r"row 1: no column 'reward_model\.ground_truth\.x'"),
        ({"answer": "nothing"}, r"row 1: column 'nothing' is empty; set the option `answer` to another of"),
        (
            {"messages": "promt"},
            r"no column 'promt' .did you mean 'prompt'\?.; set the option `messages`",
        ),
        ({"messages": "data_source"}, r"column 'data_source' must be a list of messages .*, got 'openai/gsm8k'; if it"),
        ({"messages": "extra_info.nested.deep"}, r"must be a list of messages .*got \[1, 2\]"),
        ({"messages": "roles"}, r"must be a list of messages .*got \[\{'role': 'user'\}\]"),
        ({"messages": "empty"}, r"must be a list of messages .*got \[\]"),
        ({"metadata": ["ability", "extra"]}, r"no column 'extra' .*set the option `metadata`"),
        ({"source": "datasource"}, r"no column 'datasource' .did you mean 'data_source'"),
        ({"answer": "bytes"}, r"column 'bytes' holds bytes, not text"),
        ({"answer": "times"}, r"column 'times' is neither text nor a JSON value: .*datetime"),
        ({"id": "ability"}, r"train\.parquet row 2: the id 'math' is taken by .*row 1; `id` needs a column of unique"),
        ({"messages": "answers", "instruction": "Think."}, r"row 1: no message of the user with a text, which `instru"),
    ],
)
def test_errors_name_file_row_column_and_the_nearest_column(tmp_path: Path, options: dict, message: str) -> None:
    row = {
        **VERL_ROW,
        **{"nothing": None, "roles": [{"role": "user"}], "bytes": b"5", "times": [datetime.datetime(2026, 1, 1)]},
        **{"empty": [], "answers": [{"role": "assistant", "content": "5"}]},
    }
    path = parquet(tmp_path, row, row)
    with pytest.raises(DataError, match=message) as caught:
        dataset_problems(path=path, **{**VERL_OPTIONS, **options})
    assert str(caught.value).startswith(f"{path} row ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 no", r"a\.parquet: not Parquet, or damaged: "),
        ("a.parquet", b"", r"a\.parquet: not Parquet, or damaged: "),
        ("a.json", b"[{]", r"a\.json: not JSON, "),
        ("a.json", b'[{"question": "q", "answer": "a"}, 7]', r"a\.json row 2: each must be one JSON object .*got 7"),
        ("a.json", b"7", r"a\.json:1: each line must be one JSON object .*got 7"),
        ("a.json", b"[]", r"a\.json: no problem in it"),
        ("a.jsonl", b"null", r"a\.jsonl:1: each line must be one JSON object"),
        ("a.jsonl", b'{"question": "\xff"}', r"a\.jsonl:1: .*not JSON, .*utf-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: .*not JSON, .*recursion"),
        ("a.csv", b"question,answer\nq", r"a\.csv row 1: column 'answer' is empty"),
        ("a.csv", b"question,answer\nq,a,b", r"a\.csv row 1: it has more cells than the first line has names"),
        ("a.csv", b'question,answer\n"q', r"a\.csv: not CSV, "),
        ("a.csv", b"question,answer\n\xff,a", r"a\.csv: not CSV, .*utf-8"),
        ("a.csv", b"", r"a\.csv: no problem in it"),
        ("a.txt", b"", r"a\.txt: cannot tell what it holds; its name must end with \.parquet, \.jsonl, \.json, \.csv"),
        ("a.jsnl", b"", r"a\.jsnl: cannot tell what it holds"),
    ],
)
def test_files_that_are_not_what_they_say_are_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        dataset_problems(path=str(tmp_path / name))


def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    parquet(tmp_path, VERL_ROW)
    with pytest.raises(DataError, match=r"tran\.parquet: no such file .did you mean 'train\.parquet'"):
        dataset_problems(path=str(tmp_path / "tran.parquet"))
    for path in ("no/such/folder/a.jsonl", "./nothing", "/nothing"):
        with pytest.raises(DataError, match="no such file; `path` names a file"):
            dataset_problems(path=path)


def test_only_as_much_of_a_file_is_read_as_the_limit_asks(tmp_path: Path) -> None:
    path = written(tmp_path, {"question": "q", "answer": "a"}, "not JSON")
    assert len(dataset_problems(path=str(path), limit=1)) == len(jsonl_problems(path=path, limit=1)) == 1
