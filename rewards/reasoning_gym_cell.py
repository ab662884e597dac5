"""Runs one verifier of reasoning-gym. The text of this file is the first cell of a session, which holds nothing else.

Loaded by `sandbox.py` as text, never by rlsys. Some verifiers evaluate the answer as Python, by `eval` or by SymPy's
`parse_expr`, which is `eval` as well. Code in an answer could say that the answer is right, so none may run: here both
take numbers, operators and a few names, and refuse all else before anything is evaluated.
"""

import ast
import base64
import difflib
import json
import os
import pickle
import re
import sys
from typing import Any

OUTPUT, NOTHING = 101, 102  # descriptors of the session: what it shows, and the null device
NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?![\w.])"  # no 1e9 and no 0x9: verifiers count the numbers in an answer
HEXADECIMAL = r"0[xX][0-9a-fA-F]+(?![\w.])"
ARITHMETIC = re.compile(rf"(?:{NUMBER}|{HEXADECIMAL}|[-+*/%&|^~()]|<<|>>|\s)+", re.ASCII)
EXPRESSION = re.compile(rf"(?:{NUMBER}|[A-Za-z]+(?![\w.])|[-+*/(),]|\s)+", re.ASCII)
NAME = re.compile("[A-Za-z]+")
DIGITS = re.compile("[0-9]+")
# What writes a result; nothing that computes one, such as Integral, expand or factorial.
NAMES = {
    *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("exp", "log", "ln", "sqrt", "Abs", "pi", "E", "C"),
}
parts: list[str] = []


class RefusedError(ValueError):
    """Text that is not evaluated."""


def run() -> None:
    """Grade the job in `parts` and show the result as JSON: {"score": ...}, {"unknown": [...]} or {"failed": ...}."""
    job = pickle.loads(base64.b64decode("".join(parts)))
    os.dup2(NOTHING, 1)
    import reasoning_gym  # noqa: F401  it loads every task

    close_doors()
    os.write(OUTPUT, json.dumps(grade(**job)).encode())


def close_doors() -> None:
    """Put guards in the place of everything with which a verifier could evaluate text."""
    import sympy
    from sympy.parsing import sympy_parser

    original = sympy_parser.parse_expr
    parse_expr = guarded(original, names=True)
    for module in (sympy, sympy.parsing, sympy_parser):
        module.parse_expr = parse_expr
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "reasoning_gym":
            module.__dict__.update(eval=evaluate, exec=refuse, compile=refuse)
            if module.__dict__.get("parse_expr") is original:
                # In games with numbers x/x would be one more 1, which no verifier counts.
                module.__dict__["parse_expr"] = guarded(original, names=".games." not in name)


def guarded(parse_expr: Any, *, names: bool) -> Any:
    """SymPy's own for plain expressions; RefusedError for all else."""

    def parse(text: str, *arguments: Any, **keywords: Any) -> Any:
        if not EXPRESSION.fullmatch(text):
            raise RefusedError(f"not a plain expression: {text[:100]!r}")
        for name in NAME.findall(text):
            known = name in NAMES or (len(name) == 1 and name not in "NOQSI")  # these letters mean something to SymPy
            if not (names and known):
                raise RefusedError(f"no name for an answer: {name!r}")
        return parse_expr(text, *arguments, **keywords)

    return parse


def evaluate(text: str, *_: Any) -> Any:
    """Python's value of arithmetic with numbers only, or of a literal."""
    if ARITHMETIC.fullmatch(text):
        return eval(text, {"__builtins__": {}})
    return ast.literal_eval(text)


def refuse(*_: Any, **__: Any) -> Any:
    """No verifier needs this."""
    raise RefusedError("code is not run")


def grade(task: str, options: dict[str, Any], answer: str, entry: dict[str, Any]) -> dict[str, Any]:
    """What the task's verifier says; an exception is the answer's fault where the known answer passes."""
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        return {"unknown": difflib.get_close_matches(task, DATASETS, n=1)}
    made, config = DATASETS[task]
    try:
        verifier = made(config(**options))
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    try:
        return {"score": score(verifier, task, answer, entry)}
    except Exception as error:
        try:
            passes = score(verifier, task, entry["answer"], entry) >= 1.0
        except Exception:
            passes = False
        return {"score": 0.0} if passes else {"failed": f"{type(error).__name__}: {error}"}


def score(verifier: Any, task: str, answer: str, entry: dict[str, Any]) -> float:
    """The verifier's score, but for two that pass wrong answers: one any text, one any four numbers."""
    if task == "game_of_life_halting":
        return float(answer == entry["answer"])
    if task == "puzzle24" and sorted(map(int, DIGITS.findall(answer))) != sorted(entry["metadata"]["numbers"]):
        return 0.0
    return float(verifier.score_answer(answer, entry))
