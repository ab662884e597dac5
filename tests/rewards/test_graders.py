"""Grader specs: what each type grades, what is wrong with a spec, and what a response can not do to a grader."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from rlsys.errors import ConfigError
from rlsys.interfaces import RewardResult
from rlsys.rewards.graders import MAX_COMPARED_CHARACTERS, GraderReward
from rlsys.rewards.specs.formula import Formula
from rlsys.rewards.specs.model import score_of
from rlsys.rewards.specs.values import MAX_JSON_CHARACTERS, GradingError, sample_of, strict_json
from rlsys.rewards.specs.worker import similarity
from rlsys.types import Problem, Rollout

EMPTY = Rollout(
    tokens=np.zeros(0, np.int32),
    loss_mask=np.zeros(0, np.bool_),
    logprobs=np.zeros(0, np.float32),
    versions=np.zeros(0, np.int32),
)
FIVE_MEGABYTES = 5_000_000
PATIENT = {"timeout_seconds": 30.0}  # a deadline that a busy machine can keep
TEXT = "{{ sample.output_text }}"
ANSWER = "{{ item.reference_answer }}"
CAT, SHORT_CAT = "the cat sat on the mat", "the cat sat on mat"


def problem(answer: str | None = "Paris", **metadata: Any) -> Problem:
    return Problem(id="p7", prompt=({"role": "user", "content": "?"},), answer=answer, metadata=metadata)


def grade(
    spec: Mapping[str, Any], *responses: str, of: Problem | None = None, options: Mapping[str, Any] = PATIENT
) -> list[RewardResult]:
    """What one reward makes of responses to one problem, graded one after the other."""

    async def main() -> list[RewardResult]:
        reward = GraderReward(spec=spec, **options)
        try:
            return [await reward.score(of or problem(), response, EMPTY) for response in responses]
        finally:
            await reward.close()

    return asyncio.run(main())


def one(spec: Mapping[str, Any], response: str, **more: Any) -> tuple[float, str]:
    (result,) = grade(spec, response, **more)
    return result.score, result.status


def check(operation: str = "eq", text: str = TEXT, reference: str = ANSWER) -> dict[str, Any]:
    return {"type": "string_check", "input": text, "reference": reference, "operation": operation}


def similar(metric: str = "fuzzy_match", **more: Any) -> dict[str, Any]:
    return {"type": "text_similarity", "input": TEXT, "reference": ANSWER, "evaluation_metric": metric, **more}


def python(body: str) -> dict[str, Any]:
    return {"type": "python", "source": "def grade(sample, item):\n" + "\n".join("    " + x for x in body.split("\n"))}


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "graders": graders, "calculate_output": formula}


def schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "schema": schema, **more}


def wrong_spec(spec: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        GraderReward(spec=spec, **options)
    return str(caught.value)


# --- item and sample -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("Paris", "Paris"),
        ("<think>Rome?</think>\n\nParis\n", "Paris"),
        ("Rome?</think>Paris", "Paris"),
        ("<think>Rome</think>Lyon<think>no</think>Paris", "Paris"),
        ("<think>Paris", ""),
        ("<think>a</think>Paris<think>", ""),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>Paris', "Paris"),
        ("Paris</think>", ""),
        ("", ""),
    ],
)
def test_only_what_stands_behind_the_thinking_counts(response: str, text: str) -> None:
    assert sample_of(response)["output_text"] == text


def test_json_and_tool_calls_have_openais_shape() -> None:
    call = '<tool_call>{"name": "find", "arguments": {"q": "é"}}</tool_call>'
    wrapped = '<tool_call>{"function": {"name": "find", "arguments": "{}"}}</tool_call>'
    sample = sample_of(f'<think>x</think>{call}{wrapped}<think>y</think> {{"a": [1]}} ')
    assert sample["output_json"] == {"a": [1]}
    assert [entry["function"] for entry in sample["output_tools"]] == [
        {"name": "find", "arguments": '{"q": "é"}'},
        {"name": "find", "arguments": "{}"},
    ]
    assert sample_of("Paris")["output_json"] is None


@pytest.mark.parametrize("body", ["", "{", "[]", '{"arguments": {}}', '{"name": 5}', '{"name": "f", "name": "g"}'])
def test_a_call_that_cannot_be_understood_is_a_call_without_a_name(body: str) -> None:
    for response in (f"<tool_call>{body}</tool_call>", f"<tool_call>{body}"):
        assert sample_of(response)["output_tools"][0]["function"] == {"name": "", "arguments": body}


def test_calls_inside_the_thinking_are_none() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert sample_of(f"<think>{call}</think>x")["output_tools"] == []
    assert sample_of(f"{call}</think>x")["output_tools"] == []
    assert sample_of(f"<think>{call}")["output_tools"] == []
    assert len(sample_of(f"a</think>{call}b</think>x")["output_tools"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"x": {"a": 1, "a": 1}}',
        "NaN",
        "[Infinity]",
        "1e999",
        "9" * 5000,
        "[" * 100 + "]" * 100,
        "[" * 90_000 + "]" * 90_000,
        '{"a":' * 30_000 + "1" + "}" * 30_000,
        '"' + "x" * MAX_JSON_CHARACTERS + '"',
        '{"a": 1} x',
        "",
    ],
)
def test_json_that_is_not_strict_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|Expect|Extra|digits"):
        strict_json(text)
    assert sample_of(text)["output_json"] is None


# --- string_check ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "response", "score"),
    [
        ("eq", "Paris", 1.0),
        ("eq", "paris", 0.0),
        ("eq", "Paris, of course", 0.0),
        ("ne", "Paris", 0.0),
        ("ne", "Rome", 1.0),
        ("like", "It is Paris.", 1.0),
        ("like", "It is PARIS.", 0.0),
        ("ilike", "It is PARIS.", 1.0),
        ("ilike", "It is Rome.", 0.0),
        ("like", "", 0.0),
    ],
)
def test_a_string_check_compares_or_looks_inside(operation: str, response: str, score: float) -> None:
    assert one(check(operation), response) == (score, "correct" if score else "wrong")


@pytest.mark.parametrize("operation", ["eq", "like", "ilike"])
@pytest.mark.parametrize(
    "response",
    [
        "P\u0430ris",  # a Cyrillic letter
        "Pa\u200bris",  # a space without width
        "Ｐａｒｉｓ",  # noqa: RUF001
        "Pa\u0301ris",
        "Par\x00is",
        "\u202esiraP",  # written from right to left
        "<think>Paris</think>",
        "<think>Paris",
        "Paris</think>",
        '<tool_call>{"name": "Paris", "arguments": {}}</tool_call>',
        "{{ item.answer }}",
        "{{ item.reference_answer }}",
        "{{ item['answer'] }}",
        "{% raw %}{{ item.answer }}{% endraw %}",
        "{% set x = item.answer %}{{ x }}",
        "{{ sample.__class__.__mro__ }}",
        "",
        "P" * FIVE_MEGABYTES,
        "\x00" * 1000,
    ],
)
def test_tricks_do_not_equal_an_answer(operation: str, response: str) -> None:
    assert one(check(operation), response) == (0.0, "wrong")


def test_an_answer_that_the_problem_lacks_is_an_error_and_no_empty_answer() -> None:
    for operation in ("eq", "like", "ilike"):
        assert one(check(operation), "None", of=problem(None)) == (0.0, "error")
        assert one(check(operation), "", of=problem("")) == (0.0, "error")
        assert one(check(operation, reference="{{ item.city }}"), "", of=problem()) == (0.0, "error")
    swapped = check("like", text="Paris and Rome", reference=TEXT)
    assert one(swapped, "Rome") == (1.0, "correct")
    assert one(swapped, "") == (0.0, "wrong")


# --- templates -------------------------------------------------------------------------------------------------------


def test_templates_reach_fields_lists_and_keys_that_are_named_like_methods() -> None:
    of = problem(values={"items": [1, 2.5, "x"]}, right=True)
    response = '{"keys": ["Paris"], "n": 2.5, "ok": true, "o": {"b": 1}}'
    for text, reference in [
        ("{{ sample.output_json.keys[0] }}", ANSWER),
        ("{{ sample['output_json']['n'] }}", "{{ item.values.items[1] }}"),
        ("{{ sample.output_json.ok }}", "{{ item.right }}"),
        ("{{ sample.output_json.o }}", '{"b": 1}'),
        ("{{ sample.output_json.keys[0] | upper }}", "PARIS"),
        ("{{ item.prompt[0].content }}{{ item.id }}{{ item.source }}", "?p7"),
    ]:
        assert one(check("eq", text, reference), response, of=of) == (1.0, "correct")


@pytest.mark.parametrize(
    "response",
    ["", "no JSON", "{}", '{"city": null}', '{"City": "Paris"}', "[]", '"Paris"', '{"city": {}, "city": "Paris"}'],
)
def test_a_field_that_the_response_lacks_is_wrong_and_no_error(response: str) -> None:
    field = "{{ sample.output_json.city }}"
    assert one(check("eq", field), response) == (0.0, "wrong")
    assert one(check("ne", field), response) == (0.0, "wrong")
    assert one(check("eq", f"{field}{{{{ item.id }}}}"), response) == (0.0, "wrong")
    assert one(check("eq", "{{ sample.output_tools[0].function.arguments }}"), response) == (0.0, "wrong")


@pytest.mark.parametrize(
    "expression", ["sample.output_json.__class__", "sample.output_text.__class__", "item.id.format", "item.__init__"]
)
def test_a_template_reaches_no_python_object(expression: str) -> None:
    score, status = one(check("ne", "{{ " + expression + " }}"), '{"a": 1}')
    assert (score, status) in [(0.0, "wrong"), (0.0, "error")]


def test_a_template_in_the_problem_is_a_value_too() -> None:
    assert one(check(), "{{ item.id }}", of=problem("{{ item.id }}")) == (1.0, "correct")
    assert one(check(), "p7", of=problem("{{ item.id }}")) == (0.0, "wrong")


# --- text_similarity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "text", "reference", "value"),
    [
        ("fuzzy_match", "kitten", "sitting", 2 * 4 / 13),  # "ittn" in 6 and 7 characters
        ("fuzzy_match", "Paris", "Paris", 1.0),
        ("bleu", SHORT_CAT, CAT, (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4) * math.exp(1 - 6 / 5)),
        ("bleu", "Paris", "Paris", 1.0),
        ("bleu", "Rome", "Paris", 0.0),
        ("gleu", SHORT_CAT, CAT, 11 / 18),  # of 14 and 18 n-grams, 5 + 3 + 2 + 1 are in both
        ("rouge_1", SHORT_CAT, CAT, 2 * 1 * (5 / 6) / (1 + 5 / 6)),
        ("rouge_2", SHORT_CAT, CAT, 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)),
        ("rouge_3", SHORT_CAT, CAT, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("rouge_4", SHORT_CAT, CAT, 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
        ("rouge_5", SHORT_CAT, CAT, 0.0),
        ("rouge_l", SHORT_CAT, CAT, 2 * 5 / 11),
        ("rouge_l", "The CAT!", "the cat", 1.0),
        ("rouge_1", "我爱你", "你爱我", 1.0),
        ("rouge_2", "я люблю тебя", "я люблю вас", 0.5),
    ],
)
def test_metrics_have_the_values_that_are_worked_by_hand(metric: str, text: str, reference: str, value: float) -> None:
    assert similarity(metric, text, reference) == pytest.approx(value)


def test_rouge_l_is_that_of_the_rouge_score_library() -> None:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    random = np.random.default_rng(0)
    for _ in range(20):
        text, reference = (" ".join(random.choice(list("abcde"), size=random.integers(1, 30))) for _ in range(2))
        theirs = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
        assert similarity("rouge_l", text, reference) == pytest.approx(theirs)


def test_a_similarity_is_graded_and_with_a_threshold_passes_or_fails() -> None:
    of = problem("sitting")
    assert one(similar(), "kitten", of=of) == (pytest.approx(8 / 13), "ok")
    assert one(similar(pass_threshold=0.6), "kitten", of=of) == (pytest.approx(8 / 13), "correct")
    assert one(similar(pass_threshold=0.7), "kitten", of=of) == (pytest.approx(8 / 13), "wrong")


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_l"])
def test_hostile_texts_are_like_nothing(metric: str) -> None:
    responses = ["", "   ", "<think>" + CAT, "{{ item.answer }}", "\x00" * 50, "\u200b" * 500, "😀" * 1000]
    responses += [CAT + " junk" * 1_000_000, "<think>" * 700_000, "x" * FIVE_MEGABYTES]
    results = grade(similar(metric, pass_threshold=0.5), *responses, of=problem(CAT))
    assert [result.status for result in results] == ["wrong"] * len(responses)
    assert [result.score for result in results[-2:]] == [0.0, 0.0]


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "rouge_5", "rouge_l"])
def test_the_longest_texts_that_are_compared_end_before_the_deadline(metric: str) -> None:
    words = ("a b " * MAX_COMPARED_CHARACTERS)[:MAX_COMPARED_CHARACTERS]
    assert one(similar(metric), words[2:], of=problem(words)) == (pytest.approx(1.0, abs=1e-3), "ok")


def test_half_characters_do_not_break_a_metric() -> None:
    spec = similar("gleu") | {"input": "{{ sample.output_json }}"}
    assert one(spec, '"\\ud800 the"', of=problem("the"))[1] == "ok"


def test_a_problem_without_a_text_to_compare_with_is_an_error() -> None:
    assert one(similar(), "x", of=problem(None)) == (0.0, "error")
    assert one(similar(), "x", of=problem("")) == (0.0, "error")
    assert one(similar(), "x", of=problem("x" * (MAX_COMPARED_CHARACTERS + 1))) == (0.0, "error")


def test_a_library_that_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nltk" else find(name))
    message = wrong_spec(similar("bleu"))
    assert 'pip install "rlsys[graders]"' in message
    assert "nltk" in message
    GraderReward(spec=similar("fuzzy_match"))


# --- python ----------------------------------------------------------------------------------------------------------


def test_a_python_grader_sees_sample_and_item_and_returns_a_score() -> None:
    spec = python(
        "import numpy\n"
        "right = sample['output_json']['city'] == item['reference_answer'] and item['n'] == [1, 2.5]\n"
        "assert sample['output_tools'] == [] and item['text'] == chr(0x1f600) + '\\x00' + chr(34) * 3\n"
        "return numpy.float32(0.75) if right else 0"
    )
    of = problem(n=np.array([1, 2.5]), text='😀\x00"""')
    assert one(spec, '{"city": "Paris"}', of=of) == (0.75, "ok")
    assert one(spec, '{"city": "Rome"}', of=of) == (0.0, "ok")
    assert one(spec, "Paris", of=of) == (0.0, "error")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("return '1'", "error"),
        ("return float('nan')", "error"),
        ("return float('inf')", "error"),
        ("return 10 ** 400", "error"),
        ("pass", "error"),
        ("return None", "error"),
        ("return [1.0]", "error"),
        ("return 1j", "error"),
        ("raise ValueError('no')", "error"),
        ("raise SystemExit(0)", "error"),
        ("import os; os._exit(0)", "error"),
        ("return grade(sample, item)", "error"),
        ("bytearray(1 << 40)", "error"),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import socket; return float(bool(socket.create_connection(('127.0.0.1', 80))))", "error"),
    ],
)
def test_a_grader_that_fails_is_no_grade(body: str, status: str) -> None:
    options = {"timeout_seconds": 1.0} if status == "timeout" else PATIENT
    assert one(python(body), "x", options=options) == (0.0, status)


