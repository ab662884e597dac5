"""When two answers are the same: worked by hand, and against SymPy on random expressions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.rewards.answers.equality import plain_number, same
from rlsys.rewards.answers.exact import HUGE, Unreadable
from rlsys.rewards.answers.expressions import read_scalars
from rlsys.rewards.answers.latex import tokenize
from rlsys.rewards.answers.spelling import normalize
from rlsys.rewards.answers.units import read_unit


def pairs(text: str) -> list[tuple[str, str]]:
    """The lines of a table as pairs of reference and answer."""
    return [(gold, answer) for gold, _, answer in (line.partition("  ~  ") for line in text.strip().splitlines())]


SAME = pairs(
    r"""
(409,-134,921)  ~  \left(409, -134, 921\right)
100,200  ~  100, 200
58,500  ~  58500
1,024  ~  x=1,024
\frac13  ~  0.333\ldots
1000000  ~  1 \text{ million}
204  ~  \text{The answer is } 204
\$18.90  ~  1890 \text{ cents}
\binom{10}{3}  ~  {10 \choose 7}
\ln 2  ~  \log_e 2
1+2i  ~  1+2\mathrm{i}
\emptyset  ~  \varnothing
\emptyset  ~  \{\}
2516_8  ~  (2516)_{8}
4210_5  ~  4210_{\text{five}}
(-\infty,2)\cup(3,\infty)  ~  x<2 \text{ or } x>3
(-\infty,\infty)  ~  \mathbb{R}
3:4  ~  3 \text{ to } 4
(3,4]  ~  \{x : 3 < x \leq 4\}
\begin{pmatrix} 1/2 \\ 1 \end{pmatrix}  ~  \frac12\begin{pmatrix} 1 \\[4pt] 2 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ~  [[1,2],[3,4]]
\text{(C)}  ~  \textbf{(C)}\ 12
1/2  ~  0.5
1/3  ~  0.333333
0.5  ~  \frac{1}{2}
\frac{14}{3}  ~  4\frac{2}{3}
721  ~  721.0
025  ~  25
1000  ~  1 000
1000  ~  1e3
.0000672  ~  6.72\times 10^{-5}
1/6  ~  0.1\overline{6}
50\%  ~  0.5
50\%  ~  50
50  ~  50%
0.5  ~  50\%
4  ~  ٤
1/2  ~  ½
3.5  ~  3,5
3\sqrt{13}  ~  \sqrt{117}
\frac{\sqrt{3}}{3}  ~  \frac{1}{\sqrt3}
2\sqrt{5}  ~  2*sqrt(5)
\sqrt{6}  ~  \sqrt2 \cdot \sqrt{3}
\pi  ~  3.141593
18+2\pi  ~  2(9+\pi)
2  ~  8^{1/3}
6 - 5i  ~  -5i+6
1+2i  ~  \frac{5}{1-2i}
x^2+2x+1  ~  (x+1)^2
\frac{11+9a}{20}  ~  11/20+9a/20
(a+5)(b+2)  ~  ab+2a+5b+10
2k  ~  k \cdot 2
x^2  ~  x²
5r^5  ~  5 r^{5}
2x^{-1}  ~  \frac2x
\cot x  ~  \cot(x)
x_1  ~  x_{1}
120  ~  5!
10  ~  \binom{5}{2}
1024  ~  2^10
x=5  ~  5
5  ~  x=5
5  ~  2+3=5
f(x) = 2x  ~  2x
y = 2x + 3  ~  y-2x=3
y = 2x+3  ~  2x+3
5x - 7y + 11z + 4 = 0  ~  10x-14y+22z=-8
(x,y) = (1,2)  ~  (1,2)
(3,4]  ~  3<x\le 4
(2,\infty)  ~  x>2
(-\infty, 0]  ~  x \leq 0
x \in [-2,7]  ~  [-2,7]
(-\infty, 2) \cup (3, \infty)  ~  (3,\infty)\cup(-\infty,2)
(2,4)  ~  2,4
(6,31,-1)  ~  [6,31,-1]
1,-2  ~  -2,1
1,-2  ~  x=-2 \text{ or } x=1
3, 5, 7  ~  7, 5, and 3
1,2  ~  \{2,1\}
1 \pm \sqrt{19}  ~  1-\sqrt{19}, 1+\sqrt{19}
\{1\pm\sqrt{5},-2\}  ~  -2, 1+\sqrt5, 1-\sqrt5
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}  ~  \begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}  ~  \left(\begin{array}{cc}-1&0\\0&-1\end{array}\right)
52_8  ~  52_{8}
52_8  ~  52
\text{(C)}  ~  C
\text{(C)}  ~  (C) 12
B  ~  \textbf{(B)}
\text{Evelyn}  ~  Evelyn
\text{ellipse}  ~  an ellipse
even  ~  \text{Even}
864 \mbox{ inches}^2  ~  864
864 \mbox{ inches}^2  ~  864 square inches
5\text{ m}  ~  500 cm
5.4 \text{ cents}  ~  5.4
5.4 \text{ cents}  ~  \$0.054\text{ dollars}
\$18.90  ~  18.90 dollars
90^\circ  ~  90
90^\circ  ~  \frac{\pi}{2}
90^{\circ}  ~  90 degrees
60 mph  ~  60 miles per hour
"""
)
DIFFERENT = pairs(
    r"""
