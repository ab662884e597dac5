r"""Reads one mathematical expression, in LaTeX or as people type it, into an exact value.

It knows sums, products (also without a sign), quotients, powers, roots, factorials, binomial coefficients, `\pm` and
the names of functions. Everything else is `Unreadable`, which says nothing about the value: a computer algebra system
may know more. The work is bounded by the length of the text and by the bounds of `exact`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from rlsys.rewards.answers import exact
from rlsys.rewards.answers.exact import IMAGINARY, INFINITY, PI, Exact, Huge, Unreadable, Value
from rlsys.rewards.answers.latex import FACTORS, FUNCTIONS, GREEK

_DIGITS = frozenset("0123456789.")
_BASE_E = f"_{Exact.generator(exact.OPAQUE + 'e').key()}"
MAX_DEPTH = 40
"""Nested brackets, fractions and roots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """One value and how it was written: `decimal` with a decimal point, `percent` with a percent sign behind it."""

    value: Value
    decimal: bool = False
    percent: bool = False
    unit: str = ""


def read_scalars(tokens: Sequence[str]) -> list[Scalar]:
    r"""The value of an expression; two of them, + first, where it has a `\pm`.

    Raises:
        Unreadable: it is not one, or has more in it than is known here.
    """
    tokens = list(tokens)
    percent = len(tokens) > 1 and tokens[-1] == "%"
    if percent:
        tokens.pop()
    signs = (1, -1) if r"\pm" in tokens or r"\mp" in tokens else (1,)
    found = []
    for sign in signs:
        reader = _Reader(list(tokens), sign)
        value = reader.read_all()
        found.append(Scalar(value=value, decimal=reader.decimal, percent=percent))
    return found