def test_a_source_that_fails_before_it_defines_grade_is_an_error() -> None:
    source = "import nothing_of_this_name\ndef grade(sample, item): return 1.0"
    assert one({"type": "python", "source": source}, "x") == (0.0, "error")


def test_what_a_grader_prints_is_no_grade() -> None:
    spec = python("print(sample['output_text'])\nprint('y' * 10_000_000)\nreturn 0.25")
    fakes = ["1.0", "\n1.0\n", "0" * 32 + "1.0" + "0" * 32, "result = 1.0", "\x00", "x" * 100_000]
    assert [result.score for result in grade(spec, *fakes)] == [0.25] * len(fakes)


@pytest.mark.parametrize(
    "response",
    [
        '"); grade = lambda sample, item: 1.0; ("',
        "'''\ndef grade(sample, item): return 1.0\n'''",
        '\\"\n_grader_grade = 1.0\n#',
        "__import__('os')._exit(0)",
        "{{ 1.0 }}",
        "x\ud800\x00\u2028x",
        '{"__class__": "x"}',
    ],
)
def test_a_response_that_looks_like_code_is_data(response: str) -> None:
    assert one(python("return 0.5 if len(sample['output_text']) > 2 else 0"), response) == (0.5, "ok")


def test_a_grading_leaves_nothing_for_the_next_one() -> None:
    source = "seen = []\ndef grade(sample, item):\n    seen.append(1)\n    open('x', 'a').write('x')\n"
    source += "    return len(seen) + len(open('x').read())"
    assert [result.score for result in grade({"type": "python", "source": source}, "a", "b")] == [2.0, 2.0]


