"""`rlsys grade`: a result for each line, in order, and one clear message for a bad file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlsys.cli import app
from rlsys.errors import ConfigError, DataError
from rlsys.grading import read_responses

RESPONSES = (
    {"response": r"so \boxed{\frac{1}{2}}", "answer": "0.5"},
    {"response": "the answer is 7", "answer": 8},
    {"response": "I do not know", "answer": "1"},
    {"response": r"\boxed{1}", "prompt": "1?", "id": "no reference"},
)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "responses.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_every_line_gets_its_result(tmp_path: Path) -> None:
    path = write(tmp_path, *RESPONSES)
    outcome = CliRunner().invoke(app, ["grade", str(path)], catch_exceptions=False)
    results = [json.loads(line) for line in (tmp_path / "responses.graded.jsonl").read_text().splitlines()]
    assert [(r["score"], r["status"], r["extracted"]) for r in results] == [
        (1.0, "correct", r"\frac{1}{2}"),
        (0.0, "wrong", "7"),
        (0.0, "no_answer", None),
        (None, "error", None),
    ]
    assert "no reference" in results[3]["message"]
    assert all(result["seconds"] >= 0 for result in results)
    assert "no reference" in outcome.output


def test_a_reward_of_ones_own_with_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_reward.py").write_text(
        "from rlsys.interfaces import RewardResult\n"
        "class Length:\n"
        "    def __init__(self, *, most): self.most = most\n"
        "    async def score(self, problem, response, rollout): return RewardResult(score=len(response) / self.most)\n"
    )
    command = ["grade", str(write(tmp_path, {"response": "four"})), "--reward", "my_own_reward:Length"]
    output = tmp_path / "out.jsonl"
    CliRunner().invoke(app, [*command, "--option", "most=8", "--output", str(output)], catch_exceptions=False)
    assert json.loads(output.read_text())["score"] == 0.5
    with pytest.raises(ConfigError, match="'most' is not of the form name=value"):
        CliRunner().invoke(app, [*command, "--option", "most"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"responses.jsonl:1: not valid JSON"),
        ([], r'responses.jsonl:1: every line needs a text under "response"'),
        ({"response": 3}, r'responses.jsonl:1: every line needs a text under "response"'),
        ({"response": "", "answer": [1]}, r'responses.jsonl:1: "answer" must be a text or a number, got list'),
        ({"response": "", "prompt": 3}, r'responses.jsonl:1: "prompt" must be a text or a list'),
        ({"response": "", "prompt": []}, r"responses.jsonl:1: "),
        ({"response": "", "prompt": [{"content": "?"}]}, r"responses.jsonl:1: "),
        ("\n", r"has no line"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_responses(write(tmp_path, line))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file"):
        read_responses(tmp_path / "none.jsonl")


def grade(folder: Path, name: str, *lines: object, more: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    output = folder / "out.jsonl"
    command = ["grade", str(write(folder, *lines)), "--reward", f"reward_plugins:{name}", "--output", str(output)]
    CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_group_reward_gets_consecutive_lines_with_one_id_or_prompt_together(tmp_path: Path) -> None:
    results = grade(
        tmp_path,
        "Ranks",
        {"response": "a", "prompt": "1?"},
        {"response": "aa", "prompt": "1?"},
        {"response": "a", "id": "x"},
        {"response": "aaa", "id": "x"},
        {"response": "aa", "id": "x"},
        {"response": "alone"},
        {"response": "fail", "prompt": "2?"},
        {"response": "b", "prompt": "2?"},
    )
    # the share of siblings that are shorter
    assert [result["score"] for result in results] == [0, 1 / 2, 0, 2 / 3, 1 / 3, 0, None, None]
    assert [result["status"] for result in results] == ["ok"] * 6 + ["error"] * 2
    assert "not to be compared" in results[7]["message"]


def test_a_response_whose_grading_hangs_ends_at_the_deadline_with_the_status_timeout(tmp_path: Path) -> None:
    lines = ({"response": "hang 600"}, {"response": "2"})
    late, good = grade(tmp_path, "Synchronous", *lines, more=("--timeout", "0.2"))
    assert (late["status"], late["score"], good["score"]) == ("timeout", None, 2.0)


def test_what_is_no_reward_is_said_before_anything_is_graded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'reward_plugins:HOOKS' is neither"):
        grade(tmp_path, "HOOKS", {"response": ""})


def test_a_line_may_say_where_its_problem_is_from(tmp_path: Path) -> None:
    path = write(tmp_path, {"response": "5", "answer": "5", "source": "chain_sum", "level": 2})
    ((problem, _),) = read_responses(path)
    assert (problem.source, problem.metadata) == ("chain_sum", {"level": 2})
