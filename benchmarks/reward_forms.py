"""Answers to grade: reference answers in other words, nearly equal ones, and eight kinds made afresh.

`rewrite` takes the reference answers of real problems and writes each in many forms. Whether a form is right follows
from the rule that made it, not from a grader: equal ones come from rules of spelling and from SymPy's own expansion and
factoring, unequal ones change the value or the structure.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One answer beside its reference; `rule` made it, and `right` is what that means."""

    source: str
    gold: str
    answer: str
    rule: str
    right: bool


_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}")
_DECIMAL = re.compile(r"-?\d*\.\d+")
_TUPLE = re.compile(r"(?:\\left\s*)?([(\[])\s*([^()\[\]]+?)\s*(?:\\right\s*)?([)\]])")
_WORD = re.compile(r"\\text\{([A-Za-z]+)\}")
_CHOICE = re.compile(r"\\text\{\(([A-E])\)\}")
_DEGREES = re.compile(r"(\d+)\^\\circ")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.+)\\end\{pmatrix\}")
_EQUATION = re.compile(r"([^=,]+)=([^=,]+)")
_BASED = re.compile(r"(\d+)_\{?(\d)\}?")
_UNION = re.compile(r".+\\cup.+")
_LIST = re.compile(r"(?!\d{1,3}(?:,(?:\\!)?\s*\d{3})+$)[^(){}\[\]=$\\]+(?:,[^(){}\[\]=$\\]+)+")
_MEASURED = re.compile(r"(.+?)\\(?:mbox|text)\{\s*(\w+)\s*\}(.*)")


def read_answers(folder: Path) -> list[tuple[str, str]]:
    """(source, reference answer) of the problems in GSM8K's, MATH-500's, AIME's and AMC's files, each answer once."""
    found: dict[tuple[str, str], None] = {}
    for name in ("gsm8k_test", "math500", "aime24", "amc23"):
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            answer = json.loads(line)["answer"]
            if isinstance(answer, float):
                answer = f"{answer:g}"
            found[name, answer.partition("####")[2].strip().replace(",", "") if "####" in answer else answer] = None
    return list(found)


def rewrite(source: str, gold: str, generator: random.Random) -> Iterator[Form]:
    """The answer in other words, and things that are nearly it."""

    def form(rule: str, answer: str, right: bool) -> Form:
        return Form(source=source, gold=gold, answer=answer, rule=rule, right=right)

    yield form("as it is", gold, True)
    yield form("in dollars", f"${gold}$", True)
    yield form("with spaces", f"  {gold} ", True)
    yield form("said twice, the second one wrong", f"{gold}, \\pi^{{17}}", False)
    for pattern, rules in _RULES:
        if found := pattern.fullmatch(gold):
            for rule, answer, right in rules(found, generator):
                yield form(rule, answer, right)
            return
    for rule, answer, right in _by_sympy(gold):
        yield form(rule, answer, right)


Rules = Iterator[tuple[str, str, bool]]


def _integer(found: re.Match[str], generator: random.Random) -> Rules:
    n = int(found[0])
    factor = generator.randint(2, 9)
    yield "with decimals", f"{n}.0", True
    yield "with thousands", f"{n:,}", True
    yield "as a quotient", rf"\frac{{{n * factor}}}{{{factor}}}", True
    yield "as a sum", f"{n - factor} + {factor}", True
    yield "assigned", f"x = {n}", True
    yield "in words of LaTeX", rf"\text{{{n}}}", True
    yield "bold", rf"\mathbf{{{n}}}", True
    yield "with a unit", rf"{n}\text{{ apples}}", True
    yield "as a product", rf"{n} \cdot 1", True
    if n > 1:
        yield "as a root", rf"\sqrt{{{n * n}}}", True
        yield "in scientific notation", rf"{n / 10 ** (len(str(n)) - 1):.12g} \times 10^{{{len(str(n)) - 1}}}", True
    yield "one more", str(n + 1), False
    yield "a tenth", f"{n / 10:.12g}" if n else "0.1", False
    yield "nearly, in decimals", f"{n}.004", False
    yield "one of two", f"{n} or {n + 1}", False
    yield "in a set with others", rf"\{{{n}, {n + 1}\}}", False
    yield "a false equation", f"{n + 1} = {n}", False
    yield "as an interval", f"[{n}, {n + 1}]", False
    if n:
        yield "the other sign", str(-n), False


