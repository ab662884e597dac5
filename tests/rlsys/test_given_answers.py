"""Answers that exist already, as samples; and the sums that a program thinks through."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import Config
from rlsys.config_file import structure
from rlsys.demonstrations import Demonstration
from rlsys.errors import ConfigError, DataError
from rlsys.given_answers import NO_ANSWER, GivenAnswers
from rlsys.reproduce.sums import partial_sums, sum_demonstrations
from rlsys.samplers import Answers, SamplerContext
from rlsys.scratch import byte_tokenizer
from rlsys.types import Problem


def problem(name: str, answer: str = "2") -> Problem:
    return Problem(id=name, prompt=({"role": "user", "content": f"{name}?"},), answer=answer)


def ends_with_answer(problem: Problem, response: str) -> float:
    """The reward of this test."""
    return float(response.endswith(str(problem.answer)))


def some_problems() -> list[Problem]:
    return [problem("p"), problem("q")]


def some_answers(problems: Sequence[Problem], *, texts: Sequence[str], turns: bool = False) -> list[Demonstration]:
    """The source of this test: answers to `p`, without its right answer."""
    assert [one.id for one in problems] == ["p", "q"]
    asked = Problem(id="row-1", prompt=problem("p").prompt)
    if turns:
        return [Demonstration(problem=asked, turns=({"role": "assistant", "content": "x"},))]
    return [Demonstration(problem=asked, segments=((text, True),)) for text in texts]


def found(
    tmp_path: Path, asked: Problem, size: int, *, chat: Mapping[str, Any] | None = None, **options: Any
) -> Answers:
    byte_tokenizer().save_pretrained(tmp_path)
    source = {"use": f"{__name__}:some_problems"}
    config = structure(
        Config,
        [
            {
                "name": "t",
                "model": {"path": str(tmp_path)},
                "data": {"train": source, "held_out": source},
                "rewards": [{"use": f"{__name__}:ends_with_answer"}],
                "chat": dict(chat or {}),
            }
        ],
        place="test",
    )
    sampler = GivenAnswers(demonstrations={"use": f"{__name__}:some_answers", "options": options})

    async def go() -> Answers:
        sampling = config.eval.sampling
        context = SamplerContext(config=config, stage="long", model=tmp_path, sampling=sampling, tell=print)
        await sampler.start(context)
        try:
            return await sampler.sample(asked, size=size)
        finally:
            await sampler.close()

    return asyncio.run(go())


def test_an_answer_belongs_to_the_problem_with_its_prompt_and_is_graded_by_that(tmp_path: Path) -> None:
    answers = found(tmp_path, problem("p"), 3, texts=["It is 2", "It is 3"])
    assert [(sample.text, sample.correct) for sample in answers.samples] == [("It is 2", True), ("It is 3", False)]
    assert all(sample.problem == problem("p") for sample in answers.samples)
    assert [sample.num_tokens for sample in answers.samples] == [
        len(byte_tokenizer().encode(text)) + 1 for text in ("It is 2", "It is 3")
    ]
    assert answers.samples[0].provenance["sampler"] == "given"
    assert answers.dropped == {NO_ANSWER: 1}


def test_where_thoughts_are_hidden_the_response_alone_is_graded(tmp_path: Path) -> None:
    thought = {"prompt": "{message} T: R:", "thought_mark": "T:", "response_mark": "R:"}
    texts = ["T: it is 3 R: It is 2", "T: it is 2 R: It is 3", "It is 2"]
    answers = found(tmp_path, problem("p"), 3, texts=texts, chat={"thought": thought})
    assert [sample.text for sample in answers.samples] == texts
    assert [sample.correct for sample in answers.samples] == [True, False, False]
    assert [sample.metrics["thought_parse_failure"] for sample in answers.samples] == [0.0, 0.0, 1.0]


def test_a_problem_without_an_answer_is_counted(tmp_path: Path) -> None:
    answers = found(tmp_path, problem("q"), 2, texts=["It is 2"])
    assert (list(answers.samples), answers.dropped) == ([], {NO_ANSWER: 2})


def test_sources_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"write \{use: module:function, options"):
        GivenAnswers(demonstrations={"path": "x"})
    with pytest.raises(ConfigError, match=r"unknown option 'txts'; did you mean `texts`"):
        GivenAnswers(demonstrations={"use": f"{__name__}:some_answers", "options": {"txts": []}})
    with pytest.raises(DataError, match=r"samples\.long: .*some_answers gave no answer"):
        found(tmp_path, problem("p"), 1, texts=[])
    with pytest.raises(DataError, match="gave a chat of several turns"):
        found(tmp_path, problem("p"), 1, texts=[], turns=True)


def a_sum(expression: str, answer: str) -> Problem:
    prompt = ({"role": "user", "content": expression},)
    return Problem(id=expression, prompt=prompt, answer=answer, metadata={"expression": expression})


def test_partial_sums_lead_to_the_answer() -> None:
    assert partial_sums(a_sum("3 + 4 - 9 + 0", "-2")) == ["3 + 4 = 7", "7 - 9 = -2", "-2 + 0 = -2"]
    with pytest.raises(DataError, match="is '3 \\* 4', not a sum"):
        partial_sums(a_sum("3 * 4", "12"))


def test_styles_come_in_their_shares_and_all_are_true() -> None:
    problems = [a_sum("3 + 4 - 9", "-2"), a_sum("1 + 1 + 1", "3")]
    found = sum_demonstrations(
        problems, size=400, seed=0, styles={"direct": 0.5, "steps": 0.25, "checked": 0.25}, checks=2
    )
    assert all(one.text.endswith(f"\\boxed{{{one.problem.answer}}}") for one in found)
    checks = [one.text.count("Wait, check this:") for one in found]
    directly = sum("in my head" in one.text for one in found)
    assert 160 < directly < 240
    assert 70 < checks.count(2) < 130
    assert set(checks) == {0, 2}
    assert [one.text for one in sum_demonstrations(problems, size=9, seed=1, styles={"steps": 1})] == [
        one.text for one in sum_demonstrations(problems, size=9, seed=1, styles={"steps": 1})
    ]


@pytest.mark.parametrize("styles", [{}, {"slow": 1}, {"steps": -1}, {"steps": 0}])
def test_shares_that_cannot_be_are_refused(styles: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="sum_demonstrations: "):
        sum_demonstrations([a_sum("1 + 1", "2")], size=1, seed=0, styles=styles)
