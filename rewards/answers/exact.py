r"""Exact arithmetic with what answers are made of: rational numbers, square roots, i, pi and free variables.

An `Exact` is a quotient of two polynomials with rational coefficients. Their generators are variables, pi, i (i^2 = -1)
and the square roots of primes (sqrt(p)^2 = p), which are linearly independent over the rationals: two such numbers are
equal if and only if their cross products have the same normal form. What has no such form (a cube root, a sine) becomes
an *opaque* generator, named by its own text: equal forms are then still equal, but different ones prove nothing.

No operation can take long: what would grow beyond stated bounds raises `Unreadable`, or is `HUGE`.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

MAX_BITS = 20_000
"""Of a numerator or denominator. No text of 400 characters can undo half as many by multiplying."""
MAX_TERMS = 150
MAX_DEGREE = 64
MAX_RADICAND = 10**8  # factored by trial division
IMAGINARY, PI, INFINITY = "i", "π", "∞"
OPAQUE, ROOT = "?", "√"

Monomial = tuple[tuple[str, int], ...]
"""Generators with their exponents, sorted by name."""
Polynomial = dict[Monomial, Fraction]
_ONE: Polynomial = {(): Fraction(1)}


class Unreadable(Exception):
    """Not an expression that is decided here; says nothing about its value."""


class Huge:
    """A rational number that has had more than MAX_BITS bits: different from all that have less than half as many."""

    def __repr__(self) -> str:
        return "HUGE"


HUGE = Huge()


class Exact:
    """An exact value. Immutable; `+ - * /` and unary `-` are its operations, `power` and `root` are functions."""

    __slots__ = ("denominator", "numerator")

    def __init__(self, numerator: Polynomial, denominator: Polynomial = _ONE) -> None:
        self.numerator = numerator
        self.denominator = denominator

    @classmethod
    def number(cls, value: int | Fraction) -> Exact:
        """A rational number."""
        return cls({(): Fraction(value)} if value else {})

    @classmethod
    def generator(cls, name: str) -> Exact:
        """A variable, or a constant that is none."""
        return cls({((name, 1),): Fraction(1)})

    def rational(self) -> Fraction | None:
        """The value where it is a rational number that is plain to see."""
        top, bottom = _constant(self.numerator), _constant(self.denominator)
        return None if top is None or bottom is None else top / bottom

    @property
    def generators(self) -> set[str]:
        """The names of all generators."""
        return {name for part in (self.numerator, self.denominator) for monomial in part for name, _ in monomial}

    def __add__(self, other: Exact) -> Exact:
        if self.denominator == other.denominator:
            return Exact(_sum(self.numerator, other.numerator), self.denominator)
        top = _sum(_product(self.numerator, other.denominator), _product(other.numerator, self.denominator))
        return Exact(top, _product(self.denominator, other.denominator))

    def __neg__(self) -> Exact:
        return Exact({monomial: -factor for monomial, factor in self.numerator.items()}, self.denominator)

    def __sub__(self, other: Exact) -> Exact:
        return self + -other

    def __mul__(self, other: Exact) -> Exact:
        return Exact(_product(self.numerator, other.numerator), _product(self.denominator, other.denominator))

    def __truediv__(self, other: Exact) -> Exact:
        if not other.numerator:
            raise Unreadable("a division by zero")
        return Exact(_product(self.numerator, other.denominator), _product(self.denominator, other.numerator))

    def same(self, other: Exact) -> bool | None:
        """Whether both are equal; None where opaque generators leave it open."""
        if _product(self.numerator, other.denominator) == _product(other.numerator, self.denominator):
            return True
        opaque = any(name.startswith(OPAQUE) for name in self.generators | other.generators)
        return None if opaque else False

    def proportional(self, other: Exact) -> bool:
        """Whether one is the other times a rational number other than 0."""
        left = _product(self.numerator, other.denominator)
        right = _product(other.numerator, self.denominator)
        if left.keys() != right.keys() or not left:
            return False
        return len({left[monomial] / right[monomial] for monomial in left}) == 1

    def key(self) -> str:
        """A text that is the same for values that were built the same way."""
        return f"{_text(self.numerator)}/{_text(self.denominator)}"

    def approximate(self) -> complex | None:
        """The value to some 15 digits of its largest term; None where it has variables."""
        if any(name not in (IMAGINARY, PI) and not name.startswith(ROOT) for name in self.generators):
            return None
        try:
            return _approximate(self.numerator) / _approximate(self.denominator)
        except (OverflowError, ZeroDivisionError):
            return None


Value = Exact | Huge


def add(left: Value, right: Value) -> Value:
    """The sum."""
    if isinstance(left, Huge) or isinstance(right, Huge):
        return _beside_huge(left, right)
    return left + right


def multiply(left: Value, right: Value) -> Value:
    """The product."""
    if isinstance(left, Huge) or isinstance(right, Huge):
        other = right if isinstance(left, Huge) else left
        return other if isinstance(other, Exact) and not other.numerator else _beside_huge(left, right)
    return left * right


def negate(value: Value) -> Value:
    """The opposite."""
    return value if isinstance(value, Huge) else -value


def divide(left: Value, right: Value) -> Value:
    """The quotient."""
    if isinstance(left, Huge) or isinstance(right, Huge):
        if isinstance(right, Exact) and not right.numerator:
            raise Unreadable("a division by zero")
        return left if isinstance(left, Exact) and not left.numerator else _beside_huge(left, right)
    return left / right


def _beside_huge(left: Value, right: Value) -> Huge:
    """A number of MAX_BITS stays one beside a number that a short text can write; two of them may cancel."""
    for value in (left, right):
        if isinstance(value, Exact) and value.rational() is None:
            raise Unreadable("a huge number beside what is no rational number")
    if isinstance(left, Huge) and isinstance(right, Huge):
        raise Unreadable("two huge numbers")
    return HUGE


def power(base: Value, exponent: Value) -> Value:
    """`base` to the `exponent`; what is neither an integer power nor a square root is opaque."""
    if isinstance(base, Huge) or isinstance(exponent, Huge):
        return _huge_power(base, exponent)
    times = exponent.rational()
    if times is None:
        return _opaque("^", base, exponent)
    if times.denominator == 1:
        return _integer_power(base, times.numerator)
    if times.denominator == 2:
        return _root_power(base, times)
    number = base.rational()
    if number is not None and number >= 0 and (exact := _exact_root(number, times.denominator)) is not None:
        return _integer_power(Exact.number(exact), times.numerator)
    return _opaque("^", base, exponent)


def _huge_power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Exact):
        number = base.rational()
        if number is not None and abs(number) not in (0, 1):
            return HUGE
    elif isinstance(exponent, Exact):
        times = exponent.rational()
        if times is not None and times.denominator == 1 and times != 0:
            return HUGE
    raise Unreadable("a power with a huge number")


def _root_power(base: Exact, times: Fraction) -> Value:
    try:
        return _integer_power(root(base), times.numerator)
    except Unreadable:
        return _opaque("^", base, Exact.number(times))


def _integer_power(base: Exact, times: int) -> Value:
    number = base.rational()
    if number is not None:
        bits = max(number.numerator.bit_length(), number.denominator.bit_length())
        if number not in (0, 1, -1) and (bits - 1) * abs(times) > MAX_BITS:
            return HUGE
        if number == 0 and times <= 0:
            raise Unreadable("a power of zero")
        return Exact.number(number**times if number not in (1, -1) else (1 if number == 1 or times % 2 == 0 else -1))
    if abs(times) > MAX_DEGREE:
        return _opaque("^", base, Exact.number(times))
    if times < 0:
        base, times = Exact.number(1) / base, -times
    result = Exact.number(1)
    for _ in range(times):
        result = result * base
    return result


def root(value: Exact) -> Exact:
    """The square root of a rational number, as a product of roots of primes; else Unreadable."""
    number = value.rational()
    if number is None:
        raise Unreadable("a root of what is no rational number")
    outside, inside = _square_and_rest(abs(number.numerator * number.denominator))
    result = Exact.number(Fraction(outside, number.denominator))
    for prime in inside:
        result = result * Exact.generator(f"{ROOT}{prime}")
    return result * Exact.generator(IMAGINARY) if number < 0 else result


def opaque_root(value: Exact, degree: int) -> Value:
    """The root of any degree: exact where that is possible, else opaque."""
    return power(value, Exact.number(Fraction(1, degree)))


def factorial(value: Value) -> Value:
    """`n!` of a whole number."""
    if isinstance(value, Huge):
        return HUGE
    number = value.rational()
    if number is None or number.denominator != 1 or number < 0:
        raise Unreadable("a factorial of what is no whole number")
    return Exact.number(math.factorial(int(number))) if number <= 300 else HUGE if number > 3000 else _too_large()


def binomial(above: Value, below: Value) -> Value:
    """The binomial coefficient of whole numbers."""
    if isinstance(above, Huge) or isinstance(below, Huge):
        raise Unreadable("a binomial coefficient of huge numbers")
    total, chosen = above.rational(), below.rational()
    if total is None or chosen is None or total.denominator != 1 or chosen.denominator != 1 or not 0 <= chosen <= total:
        raise Unreadable("a binomial coefficient of what are no whole numbers")
    fewer = int(min(chosen, total - chosen))
    if total <= 2000:
        return Exact.number(math.comb(int(total), fewer))
    if fewer and fewer * (math.log2(int(total)) - math.log2(fewer)) > MAX_BITS:  # (n / k)^k is a lower bound
        return HUGE
    return _too_large()


def function(name: str, argument: Value) -> Value:
    """A function that is not evaluated here."""
    if isinstance(argument, Huge):
        raise Unreadable("a function of a huge number")
    return _opaque(name, argument)


def _opaque(name: str, *values: Exact) -> Exact:
    return Exact.generator(f"{OPAQUE}{name}({','.join(value.key() for value in values)})")


def _too_large() -> Exact:
    raise Unreadable("a number that is too large to be written out and too small to be told by its size")


def _constant(polynomial: Polynomial) -> Fraction | None:
    if not polynomial:
        return Fraction(0)
    return polynomial.get(()) if len(polynomial) == 1 else None


def _sum(left: Polynomial, right: Polynomial) -> Polynomial:
    result = dict(left)
    for monomial, factor in right.items():
        total = result.get(monomial, 0) + factor
        if total:
            result[monomial] = total
        else:
            result.pop(monomial, None)
    return _bounded(result)


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    if left == _ONE:
        return right
    if right == _ONE:
        return left
    if len(left) * len(right) > 4 * MAX_TERMS:
        raise Unreadable("too many terms")
    result: Polynomial = {}
    for first, factor in left.items():
        for second, other in right.items():
            monomial, number = _monomial_product(first, second)
            total = result.get(monomial, 0) + factor * other * number
            if total:
                result[monomial] = total
            else:
                result.pop(monomial, None)
    return _bounded(result)


@functools.lru_cache(maxsize=4096)
def _monomial_product(left: Monomial, right: Monomial) -> tuple[Monomial, int]:
    """The product in normal form, with the number that i^2 = -1 and sqrt(p)^2 = p leave."""
    if not left or not right:
        return left or right, 1
    exponents = dict(left)
    for name, exponent in right:
        exponents[name] = exponents.get(name, 0) + exponent
    number = 1
    for name in list(exponents):
        if exponents[name] > 1 and (name == IMAGINARY or name.startswith(ROOT)):
            square = -1 if name == IMAGINARY else int(name.removeprefix(ROOT))
            number *= square ** (exponents[name] // 2)
            exponents[name] %= 2
            if not exponents[name]:
                del exponents[name]
    return tuple(sorted(exponents.items())), number


def _bounded(polynomial: Polynomial) -> Polynomial:
    if len(polynomial) > MAX_TERMS:
        raise Unreadable("too many terms")
    for factor in polynomial.values():
        if factor.numerator.bit_length() > MAX_BITS or factor.denominator.bit_length() > MAX_BITS:
            raise Unreadable("too many digits")
    return polynomial


def _text(polynomial: Polynomial) -> str:
    return "+".join(
        f"{factor}{''.join(f'*{name}^{times}' for name, times in monomial)}"
        for monomial, factor in sorted(polynomial.items())
    )


def _approximate(polynomial: Polynomial) -> complex:
    total = 0j
    for monomial, factor in polynomial.items():
        value = complex(factor)
        for name, times in monomial:
            if name == IMAGINARY:
                value *= 1j**times
            else:
                value *= (math.pi if name == PI else math.sqrt(int(name.removeprefix(ROOT)))) ** times
        total += value
    return total


@functools.lru_cache(maxsize=4096)
def _square_and_rest(number: int) -> tuple[int, tuple[int, ...]]:
    """`number` as outside^2 times a product of different primes."""
    whole = math.isqrt(number)
    if whole * whole == number:
        return whole, ()
    if number > MAX_RADICAND:
        raise Unreadable("a root of a large number")
    outside, inside, prime = 1, [], 2
    while prime * prime <= number:
        times = 0
        while number % prime == 0:
            number //= prime
            times += 1
        outside *= prime ** (times // 2)
        if times % 2:
            inside.append(prime)
        prime += 1 + (prime > 2)
    if number > 1:
        inside.append(number)
    return outside, tuple(inside)


def _exact_root(number: Fraction, degree: int) -> Fraction | None:
    """The root of a rational number where it is rational itself."""
    if degree > MAX_DEGREE:
        return None
    parts = []
    for part in (number.numerator, number.denominator):
        if part.bit_length() > 900:
            return None
        guess = round(part ** (1 / degree))
        if guess**degree != part:
            return None
        parts.append(guess)
    return Fraction(parts[0], parts[1])
