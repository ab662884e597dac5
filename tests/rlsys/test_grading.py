"""`rlsys grade`: a result for each line, in order, and one clear message for a bad file."""

from __future__ import annotations

import json
from pathlib import Path

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
        (None, "failed", None),
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