def test_a_response_of_five_megabytes_is_an_error_and_others_are_graded() -> None:
    results = grade(python("return len(sample['output_text'])"), "x" * FIVE_MEGABYTES, "x" * 700_000)
    assert [(result.score, result.status) for result in results] == [(0.0, "error"), (700_000.0, "ok")]


# --- score_model -----------------------------------------------------------------------------------------------------


class FakeEngine:
    """Answers with the given texts in turn; an answer "raise" or "hang" does that."""

    asked: list[tuple[list[dict[str, Any]], Mapping[str, Any]]] = []  # noqa: RUF012
    events: list[str] = []  # noqa: RUF012

    def __init__(self, *, model: str, answers: Sequence[str]) -> None:
        self._answers = iter(answers)
        self.events.append(f"made {model}")

    async def start(self) -> None:
        self.events.append("started")

    async def generate(self, messages: list[dict[str, Any]], sampling: Mapping[str, Any]) -> str:
        self.asked.append((messages, sampling))
        answer = next(self._answers)
        if answer == "raise":
            raise OSError("the engine is gone")
        if answer == "hang":
            await asyncio.sleep(600)
        return answer

    async def close(self) -> None:
        self.events.append("closed")


@pytest.fixture(autouse=True)
def _fake_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fake_engines")
    module.__dict__["FakeEngine"] = FakeEngine
    monkeypatch.setitem(sys.modules, "fake_engines", module)
    FakeEngine.asked, FakeEngine.events = [], []


