r"""What a final answer can be.

An answer is a number with its unit or percent sign, an expression, a tuple or an interval, a set or a bare list (in any
order), a union of intervals, a matrix, an equation, or a number in another base.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rlsys.rewards.answers.exact import INFINITY, PI, Exact, Huge, Unreadable, multiply
from rlsys.rewards.answers.expressions import Scalar, read_scalars
from rlsys.rewards.answers.latex import THOUSANDS, WRAPPED, encloses, split, tokenize
from rlsys.rewards.answers.units import MULTIPLES, read_unit

MAX_CHARACTERS = 400
"""A longer answer is for a process with a deadline."""
MAX_ITEMS = 64

_BASED = re.compile(r"\(?([0-9A-Fa-f]+)\)?_\s*\{?\s*(?:\\text\s*\{)?\s*(?:base)?[\s}]*(\d{1,2}|[a-z]+)[\s}]*", re.ASCII)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree)\s*$")
_WRAPPED_UNIT = re.compile(rf"({WRAPPED})\s*(\^\s*(?:\{{\s*)?[23](?:\s*\}})?)?\s*$")
_PLAIN_UNIT = re.compile(r"\s*([A-Za-z][A-Za-z./ ]{1,30}(?:\^\s*(?:\{\s*)?[23](?:\s*\})?)?)$")
_INNER = re.compile(r"\{([^{}]*)\}")
_INFINITY = Exact.generator(INFINITY)
_COLON = frozenset([":", "|"])
_COMMAS = frozenset([",", ";"])
_ORDER = frozenset(["<", ">", r"\le", r"\ge"])
_RELATIONS = frozenset(["=", "<", ">", r"\le", r"\ge", r"\in"])
_MATRICES = frozenset(["pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array"])


@dataclass(frozen=True, slots=True)
class Group:
    """A tuple, or with two items perhaps an interval."""

    opening: str
    closing: str
    items: tuple[Form, ...]


@dataclass(frozen=True, slots=True)
class Collection:
    """Items in any order: a set in braces, or a bare list."""

    items: tuple[Form, ...]
    braces: bool


@dataclass(frozen=True, slots=True)
class Union:
    """Sets that are united, in any order."""

    parts: tuple[Form, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of cells."""

    rows: tuple[tuple[Form, ...], ...]


