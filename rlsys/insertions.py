"""Where code can be put into a chain of thought: the words at which it turns, and hints that begin a block of code.

STILL-3 (arXiv 2503.04548) splits reasoning at such words and puts one of 14 hints there. Words and numbers are the
paper's; the wording of the hints is ours.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from rlsys.demonstrations import Segments

SPLIT_WORDS = ("Wait", "But", "Alternatively", "Hmm", "Moreover", "Furthermore")
"""Words with which a chain of thought turns."""

OPEN_FENCE = "```python\n"
"""The end of every hint: the model goes on with code."""

HINTS = tuple(
    f"{sentence}\n{OPEN_FENCE}"
    for sentence in (
        "Let me run a few lines of Python to be sure of this.",
        "I would rather compute this than trust my head.",
        "A short program can settle this step.",
        "Let me hand this calculation to Python.",
        "It is safer to check this numerically.",
        "I can test this claim with code.",
        "Let me verify what I have so far by running it.",
        "Working this out by hand invites mistakes, so here it is in Python.",
        "Let me go through the cases with a program.",
        "Let me see what Python makes of this expression.",
        "I can let sympy do the algebra here.",
        "Before I go on, I check the last result with code.",
        "A brute-force search tells me whether this holds.",
        "Let me write this step as code and look at the output.",
    )
)
"""Beginnings of a block of code, each the policy's own words."""

SplitAt = Literal["sentence", "line", "word"]
"""Where a word counts: as the first one of a sentence or line, of a line only, or anywhere."""

_BEHIND: dict[str, str] = {
    "line": r"(?:\A|(?<=\n))",
    "sentence": r"(?:\A|(?<=\n)|(?<=[.!?:] )|(?<=[.!?][\"')\]] )|(?<=<think>))",
    "word": r"\b",
}
_FENCE = re.compile(r"^```.*$", re.MULTILINE)
_BLOCK = re.compile(r"^```python$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A place in a turn, in characters from its beginning, and the word that stands there."""

    position: int
    word: str


def splits(
    segments: Segments,
    *,
    words: Sequence[str] = SPLIT_WORDS,
    split_at: SplitAt = "sentence",
    end: str = "</think>",
    behind: int = 0,
) -> list[Split]:
    """The places from `behind` on at which the policy's own words turn, in order.

    Tool output, the inside of a fence and what comes after `end` (the answer) are no places. Upper and lower case
    differ: in the middle of a sentence "but" is no turn.
    """
    text = "".join(part for part, _ in segments)
    own = "".join(part if trained else "\0" * len(part) for part, trained in segments)
    last = text.find(end) if end else -1
    choice = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    pattern = re.compile(rf"{_BEHIND[split_at]}(?:{choice})(?!\w)")
    fences = [match.start() for match in _FENCE.finditer(text)]
    return [
        Split(position=match.start(), word=match[0])
        for match in pattern.finditer(text)
        if match.start() >= behind
        and (last < 0 or match.start() < last)
        and own[match.start()] != "\0"
        and sum(fence < match.start() for fence in fences) % 2 == 0
    ]


def inserted(segments: Segments, position: int, hint: str) -> Segments:
    """The turn up to this place, and the hint behind it as the policy's own words."""
    ends = list(accumulate(len(text) for text, _ in segments))
    kept = [
        (text if position >= stop else text[: len(text) - (stop - position)], trained)
        for (text, trained), stop in zip(segments, ends, strict=True)
        if position > stop - len(text)
    ]
    if kept and kept[-1][1]:
        kept[-1] = (kept[-1][0] + hint, True)
    else:
        kept.append((hint, True))
    return tuple(kept)


def num_blocks(segments: Segments, position: int | None = None) -> int:
    """Blocks of code that the policy opened, up to this place or in all."""
    text = "".join(part if trained else "\n" * len(part) for part, trained in segments)
    return len(_BLOCK.findall(text[:position]))


def insertion(places: Sequence[Split], hints: Sequence[str], number: int, seed: str) -> tuple[Split, str]:
    """The `number`-th of a seeded series in which places and hints take turns, so that no two are soon the same."""
    generator = random.Random(seed)
    order, phrases = generator.sample(places, len(places)), generator.sample(hints, len(hints))
    return order[number % len(order)], phrases[number % len(phrases)]