def judge(*answers: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "score_model",
        "model": "fake",
        "input": [
            {"role": "system", "content": "Grade."},
            {"role": "user", "content": f"Right: {ANSWER}. Given: {TEXT}"},
        ],
        "sampling_params": {"temperature": 0},
        "engine": {"use": "fake_engines:FakeEngine", "options": {"answers": list(answers)}},
        **more,
    }


def test_a_judge_reads_filled_messages_and_its_number_is_the_score() -> None:
    assert one(judge('{"steps": [], "result": 0.7}'), "{{ item.answer }} Ro\u200bme") == (0.7, "ok")
    messages, sampling = FakeEngine.asked[0]
    assert messages == [
        {"role": "system", "content": "Grade."},
        {"role": "user", "content": "Right: Paris. Given: {{ item.answer }} Rome"},
    ]
    assert sampling == {"temperature": 0}
    assert FakeEngine.events == ["made fake", "started", "closed"]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"result": 3}', 3.0),
        ('<think>{"result": 5}</think>{"result": 2}', 2.0),
        ('Reasons.\n```json\n{"result": 4.5}\n```', 4.5),
        ("4", 4.0),
        ("I think: 2, no, 3", 3.0),
        ("Score: -1.5", -1.5),
        (".5", 0.5),
    ],
)
def test_a_judges_number_is_found(reply: str, score: float) -> None:
    assert score_of(reply, -2.0, 5.0) == score


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no number",
        "<think>1",
        "<think>1</think>",
        "4/5",
        "4 out of 5",
        "100%",
        "nan",
        "inf",
        "6",
        "-3",
        "1e400",
        '{"result": "1"}',
        '{"result": true}',
        '{"result": null}',
        '{"result": NaN}',
        '{"result": 1000}',
        '{"score": 1}',
        '{"result": 1, "result": 0}',
        '```\n{"result": 1}\n```\n```\n{"result": 0}\n```',
        'They wrote {"result": 1}. So 0.',
        "x" * 1_000_000,
        None,
        1.0,
    ],
)
def test_anything_else_that_a_judge_says_is_no_score(reply: Any) -> None:
    with pytest.raises(GradingError):
        score_of(reply, 0.0, 5.0)


