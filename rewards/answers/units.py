"""Units of measurement, as far as answers to problems name them: 5 cm is 0.05 m, and 5 cm is not 5 m."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

_UNITS = {
    "length": {
        "mm millimeter millimetre": "1/1000",
        "cm centimeter centimetre": "1/100",
        "m meter metre": "1",
        "km kilometer kilometre": "1000",
        "in inch": "254/10000",
        "ft foot feet": "3048/10000",
        "yd yard": "9144/10000",
        "mi mile": "1609344/1000",
    },
    "time": {"s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800"},
    "mass": {"mg milligram": "1/1000", "g gram": "1", "kg kilogram": "1000", "ton tonne": "1000000"},
    "weight": {"oz ounce": "1", "lb pound": "16"},
    "money": {"dollar usd": "1", "cent": "1/100"},
    "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1"},
    "angle": {"degree deg": "1"},
    "turn": {"radian rad": "1"},
}
_FACTORS = {
    name: (dimension, Fraction(factor))
    for dimension, units in _UNITS.items()
    for names, factor in units.items()
    for name in names.split()
}
_POWER = re.compile(r"\^?\s*\{?\s*([23])\s*\}?$")
_WORD_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}

MULTIPLES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
"""Words that stand behind a number and multiply it."""

Unit = tuple[tuple[tuple[str, int], ...], Fraction]
"""The dimensions with their exponents, sorted, and the factor to the dimension's own unit."""


@functools.lru_cache(maxsize=1024)
def read_unit(text: str) -> Unit | None:
    """The unit that `text` names, such as "cm", "square inches" or "miles per hour"; None where it names none."""
    above, *below = re.split(
        r"\s+per\s+|/", re.sub(r"\s*\^\s*", "^", text.strip().lower()).replace("mph", "miles per hour")
    )
    if len(below) > 1:
        return None
    parts = [(_single(above), 1), *((_single(part), -1) for part in below)]
    dimensions: dict[str, int] = {}
    factor = Fraction(1)
    for single, sign in parts:
        if single is None:
            return None
        dimension, size, power = single
        dimensions[dimension] = dimensions.get(dimension, 0) + sign * power
        factor *= size ** (sign * power)
    return tuple(sorted(dimensions.items())), factor


def _single(text: str) -> tuple[str, Fraction, int] | None:
    words = text.replace(".", "").split()
    power = 1
    if words and words[0] in _WORD_POWERS:
        power = _WORD_POWERS[words.pop(0)]
    if len(words) != 1:
        return None
    word = words[0]
    if found := _POWER.search(word):
        power *= int(found[1])
        word = word[: found.start()]
    for name in (word, word.removesuffix("s"), word.removesuffix("es")):
        if name in _FACTORS:
            return *_FACTORS[name], power
    return None