def _fraction(found: re.Match[str], generator: random.Random) -> Rules:
    sign, top, bottom = found[1], int(found[2]), int(found[3])
    value, factor = Fraction(top, bottom), generator.randint(2, 9)
    yield "as a display fraction", rf"{sign}\dfrac{{{top}}}{{{bottom}}}", True
    yield "with a slash", f"{sign}{top}/{bottom}", True
    yield "not in lowest terms", rf"{sign}\frac{{{top * factor}}}{{{bottom * factor}}}", True
    yield "the sign inside", rf"\frac{{{sign}{top}}}{{{bottom}}}", True
    yield "as a product", rf"{sign}{top} \cdot \frac{{1}}{{{bottom}}}", True
    yield "assigned", rf"x = {sign}\frac{{{top}}}{{{bottom}}}", True
    yield "in parentheses", rf"\left({sign}\frac{{{top}}}{{{bottom}}}\right)", True
    yield "to six decimals", f"{sign}{top / bottom:.6f}", True
    if value > 1 and value.denominator > 1:
        whole, rest = divmod(top, bottom)
        yield "as a mixed number", rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}", True
    terminates = value.denominator == 2 ** _times(value.denominator, 2) * 5 ** _times(value.denominator, 5)
    if terminates:
        yield "as a decimal", f"{sign}{top / bottom:.12g}", True
    else:
        yield "to two decimals", f"{sign}{top / bottom:.2f}", False
    yield "upside down", rf"{sign}\frac{{{bottom}}}{{{top}}}", False
    yield "the numerator one more", rf"{sign}\frac{{{top + 1}}}{{{bottom}}}", False
    yield "only the numerator", f"{sign}{top}", False
    yield "the other sign", rf"{'' if sign else '-'}\frac{{{top}}}{{{bottom}}}", False
    yield "as a pair", f"({sign}{top}, {bottom})", False


def _times(number: int, prime: int) -> int:
    count = 0
    while number % prime == 0:
        number //= prime
        count += 1
    return count


def _decimal(found: re.Match[str], _: random.Random) -> Rules:
    value = Fraction(found[0])
    yield "as a fraction", rf"\frac{{{value.numerator}}}{{{value.denominator}}}", True
    yield "with a zero behind it", f"{found[0]}0", True
    yield "the last digit another", found[0][:-1] + str((int(found[0][-1]) + 1) % 10), False
    yield "without its last digit", found[0][:-1], False
    yield "ten times", f"{float(value) * 10:.12g}", False


def _tuple(found: re.Match[str], _: random.Random) -> Rules:
    opening, inner, closing = found.groups()
    items = [item.strip() for item in inner.split(",")]
    if len(items) < 2:
        return
    spaced = " , ".join(items)
    yield "with sized brackets", rf"\left{opening}{inner}\right{closing}", True
    yield "with other spaces", rf"\left{opening} {spaced} \right{closing}", True
    yield "fractions as display fractions", f"{opening}{inner}{closing}".replace(r"\frac", r"\dfrac"), True
    if items != items[::-1]:
        yield "the other way round", f"{opening}{', '.join(items[::-1])}{closing}", False
    yield "one more item", f"{opening}{inner}, 0{closing}", False
    yield "another first item", f"{opening}{', '.join(['17', *items[1:]])}{closing}", False
    if len(items) == 2 and "infty" not in inner:
        other = {"(": "[", "[": "("}[opening]
        yield "another bracket", f"{other}{inner}{closing}", False