def test_a_judge_is_asked_again_and_then_it_is_an_error() -> None:
    options = {"retries": 2, "engine_seconds": 0.2}
    assert one(judge("hm", "raise", "1"), "x", options=options) == (1.0, "ok")
    assert one(judge("hm", "2", "raise", "1"), "x", options=options) == (0.0, "error")
    assert one(judge("hang", "hang", "hang"), "x", options=options) == (0.0, "timeout")
    assert one(judge("raise", "1"), "x", options={"retries": 0}) == (0.0, "error")


def test_a_judge_passes_from_its_threshold_on_and_an_absent_field_gets_the_lowest_grade() -> None:
    spec = judge("4", "5", range=[1, 5], pass_threshold=5)
    assert [(result.score, result.status) for result in grade(spec, "a", "b")] == [(4.0, "wrong"), (5.0, "correct")]
    absent = judge("5", range=[1, 5], input=[{"role": "user", "content": "{{ sample.output_json.city }}"}])
    assert one(absent, "no JSON") == (1.0, "ok")
    assert one(judge("1"), "x" * FIVE_MEGABYTES) == (0.0, "ok")
    assert one(judge("1"), "x", of=problem(None)) == (0.0, "error")
    assert len(FakeEngine.asked) == 2


def test_a_wrong_setting_of_an_engine_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any) -> str:
        raise ConfigError("unknown sampling option 'temprature'")

    monkeypatch.setattr(FakeEngine, "generate", refuse)
    with pytest.raises(ConfigError, match="temprature"):
        grade(judge(), "x")


def test_one_engine_serves_all_graders_that_name_it() -> None:
    spec = judge()
    del spec["engine"]
    engine = {"use": "fake_engines:FakeEngine", "options": {"answers": ["0.5", "0.25"]}}
    (result,) = grade(multi("a + b", a=spec, b=spec), "x", options={"engine": engine})
    assert result.score == 0.75
    assert FakeEngine.events == ["made fake", "started", "closed"]