\$18.90  ~  18.90 \text{ cents}
1 \text{ million}  ~  1
3:4  ~  4:3
\emptyset  ~  0
\emptyset  ~  \{0\}
4  ~  \text{negative four}
(409,-134,921)  ~  (409,-134,922)
58,500  ~  58,501
100,200  ~  100,300
1,2  ~  1,2,003
1/3  ~  0.33
0.5  ~  0.5\%
.0000672  ~  0.000067
10000001  ~  10000002
\sqrt{2}  ~  1.41
\pi  ~  3.14
12  ~  12.001
5  ~  -5
\frac12  ~  \frac21
2^{10}  ~  10^2
1/2  ~  1/3
x  ~  y
p - q  ~  q - p
3R^2  ~  3r^2
(x+1)^2  ~  x^2+1
i  ~  1
1+i  ~  1-i
5  ~  1,5
1,5  ~  5
5  ~  4 = 5
5  ~  5 = 4 = 5
x=5  ~  y=4
1  ~  1, 2, 3, 4
(3,4]  ~  [3,4)
(3,4]  ~  (3,4)
(1,2)  ~  (2,1)
(1,2)  ~  \{1,2\}
\{1,2\}  ~  (1,2)
1,2  ~  1,2,3
1,2  ~  1,1
\{1,2\}  ~  \{1,3\}
(2,\infty)  ~  x<2
(2,\infty)  ~  x \ge 2
\text{(C)}  ~  B
\text{(C)}  ~  A, B, C, D
\text{(C)}  ~  A or C
C  ~  (D)
B  ~  A. B
\text{even}  ~  odd
\text{even}  ~  even or odd
\text{Evelyn}  ~  not Evelyn
15\mbox{ cm}^2  ~  15 \text{ cm}
5\text{ m}  ~  5 km
90^\circ  ~  \pi
52_8  ~  52_9
52_8  ~  42
5  ~  9^{9^{9^9}}
5  ~  -(10^{10^8})!
5  ~  \binom{10^9}{5\cdot10^8}
x  ~  2^{9^{9^9}}
5  ~  2^{-9^{9^9}}
5  ~  \infty
\begin{pmatrix} 1 \\ 2 \end{pmatrix}  ~  \begin{pmatrix} 2 \\ 1 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix}  ~  \begin{pmatrix} 1 & 2 \end{pmatrix}
"""
)
OPEN = pairs(
    r"""
\cot x  ~  \frac{\cos x}{\sin x}
\sqrt{x^2}  ~  x
\sqrt{3+2\sqrt2}  ~  1+\sqrt2
|x|  ~  x
5  ~  \lfloor 5.5 \rfloor
5  ~  9^{9^{9^9}} - 9^{9^{9^9}} + 5
1  ~  \frac{1}{0}
5  ~  5 5
5  ~  \frac{}
5  ~  (5
5  ~  5)
5  ~  七 🙂
\begin{pmatrix} 1 \\ 2 \end{pmatrix}  ~  (1,2)
x^{100}  ~  x^{99}
(x+y+z+w)^{60}  ~  1
"""
)
OPEN += [("(2,5)", r"x<2 \text{ or } x>5"), ("5", "{" * 90 + "5" + "}" * 90), ("5", "\ud800\x00")]


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


COMMANDS = (
    r"\\ \frac \sqrt \left \begin \end {pmatrix} \text{ \cup \{ \} \in \le \pm \pi \infty \binom \log \circ \overline"
)
OTHERS = (r"\overline", "and", "or", "to", "cm", "million", "²", "①", "𐩀", "٣", "½", "\u200b", "\ud800", "\x00")
PIECES = [*"0123456789xyie+-*/^_=<>()[]{},;:|!%&$.'~ ", *COMMANDS.split(), *OTHERS, "}}}", "9" * 50]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.lists(st.sampled_from(PIECES), max_size=14))
@settings(max_examples=1500, deadline=None)
def test_no_text_makes_it_stumble(gold: str, pieces: list[str]) -> None:
    answer = normalize("".join(pieces))
    assert same(normalize(gold), answer) in (True, False, None)
    assert same(answer, answer) is True


def test_two_sides_that_are_too_large_together_are_left_open() -> None:
    sum_of_powers = "+".join(f"x^{{{n}}}" for n in range(40))
    assert same(r"\frac{1}{(1+x)^{20}}", sum_of_powers) is None


def test_a_huge_number_divided_by_a_little_may_be_one_that_is_just_not_huge() -> None:
    assert same("2^{20000}", r"\frac{2^{20002}}{4}") is None
    assert same("2^{1000}", r"\frac{2^{20002}}{4}") is False
