"""Pairs for Thinking Preference Optimization (ThinkPO, arXiv 2502.13173): a long chain of thought over a short one.

Both answer the same problem and both are right, so that length, and what fills it, is all that differs. How far apart
the two lengths may be is a setting: pairs that are too far apart teach less. What is left out is counted, by rule.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rlsys.errors import ConfigError, DataError
from rlsys.pairs import PairList, PreferencePair
from rlsys.samples import Sample, read_samples
from rlsys.types import Problem

Match = Literal["widest", "nearest", "random"]
SameProblem = Literal["prompt", "id"]

_FIX = {
    "wrong": "take other files, or pairs of wrong answers with require_correct=false",
    "ungraded": "grade the answers by a reward when they are sampled, or set require_correct=false",
    "not_completed": "sample with more max_response_tokens, or set require_completed=false",
    "over_max_tokens": "raise max_tokens",
    "no_partner": "answer the same problems on both sides (with the same prompt, or set same=id)",
    "other_answer": "ids of the two files mean other problems; set same=prompt",
    "equal_text": "take answers of another model or style for one side",
    "not_longer": "exchange `long` and `short`, or take longer answers",
    "ratio_below": "lower min_ratio",
    "ratio_above": "raise max_ratio",
    "difference_below": "lower min_difference",
    "difference_above": "raise max_difference",
}
"""What helps where a rule has left nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthGap:
    """Which two answers to one problem make a pair, by their lengths in tokens.

    The ratio is long / short, the difference long - short; the long one is always longer. `match` says which of the
    pairs that are within the band are taken first: the `widest` (longest with shortest), those `nearest` to
    `target_ratio` (in logarithms, so that 2 is as near to 4 as 8 is), or `random` ones.

    Raises:
        ConfigError: a band without room, or a target that its rule does not read or lacks.
    """

    min_ratio: float = 1.0
    max_ratio: float | None = None
    min_difference: int = 1
    max_difference: int | None = None
    match: Match = "widest"
    target_ratio: float | None = None

    def __post_init__(self) -> None:
        place = "thinkpo_pairs"
        if self.match not in get_args(Match):
            raise ConfigError(f"{place}: match is {self.match!r}; known: {', '.join(get_args(Match))}")
        if (self.match == "nearest") != (self.target_ratio is not None):
            raise ConfigError(
                f"{place}: match={self.match} with target_ratio={self.target_ratio}; match=nearest, and only that, "
                "needs the ratio that it is to be near to, such as target_ratio: 2"
            )
        if not (self.min_ratio >= 1 and math.isfinite(self.min_ratio)):
            raise ConfigError(f"{place}: min_ratio is {self.min_ratio}; long / short is at least 1")
        if self.target_ratio is not None and not (self.target_ratio >= 1 and math.isfinite(self.target_ratio)):
            raise ConfigError(f"{place}: target_ratio is {self.target_ratio}; long / short is at least 1")
        if self.min_difference < 1:
            raise ConfigError(f"{place}: min_difference is {self.min_difference}; the long answer has at least 1 more")
        for name, low, high in (
            ("ratio", self.min_ratio, self.max_ratio),
            ("difference", self.min_difference, self.max_difference),
        ):
            if high is not None and not high >= low:
                raise ConfigError(f"{place}: max_{name} ({high}) is below min_{name} ({low}); the band is empty")

    def outside(self, long: NDArray[np.float64], short: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
        """By rule, which pairs of these lengths break it; rules in the order in which they are counted."""
        ratio, difference = long / np.maximum(short, 1), long - short
        return {
            "not_longer": difference <= 0,
            "ratio_below": ratio < self.min_ratio,
            "ratio_above": ratio > (np.inf if self.max_ratio is None else self.max_ratio),
            "difference_below": difference < self.min_difference,
            "difference_above": difference > (np.inf if self.max_difference is None else self.max_difference),
        }

    def order(self, long: NDArray[np.float64], short: NDArray[np.float64], seed: str) -> NDArray[np.int64]:
        """Indices of pairs of these lengths, best first; a tie goes to the one that was read first."""
        if self.match == "widest":
            return np.argsort(-(long - short), kind="stable")
        if self.match == "nearest":
            assert self.target_ratio is not None
            distance = np.abs(np.log(long / np.maximum(short, 1)) - math.log(self.target_ratio))
            return np.argsort(distance, kind="stable")
        order = list(range(len(long)))
        random.Random(seed).shuffle(order)
        return np.array(order, np.int64)


def thinkpo_pairs(
    _problems: Sequence[Problem],
    *,
    long: str | Sequence[str],
    short: str | Sequence[str] | None = None,
    min_ratio: float = 1.0,
    max_ratio: float | None = None,
    min_difference: int = 1,
    max_difference: int | None = None,
    match: Match = "widest",
    target_ratio: float | None = None,
    pairs_per_problem: int = 1,
    max_tokens: int | None = None,
    limit: int | None = None,
    require_correct: bool = True,
    require_completed: bool = True,
    same: SameProblem = "prompt",
    seed: int = 0,
) -> PairList:
    """Pairs from samples files: a long answer chosen, a short one to the same problem rejected.

    `long` and `short` are files (or folders of them) that sampling stages wrote; without `short`, both sides come from
    `long`. Lengths are the files' `num_tokens`. See `LengthGap` for the band. An answer stands in at most one pair;
    what is the same text counts as one answer. `max_tokens` leaves longer answers out, `limit` keeps the first so many
    pairs. Two answers belong to one problem where prompt and right answer are the same; with `same: id`, where the
    problems' ids are: then the short answer is learned under the long one's prompt.

    Raises:
        DataError: no pair is left; says which rule removed how many, and what helps.
        ConfigError: the band is empty, or a number makes no sense.
    """
    gap = LengthGap(
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        min_difference=min_difference,
        max_difference=max_difference,
        match=match,
        target_ratio=target_ratio,
    )
    for name, value in (("pairs_per_problem", pairs_per_problem), ("limit", limit), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"thinkpo_pairs: {name} is {value}; at least 1 is needed")
    if same not in get_args(SameProblem):
        raise ConfigError(f"thinkpo_pairs: same is {same!r}; known: {', '.join(get_args(SameProblem))}")
    rules = _Rules(require_correct, require_completed, max_tokens, same)
    removed: Counter[str] = Counter()
    long_answers = rules.by_problem(_read(long), removed)
    short_answers = None if short is None else rules.by_problem(_read(short), removed)
    found = PairList()
    partners = long_answers if short_answers is None else short_answers
    for key, answers in long_answers.items():
        others = partners.get(key, [])
        if not others or (short_answers is None and len(answers) < 2):
            removed["no_partner"] += 1
            continue
        if same == "id" and answers[0].problem.answer != others[0].problem.answer:
            removed["other_answer"] += 1
            continue
        chosen = _matched(answers, others, gap, pairs_per_problem, f"{seed} {key}", removed)
        found += [_pair(answers[one], others[other]) for one, other in chosen]
    removed["no_partner"] += len(set(partners) - set(long_answers))
    if limit is not None and len(found) > limit:
        removed["over_limit"] += len(found) - limit
        del found[limit:]
    found.counts = {"problems": len(set(long_answers) | set(partners)), **_nonzero(removed)}
    if not found:
        _raise_empty(found.counts)
    return found


@dataclass(frozen=True, slots=True)
class _Rules:
    """What holds of one answer, whatever its partner."""

    require_correct: bool
    require_completed: bool
    max_tokens: int | None
    same: SameProblem

    def by_problem(self, samples: Sequence[Sample], removed: Counter[str]) -> dict[str, list[Sample]]:
        """The answers that hold, by their problem, in the order in which they were read."""
        found: dict[str, list[Sample]] = {}
        seen: set[tuple[str, str]] = set()
        for sample in samples:
            key = self._key(sample.problem)
            rule = self._broken(sample) or ("duplicate" if (key, sample.text) in seen else None)
            if rule is not None:
                removed[rule] += 1
                continue
            seen.add((key, sample.text))
            found.setdefault(key, []).append(sample)
        return found

    def _broken(self, sample: Sample) -> str | None:
        if self.require_correct and not sample.correct:
            return "ungraded" if sample.correct is None else "wrong"
        if self.require_completed and sample.finish_reason != "stop":
            return "not_completed"
        return "over_max_tokens" if self.max_tokens is not None and sample.num_tokens > self.max_tokens else None

    def _key(self, problem: Problem) -> str:
        if self.same == "id":
            return problem.id
        return json.dumps([[dict(message) for message in problem.prompt], problem.answer], sort_keys=True)


def _read(paths: str | Sequence[str]) -> list[Sample]:
    return [sample for path in ([paths] if isinstance(paths, str) else paths) for sample in read_samples(path)]


def _matched(
    long: Sequence[Sample],
    short: Sequence[Sample],
    gap: LengthGap,
    count: int,
    seed: str,
    removed: Counter[str],
) -> list[tuple[int, int]]:
    """Up to `count` pairs as indices into both sides; counts the candidates that a rule removes."""
    ones, others = (index.ravel() for index in np.indices((len(long), len(short))))
    lengths = [np.array([sample.num_tokens for sample in side], np.float64) for side in (long, short)]
    if long is short:  # each two of them once, the longer one as the long side
        longer = (lengths[0][ones] > lengths[1][others]) | ((lengths[0][ones] == lengths[1][others]) & (ones < others))
        ones, others = ones[longer], others[longer]
    equal = np.array([long[i].text == short[j].text for i, j in zip(ones, others, strict=True)], np.bool_)
    left = ~equal
    removed["equal_text"] += int(equal.sum())
    for rule, broken in gap.outside(lengths[0][ones], lengths[1][others]).items():
        removed[rule] += int((broken & left).sum())
        left &= ~broken
    ones, others = ones[left], others[left]
    taken: list[tuple[int, int]] = []
    used: tuple[set[int], set[int]] = (set(), set())
    for index in gap.order(lengths[0][ones], lengths[1][others], seed).tolist():
        one, other = int(ones[index]), int(others[index])
        free = one not in used[0] and other not in used[1]
        if long is short:
            free = free and one not in used[1] and other not in used[0]
        if free and len(taken) < count:
            taken.append((one, other))
            used[0].add(one)
            used[1].add(other)
    removed["not_chosen"] += len(ones) - len(taken)
    return taken


def _pair(long: Sample, short: Sample) -> PreferencePair:
    one, other = long.demonstration, short.demonstration
    alike = one.problem.prompt == other.problem.prompt  # ids hold the prompt: those of another one are of no use
    return PreferencePair(
        problem=one.problem,
        chosen=one.segments,
        rejected=other.segments,
        chosen_recorded=one.recorded,
        rejected_recorded=other.recorded if alike else None,
        complete=(one.complete, other.complete),
    )


def _nonzero(removed: Mapping[str, int]) -> dict[str, int]:
    return {f"removed/{rule}": count for rule, count in removed.items() if count}


def _raise_empty(counts: Mapping[str, Any]) -> None:
    removed = {name.removeprefix("removed/"): count for name, count in counts.items() if name != "problems"}
    if not removed:
        raise DataError("thinkpo_pairs: the samples files have no answer; look at the report of the stage that made it")
    most = max(removed, key=lambda rule: removed[rule])
    told = ", ".join(f"{rule} {count}" for rule, count in removed.items())
    raise DataError(
        f"thinkpo_pairs: no pair is left of {counts['problems']} problems; removed by rule (answers, problems or "
        f"pairs of answers): {told}. Most by {most}: {_FIX.get(most, 'look at the files')}"
    )