def test_start_makes_the_engine_and_says_what_is_wrong_with_it() -> None:
    async def start(**engine: Any) -> None:
        reward = GraderReward(spec=judge("1", engine=engine))
        await reward.start()
        await reward.close()

    asyncio.run(start(use="fake_engines:FakeEngine", options={"answers": []}))
    assert FakeEngine.events == ["made fake", "started", "closed"]
    with pytest.raises(ConfigError, match=r"spec\.engine\.use.*FakeEngine"):
        asyncio.run(start(use="fake_engines:FakeEngin"))
    with pytest.raises(ConfigError, match=r"answers"):
        asyncio.run(start(use="fake_engines:FakeEngine", options={"answer": []}))


# --- multi -----------------------------------------------------------------------------------------------------------


def test_a_multi_grader_calculates_and_logs_its_parts() -> None:
    spec = multi("0.3 * style + 0.7 * right", style=similar(), right=check("like"))
    (result,) = grade(spec, "Paris!")
    assert result.terms == {"style": pytest.approx(10 / 11), "right": 1.0}
    assert result.score == pytest.approx(0.3 * 10 / 11 + 0.7)
    assert result.status == "ok"


def test_the_example_of_the_public_format_works() -> None:
    spec = multi(
        "0.5 * function_name + 0.5 * arguments",
        function_name=check("eq", "get_acceptors", "{{sample.output_tools[0].function.name}}") | {"name": "f"},
        arguments=check("eq", '{"smiles": "{{item.smiles}}"}', "{{sample.output_tools[0].function.arguments}}"),
    )
    of = problem(smiles="CCO")
    right = '<tool_call>{"name": "get_acceptors", "arguments": {"smiles": "CCO"}}</tool_call>'
    assert one(spec, right, of=of)[0] == 1.0
    assert one(spec, right.replace("CCO", "CC"), of=of)[0] == 0.5
    assert one(spec, "no call", of=of)[0] == 0.0


def test_a_part_that_fails_fails_the_whole() -> None:
    spec = multi("max(good, bad)", good=check("like"), bad=python("raise ValueError"))
    assert one(spec, "Paris") == (0.0, "error")
    late = multi("good", good=check("like"), bad=python("while True: pass"))
    assert one(late, "Paris", options={"timeout_seconds": 1.0}) == (0.0, "timeout")
    assert one(multi("1 / (1 - right)", right=check()), "Paris") == (0.0, "error")


@pytest.mark.parametrize(
    ("formula", "value"),
    [("a", 0.5), ("-a + +b * 2", 3.5), ("(a + b) / 2", 1.25), ("min(a, b, 0.1)", 0.1), ("max(a, 1 - a)", 0.5)],
)
def test_a_formula_is_arithmetic(formula: str, value: float) -> None:
    assert Formula(formula, ["a", "b"], place="here").value({"a": 0.5, "b": 2.0}) == pytest.approx(value)


@pytest.mark.parametrize(
    "formula",
    [
        "",
        "a +",
        "a ** 9 ** 9",
        "a ^ 2",
        "a if b else a",
        "a and b",
        "a < b",
        "[a]",
        "a.real",
        "a[0]",
        "'a' * 9",
        "True",
        "1j",
        "1e999",
        "9" * 400,
        "min(a)",
        "min(*a)",
        "max(a, b, key=a)",
        "abs(a)",
        "__import__('os').system('true')",
        "(lambda: a)()",
        "(a := 1)",
        "a; b",
        "sum(x for x in a)",
        "(" * 300 + "a" + ")" * 300,
        "-" * 1999 + "a",
        "a" * 3000,
        "c",
    ],
)
def test_a_formula_is_nothing_but_arithmetic(formula: str) -> None:
    with pytest.raises(ConfigError, match="here"):
        Formula(formula, ["a", "b"], place="here")


# --- json_schema -----------------------------------------------------------------------------------------------------

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"city": "Paris"}', 1.0),
        ('<think>{}</think>\n{"city": "Paris"}', 1.0),
        ('{"city": 5}', 0.0),
        ("{}", 0.0),
        ('{"city": 1, "city": "Paris"}', 0.0),
        ('{"city": "Paris", "n": NaN}', 0.0),
        ('{"city": "Paris"} {"city": "Paris"}', 0.0),
        ('```json\n{"city": "Paris"}\n```', 0.0),
        ('<think>{"city": "Paris"}', 0.0),
        ('{"city": "Paris"', 0.0),
        ('{"city": "Paris", "deep": ' + "[" * 50_000 + "]" * 50_000 + "}", 0.0),
        ('{"city": "' + "x" * FIVE_MEGABYTES + '"}', 0.0),
        ('{"city": "Paris", "n": ' + "9" * 100_000 + "}", 0.0),
        ("", 0.0),
    ],
)
def test_json_passes_where_its_schema_allows_it(response: str, score: float) -> None:
    assert one(schema(CITY), response) == (score, "correct" if score else "wrong")