def _word(found: re.Match[str], _: random.Random) -> Rules:
    word = found[1]
    yield "without the command", word, True
    yield "bold", rf"\textbf{{{word}}}", True
    yield "denied", rf"\text{{not {word}}}", False
    yield "another word", r"\text{parabola}", False


def _choice(found: re.Match[str], _: random.Random) -> Rules:
    letter = found[1]
    other = "A" if letter != "A" else "B"
    yield "without the command", f"({letter})", True
    yield "the letter alone", letter, True
    yield "bold", rf"\textbf{{({letter})}}", True
    yield "another letter", other, False
    yield "all letters", "A, B, C, D, E", False


def _degrees(found: re.Match[str], _: random.Random) -> Rules:
    yield "without degrees", found[1], True
    yield "degrees in braces", rf"{found[1]}^{{\circ}}", True
    yield "degrees in words", rf"{found[1]}\text{{ degrees}}", True
    yield "one more degree", rf"{int(found[1]) + 1}^\circ", False


def _measured(found: re.Match[str], _: random.Random) -> Rules:
    yield "without its unit", found[1].strip(), True
    yield "the unit in another command", rf"{found[1]}\mathrm{{~{found[2]}}}{found[3]}", True
    yield "another unit", rf"{found[1]}\text{{ miles}}{found[3]}", False


def _list(found: re.Match[str], _: random.Random) -> Rules:
    items = [item.strip() for item in found[0].split(",")]
    yield "the other way round", ", ".join(items[::-1]), True
    yield "in words", ", ".join(items[:-1]) + rf" \text{{ and }} {items[-1]}", True
    yield "in braces", rf"\{{{', '.join(items)}\}}", True
    yield "each assigned", ", ".join(f"x = {item}" for item in items), True
    yield "one missing", ", ".join(items[1:]), False
    yield "one too many", ", ".join([*items, "17"]), False
    yield "one another", ", ".join(["17", *items[1:]]), False


def _matrix(found: re.Match[str], _: random.Random) -> Rules:
    rows = [row.strip() for row in found[1].split(r"\\")]

    def matrix(rows: list[str], name: str = "pmatrix") -> str:
        return rf"\begin{{{name}}} " + r" \\ ".join(rows) + rf" \end{{{name}}}"

    yield "in square brackets", matrix(rows, "bmatrix"), True
    yield "fractions as LaTeX", re.sub(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", found[0]), True
    if rows != rows[::-1]:
        yield "upside down", matrix(rows[::-1]), False
    yield "one row more", matrix([*rows, "&".join(["0"] * (1 + rows[0].count("&")))]), False


def _equation(found: re.Match[str], _: random.Random) -> Rules:
    left, right = found.groups()
    yield "sides exchanged", f"{right} = {left}", True
    yield "doubled", f"2({left}) = 2({right})", True
    yield "brought to one side", f"{left} - ({right}) = 0", True
    yield "one more on the right", f"{left} = {right} + 1", False
    yield "one side doubled", f"2({left}) = {right} + 17", False


def _based(found: re.Match[str], _: random.Random) -> Rules:
    digits, base = found.groups()
    yield "the base in braces", f"{digits}_{{{base}}}", True
    yield "without the base", digits, True
    yield "another base", f"{digits}_{{{int(base) + 1}}}", False
    yield "in base ten", str(int(digits, int(base))), False


def _union(found: re.Match[str], _: random.Random) -> Rules:
    parts = [part.strip() for part in found[0].split(r"\cup")]
    yield "the other way round", r" \cup ".join(parts[::-1]), True
    yield "one part only", parts[0], False
    yield "one end closed", found[0].replace(")", "]", 1).replace("(", "[", 1), False


_RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], random.Random], Rules]], ...] = (
    (_INTEGER, _integer),
    (_FRACTION, _fraction),
    (_DECIMAL, _decimal),
    (_TUPLE, _tuple),
    (_WORD, _word),
    (_CHOICE, _choice),
    (_DEGREES, _degrees),
    (_MEASURED, _measured),
    (_MATRIX, _matrix),
    (_EQUATION, _equation),
    (_BASED, _based),
    (_UNION, _union),
    (_LIST, _list),
)


