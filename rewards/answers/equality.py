"""When two answers are the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from rlsys.rewards.answers import exact
from rlsys.rewards.answers.exact import PI, Exact, Huge, Unreadable, Value
from rlsys.rewards.answers.expressions import Scalar
from rlsys.rewards.answers.forms import Based, Collection, Equation, Form, Group, Matrix, Union, read
from rlsys.rewards.answers.units import read_unit

PLACES = 0.5e-6
"""A decimal stands for an exact value that it is, rounded to six places, as long as it still has three digits of it."""
NOISE = 1e-6
"""Two decimals may differ so much, times the reference where that is below 1: as much as floating point may bring."""

_UNWRAP = re.compile(r"^\\(?:text|mbox|mathrm|mathbf|textbf|textrm|textit|mathit|operatorname)\s*\{([^{}]*)\}$")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?\(?([A-Za-z])\)?[.:]?|\(([A-Za-z])\)\s*\S.*|([A-Z])[.):]\s+\S.*"
    r"|\\text(?:bf)?\{\(?([A-Z])\)?[.:]?\s*\}(?:\\|~|\s)\s*\S.*",
    re.DOTALL | re.IGNORECASE,
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z'-]{2,}(?:\s+[A-Za-z'-]+)*")
_NUMBER = re.compile(
    r"\s*([+-]?)\s*(?:((?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*))(?:\.(\d*))?|(\d+)\s*/\s*(\d+)"
    r"|\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)(\d)))\s*",
    re.ASCII,
)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
_ARTICLES = re.compile(r"^(?:an?|the)\s+")


def same(gold: str, answer: str) -> bool | None:
    """Whether the answer is the reference answer; None where this cannot be said by exact arithmetic.

    Both are normalized texts (`rlsys.rewards.answers.spelling.normalize`).
    """
    if gold == answer:
        return True
    if (decided := same_numbers(gold, answer)) is not None:
        return decided
    letter = _choice(gold)
    if letter is not None and (chosen := _choice(answer)) is not None:
        return chosen == letter
    words, said = _words(gold), _words(answer)
    if words is not None and words == said:
        return True
    if gold.startswith("\\") and (letter is not None or words is not None):
        return False  # the reference is words or a letter for sure, and the answer is not the same
    if _DECIMAL_COMMA.fullmatch(answer) and answer.replace(",", ".") == gold:
        return True
    try:
        results = [_same(left, right) for left in read(gold) for right in read(answer)]
    except (Unreadable, RecursionError):  # each can be read, but what is made of both has too many terms
        return None
    if True in results:
        return True
    return None if None in results or not results else False


def same_numbers(gold: str, answer: str) -> bool | None:
    """As `same`, for plain numbers that need not be normalized: what most answers are, in a few microseconds."""
    number = plain_number(gold)
    if number is None or (found := plain_number(answer)) is None:
        return None
    if number == found:
        return True
    if "," in gold or "," in answer:
        return None  # perhaps several numbers of three digits
    return ("." in gold or "." in answer) and _is_near(float(number), float(found), gold_is_decimal="." in gold)


def plain_number(text: str) -> Fraction | None:
    r"""The number that a plain spelling (`-3`, `1,024.50`, `5/6`, `-\frac56`) stands for, else None."""
    found = _NUMBER.fullmatch(text) if len(text) <= 100 else None
    if found is None:
        return None
    if text.isdigit():
        return Fraction(int(text))
    sign, whole, decimals, above, below, top, bottom, digit, other = found.groups()
    if whole is not None:
        value = Fraction(f"{whole.replace(',', '') or 0}.{decimals}" if decimals else int(whole.replace(",", "")))
    else:
        under = int(below or bottom or other)
        if under == 0:
            return None
        value = Fraction(int(above or top or digit), under)
    return -value if sign == "-" else value


def _is_near(gold: complex, answer: complex, *, gold_is_decimal: bool) -> bool:
    difference, size = abs(gold - answer), abs(gold)
    if gold_is_decimal:
        return difference <= NOISE * min(1.0, size)
    return difference <= PLACES * (1 + 1e-6) and difference <= 1e-3 * size


def _choice(text: str) -> str | None:
    """The letter of a choice: `C`, `(C)`, `\\textbf{(C)}`, `(C) 12`, `C. 12`."""
    unwrapped = _UNWRAP.match(text)
    found = _CHOICE.fullmatch(unwrapped[1].strip() if unwrapped else text)
    return next(filter(None, found.groups())).upper() if found else None


def _words(text: str) -> str | None:
    unwrapped = _UNWRAP.match(text)
    plain = _ARTICLES.sub("", (unwrapped[1] if unwrapped else text).strip(" .").lower())
    return " ".join(plain.split()) if _WORDS.fullmatch(plain) else None


def _same(gold: Form, answer: Form) -> bool | None:
    if isinstance(gold, Equation) or isinstance(answer, Equation):
        return _same_equation(gold, answer)
    gold, answer = _only(gold), _only(answer)
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return _same_scalar(gold, answer)
    if isinstance(gold, Based) or isinstance(answer, Based):
        return _same_based(gold, answer)
    if isinstance(gold, Group) and isinstance(answer, Group):
        if len(gold.items) == 2 and (gold.opening, gold.closing) != (answer.opening, answer.closing):
            return False
        return _pairwise(gold.items, answer.items)
    if isinstance(gold, Collection) and isinstance(answer, Collection):
        return _any_order(gold.items, answer.items)
    if isinstance(gold, Group) and isinstance(answer, Collection):
        return False if answer.braces or gold.opening + gold.closing != "()" else _pairwise(gold.items, answer.items)
    if isinstance(gold, Collection) and isinstance(answer, Group):
        return False if gold.braces else _any_order(gold.items, answer.items)
    if isinstance(gold, Union) and isinstance(answer, Union):
        return _any_order(gold.parts, answer.parts)
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
            return False
        return _pairwise([cell for row in gold.rows for cell in row], [cell for row in answer.rows for cell in row])
    if isinstance(gold, Matrix) and isinstance(answer, Group) and all(isinstance(row, Group) for row in answer.items):
        rows = [row.items for row in answer.items if isinstance(row, Group)]
        return _same(gold, Matrix(tuple(rows)))  # [[1, 2], [3, 4]]
    if isinstance(gold, Matrix | Union) or isinstance(answer, Matrix | Union):
        return None  # a column and a tuple, a union that is one interval
    return False  # one value and several


def _only(form: Form) -> Form:
    """The item of a set or list of one."""
    return form.items[0] if isinstance(form, Collection) and len(form.items) == 1 and not form.braces else form


def _pairwise(gold: Sequence[Form], answer: Sequence[Form]) -> bool | None:
    if len(gold) != len(answer):
        return False
    results = [_same(left, right) for left, right in zip(gold, answer, strict=True)]
    return False if False in results else None if None in results else True


def _any_order(gold: Sequence[Form], answer: Sequence[Form]) -> bool | None:
    if len(gold) != len(answer):
        return False
    left, unsure = list(answer), False
    for item in gold:
        results = [_same(item, other) for other in left]
        if True in results:
            left.pop(results.index(True))
        elif None in results:
            unsure = True
        else:
            return False
    return None if unsure else True


def _same_equation(gold: Form, answer: Form) -> bool | None:
    """`x = 5` answers 5; two equations are the same where one is a multiple of the other."""
    if isinstance(answer, Equation) and not answer.true_so_far:
        return False  # "4 = 5" lists answers
    if not isinstance(answer, Equation):
        assert isinstance(gold, Equation)
        return _same(gold.right, answer) if _is_name(gold.left) else False
    if not isinstance(gold, Equation):
        return _same(gold, answer.left if _is_name(answer.right) and not _is_name(answer.left) else answer.right)
    named = _is_name(gold.left) and _is_name(answer.left)
    if named and (result := _pairwise(_sides(gold), _sides(answer))):
        return result
    values = [side.value for side in (*_sides(gold), *_sides(answer)) if isinstance(side, Scalar)]
    if len(values) < 4 or any(isinstance(value, Huge) for value in values):
        return None
    left, right, other_left, other_right = (value for value in values if isinstance(value, Exact))
    if (left - right).proportional(other_left - other_right):
        return True
    return False if named and right.approximate() is not None and other_right.approximate() is not None else None


def _sides(equation: Equation) -> tuple[Form, Form]:
    return equation.left, equation.right


def _is_name(form: Form) -> bool:
    """Whether this side only says what the other one is: `x`, `f(x)`, `(x, y)`."""
    if isinstance(form, Group):
        return all(map(_is_name, form.items))
    if not isinstance(form, Scalar) or isinstance(form.value, Huge) or form.value.approximate() is not None:
        return False
    monomials = [*form.value.numerator]
    return len(monomials) == 1 and form.value.numerator[monomials[0]] == 1 and form.value.denominator == {(): 1}


def _same_based(gold: Form, answer: Form) -> bool | None:
    if isinstance(gold, Based) and isinstance(answer, Based):
        return gold == answer
    if isinstance(gold, Based) and isinstance(answer, Scalar) and isinstance(answer.value, Exact):
        number = answer.value.rational()
        return number is not None and str(number) == gold.digits
    return None


def _same_scalar(gold: Scalar, answer: Scalar) -> bool | None:
    if isinstance(gold.value, Huge) or isinstance(answer.value, Huge):
        return None if _may_be_huge(gold.value) and _may_be_huge(answer.value) else False
    factor = _unit_factor(gold, answer)
    if factor is None:
        return False
    answer = replace(answer, value=answer.value * factor)
    if gold.percent == answer.percent or gold.unit or answer.unit:
        return _same_value(gold, answer)
    # "50%" may stand for 0.5, and for the 50 that is asked for in percent; "0.5%" is not 0.5.
    percent, plain = (gold, answer) if gold.percent else (answer, gold)
    hundredth = replace(percent, value=exact.divide(percent.value, Exact.number(100)))
    result = _same_value(hundredth, plain)
    number = plain.value.rational() if isinstance(plain.value, Exact) else None
    if result is False and number is not None and abs(number) >= 1:
        return _same_value(percent, plain)
    return result


def _may_be_huge(value: Value) -> bool:
    """Whether it is HUGE, or so large a number that a HUGE one divided by a little may be the same."""
    if isinstance(value, Huge):
        return True
    number = value.rational()
    bits = 0 if number is None else max(number.numerator.bit_length(), number.denominator.bit_length())
    return bits > exact.MAX_BITS // 2


def _same_value(gold: Scalar, answer: Scalar) -> bool | None:
    assert isinstance(gold.value, Exact)
    assert isinstance(answer.value, Exact)
    result = gold.value.same(answer.value)
    if result is False and (gold.decimal or answer.decimal):
        left, right = gold.value.approximate(), answer.value.approximate()
        if left is not None and right is not None:
            return _is_near(left, right, gold_is_decimal=gold.decimal)
    return result


def _unit_factor(gold: Scalar, answer: Scalar) -> Exact | None:
    """What the answer is multiplied by to be in the reference's unit; None where the units exclude each other.

    A unit on one side only is no difference, except that an angle without one is in radians where pi is in it.
    """
    if gold.unit == answer.unit:
        return Exact.number(1)
    if not gold.unit or not answer.unit:
        bare, unit = (answer, gold.unit) if gold.unit else (gold, answer.unit)
        assert isinstance(bare.value, Exact)
        if unit == "degree" and PI in bare.value.generators:
            degrees = Exact.number(180) / Exact.generator(PI)
            return degrees if bare is answer else Exact.number(1) / degrees
        return Exact.number(1)
    ours, theirs = read_unit(gold.unit), read_unit(answer.unit)
    if ours is None or theirs is None or ours[0] != theirs[0]:
        return None
    return Exact.number(theirs[1] / ours[1])