@dataclass(slots=True)
class _Reader:
    """A recursive descent through the tokens of one expression."""

    tokens: list[str]
    sign: int
    position: int = 0
    depth: int = 0
    decimal: bool = field(default=False)

    def read_all(self) -> Value:
        value = self._sum()
        if self.position != len(self.tokens):
            raise Unreadable(f"{self.tokens[self.position]!r} where nothing more was expected")
        return value

    def _peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self.position += 1
        return token

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise Unreadable(f"no {token!r} where it is needed")

    def _sum(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        total: Value | None = None
        while total is None or self._peek() in ("+", "-", r"\pm", r"\mp"):
            sign = 1
            while self._peek() in ("+", "-", r"\pm", r"\mp"):
                token = self._take()
                sign *= {"+": 1, "-": -1, r"\pm": self.sign, r"\mp": -self.sign}[token]
            term = self._term()
            term = exact.negate(term) if sign < 0 else term
            total = term if total is None else exact.add(total, term)
        self.depth -= 1
        return total

    def _term(self) -> Value:
        value = self._factor()
        while True:
            token = self._peek()
            if token == "*":
                self._take()
                value = exact.multiply(value, self._signed_factor())
            elif token == "/":
                self._take()
                value = exact.divide(value, self._signed_factor())
            elif self._starts_factor(token):
                if token[0] in _DIGITS:
                    raise Unreadable("a number right behind a factor")
                value = exact.multiply(value, self._factor())
            else:
                return value

    def _signed_factor(self) -> Value:
        sign = 1
        while self._peek() in ("+", "-"):
            sign *= -1 if self._take() == "-" else 1
        value = self._factor()
        return exact.negate(value) if sign < 0 else value

    @staticmethod
    def _starts_factor(token: str) -> bool:
        return bool(token) and (token[0] in _DIGITS or (token.isascii() and token.isalpha()) or token in FACTORS)

    def _factor(self) -> Value:
        value = self._atom()
        while self._peek() in ("!", "^"):
            if self._take() == "!":
                value = exact.factorial(value)
            else:
                return exact.power(value, self._exponent())
        return value

    def _exponent(self) -> Value:
        """What stands behind `^`; towers of powers go from the top down."""
        sign = -1 if self._peek() == "-" else 1
        if self._peek() in ("+", "-"):
            self._take()
        if self._peek() == "{":
            value = self._bracketed("}")
            if self._peek() == "^":
                raise Unreadable("a power of a superscript")
        else:
            value = self._factor()
        return exact.negate(value) if sign < 0 else value

    def _bracketed(self, closing: str) -> Value:
        self._take()
        value = self._sum()
        self._expect(closing)
        return value

    def _atom(self) -> Value:
        token = self._peek()
        if token in ("(", "{", "["):
            return self._bracketed({"(": ")", "{": "}", "[": "]"}[token])
        self._take()
        if token[:1] in _DIGITS:
            return self._number(token)
        if token == r"\frac":
            return exact.divide(self._argument(), self._argument())
        if token == r"\binom":
            return exact.binomial(self._argument(), self._argument())
        if token == r"\sqrt":
            return self._root()
        if token == r"\pi":
            return Exact.generator(PI)
        if token == r"\infty":
            return Exact.generator(INFINITY)
        if token in FUNCTIONS:
            return self._function(token)
        if token.isascii() and token.isalpha():
            return self._letters(token)
        if token in GREEK:
            return self._variable(token)
        raise Unreadable(f"{token!r} is not known here")

    def _number(self, token: str) -> Value:
        self.decimal |= "." in token
        if len(token) > exact.MAX_BITS // 4:
            raise Unreadable("too many digits")
        value = Fraction(token.rstrip(".") or "0")
        if self._peek() == r"\overline":
            return self._repeating(token)
        if self._peek() == r"\frac" and value.denominator == 1:
            return self._mixed(value)
        return Exact.number(value)

    def _repeating(self, text: str) -> Value:
        r"""`0.1\overline{6}` is 1/6."""
        self._take()
        self._expect("{")
        digits = self._take()
        self._expect("}")
        whole, point, fixed = text.partition(".")
        if not point or not (digits.isascii() and digits.isdigit()):
            raise Unreadable("a line over what are no decimals")
        self.decimal = False  # exact, not rounded
        scale = 10 ** len(fixed)
        repeated = Fraction(int(digits), scale * (10 ** len(digits) - 1))
        return Exact.number(Fraction(int(whole + fixed), scale) + repeated)

    def _mixed(self, whole: Fraction) -> Value:
        r"""`1\frac{4}{5}` is 9/5, but `2\frac{x}{3}` is a product."""
        start = self.position
        part = self._atom()
        fraction = part.rational() if isinstance(part, Exact) else None
        if fraction is not None and 0 < fraction < 1 and "^" not in self.tokens[start : self.position]:
            return Exact.number(whole + fraction)
        return exact.multiply(Exact.number(whole), part)

    def _argument(self) -> Value:
        r"""What a command such as `\frac` takes: a group, or one character."""
        token = self._peek()
        if token == "{":
            return self._bracketed("}")
        if len(token) > 1 and token.isascii() and token.isalnum():  # \frac43, \sqrt2x
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]]
            self._take()
            return Exact.number(int(token[0])) if token[0].isdigit() else self._letters(token[0])
        return self._atom()

    def _root(self) -> Value:
        degree = 2
        if self._peek() == "[":
            self._take()
            token = self._take()
            self._expect("]")
            if not (token.isascii() and token.isdigit()) or not 2 <= int(token) <= exact.MAX_DEGREE:
                raise Unreadable("a root of an odd degree")
            degree = int(token)
        value = self._argument()
        if isinstance(value, Huge):
            raise Unreadable("a root of a huge number")
        return exact.opaque_root(value, degree)

    def _function(self, name: str) -> Value:
        marks = ""
        while self._peek() in ("^", "_"):
            mark = self._take()
            value = self._bracketed("}") if self._peek() == "{" else self._atom()
            if isinstance(value, Huge):
                raise Unreadable("a huge number in a function's name")
            marks += mark + value.key()
        if self._peek() in ("(", "{"):
            argument = self._atom()
        else:
            argument = self._factor()
            while self._starts_factor(self._peek()) and self._peek() not in FUNCTIONS:
                argument = exact.multiply(argument, self._factor())
        if (name, marks) == (r"\log", _BASE_E):
            name, marks = r"\ln", ""
        return exact.function(name + marks, argument)

    def _letters(self, token: str) -> Value:
        """Letters without a space between them are variables that are multiplied; a subscript is part of the last."""
        value: Value = Exact.number(1)
        for letter in token[:-1]:
            value = exact.multiply(value, _named(letter))
        return exact.multiply(value, self._variable(token[-1]))

    def _variable(self, name: str) -> Value:
        if self._peek() != "_":
            return _named(name)
        self._take()
        if self._peek() == "{":
            end = self.tokens.index("}", self.position) if "}" in self.tokens[self.position :] else len(self.tokens)
            subscript = "".join(self.tokens[self.position + 1 : end])
            self.position = end + 1
        else:
            subscript = self._take()
        if not (subscript.isascii() and subscript.isalnum()):
            raise Unreadable("a subscript that is no name")
        return Exact.generator(f"{name}_{subscript}")


def _named(letter: str) -> Exact:
    return Exact.generator(IMAGINARY if letter == "i" else f"{exact.OPAQUE}e" if letter == "e" else letter)
