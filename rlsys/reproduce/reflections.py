"""Program-written chains of thought that turn ("Wait, ..."), with and without code: material to put code into."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from rlsys.demonstrations import CLOSING, DIRECT_OPENINGS, TOOL_OPENINGS, Demonstration, Segments, drawn, expression_of
from rlsys.errors import ConfigError
from rlsys.reproduce.sums import partial_sums
from rlsys.types import Problem

KINDS = ("direct", "run", "unrun")
"""`direct`: partial sums from the head, the last one behind a turn. `run`: a block of code, perhaps behind such a sum,
and its output. `unrun`: such a block that nobody runs, and all partial sums behind it."""

TURNS = ("Wait,", "However,")
"""Words with which a chain of thought turns."""


def reflective_demonstrations(
    problems: Sequence[Problem], *, size: int, seed: int, shares: Mapping[str, float]
) -> list[Demonstration]:
    """`size` demonstrations, all true; `shares` are those of `KINDS`, and need not add up to 1.

    Problems need `metadata["expression"]`, a Python expression whose value is the answer (reasoning-gym's chain_sum and
    products have one). They are gone through in a random order, again where `size` is larger.

    Raises:
        ConfigError: there are no problems, or a share is of no kind or below 0.
        DataError: a problem has no expression or no answer.
    """
    if not problems or not set(shares) <= set(KINDS) or min(shares.values(), default=0) < 0 or not sum(shares.values()):
        raise ConfigError(
            f"reflective_demonstrations: need problems and shares of {', '.join(KINDS)}, none below 0 and one above; "
            f"got {len(problems)} problems and shares={dict(shares)}"
        )
    generator = random.Random(seed)
    order = drawn(problems, size, generator)
    kinds = generator.choices(list(shares), weights=list(shares.values()), k=size)
    return [
        Demonstration(problem=problem, segments=_turn(problem, kind, generator))
        for problem, kind in zip(order, kinds, strict=True)
    ]


def _turn(problem: Problem, kind: str, generator: random.Random) -> Segments:
    expression, answer = expression_of(problem), problem.answer
    end = f"{CLOSING}</think>\n\\boxed{{{answer}}}"
    lines = partial_sums(problem)
    if kind == "direct":
        lines[-1] = f"{generator.choice(TURNS)} {lines[-1]}"
        return (("\n".join(["<think>", generator.choice(DIRECT_OPENINGS), *lines, end]), True),)
    begun = lines[: generator.randrange(len(lines))]  # code may come at any place
    block = "\n".join(["<think>", *begun, generator.choice(TOOL_OPENINGS), f"```python\n{expression}\n```\n"])
    if kind == "run":
        return ((block, True), (f"```output\n{answer}\n```\n", False), (end, True))
    return ((block + "\n".join([*lines, end]), True),)
