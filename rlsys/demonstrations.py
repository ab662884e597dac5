"""Program-written demonstrations for a short supervised cold start: what thinking and a tool call look like.

They teach a form, not arithmetic: a small model that imitates the direct ones is mostly wrong, one that imitates the
tool calls is mostly right. Which of the two to prefer is left for reinforcement learning to find out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlsys.errors import ConfigError, DataError
from rlsys.types import Message, Problem

Segments = tuple[tuple[str, bool], ...]
"""The pieces of an assistant turn in their order: text, and whether it trains."""

Turns = Literal["all", "last", "each"]
"""Which turns of the assistant in a chat train: all of them in one sequence, the last, or each in one of its own."""

TOOL_OPENINGS = (
    "Let me verify with Python.",
    "Let me check with Python.",
    "Wait, verify with Python.",
    "I double check with Python.",
    "However, check with Python.",
)
"""Thoughts in front of a call, all of one length: a tiny model copies most easily from a fixed distance."""

DIRECT_OPENINGS = (
    "I can do this in my head:",
    "Wait, I know this one:",
    "However, this one is easy:",
    "Let me check this in my head:",
)
"""Thoughts in front of an answer without a call."""

CLOSING = "Verified."
"""The thought behind a result. With one length for all, a tiny model learns to copy the result in far fewer steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The token axis of an answer as it was generated, prompt included: `tokens` [T] int32, `loss_mask` [T] bool.

    `template` is the fingerprint of the chat that wrote it (`Chat.fingerprint`): under another one the ids mean
    something else.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    template: str

    def __post_init__(self) -> None:
        if self.tokens.shape != self.loss_mask.shape or self.tokens.ndim != 1:
            raise ValueError(f"tokens {self.tokens.shape} and loss_mask {self.loss_mask.shape} share one token axis")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A problem and an assistant turn that solves it.

    `segments` are (text, trained) in the order of the turn: tool output is not trained on. Each is tokenized by itself,
    as in a rollout. The end of turn is not in them: append the tokenizer's `eos_token_id`, trained. Where the turn was
    generated, `recorded` holds its token ids, and these train under the same chat; elsewhere the text does. A turn that
    was cut off is not `complete`: nobody is to learn that it ends there.

    A chat of several turns has in the place of segments `turns`, the messages behind the prompt. The chat template
    writes them, and what the assistant says in them trains.
    """

    problem: Problem
    segments: Segments = ()
    recorded: Recorded | None = None
    turns: tuple[Message, ...] = ()
    complete: bool = True

    @property
    def text(self) -> str:
        """The whole turn; of a chat, what the assistant says in it."""
        said = [str(turn["content"]) for turn in self.turns if turn["role"] == "assistant"]
        return "\n".join(said) if self.turns else "".join(text for text, _ in self.segments)


def arithmetic_demonstrations(
    problems: Sequence[Problem], *, size: int, seed: int, tool_share: float = 0.5
) -> list[Demonstration]:
    """`size` demonstrations, of which `tool_share` call Python and the rest answer directly; all answers are true.

    Problems need `metadata["expression"]`, a Python expression whose value is the answer (reasoning-gym's chain_sum and
    products have one). They are gone through in a random order, again with new phrasings where `size` is larger.
    """
    if not problems or not 0 <= tool_share <= 1:
        raise ConfigError(f"need problems and a tool_share in [0, 1], got {len(problems)} and {tool_share}")
    generator = random.Random(seed)
    order = drawn(problems, size, generator)
    calls = [index < round(size * tool_share) for index in range(size)]
    generator.shuffle(calls)
    return [
        Demonstration(problem=problem, segments=(_call if call else _direct)(problem, generator))
        for problem, call in zip(order, calls, strict=True)
    ]


def drawn(problems: Sequence[Problem], size: int, generator: random.Random) -> list[Problem]:
    """`size` of the problems in a random order; all of them again, in another order, where there are fewer."""
    order: list[Problem] = []
    while len(order) < size:
        order += generator.sample(problems, len(problems))
    return order[:size]


def _call(problem: Problem, generator: random.Random) -> tuple[tuple[str, bool], ...]:
    """A Python call, its result (not trained) and the answer."""
    opening = generator.choice(TOOL_OPENINGS)
    return (
        (f"<think>\n{opening}\n```python\n{expression_of(problem)}\n```\n", True),
        (f"```output\n{problem.answer}\n```\n", False),
        (f"{CLOSING}</think>\n\\boxed{{{problem.answer}}}", True),
    )


def _direct(problem: Problem, generator: random.Random) -> tuple[tuple[str, bool], ...]:
    """The result from the head, then the answer as behind a call."""
    opening = generator.choice(DIRECT_OPENINGS)
    return ((f"<think>\n{opening} {problem.answer}\n{CLOSING}</think>\n\\boxed{{{problem.answer}}}", True),)


def expression_of(problem: Problem) -> str:
    """The Python expression whose value is the answer; DataError where the problem has none."""
    expression = problem.metadata.get("expression")
    if not isinstance(expression, str) or problem.answer is None:
        raise DataError(
            f"problem {problem.id!r} has no metadata['expression'] or no answer; "
            "use tasks that have both, such as reasoning-gym's chain_sum and products"
        )
    return expression


def sample_demonstrations(
    _problems: Sequence[Problem], *, path: str | Sequence[str], limit: int | None = None, seed: int | None = None
) -> list[Demonstration]:
    """The answers of samples files, as sampling stages write them (`RUN/STAGE/samples.parquet`).

    Under the chat that they were sampled with, the very token ids that were generated are trained on. `limit` takes the
    first so many, or with a `seed` so many by chance.

    Raises:
        DataError: a file is missing, damaged or of another kind.
    """
    from rlsys.samples import read_samples  # samples are made of demonstrations

    paths = [path] if isinstance(path, str) else list(path)
    found = [sample.demonstration for one in paths for sample in read_samples(one)]
    if seed is not None:
        random.Random(seed).shuffle(found)
    return _limited(found, limit)


def table_demonstrations(
    _problems: Sequence[Problem],
    *,
    path: str,
    name: str | None = None,
    split: str | None = None,
    question: str | None = None,
    messages: str | None = None,
    response: str | None = None,
    turns: Turns = "all",
    instruction: str = "",
    limit: int | None = None,
) -> list[Demonstration]:
    """The rows of a file, folder or hub data set, as `rlsys.data:dataset_problems` reads them.

    With `response`, a column of text: the answer to the prompt in `question` (the default) or `messages`. Without it,
    `messages` is a column of whole chats, and what the assistant says in them trains, with `turns` in `all` of them, in
    the `last` one, or in `each`: a demonstration for every turn of the assistant, with all before it as the prompt, as
    the chat template writes it there. What users, systems and tools say never trains.

    Raises:
        DataError: names the file, the row and the column.
    """
    from rlsys.demonstration_tables import chat_rows, response_rows  # tables are read into demonstrations

    table: dict[str, Any] = {
        **{"path": path, "name": name, "split": split, "question": question, "messages": messages},
        **{"instruction": instruction, "limit": limit},
    }
    return chat_rows(**table, turns=turns) if response is None else response_rows(**table, response=response)


def _limited(demonstrations: list[Demonstration], limit: int | None) -> list[Demonstration]:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    return demonstrations[:limit]