@dataclass(frozen=True, slots=True)
class Equation:
    """Two sides; of a chain the first and the last."""

    left: Form
    right: Form
    true_so_far: bool
    """Whether all sides that are plain numbers agree."""


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a base that is named."""

    digits: str
    base: int


Form = Scalar | Group | Collection | Union | Matrix | Equation | Based


@functools.lru_cache(maxsize=4096)
def read(text: str) -> tuple[Form, ...]:
    """What an answer may mean: mostly one thing, nothing where it has no form that is known here.

    In "(100,200)" there are two numbers or one with a comma between its thousands, so it means either.
    """
    if len(text) > MAX_CHARACTERS:
        return ()
    if (based := _BASED.fullmatch(text)) and (based[2].isdigit() or based[2] in _BASES):
        return (Based(based[1].lstrip("0").lower(), _BASES.get(based[2]) or int(based[2])),)
    spellings = [text]
    if THOUSANDS.search(text):
        spellings.append(THOUSANDS.sub(lambda found: found[0].replace(",", ""), text))
    forms = []
    for spelling in spellings:
        with contextlib.suppress(Unreadable):  # the other one may be readable
            forms.append(_read(_with_commas(tokenize(spelling))))
    return tuple(forms)


def _with_commas(tokens: list[str]) -> list[str]:
    """The tokens with commas for "and" and "or", and one comma where several would stand.

    Between inequalities "or" unites, and "and" is left to be unreadable.
    """
    found: list[str] = []
    ordered = not _ORDER.isdisjoint(tokens)
    signs = {"or": r"\cup"} if ordered else {"or": ",", "and": ","}
    for token in tokens:
        inner = _INNER.search(token) if len(token) > 1 and token[0] == "\\" else None
        word = (inner[1] if inner else token).strip(" ,").lower()
        token = signs.get(word, ":" if word == "to" else token)
        if token != "," or not found or found[-1] != ",":
            found.append(token)
    return found


def _read(tokens: Sequence[str]) -> Form:
    if not tokens:
        raise Unreadable("nothing")
    parts = split(tokens, _COMMAS)
    if len(parts) > 1:
        return Collection(_items(parts), braces=False)
    if r"\cup" in tokens:
        parts = split(tokens, frozenset([r"\cup"]))
        if len(parts) > 1:
            return Union(tuple(_read(part) for part in parts))
    if not _RELATIONS.isdisjoint(tokens):
        parts = split(tokens, _RELATIONS)
        if len(parts) > 1:
            return _relation(tokens, parts)
    if encloses(tokens):
        parts = split(tokens[1:-1], _COMMAS)
        if tokens[0] == r"\{":
            return _set(tokens[1:-1], parts)
        if tokens[1] == r"\begin":
            return _matrix(tokens[1:-1])
        if len(parts) > 1:
            return Group(tokens[0], tokens[-1], tuple(_read(part) for part in parts))
    if r"\begin" in tokens:
        return _multiple(tokens)
    if tokens == [r"\emptyset"]:
        return Collection((), braces=True)
    if tokens == [r"\mathbb", "{", "R", "}"]:
        return Group("(", ")", (Scalar(value=-_INFINITY), Scalar(value=_INFINITY)))
    if len(parts := split(tokens, _COLON)) > 1:
        return Group(":", ":", tuple(_read(part) for part in parts))
    if (measured := _measured(" ".join(tokens))) is not None:
        return measured
    scalars = read_scalars(tokens)
    return scalars[0] if len(scalars) == 1 else Collection(tuple(scalars), braces=False)


def _set(tokens: Sequence[str], parts: list[list[str]]) -> Form:
    r"""What stands in braces: items, nothing, or a condition as in `\{x : x > 2\}`."""
    if not tokens:
        return Collection((), braces=True)
    condition = split(tokens, _COLON)
    if len(condition) == 2 and condition[0][:1] != [] and condition[0][0] in condition[1]:
        return _read(condition[1])
    return Collection(_items(parts), braces=True)


def _items(parts: Iterable[Sequence[str]]) -> tuple[Form, ...]:
    items: list[Form] = []
    for part in parts:
        form = _read(part)
        items += form.items if isinstance(form, Collection) and not form.braces else (form,)
    if len(items) > MAX_ITEMS:
        raise Unreadable("too many items")
    return tuple(items)


def _matrix(tokens: Sequence[str]) -> Matrix:
    if len(tokens) < 9 or tokens[2] not in _MATRICES or list(tokens[-4:]) != [r"\end", "{", tokens[2], "}"]:
        raise Unreadable("no matrix")
    start = 4
    if tokens[2] == "array" and tokens[start] == "{":
        start = list(tokens).index("}", start) + 1
    body = tokens[start:-4]
    rows = [row for row in split(body, frozenset([r"\\"])) if row]
    return Matrix(tuple(tuple(_read(cell) for cell in split(row, frozenset(["&"]))) for row in rows))


def _multiple(tokens: Sequence[str]) -> Matrix:
    """A matrix, perhaps with a number in front."""
    start = list(tokens).index(r"\begin")
    matrix = _matrix(tokens[start:])
    if not start:
        return matrix
    (factor,) = read_scalars(tokens[:start])

    def times(cell: Form) -> Scalar:
        if not isinstance(cell, Scalar):
            raise Unreadable("a matrix of what are no numbers")
        return replace(cell, value=multiply(factor.value, cell.value))

    return Matrix(tuple(tuple(map(times, row)) for row in matrix.rows))


def _measured(text: str) -> Scalar | None:
    """A number with a unit behind it."""
    if found := _DEGREES.search(text):
        unit = "degree"
    elif found := _WRAPPED_UNIT.search(text):
        inner = _INNER.search(found[1])
        unit = (inner[1].strip(" ~\\,") if inner else "") + (found[2] or "").replace(" ", "")
    elif (found := _PLAIN_UNIT.search(text)) and (
        found[1].split()[0].lower() in MULTIPLES or read_unit(found[1]) is not None
    ):
        unit = found[1]
    else:
        return None
    number = text[: found.start()].strip()
    if not any(character.isdigit() for character in number):
        return None
    scalars = read_scalars(tokenize(number))
    if len(scalars) != 1:
        raise Unreadable("two values with a unit")
    unit = unit.strip().lower()
    multiple, _, rest = unit.partition(" ")
    if multiple in MULTIPLES:
        value = multiply(scalars[0].value, Exact.number(MULTIPLES[multiple]))
        return replace(scalars[0], value=value, unit=rest.strip())
    return replace(scalars[0], unit=unit)


def _is_unit(text: str) -> bool:
    return text.split()[0].lower() in MULTIPLES or read_unit(text) is not None


def _relation(tokens: Sequence[str], parts: list[list[str]]) -> Form:
    depth, signs = 0, []
    for token in tokens:
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        if depth == 0 and token in _RELATIONS:
            signs.append(token)
    if r"\in" in signs:
        if len(signs) > 1:
            raise Unreadable("a chain with a membership")
        return _read(parts[1])
    sides = [_read(part) for part in parts]
    if set(signs) == {"="}:
        numbers = {
            side.value.rational() for side in sides if isinstance(side, Scalar) and isinstance(side.value, Exact)
        }
        return Equation(sides[0], sides[-1], len(numbers - {None}) <= 1)
    return _inequality(signs, sides)


def _inequality(signs: list[str], sides: list[Form]) -> Group:
    """`2 < x \\le 5` as the interval that it means; Unreadable where it is about more than one variable."""
    if signs[0] in (">", r"\ge"):
        mirrored = {">": "<", r"\ge": r"\le"}
        signs, sides = [mirrored.get(sign, "") for sign in reversed(signs)], sides[::-1]
    if not set(signs) <= {"<", r"\le"}:
        raise Unreadable("an inequality in two directions")
    if len(sides) == 2 and _is_variable(sides[0]):
        sides, signs = [Scalar(value=-_INFINITY), *sides], ["<", *signs]
    elif len(sides) == 2 and _is_variable(sides[1]):
        sides, signs = [*sides, Scalar(value=_INFINITY)], [*signs, "<"]
    if len(sides) != 3 or not _is_variable(sides[1]) or not all(map(_is_constant, (sides[0], sides[2]))):
        raise Unreadable("an inequality that is no interval")
    return Group("[" if signs[0] == r"\le" else "(", "]" if signs[1] == r"\le" else ")", (sides[0], sides[2]))


def _is_variable(form: Form) -> bool:
    if not isinstance(form, Scalar) or isinstance(form.value, Huge):
        return False
    names = form.value.generators
    return len(names) == 1 and form.value.key() == Exact.generator(*names).key() and names.isdisjoint((PI, INFINITY))


def _is_constant(form: Form) -> bool:
    if not isinstance(form, Scalar) or isinstance(form.value, Huge):
        return False
    return form.value.approximate() is not None or form.value.generators == {INFINITY}
