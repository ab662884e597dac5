"""Filters of samples: functions of all samples of a stage, and options, that return those to keep, in their order.

Any function of this shape works. A filter sees what the ones before it left.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from rlsys.errors import ConfigError
from rlsys.near_duplicates import near_duplicates
from rlsys.samples import Sample

CALL_MARKS = ("```python\n", "<tool_call>")
"""How a call looks in an answer that was not generated here, of which no calls were counted."""


def correct(samples: Sequence[Sample]) -> list[Sample]:
    """Those that the first reward calls correct."""
    return [sample for sample in samples if sample.correct]


def completed(samples: Sequence[Sample]) -> list[Sample]:
    """Those that came to their end by themselves, instead of running out of tokens or tool calls."""
    return [sample for sample in samples if sample.finish_reason == "stop"]


def pass_rate(samples: Sequence[Sample], *, at_least: float = 0.0, at_most: float = 1.0) -> list[Sample]:
    """Answers to problems whose share of correct answers lies between the two: neither too hard nor too easy.

    The share is that among all answers that the stage sampled, whatever filters stand before this one.
    """
    _check_range("pass_rate", at_least, at_most)
    return [
        sample
        for sample in samples
        if "pass_rate" in sample.metrics and at_least <= sample.metrics["pass_rate"] <= at_most
    ]


def length(samples: Sequence[Sample], *, at_least: int = 0, at_most: int | None = None) -> list[Sample]:
    """Answers of so many tokens; tool output does not count."""
    most = float("inf") if at_most is None else at_most
    _check_range("length", at_least, most)
    return [sample for sample in samples if at_least <= sample.num_tokens <= most]


def has_tool_call(samples: Sequence[Sample], *, wanted: bool = True) -> list[Sample]:
    """Answers that call a tool, or with `wanted: false` those that do not."""

    def calls(sample: Sample) -> bool:
        if "tool_calls" in sample.metrics:
            return sample.metrics["tool_calls"] > 0
        return any(mark in sample.text for mark in CALL_MARKS)

    return [sample for sample in samples if calls(sample) == wanted]


def distinct(
    samples: Sequence[Sample],
    *,
    similarity: float = 1.0,
    words: int = 5,
    within: Literal["problem", "all"] = "problem",
) -> list[Sample]:
    """The first of those that say the same: of the answers to one problem, or of all.

    Two are the same where their texts are, but for white space; with `similarity` below 1 also where the sets of their
    sequences of so many `words` have at least so much in common (Jaccard: shared / all). Within a problem all are
    compared; across problems those that MinHash finds, which is nearly all of them (`rlsys.near_duplicates`).
    """
    if not 0 < similarity <= 1:
        raise ConfigError(f"distinct: similarity is {similarity:g}; it is above 0 and at most 1 (only equal texts)")
    if words < 1:
        raise ConfigError(f"distinct: words is {words}; at least 1")
    if within not in ("problem", "all"):
        raise ConfigError(f"distinct: within is {within!r}; known: problem, all")
    groups: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.problem.id if within == "problem" else ""].append(index)
    repeated: set[int] = set()
    for members in groups.values():
        found = near_duplicates([samples[index].text for index in members], similarity=similarity, words=words)
        repeated |= {members[place] for place in found}
    return [sample for index, sample in enumerate(samples) if index not in repeated]


def per_problem(
    samples: Sequence[Sample],
    *,
    count: int = 1,
    prefer: Literal["random", "shortest", "longest"] = "random",
    seed: int = 0,
) -> list[Sample]:
    """At most `count` answers to each problem; which, depends on the seed alone or on their lengths."""
    if count < 1:
        raise ConfigError(f"per_problem: count is {count}; at least 1")
    if prefer not in ("random", "shortest", "longest"):
        raise ConfigError(f"per_problem: prefer is {prefer!r}; known: random, shortest, longest")
    groups: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.problem.id].append(index)
    kept: set[int] = set()
    for problem, members in groups.items():
        if prefer == "random":
            # By problem, so that other problems do not change what is drawn for this one.
            random.Random(f"{seed} {problem}").shuffle(members)
        else:
            sign = 1 if prefer == "shortest" else -1
            members.sort(key=lambda index: sign * samples[index].num_tokens)
        kept.update(members[:count])
    return [sample for index, sample in enumerate(samples) if index in kept]


def _check_range(name: str, low: float, high: float) -> None:
    if not low <= high:
        raise ConfigError(f"{name}: at_least={low:g} is above at_most={high:g}; nothing could be kept")
