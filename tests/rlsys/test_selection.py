"""Which siblings train, worked by hand: length without a reward for it, and what is wrong with a selection."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from rlsys.errors import ConfigError
from rlsys.selection import (
    completed_only,
    longer_correct_only,
    longest_correct_shortest_wrong,
    resolve_selections,
    select,
)
from rlsys.types import FinishReason, Problem, Rollout, RolloutGroup

PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "?"},))


def sibling(correct: bool, length: int, finish: FinishReason = "stop") -> Rollout:
    """One with `length` own tokens after two that it read."""
    size = length + 2
    return Rollout(
        tokens=np.zeros(size, np.int32),
        loss_mask=np.arange(size) >= 2,
        logprobs=np.zeros(size, np.float32),
        versions=np.zeros(size, np.int32),
        finish_reason=finish,
        metrics={"correct": float(correct)},
    )


def group(*siblings: Rollout) -> RolloutGroup:
    return RolloutGroup(problem=PROBLEM, rollouts=siblings)


def test_only_truncated_siblings_are_left_out() -> None:
    ends: list[FinishReason] = ["stop", "length", "turns", "length"]
    assert completed_only(group(*(sibling(True, 1, end) for end in ends))) == [True, False, True, False]
    assert completed_only(group()) == []


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ([6, 2], [3, 3], True),  # 4 above 3
        ([6, 2], [4], False),  # equal is not longer
        ([1], [2], False),
        ([9], [], False),
        ([], [9], False),
    ],
)
def test_a_question_stays_where_its_correct_responses_are_longer(
    right: list[int], wrong: list[int], expected: bool
) -> None:
    siblings = group(*(sibling(True, n) for n in right), *(sibling(False, n) for n in wrong))
    assert longer_correct_only(siblings) == [expected] * len(siblings.rollouts)


@pytest.mark.parametrize(
    ("siblings", "chosen"),
    [
        ([(True, 3), (False, 5), (True, 9), (False, 4)], [2, 3]),
        ([(True, 9), (True, 9), (False, 4), (False, 4)], [0, 2]),  # the first of equals
        ([(False, 4), (True, 5)], [0, 1]),
        ([(True, 4), (False, 4)], []),
        ([(True, 3), (False, 4)], []),
        ([(True, 3), (True, 4)], []),
        ([(False, 3)], []),
        ([], []),
    ],
)
def test_two_siblings_stay_the_longest_correct_and_the_shortest_wrong(
    siblings: list[tuple[bool, int]], chosen: list[int]
) -> None:
    found = longest_correct_shortest_wrong(group(*(sibling(*each) for each in siblings)))
    assert found == [index in chosen for index in range(len(siblings))]


def test_each_selection_sees_what_the_one_before_left_and_the_rest_is_counted() -> None:
    siblings = group(sibling(True, 9, "length"), sibling(True, 5), sibling(False, 2), sibling(False, 3))
    names = ["rlsys.selection:completed_only", "rlsys.selection:longest_correct_shortest_wrong"]
    found = select(siblings, resolve_selections(names))
    assert found.rollouts == (siblings.rollouts[1], siblings.rollouts[2])
    assert found.dropped == {"not_selected": 2}
    assert select(siblings, {}) is siblings


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        (lambda _: [True], r"mine returned \[True\] for the 2 siblings of problem 'p'; it must return one bool"),
        (lambda _: [True, 1], r"mine returned \[True, 1\]"),
        (lambda _: None, "mine raised TypeError for problem 'p'"),
        (lambda _: 1 / 0, "mine raised ZeroDivisionError for problem 'p': division by zero"),
    ],
)
def test_a_selection_that_does_not_choose_is_a_mistake_in_the_configuration(
    selection: Callable[[RolloutGroup], Sequence[bool]], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        select(group(sibling(True, 1), sibling(True, 2)), {"mine": selection})


def test_numpy_may_choose() -> None:
    chosen: Any = np.array([False, True])
    assert len(select(group(sibling(True, 1), sibling(True, 2)), {"mine": lambda _: chosen}).rollouts) == 1


def test_a_selection_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"rl\.selections\.0: .*did you mean `rlsys\.selection:completed_only`"):
        resolve_selections(["rlsys.selection:complete_only"])
    monkeypatch.setitem(sys.modules, "these", sys.modules[__name__])
    with pytest.raises(ConfigError, match=r"rl\.selections\.0: 'these:PROBLEM' is no function"):
        resolve_selections(["these:PROBLEM"])