def test_every_tool_call_must_fit_its_tools_schema() -> None:
    spec = {"type": "json_schema", "tool_calls": {"find": CITY}}
    good = '<tool_call>{"name": "find", "arguments": {"city": "Paris"}}</tool_call>'
    bad = good.replace('"Paris"', "5")
    responses = [good, good + good + "done", "no call", good + bad, bad + good, good + "<tool_call>", "<think>" + good]
    responses += [
        good.replace("find", "seek"),
        good.replace('{"city": "Paris"}', '"5"'),
        good * 300,
        good + "<tool_call>",
    ]
    assert [result.score for result in grade(spec, *responses)] == [1.0, 1.0] + [0.0] * 9
    both = spec | {"schema": CITY}
    assert [result.score for result in grade(both, good, good + '{"city": "x"}', '{"city": "x"}')] == [0.0, 1.0, 0.0]


def test_a_pattern_that_explodes_ends_at_the_deadline_and_the_next_text_is_graded() -> None:
    spec = schema({"type": "string", "pattern": "^(a+)+$"})
    responses = ['"' + "a" * 60 + '!"', '"aaa"', '"b"']
    results = grade(spec, *responses, options={"timeout_seconds": 2.0})
    assert [result.status for result in results] == ["timeout", "correct", "wrong"]
    assert results[0].score == 0.0


def test_a_recursion_that_only_a_text_reaches_is_an_error_and_no_reward() -> None:
    loop = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "properties": {"x": {"$ref": "#/$defs/a"}}}
    assert one(schema(loop), '{"x": 1}') == (0.0, "error")
    tree = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}
    assert one(schema(tree), "[[],[[]]]") == (1.0, "correct")
    assert one(schema(tree), "[[],[[5]]]") == (0.0, "wrong")


@pytest.mark.parametrize(
    "reference", ["http://127.0.0.1:{port}/schema.json", "file:///etc/passwd", "other.json", "https://example.com/x#/a"]
)
def test_a_schema_fetches_nothing(reference: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        message = wrong_spec(schema({"properties": {"x": {"$ref": reference.format(port=server.getsockname()[1])}}}))
        assert "nothing is fetched" in message
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ("text", "mapping"),
        ({"type": "strin"}, "strin"),
        ({"type": "string", "pattern": "("}, "pattern|JSON schema|\\("),
        ({"minimum": "x"}, "JSON schema"),
        ({"$ref": "#"}, "without an end"),
        ({"$ref": "#/$defs/none"}, "does not contain"),
        ({"const": {1, 2}}, "JSON"),
    ],
)
def test_a_schema_that_is_none_is_refused_at_once(wrong: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        GraderReward(spec=schema(wrong))


# --- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("string_check", ["spec:", "mapping"]),
        ({}, ["spec:", "type"]),
        ({"type": "string_chek"}, ["did you mean 'string_check'"]),
        ({"type": "label_model"}, ["spec.type"]),
        (check() | {"refrence": "x"}, ["'refrence'", "did you mean 'reference'"]),
        ({"type": "string_check", "input": "x"}, ["reference, operation must be given"]),
        (check("equals"), ["spec.operation", "'equals'", "eq"]),
        (check(reference="{{ item.answer "), ["spec.reference", "syntax"]),
        (check(reference="{{ item.answer | nofilter }}"), ["spec.reference", "nofilter"]),
        (check(reference="{% if item.answer %}x{% endif %}"), ["spec.reference", "{% ... %}"]),
        (check(reference="{{ answer }}"), ["'answer'", "item.answer"]),
        (check(reference="{{ range(9) }}"), ["'range'"]),
        (check(reference="{{ sample.output }}"), ["did you mean `sample.output_"]),
        (check(reference="{{ sample['choices'] }}"), ["'choices'", "output_text"]),
        (check("like", reference=""), ["every text contains"]),
        (check() | {"input": {"x": None}}, ["spec.input", "quote"]),
        (check() | {"name": 5}, ["spec.name"]),
        (similar("rouge_6"), ["spec.evaluation_metric", "rouge_"]),
        (similar("meteor"), ["meteor", "word meanings"]),
        (similar("cosine"), ["cosine", "embedding model"]),
        (similar(pass_threshold=2), ["pass_threshold", "from 0 to 1"]),
        (similar(pass_threshold=True), ["pass_threshold"]),
        ({"type": "python", "source": "def grade(sample): return 1"}, ["spec.source", "two parameters"]),
        ({"type": "python", "source": "def grade(:"}, ["spec.source", "not Python"]),
        ({"type": "python", "source": "x = 1"}, ["def grade(sample, item)"]),
        ({"type": "python", "source": "async def grade(sample, item): return 1"}, ["def grade(sample, item)"]),
        ({"type": "python", "source": "x" * 300_000}, ["spec.source", "the limit is"]),
        (judge(engine=None), ["spec.engine", "module:object"]),
        (judge(engine={"use": "FakeEngine"}), ["spec.engine.use"]),
        (judge(engine={"use": "a:b", "option": {}}), ["spec.engine", "'option'"]),
        (judge(range=[1, 1]), ["spec.range"]),
        (judge(range=[0, float("inf")]), ["spec.range"]),
        (judge(range=[0, 5], pass_threshold=6), ["from 0 to 5"]),
        (judge(input=[]), ["spec.input"]),
        (judge(input="Grade."), ["spec.input", "list of messages"]),
        (judge(input=[{"role": "usr", "content": "x"}]), ["spec.input.0.role", "'user'"]),
        (judge(input=[{"role": "user"}]), ["spec.input.0", "content"]),
        (judge(input=[{"role": "user", "content": "{{ x }}"}]), ["spec.input.0.content", "'x'"]),
        (multi("a", a=multi("b", b=check())), ["spec.graders.a", "not allowed"]),
        (multi("a"), ["spec.graders", "at least one"]),
        (multi("a + c", a=check(), b=check()), ["spec.calculate_output", "'c'"]),
        (multi("rigth", right=check()), ["did you mean 'right'"]),
        (multi("a", a=check("equal")), ["spec.graders.a.operation"]),
        (multi("1", **{"a-b": check()}), ["'a-b'"]),
        (multi("1", min=check()), ["'min'"]),
        ({"type": "json_schema"}, ["spec.schema"]),
        ({"type": "json_schema", "input": "x", "tool_calls": {"f": {}}}, ["spec.input"]),
        ({"type": "json_schema", "tool_calls": {"f": {"type": "x"}}}, ["spec.tool_calls.f"]),
    ],
)
def test_a_wrong_spec_is_one_message_that_names_place_and_fix(spec: Any, words: list[str]) -> None:
    message = wrong_spec(spec)
    assert all(word in message for word in words), message


