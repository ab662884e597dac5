"""Program-written chains of thought about sums, short and long, for experiments in miniature."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from rlsys.demonstrations import CLOSING, Demonstration, drawn
from rlsys.errors import ConfigError, DataError
from rlsys.types import Problem

STYLES = ("direct", "steps", "checked")
"""`direct`: the answer from the head. `steps`: the problem, then a line for each partial sum. `checked`: the same, then
these lines again, several times, which brings nothing new."""

_SUM = re.compile(r"\d+( [+-] \d+)+")
_MORE_CHECKS = "Wait, check this:"


def sum_demonstrations(
    problems: Sequence[Problem], *, size: int, seed: int, styles: Mapping[str, float], checks: int = 2
) -> list[Demonstration]:
    """`size` demonstrations, all true; `styles` are shares of `STYLES`, and `checked` says it all `checks` more times.

    Problems need `metadata["expression"]`, a sum or difference of numbers, as reasoning-gym's chain_sum has it. They
    are gone through in a random order, again with new styles where `size` is larger.
    """
    if not problems or not styles or not set(styles) <= set(STYLES) or min(styles.values()) < 0 or checks < 1:
        raise ConfigError(
            f"sum_demonstrations: need problems, checks of at least 1, and shares of {', '.join(STYLES)}; got "
            f"{len(problems)} problems, checks={checks}, styles={dict(styles)}"
        )
    if not sum(styles.values()) > 0:
        raise ConfigError(f"sum_demonstrations: the shares in styles={dict(styles)} are all 0; give one that is not")
    generator = random.Random(seed)
    order = drawn(problems, size, generator)
    chosen = generator.choices(list(styles), weights=list(styles.values()), k=size)
    return [
        Demonstration(problem=problem, segments=((_turn(problem, style, checks), True),))
        for problem, style in zip(order, chosen, strict=True)
    ]


def partial_sums(problem: Problem) -> list[str]:
    """The lines `3 + 4 = 7`, `7 - 2 = 5` that lead from the first term to the sum."""
    expression = problem.metadata.get("expression")
    if not isinstance(expression, str) or not _SUM.fullmatch(expression):
        raise DataError(
            f"problem {problem.id!r}: metadata['expression'] is {expression!r}, not a sum such as '3 + 4 - 2'; "
            "use reasoning-gym's chain_sum"
        )
    first, *rest = expression.split(" ")
    total, lines = int(first), []
    for sign, term in zip(rest[0::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return lines


def _turn(problem: Problem, style: str, checks: int) -> str:
    lines = partial_sums(problem)
    answer = lines[-1].rpartition(" ")[2]
    if style == "direct":
        thought = f"I can do this in my head: {answer}"
    else:
        thought = "\n".join([f"Let me check this: {problem.metadata['expression']}", *lines])
        if style == "checked":
            thought += "".join("\n".join(["", _MORE_CHECKS, *lines]) for _ in range(checks))
    return f"<think>\n{thought}\n{CLOSING}</think>\n\\boxed{{{answer}}}"
