"""Which of several answers to a problem make a preference pair: the best and the worst, at equal length on average.

Thought Preference Optimization (arXiv 2410.10630): of K answers to a prompt the one with the highest score is chosen
and the one with the lowest rejected, where the score is corrected for the length of what is judged, the response. Pure
functions; the preference stage learns from the pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

TOO_FEW, ALL_FAILED, SAME_TEXT, SAME_SCORE = "too_few_answers", "all_parse_failures", "same_text", "same_score"
"""Why a problem gives no pair: it has one answer or none, none with a response, all the same, or none better."""

_LEAST_SPREAD = 1e-9
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of the answers to a problem: all of its text, its judge's score, and the length of its response in tokens.

    `score` is None for a parse failure: an answer that has no response which could be judged.
    """

    text: str
    score: float | None
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which candidate of a problem, by their places, is chosen and which rejected."""

    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The pairs of many problems at one weight of length.

    `choices` has one entry for each problem, None where it gives no pair; `dropped` counts those by the reason.
    `chosen_length` and `rejected_length` are means over the pairs of which both sides have a response; `balanced` says
    that the first is not the larger one.
    """

    length_weight: float
    choices: list[Choice | None]
    dropped: Counter[str] = field(default_factory=Counter)
    chosen_length: float = 0.0
    rejected_length: float = 0.0

    @property
    def balanced(self) -> bool:
        """Whether chosen responses are, on average, not longer than rejected ones."""
        return self.chosen_length <= self.rejected_length + _ROUNDING

    @property
    def num_pairs(self) -> int:
        """How many problems give a pair."""
        return sum(choice is not None for choice in self.choices)


def normalised(values: Sequence[float] | Numbers) -> Numbers:
    """(x - mean) / standard deviation of the set [K]; all 0 where they do not differ."""
    numbers = np.asarray(values, dtype=np.float64)
    centred = numbers - numbers.mean()
    spread = float(centred.std())
    return np.zeros_like(numbers) if spread <= _LEAST_SPREAD * max(1.0, np.abs(numbers).max()) else centred / spread


def corrected(scores: Sequence[float], lengths: Sequence[int], length_weight: float) -> Numbers:
    """`norm(score) - length_weight * norm(length)` within the set [K]."""
    return normalised(scores) - length_weight * normalised(lengths)


def choose(candidates: Sequence[Candidate], length_weight: float) -> Choice | str:
    """Best against worst of one problem, or the reason why there is no pair.

    A parse failure is worse than any score and never chosen; which of several is rejected does not depend on their
    length: the first. Scores and lengths are normalised over those with a response. The first counts among equals, and
    the rejected one has another text than the chosen one.
    """
    if len(candidates) < 2:
        return TOO_FEW
    judged = [index for index, candidate in enumerate(candidates) if candidate.score is not None]
    if not judged:
        return ALL_FAILED
    scores = [score for candidate in candidates if (score := candidate.score) is not None]
    values = corrected(scores, [candidates[index].length for index in judged], length_weight)
    chosen = judged[int(np.argmax(values))]
    others = [index for index, candidate in enumerate(candidates) if candidate.text != candidates[chosen].text]
    if not others:
        return SAME_TEXT
    failed = [index for index in others if candidates[index].score is None]
    if failed:
        return Choice(chosen=chosen, rejected=failed[0])
    if normalised(scores).any():
        value_of = dict(zip(judged, values.tolist(), strict=True))
        rejected = min(others, key=value_of.__getitem__)
        if value_of[rejected] < value_of[chosen]:
            return Choice(chosen=chosen, rejected=rejected)
    return SAME_SCORE


def select(problems: Sequence[Sequence[Candidate]], length_weight: float) -> Selection:
    """The pairs of all problems at this weight of length."""
    choices: list[Choice | None] = []
    dropped: Counter[str] = Counter()
    lengths = []
    for candidates in problems:
        choice = choose(candidates, length_weight)
        if isinstance(choice, str):
            dropped[choice] += 1
            choices.append(None)
            continue
        choices.append(choice)
        if candidates[choice.rejected].score is not None:
            lengths.append((candidates[choice.chosen].length, candidates[choice.rejected].length))
    means = np.mean(lengths, axis=0).tolist() if lengths else [0.0, 0.0]
    return Selection(
        length_weight=length_weight,
        choices=choices,
        dropped=dropped,
        chosen_length=means[0],
        rejected_length=means[1],
    )


def weights_to_try(most: float, step: float) -> list[float]:
    """0, step, 2 step, ... and `most`, which is the last one."""
    count = int(np.floor(most / step + _ROUNDING))
    found = [round(index * step, 10) for index in range(count + 1)]
    return found if most - found[-1] <= _ROUNDING else [*found, most]


def balance(problems: Sequence[Sequence[Candidate]], *, most: float, step: float) -> Selection:
    """The pairs at the smallest weight of length, of those on the grid from 0 to `most`, at which chosen responses are
    on average not longer than rejected ones; where there is none, at `most` (then the selection is not `balanced`)."""
    selection = select(problems, 0.0)
    for weight in weights_to_try(most, step)[1:]:
        if selection.balanced:
            break
        selection = select(problems, weight)
    return selection
