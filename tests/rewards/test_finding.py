"""Where the final answer stands, and its one spelling."""

from __future__ import annotations

import pytest

from rlsys.rewards.answers.equality import same
from rlsys.rewards.answers.finding import MAX_ANSWER_CHARACTERS, find_answer, find_boxed
from rlsys.rewards.answers.spelling import normalize


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{1} and finally \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {3}", "3"),
        (r"\fboxed{3}", "3"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{4} and then \boxed{5", "4"),
        (r"{ } } \boxed{6}", "6"),
        (r"\\\boxed{7}", "7"),
        (r"\boxed{8} \\boxed{7}", "8"),
        (r"<answer>1</answer> <answer>2</answer> the answer is 3", "2"),
        (r"<answer>1</answer> \boxed{9}", "9"),
        ("The answer is 3. I hope it is correct.", "3"),
        ("The answer is 3.5.", "3.5"),
        ("The final answer is: $\\frac12$ because", r"\frac12"),
        ("Answer: \\(x+1\\) and more", "x+1"),
        ("The answer is 1.\nNo, the answer is 2\nbye", "2"),
        ("First 3 + 4 = 7.\nSo we get $x = 7$.", "x = 7"),
        ("They need 1,250 bricks in all.", "1,250"),
        ("It is 3/4 of them, or 75%.", "75%"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"\boxed{1} too early</think> The answer is 2", "2"),
    ],
)
def test_the_answer_is_the_last_box_then_tag_then_phrase_then_formula_or_number(response: str, answer: str) -> None:
    assert find_answer(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "",
        "no idea",
        r"\boxed{1",
        "<answer>",
        "</answer><answer>",
        "}}}{",
        r"<think>\boxed{1}",
        r"<think>\boxed{1}</think>",
        r"<think>\boxed{1}</think> I do not know",
        r"<think>1</think> well <think> \boxed{1}",
        "the year is x86, say v2",
        r"so 7 of them, \boxed{7",
        "it is 12 <answer>1",
    ],
)
def test_a_response_without_an_answer_has_none(response: str) -> None:
    assert find_answer(response) is None


@pytest.mark.parametrize(
    ("form", "answer"), [("any", "1"), ("boxed", "1"), ("tag", "2"), ("phrase", "3"), ("bare", "4")]
)
def test_a_form_can_be_demanded(form: str, answer: str) -> None:
    response = "\\boxed{1} <answer>2</answer>\nThe answer is 3\nand $4$"
    assert find_answer(response, form=form) == answer  # type: ignore[arg-type]


def test_a_flood_of_braces_is_bounded_work() -> None:
    assert find_boxed(r"\boxed{" * 50_000) is None or len(str(find_boxed(r"\boxed{" * 50_000))) > MAX_ANSWER_CHARACTERS
    assert find_boxed(r"\boxed{" * 50_000 + "1" + "}" * 50_000) == "1"
    assert len(str(find_boxed(r"\boxed{" + "{" * 5_000_000))) > MAX_ANSWER_CHARACTERS
    assert find_answer("<answer>" * 50_000 + "answer is " * 50_000 + " " * 50_000) is None
    assert find_answer("$" * 500_000 + "1" * 500_000) is not None


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        *(
            (spelling, "5")
            for spelling in ("$5$", r"\(5\)", r"\[ 5 \]", "$$5$$", "5.", " **5** ", "`5`", r"\mathbf{5}")
        ),
        ("−½", "- 1/2"),  # noqa: RUF001
        (r"10\,000", "10000"),
        ("10{,}000", "10000"),
        ("3{,}14", "3.14"),
        (r"11,\! 111,\! 100", "11111100"),
        ("1 234 567.5", "1234567.5"),
        ("1'000", "1000"),
        ("1_000", "1000"),
        ("1.5e-3", "1.5*10^{-3}"),
        ("-2 1/2", r"-2\frac{1}{2}"),
        ("٤٢", "42"),
        ("४२", "42"),
        ("42", "42"),
        ("x²", "x^{2}"),
        ("√(x+1)", r"\sqrt{(x+1)}"),
        ("4\u200b2", "42"),
        (r"-\$5", r"-5\text{ dollars}"),
        ("$5", r"5\text{ dollars}"),
        (r"0.1\dot{6}", r"0.1\overline{6}"),
        ("0.333...", r"0.\overline{3}"),
        (r"\text{The answer is } 7", "7"),
        (r"\color{red}{\sqrt{5}}", r"\sqrt{5}"),
    ],
)
def test_answers_have_one_spelling(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


STARTS = ("", "a", "1", ".", "\\", "{", "\\{", r"\text{", r"\text{is", r"\text{a", "answer is ", "√", "(", "1.")
PUMPS = (
    " ",
    "a",
    "1",
    ".1",
    "12",
    "\\",
    "{",
    "}",
    "{ ",
    "\\(",
    "\\[",
    "$",
    "√(",
    "is ",
    r"\color{",
    r"\\[",
    ",",
    "1, ",
    "'",
    "²",
)
ENDS = ("", "!", "}", "x...", "x")


@pytest.mark.timeout(60)  # a pattern that is worse than linear takes minutes to years
@pytest.mark.parametrize("start", STARTS)
def test_no_long_text_holds_the_event_loop(start: str) -> None:
    for pump in PUMPS:
        for end in ENDS:
            text = start + pump * (MAX_ANSWER_CHARACTERS // len(pump)) + end
            same(normalize(text), normalize("x"))
            same("7", normalize(text))
            find_answer(text)
            find_answer(r"\boxed{" + text + "}")


@pytest.mark.timeout(20)  # unwrapped to the last brace, it would take minutes
def test_deep_wrappers_do_not_hold_the_event_loop() -> None:
    assert normalize(r"\text{{\pi}}") == r"\pi"
    half = MAX_ANSWER_CHARACTERS // 2
    normalize("{" * half + r"\pi" + "}" * half)


def test_an_empty_wrapper_is_an_answer_like_any_other() -> None:
    assert normalize(r"\text{}") == r"\text{}"
    assert same(normalize(r"\text{}"), normalize(r"\text{}")) is True
