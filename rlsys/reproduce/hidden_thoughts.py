"""Program-written demonstrations of hidden thoughts, for a tiny model to begin with: mostly of bad ones.

They make the seed of a miniature: without a thought prompt it answers from its head; asked for thoughts, it mostly
guesses or talks, sometimes loses the form, and only now and then thinks step by step, which is what helps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlsys.demonstrations import DIRECT_OPENINGS, Demonstration, drawn
from rlsys.errors import ConfigError
from rlsys.reproduce.sums import partial_sums
from rlsys.thoughts import ThoughtConfig, Thoughts
from rlsys.types import Problem

STYLES = ("direct", "worked", "steps", "guess", "talk", "formless")
"""`direct`: the answer alone. `worked`: asked for it in the prompt, partial sums in front of the answer. The others
follow the thought prompt. `steps`: partial sums as the thought; `guess`: a number, mostly wrong, which is then the
answer; `talk`: sentences in front of the right answer; `formless`: such talk that never comes to a response."""

WORKED = " Solve with steps"
"""What asks for partial sums: a model that knows how, but seldom does so in its thoughts."""

_TALK = (2, 4)


_UNASKED = ("direct", "worked")


def thought_demonstrations(
    problems: Sequence[Problem],
    *,
    size: int,
    seed: int,
    thought: Mapping[str, Any],
    shares: Mapping[str, float],
    ask: bool = True,
) -> list[Demonstration]:
    r"""`size` demonstrations in these styles (see `STYLES`), `shares` of each; all but guesses have the right answer.

    `thought` is what the run's `chat.thought` will be; here the prompt is part of the problem, so that one stage of
    fine-tuning has demonstrations with and without it: `chat.thought` must be null in that stage. With `ask: false` the
    prompt is left to the run's `chat.thought`, and there are no `direct` and no `worked` ones. Problems need
    `metadata["expression"]`, a sum (reasoning-gym's chain_sum). Responses are `\boxed{...}`.

    Raises:
        ConfigError: an unknown style, shares that are not 1 in all, or such styles with `ask: false`.
    """
    unknown = sorted(set(shares) - set(STYLES))
    if unknown or abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0 or not problems:
        raise ConfigError(
            f"shares {dict(shares)} of thought_demonstrations must be of {', '.join(STYLES)} and add up to 1, and "
            f"there must be problems ({len(problems)})"
        )
    if not ask and (unasked := [style for style in _UNASKED if shares.get(style)]):
        raise ConfigError(f"thought_demonstrations with ask=false asks all for thoughts; leave out {unasked} of shares")
    thoughts, generator = Thoughts(ThoughtConfig(**thought)), random.Random(seed)
    order = drawn(problems, size, generator)
    styles = generator.choices(list(shares), weights=list(shares.values()), k=size)
    found = [_demonstration(problem, style, thoughts, generator) for problem, style in zip(order, styles, strict=True)]
    return found if ask else [replace(one, problem=own) for one, own in zip(found, order, strict=True)]


def _demonstration(problem: Problem, style: str, thoughts: Thoughts, generator: random.Random) -> Demonstration:
    steps = "".join(f"{step}\n" for step in partial_sums(problem))
    if style == "direct":
        return Demonstration(problem=problem, segments=((_boxed(problem.answer), True),))
    if style == "worked":
        *before, last = problem.prompt
        asked = replace(problem, prompt=(*before, {**last, "content": f"{last['content']}{WORKED}"}))
        return Demonstration(problem=asked, segments=((f"{steps}{_boxed(problem.answer)}", True),))
    answer: int | str | None = problem.answer
    if style == "steps":
        thought = steps
    else:
        thought = "\n".join(generator.choice(DIRECT_OPENINGS) for _ in range(generator.randint(*_TALK)))
        if style == "guess":
            answer = generator.randint(-40, 40)
            thought += f" {answer}"
        thought += "\n"
    mark, opening = thoughts.config.response_mark, thoughts.config.thought_mark or ""
    text = f"{opening}{thought}" if style == "formless" else f"{opening}{thought}{mark}{_boxed(answer)}"
    asked = replace(problem, prompt=tuple(thoughts.instruct(problem)))
    return Demonstration(problem=asked, segments=((text, True),))


def _boxed(answer: object) -> str:
    return f"\\boxed{{{answer}}}"
