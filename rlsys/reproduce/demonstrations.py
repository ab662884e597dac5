"""Demonstrations that think for longer or shorter, whatever the problem: without such, there is no length to force."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from rlsys.demonstrations import CLOSING, Demonstration, arithmetic_demonstrations
from rlsys.errors import ConfigError
from rlsys.types import Problem

CHECKS = (
    "Wait, verify this: ",
    "However, check this: ",
    "Let me double check: ",
    "Let me check this: ",
)
"""Beginnings of a line that says the result again. Two of them hold words that STILL-3 counts as acts of thinking
(arXiv 2503.04548), all of them have the same length in tokens of the small model."""


def checked_demonstrations(
    problems: Sequence[Problem], *, size: int, seed: int, again: float, most: int = 8, tool_share: float = 0.0
) -> list[Demonstration]:
    """`arithmetic_demonstrations` with idle checks behind the result: one more each time with probability `again`.

    There are at most `most`. Nothing is computed in them, so a policy that writes more of them is longer and no better.
    """
    if not 0 <= again < 1 or most < 0:
        raise ConfigError(f"need again in [0, 1) and most >= 0, got {again} and {most}")
    generator = random.Random(f"checks {seed}")
    made = arithmetic_demonstrations(problems, size=size, seed=seed, tool_share=tool_share)
    return [_with_checks(demonstration, _geometric(again, most, generator), generator) for demonstration in made]


def _with_checks(demonstration: Demonstration, count: int, generator: random.Random) -> Demonstration:
    answer = demonstration.problem.answer
    checks = "".join(f"{generator.choice(CHECKS)}{answer}\n" for _ in range(count))
    segments = tuple((text.replace(CLOSING, checks + CLOSING), trained) for text, trained in demonstration.segments)
    return replace(demonstration, segments=segments)


def _geometric(again: float, most: int, generator: random.Random) -> int:
    count = 0
    while count < most and generator.random() < again:
        count += 1
    return count