def _by_sympy(gold: str) -> Rules:
    """Expressions as SymPy writes them, expanded, factored, and changed."""
    from math_verify import parse
    from sympy import Expr, Symbol, expand, factor, latex, nsimplify, radsimp

    parsed = parse(f"${gold}$", parsing_timeout=None)
    if not parsed or not isinstance(parsed[0], Expr) or isinstance(parsed[0], Symbol) or "," in gold or "=" in gold:
        return
    expression = parsed[0].doit()
    if gold != gold.lower() and not gold.islower():
        return  # its parser gives back small letters for capitals
    if expression.has(Symbol("circ")) or "_" in gold or "%" in gold or "pm" in gold or '"' in gold:
        return
    yield "as SymPy writes it", latex(expression), True
    yield "expanded", latex(expand(expression)), True
    yield "factored", latex(factor(expression)), True
    yield "over a common denominator", latex(radsimp(nsimplify(expression))), True
    yield "halved and doubled", rf"2 \cdot \left({latex(expand(expression / 2))}\right)", True
    yield "plus one", latex(expression + 1), False
    yield "the other sign", latex(-expression), False
    yield "twice", latex(2 * expression), False
    for symbol in sorted(expression.free_symbols, key=str)[:1]:
        yield "another variable", latex(expression.subs(symbol, Symbol("w"))), False


KINDS = ("integers", "fractions", "wrong fractions", "decimals", "surds", "intervals", "polynomials", "tuples")


def fresh(kind: str, number: int, generator: random.Random) -> list[Form]:
    """`number` answers of a kind that no cache has seen; right ones, except for the wrong fractions."""

    def one() -> tuple[str, str]:
        a, b, c = (generator.randint(2, 999) for _ in range(3))
        if kind == "integers":
            n = generator.randint(-(10**6), 10**6)
            return str(n), str(n)
        if kind == "fractions":
            return rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{a * (c % 8 + 2)}}}{{{b * (c % 8 + 2)}}}"
        if kind == "wrong fractions":
            return rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{a}}}{{{b + c}}}"
        if kind == "decimals":
            return rf"\frac{{{a}}}{{100}}", f"{a / 100:.2f}"
        if kind == "surds":
            return rf"{a % 48 + 2}\sqrt{{{b}}}", rf"\sqrt{{{(a % 48 + 2) ** 2 * b}}}"
        if kind == "intervals":
            return f"({-a},{b}]", rf"\left({-a}, {b}\right]"
        if kind == "polynomials":
            return f"(x+{a})^2", f"x^2+{2 * a}x+{a * a}"
        return f"({a},{-b},{c})", rf"\left({a}, {-b}, {c}\right)"

    pairs = (one() for _ in range(number))
    return [
        Form(source="made", gold=gold, answer=answer, rule=kind, right=kind != "wrong fractions")
        for gold, answer in pairs
    ]


HOSTILE = (
    r"9^{9^{9^9}}",
    r"(10^{10^8})!",
    r"\binom{10^9}{5 \cdot 10^8}",
    "(" * 300 + "5" + ")" * 300,
    r"2^{2^{2^{2^{2^{2}}}}}",
    "{" * 1_000_000,
)
"""Towers of powers, huge factorials and binomials, deep nesting, a megabyte of braces: seen through before any work."""
STUBBORN = (
    r"9^{9^{9^9}} - 9^{9^{9^9}} + 5",
    r"\lfloor (10^{10^8})! \rfloor",
    r"\sum_{k=1}^{10^9} k!",
    r"\sin(9^{9^{9^9}})",
)
"""What only a deadline ends."""
