"""The program of one grading worker: reads pairs of answers, writes whether they mean the same.

A file of its own, run by path, because it must be killable at any moment (SymPy can be sent into hours of C code by
one line of LaTeX) and must not import rlsys again. One JSON object a line in, `{"gold", "answer"}`; one word a line
out: "ready" once, then "correct", "wrong" or "error" for each pair.
"""

import ctypes
import json
import logging
import os
import random
import resource
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
MAX_MEMORY_BYTES = 4 << 30
NUM_POINTS = 4
DIGITS = 30


def grade(gold: str, answer: str) -> str:
    """Compare by Math-Verify, without its own time limits (`signal.alarm`): the pool keeps the time. Then by SymPy."""
    from math_verify import LatexExtractionConfig, parse, verify

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


def main() -> None:
    """Serve until the pool closes the pipe or dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not pass for a verdict
    logging.disable()
    try:
        grade("x + \\frac{1}{2}", "\\sqrt{2} x")  # imports and warms both ways, so that no deadline pays for it
    except ImportError as error:
        os.write(replies, f"{error}; install it with `pip install math-verify`\n".encode())
        return
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verdict = grade(request["gold"], request["answer"])
        except Exception:  # untrusted input: whatever it made SymPy do is the verdict "error"
            verdict = "error"
        os.write(replies, verdict.encode() + b"\n")


if __name__ == "__main__":
    main()
