"""The reward for a right final answer to a mathematics problem."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

from rlsys.interfaces import RewardResult
from rlsys.rewards.pool import WorkerPool
from rlsys.types import Problem, Rollout

MAX_ANSWER_CHARACTERS = 4096  # no answer is longer; a response that stuffs its box is wrong, not work
MAX_EXACT_CHARACTERS = 200  # more digits than that are for the worker with its deadline
SURELY_DIFFERENT = Fraction(1, 10**5)  # Math-Verify rounds decimals to 6 places, so closer pairs are left to it

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_PHRASE = re.compile(r"answer\s*(?:is\s*:?|:)\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
_INLINE = re.compile(r"\$([^$\n]+)\$|\\\((.+?)\\\)")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)(\d))", re.ASCII)
_NUMBER = re.compile(r"([+-]?)\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)", re.ASCII)
_QUOTIENT = re.compile(r"([+-]?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)", re.ASCII)
_MIXED = re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)", re.ASCII)
_ROOT = re.compile(r"√\s*(\d+|[a-z])")
_DIGIT_SPACE = re.compile(r"(?<=\d)\\,(?=\d{3})", re.ASCII)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "÷": "\\div ", "π": "\\pi ", "∞": "\\infty ", "°": "^\\circ ", "％": "%"}  # noqa: RUF001
    | {"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8"}
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
)


class MathReward:
    r"""Scores the final answer of a response against `problem.answer` by mathematical equality.

    The answer is the last `\boxed{...}`, else the last `<answer>...</answer>`, else what follows the last "answer is"
    or "answer:"; with `strict` only a box counts. Equal text and plain rational numbers are decided at once; all else
    goes to Math-Verify in one of `num_workers` processes, which is killed after `timeout_seconds` of work on one pair.

    `status` is "correct", "wrong", "no_answer", "timeout" or "error" (the worker died, or the reference answer cannot
    be parsed); only "correct" scores `correct`, everything else scores `wrong`. Raises ValueError for a problem without
    an answer and `WorkerError` where no worker can start.
    """

    def __init__(
        self,
        *,
        timeout_seconds: float = 1.0,
        num_workers: int = 1,
        correct: float = 1.0,
        wrong: float = 0.0,
        strict: bool = False,
    ) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self.correct = correct
        self.wrong = wrong
        self.strict = strict
        program = Path(__file__).resolve().with_name("math_worker.py")
        self._pool = WorkerPool(program, num_workers=num_workers, timeout_seconds=timeout_seconds)

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> RewardResult:  # noqa: ARG002
        """Grade one response; see the class."""
        if problem.answer is None or not problem.answer.strip():
            raise ValueError(
                f"problem {problem.id!r} has no answer, which MathReward compares with; set Problem.answer"
            )
        found = find_answer(response, strict=self.strict)
        status = await self._grade(problem.answer, found)
        score = self.correct if status == "correct" else self.wrong
        return RewardResult(score=score, status=status, extracted=found and found[:MAX_ANSWER_CHARACTERS])

    async def _grade(self, reference: str, found: str | None) -> str:
        answer = normalize(found[: MAX_ANSWER_CHARACTERS + 1]) if found else ""
        if not answer:
            return "no_answer"
        gold = normalize(find_boxed(reference) or reference)
        if answer == gold:
            return "correct"
        if len(answer) > MAX_ANSWER_CHARACTERS:
            return "wrong"
        if (same := compare_exactly(gold, answer)) is not None:
            return "correct" if same else "wrong"
        try:
            verdict = await self._pool.ask({"gold": gold, "answer": answer})
        except TimeoutError:
            return "timeout"
        return verdict if verdict in ("correct", "wrong") else "error"

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def find_answer(response: str, *, strict: bool = False) -> str | None:
    """The text of the final answer, by the order that `MathReward` states; None where there is none."""
    boxed = find_boxed(response)
    if boxed is not None or strict:
        return boxed
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return response[start + len("<answer>") : end]
    for phrase in _PHRASE.finditer(response):
        start = phrase.end()
    if start < 0:
        return None
    sentence = response[start:]
    if (stop := _SENTENCE_END.search(sentence)) is not None:
        sentence = sentence[: stop.start()]
    inline = _INLINE.search(sentence)
    return (inline[1] or inline[2]) if inline else sentence


def find_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance (the inner one of two)."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    if text[start - 1 : start] != "\\" and (content := _last_balanced(text[start:])) is not None:
        return content  # the usual case does not read the reasoning before it
    return _last_balanced(text)


def _last_balanced(text: str) -> str | None:
    """The last balanced box in one pass: quadratic work on a flood of braces would block the event loop."""
    opened: list[re.Match[str]] = []
    last: tuple[int, int] | None = None
    for mark in _BRACES.finditer(text):
        if mark[0].endswith("{") and mark[0] != "\\{":
            opened.append(mark)
        elif mark[0] == "}" and opened:
            opening = opened.pop()
            if opening[0] != "{" and (last is None or opening.end() > last[0]):
                last = (opening.end(), mark.start())
    return None if last is None else text[last[0] : last[1]]


def normalize(answer: str) -> str:
    """The answer without its delimiters, a closing period and spacing commands, with common Unicode signs in LaTeX."""
    text = _ROOT.sub(r"\\sqrt{\1}", answer.translate(_SIGNS)).strip("* \t\n")
    for left, right in _DELIMITERS:
        inner = text[len(left) : -len(right)]
        if text == left + inner + right and left not in inner:
            text = inner.strip()
    text = _DIGIT_SPACE.sub("", text).replace("{,}", ",").replace("\\!", "")
    text = text.rstrip(". \n").removeprefix("\\$").removeprefix("$").strip()
    return _MIXED.sub(r"\1\\frac{\2}{\3}", text) if _MIXED.fullmatch(text.lstrip("+-")) else text


def compare_exactly(gold: str, answer: str) -> bool | None:
    """Whether two integers, decimals or simple fractions are equal; None where that cannot be said without SymPy."""
    left, right = exact_value(gold), exact_value(answer)
    if left is None or right is None:
        return None
    if left == right:
        return True
    rounded = "." in gold or "." in answer
    return None if rounded and abs(left - right) < SURELY_DIFFERENT else False


def exact_value(text: str) -> Fraction | None:
    r"""The number that a plain spelling (`-3`, `1,024.50`, `5/6`, `\frac56`, `1\frac{1}{2}`) stands for, else None."""
    if len(text) > MAX_EXACT_CHARACTERS:
        return None
    plain = _FRACTION.sub(lambda match: " {}/{}".format(*filter(None, match.groups())), text).strip()
    if number := _NUMBER.fullmatch(plain):
        value = Fraction(number[2].replace(",", ""))
    elif (quotient := _QUOTIENT.fullmatch(plain)) and int(quotient[4]) != 0:
        value = Fraction(int(quotient[3]), int(quotient[4]))
        if quotient[2] is not None:
            if value >= 1:  # "2 3/2" is no mixed number
                return None
            value += int(quotient[2])
    else:
        return None
    return -value if plain.startswith("-") else value
