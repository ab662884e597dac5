"""Where preference pairs come from: a table with a column for each side, samples, or a program, for a first try."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlsys.data import dataset_problems
from rlsys.demonstrations import arithmetic_demonstrations
from rlsys.errors import ConfigError, DataError
from rlsys.length_pairs import thinkpo_pairs as thinkpo_pairs
from rlsys.pairs import PairList, PreferencePair
from rlsys.types import Problem


def table_pairs(
    _problems: Sequence[Problem],
    *,
    path: str,
    name: str | None = None,
    split: str | None = None,
    question: str | None = None,
    messages: str | None = None,
    chosen: str = "chosen",
    rejected: str = "rejected",
    margin: str | None = None,
    equal: Literal["error", "drop"] = "error",
    instruction: str = "",
    limit: int | None = None,
) -> PairList:
    """The pairs of a file, folder or hub data set, as `dataset_problems` reads them.

    `chosen` and `rejected` are columns of text, or of chat messages whose last one is the answer; `margin` may be a
    column of numbers. The prompt stands in the column `question` (the default) or `messages`. A row whose two answers
    are the same text is an error, or dropped and counted, as `equal` says.

    Raises:
        DataError: names the file, the row and the column.
    """
    if equal not in ("error", "drop"):
        raise ConfigError(f"table_pairs: equal is {equal!r}; known: error, drop")
    columns = {"chosen": chosen, "rejected": rejected} | ({} if margin is None else {"margin": margin})
    rows = dataset_problems(
        path=path,
        name=name,
        split=split,
        question=question,
        messages=messages,
        answer=None,
        metadata=columns,
        instruction=instruction,
        limit=limit,
    )
    found = PairList()
    for row in rows:
        better, worse = (_answer(row, side, columns) for side in ("chosen", "rejected"))
        if equal == "drop" and better == worse:
            found.counts["removed/equal_text"] = found.counts.get("removed/equal_text", 0) + 1
            continue
        margin_of_row = _number(row, columns)
        found.append(
            PreferencePair(problem=row, chosen=((better, True),), rejected=((worse, True),), margin=margin_of_row)
        )
    if not found:
        raise DataError(f"{path}: chosen and rejected are the same text in all {len(rows)} rows")
    return found


def arithmetic_pairs(problems: Sequence[Problem], *, size: int, seed: int) -> list[PreferencePair]:
    """Program-written pairs: an answer that calls Python is preferred to one from the head; both are true.

    Problems need what `arithmetic_demonstrations` needs.
    """
    order = random.Random(seed).choices(problems, k=size) if problems else []
    pairs = []
    for number, problem in enumerate(order):
        called, direct = (
            arithmetic_demonstrations([problem], size=1, seed=seed + number, tool_share=share)[0] for share in (1, 0)
        )
        pairs.append(PreferencePair(problem=problem, chosen=called.segments, rejected=direct.segments))
    return pairs


def _answer(row: Problem, side: str, columns: Mapping[str, str]) -> str:
    value: Any = row.metadata[side]
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value:
        raise DataError(
            f"row {row.id!r}: column {columns[side]!r} must be a text or a list of chat messages, got {value!r:.80}; "
            f"set the option `{side}` to another column"
        )
    return value


def _number(row: Problem, columns: Mapping[str, str]) -> float:
    value = row.metadata.get("margin", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"row {row.id!r}: column {columns['margin']!r} must be a number, got {value!r:.80}")
    return float(value)
