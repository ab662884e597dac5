"""When two answers are the same: worked by hand, and against SymPy on random expressions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import sympy

from rlsys.rewards.equality import plain_number, same
from rlsys.rewards.exact import HUGE, Unreadable
from rlsys.rewards.expressions import read_scalars
from rlsys.rewards.finding import normalize
from rlsys.rewards.latex import tokenize
from rlsys.rewards.units import read_unit

SAME = [
    ("(409,-134,921)", r"\left(409, -134, 921\right)"), ("100,200", "100, 200"), ("58,500", "58500"), ("1,024", "x=1,024"),
    ("1/2", "0.5"), ("1/3", "0.333333"), ("0.5", r"\frac{1}{2}"), (r"\frac{14}{3}", r"4\frac{2}{3}"), ("721", "721.0"),
    ("025", "25"), ("1000", "1 000"), ("1000", "1e3"), (".0000672", r"6.72\times 10^{-5}"), ("1/6", r"0.1\overline{6}"),
    ("50\\%", "0.5"), ("50\\%", "50"), ("50", "50%"), ("0.5", "50\\%"), ("4", "٤"), ("1/2", "½"), ("3.5", "3,5"),
    (r"3\sqrt{13}", r"\sqrt{117}"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}"), (r"2\sqrt{5}", "2*sqrt(5)"),
    (r"\sqrt{6}", r"\sqrt2 \cdot \sqrt{3}"), (r"\pi", "3.141593"), ("18+2\\pi", r"2(9+\pi)"), ("2", "8^{1/3}"),
    ("6 - 5i", "-5i+6"), ("1+2i", r"\frac{5}{1-2i}"), ("x^2+2x+1", "(x+1)^2"), (r"\frac{11+9a}{20}", "11/20+9a/20"),
    ("(a+5)(b+2)", "ab+2a+5b+10"), ("2k", r"k \cdot 2"), ("x^2", "x²"), ("5r^5", "5 r^{5}"), ("2x^{-1}", r"\frac2x"),
    (r"\cot x", r"\cot(x)"), ("x_1", "x_{1}"), ("120", "5!"), ("10", r"\binom{5}{2}"), ("1024", "2^10"),
    ("x=5", "5"), ("5", "x=5"), ("5", "2+3=5"), ("f(x) = 2x", "2x"), ("y = 2x + 3", "y-2x=3"), ("y = 2x+3", "2x+3"),
    ("5x - 7y + 11z + 4 = 0", "10x-14y+22z=-8"), ("(x,y) = (1,2)", "(1,2)"),
    ("(3,4]", r"3<x\le 4"), (r"(2,\infty)", "x>2"), (r"(-\infty, 0]", "x \\leq 0"), (r"x \in [-2,7]", "[-2,7]"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"), ("(2,4)", "2,4"), ("(6,31,-1)", "[6,31,-1]"),
    ("1,-2", "-2,1"), ("1,-2", r"x=-2 \text{ or } x=1"), ("3, 5, 7", "7, 5, and 3"), ("1,2", r"\{2,1\}"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"), (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}"),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\left(\begin{array}{cc}-1&0\\0&-1\end{array}\right)"),
    ("52_8", "52_{8}"), ("52_8", "52"), (r"\text{(C)}", "C"), (r"\text{(C)}", "(C) 12"), ("B", r"\textbf{(B)}"),
    (r"\text{Evelyn}", "Evelyn"), (r"\text{ellipse}", "an ellipse"), ("even", r"\text{Even}"),
    (r"864 \mbox{ inches}^2", "864"), (r"864 \mbox{ inches}^2", "864 square inches"), (r"5\text{ m}", "500 cm"),
    (r"5.4 \text{ cents}", "5.4"), (r"5.4 \text{ cents}", r"\$0.054\text{ dollars}"), (r"\$18.90", "18.90 dollars"),
    (r"90^\circ", "90"), (r"90^\circ", r"\frac{\pi}{2}"), (r"90^{\circ}", "90 degrees"),
    ("60 mph", "60 miles per hour"),
]  # fmt: skip
DIFFERENT = [
    ("(409,-134,921)", "(409,-134,922)"), ("58,500", "58,501"), ("100,200", "100,300"), ("1,2", "1,2,003"),
    ("1/3", "0.33"), ("0.5", "0.5\\%"), (".0000672", "0.000067"), ("10000001", "10000002"), (r"\sqrt{2}", "1.41"),
    (r"\pi", "3.14"), ("12", "12.001"), ("5", "-5"), (r"\frac12", r"\frac21"), ("2^{10}", "10^2"), ("1/2", "1/3"),
    ("x", "y"), ("p - q", "q - p"), ("3R^2", "3r^2"), ("(x+1)^2", "x^2+1"), ("i", "1"), ("1+i", "1-i"),
    ("5", "1,5"), ("1,5", "5"), ("5", "4 = 5"), ("5", "5 = 4 = 5"), ("x=5", "y=4"), ("1", "1, 2, 3, 4"),
    ("(3,4]", "[3,4)"), ("(3,4]", "(3,4)"), ("(1,2)", "(2,1)"), ("(1,2)", r"\{1,2\}"), (r"\{1,2\}", "(1,2)"),
    ("1,2", "1,2,3"), ("1,2", "1,1"), (r"\{1,2\}", r"\{1,3\}"), (r"(2,\infty)", "x<2"), (r"(2,\infty)", r"x \ge 2"),
    (r"\text{(C)}", "B"), (r"\text{(C)}", "A, B, C, D"), (r"\text{(C)}", "A or C"), ("C", "(D)"), ("B", "A. B"),
    (r"\text{even}", "odd"), (r"\text{even}", "even or odd"), (r"\text{Evelyn}", "not Evelyn"),
    (r"15\mbox{ cm}^2", r"15 \text{ cm}"), (r"5\text{ m}", "5 km"), (r"90^\circ", r"\pi"), ("52_8", "52_9"),
    ("52_8", "42"), ("5", "9^{9^{9^9}}"), ("5", "-(10^{10^8})!"), ("5", r"\binom{10^9}{5\cdot10^8}"),
    ("x", "2^{9^{9^9}}"), ("5", "2^{-9^{9^9}}"), ("5", r"\infty"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
]  # fmt: skip
OPEN = [
    (r"\cot x", r"\frac{\cos x}{\sin x}"), (r"\sqrt{x^2}", "x"), (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), ("|x|", "x"),
    ("5", r"\lfloor 5.5 \rfloor"), ("5", "9^{9^{9^9}} - 9^{9^{9^9}} + 5"), ("1", r"\frac{1}{0}"), ("5", "5 5"),
    ("5", r"\frac{}"), ("5", "(5"), ("5", "5)"), ("5", "{" * 90 + "5" + "}" * 90), ("5", "七 🙂"), ("5", "\ud800\x00"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)"), ("x^{100}", "x^{99}"), ("(x+y+z+w)^{60}", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same_in_other_words(gold: str, answer: str) -> None:
    assert same(normalize(gold), normalize(answer)) is True


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_nearly_the_same_is_not_the_same(gold: str, answer: str) -> None:
    assert same(normalize(gold), normalize(answer)) is False


@pytest.mark.parametrize(("gold", "answer"), OPEN)
def test_what_exact_arithmetic_cannot_say_is_left_open(gold: str, answer: str) -> None:
    assert same(normalize(gold), normalize(answer)) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3", "-3"), ("+1,024.50", "1024.5"), (".5", "1/2"), ("5.", "5"), ("6/8", "3/4"), (r"-\frac{5}{6}", "-5/6"),
        (r"\dfrac56", "5/6"), ("007", "7"), ("", None), (".", None), ("1/0", None), ("1,2", None), ("1,0000", None),
        ("x", None), ("1 2", None), ("٣", None), ("9" * 201, None), ("--1", None), ("1%", None), ("-", None),
    ],
)  # fmt: skip
def test_plain_numbers(text: str, value: str | None) -> None:
    assert plain_number(text) == (None if value is None else Fraction(value))


def random_expression(generator: random.Random, depth: int) -> tuple[str, sympy.Expr]:
    """A LaTeX text and what it means."""
    if depth == 0:
        number = generator.randint(1, 12)
        return generator.choice(
            [
                (str(number), sympy.Integer(number)),
                (rf"\sqrt{{{number}}}", sympy.sqrt(number)),
                ("x", sympy.Symbol("x")),
                (r"\pi", sympy.pi),
                ("i", sympy.I),
            ]
        )
    left, first = random_expression(generator, depth - 1)
    right, second = random_expression(generator, depth - 1)
    times = generator.randint(2, 3)
    return generator.choice(
        [
            (f"({left}) + {right}", first + second),
            (f"{left} - ({right})", first - second),
            (f"({left})({right})", first * second),
            (rf"\frac{{{left}}}{{{right}+7}}", first / (second + 7)),
            (f"({left})^{{{times}}}", first**times),
        ]
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_expressions_mean_what_sympy_says_they_mean(seed: int) -> None:
    generator = random.Random(seed)
    (left, first), (right, second) = (random_expression(generator, 2) for _ in range(2))
    assert same(left, right) is bool(sympy.simplify(sympy.expand(first - second)) == 0)
    assert same(left, f"{right} + ({left}) - ({right})") is True


@pytest.mark.parametrize("text", ["9^{9^{9}}", "(9^{9^9})!", "3^{100000}", "1000000!", "(1/2)^{10^9}", "5 - 9^{9^9}"])
def test_numbers_that_nobody_can_write_out_are_huge_and_not_computed(text: str) -> None:
    (scalar,) = read_scalars(tokenize(text))
    assert scalar.value is HUGE


@pytest.mark.parametrize("text", ["(1+x+y+z)^{40}", "1000!", "x^{9^{9^9}}", "0^{-1}", "9^{9^9} x", "(((x"])
def test_what_would_grow_is_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        read_scalars(tokenize(text))


def test_units_convert() -> None:
    assert read_unit("km") == ((("length", 1),), 1000)
    assert read_unit("square inches") == read_unit("in^2") == ((("length", 2),), Fraction(254, 10000) ** 2)
    assert read_unit("km/h") == ((("length", 1), ("time", -1)), Fraction(1000, 3600))
    assert read_unit("parsecs") is None
    assert read_unit("a/b/c") is None
