"""The program of a grading worker (`worker.py`): whether two answers mean the same, by Math-Verify and SymPy.

It runs where it can be killed at any moment: one line of LaTeX can send SymPy into hours of C code.
"""

import random
import re
from typing import Any

NUM_POINTS = 4
DIGITS = 30
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)\b")
DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)")


def warm() -> None:
    """Import everything and go both ways once, so that no deadline pays for it."""
    try:
        compare("x + \\frac{1}{2}", "\\sqrt{2} x")
    except ImportError as error:
        raise ImportError(f"{error}; install it with `pip install math-verify`") from error


def grade(request: dict[str, str]) -> str:
    """ "correct", "wrong", or "error" where the reference cannot be read, for `{"gold", "answer"}`."""
    return compare(request["gold"], request["answer"])


def compare(gold: str, answer: str) -> str:
    """Compare by Math-Verify, without its own time limits (`signal.alarm`): the pool keeps the time. Then by SymPy."""
    from math_verify import LatexExtractionConfig, parse, verify

    gold, answer = in_radians(gold), in_radians(answer)
    parsed_gold = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not parsed_gold:
        return "error"
    # Of the answer, all is read or nothing: the default would look for some number in what it cannot read.
    whole = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    parsed_answer = parse(f"\\boxed{{{answer}}}", whole, fallback_mode="no_fallback", parsing_timeout=None)
    if verify(parsed_gold, parsed_answer, timeout_seconds=None):
        return "correct"
    if parsed_answer and agree_numerically(parsed_gold[0], parsed_answer[0]):
        return "correct"
    return "wrong"


def in_radians(text: str) -> str:
    r"""`\cos 36^\circ` with pi for the degrees, which the parser would drop; "36 degrees" by itself stays as it is."""
    if not TRIGONOMETRY.search(text):
        return text
    return DEGREES.sub(r"{\\frac{\1 \\pi}{180}}", text)


def agree_numerically(gold: Any, answer: Any) -> bool:
    """Whether two expressions have the same value, to 20 digits, wherever they are looked at.

    `simplify` does not see every identity. One point that is no number on either side proves nothing; less than two
    that are leave it open, which is no.
    """
    from sympy import Expr, Float, Rational

    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return False
    if gold.has(Float) or answer.has(Float) or gold.free_symbols != answer.free_symbols:
        return False
    symbols = sorted(gold.free_symbols, key=str)
    difference = gold - answer
    generator = random.Random(0)
    agreed = 0
    for _ in range(NUM_POINTS if symbols else 1):
        point = {symbol: Rational(generator.randint(-(10**6), 10**6), 10**5) for symbol in symbols}
        size = abs(gold.evalf(DIGITS, subs=point))
        value = abs(difference.evalf(DIGITS, subs=point, maxn=4 * DIGITS))
        if not (size.is_finite and value.is_finite):
            continue
        if not value <= Float(10) ** -20 * max(size, Float(1)):
            return False
        agreed += 1
    return agreed >= min(2, NUM_POINTS if symbols else 1)