def test_wrong_options_are_refused() -> None:
    assert "timeout_seconds" in wrong_spec(check(), timeout_seconds=0)
    assert "retries" in wrong_spec(check(), retries=-1)
    assert "memory_mb" in wrong_spec(check(), python={"memory_mb": 1})
    assert "memory_mb" in wrong_spec(check(), python={"memory_m": 1024})


def test_a_result_shows_what_was_graded_or_why_it_was_not() -> None:
    assert grade(check(), "<think>Rome</think> Lyon")[0].extracted == "Lyon"
    assert grade(check("ne"), "x" * FIVE_MEGABYTES)[0].extracted == "x" * 4096
    results = grade(check(), "Lyon", "Rome", of=problem(None))
    assert ["spec.reference" in str(result.extracted) for result in results] == [True, True]
    assert all("'p7'" in str(result.extracted) for result in results)


def test_the_isolation_of_a_graders_code_is_told() -> None:
    async def main() -> tuple[str | None, str | None]:
        reward = GraderReward(spec=python("return 1"))
        before = reward.tier
        await reward.start()
        after = reward.tier
        await reward.close()
        return before, after

    before, after = asyncio.run(main())
    assert before is None
    assert after in ("T2", "T1")


def test_a_spec_reads_the_same_from_yaml_and_json() -> None:
    text = """
    type: multi
    graders:
      right: {type: string_check, input: "{{ sample.output_text }}", reference: "{{ item.answer }}", operation: eq}
    calculate_output: right
    """
    spec = yaml.safe_load(text)
    assert one(spec, "Paris") == one(json.loads(json.dumps(spec)), "Paris") == (1.0, "ok")


def test_many_gradings_run_side_by_side() -> None:
    async def main() -> list[RewardResult]:
        spec = multi("a + b", a=similar(), b=python("return len(sample['output_text'])"))
        reward = GraderReward(spec=spec, **PATIENT)
        try:
            await reward.start()
            return await asyncio.gather(*(reward.score(problem("x"), "x" * n, EMPTY) for n in range(1, 13)))
        finally:
            await reward.close()

    scores = [result.score for result in asyncio.run(main())]
    assert scores == pytest.approx([2 / (n + 1) + n for n in range(1, 13)])
