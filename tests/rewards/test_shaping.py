"""The shaping terms, each worked by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rlsys.interfaces import RewardResult
from rlsys.rewards.shaping import (
    ActionWords,
    FormatReward,
    LanguageConsistency,
    LengthPenalty,
    LengthProportional,
    OverlongPenalty,
    RepetitionPenalty,
    ToolUse,
)
from rlsys.types import Problem, Rollout, RolloutGroup

PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "?"},))


def rollout(tokens: Sequence[int] = (), *, response: str = "", **fields: Any) -> Rollout:
    """One whose first token is the prompt's."""
    ids = np.array([0, *tokens], dtype=np.int32)
    return Rollout(
        tokens=ids,
        loss_mask=np.arange(len(ids)) > 0,
        logprobs=np.zeros(len(ids), np.float32),
        versions=np.zeros(len(ids), np.int32),
        response=response,
        **fields,
    )


def score(reward: Any, one: Rollout) -> float:
    result = asyncio.run(reward.score(PROBLEM, one.response, one))
    return float(result.score if isinstance(result, RewardResult) else result)


def scores(reward: Any, *siblings: Rollout) -> list[float]:
    return list(asyncio.run(reward.score_group(RolloutGroup(problem=PROBLEM, rollouts=siblings))))


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1),
        ("<think></think><answer>b</answer>", 1),
        ("<think>a</think><answer> </answer>", 0),
        ("a<think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>.", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a<answer>b</think></answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("</think><answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_the_format_is_strict(response: str, right: int) -> None:
    assert score(FormatReward(), rollout(response=response)) == right


def test_the_template_may_have_opened_the_thinking() -> None:
    assert score(FormatReward(opened=True), rollout(response="a</think><answer>b</answer>")) == 1
    assert score(FormatReward(opened=True), rollout(response="<think>a</think><answer>b</answer>")) == 0


@pytest.mark.parametrize(("length", "value"), [(0, 0), (6, 0), (7, -0.25), (8, -0.5), (10, -1), (11, -1)])
def test_the_soft_overlong_penalty_falls_in_its_margin(length: int, value: float) -> None:
    assert score(OverlongPenalty(max_tokens=10, margin_tokens=4), rollout(range(length))) == value


def test_the_hard_overlong_penalty_and_the_one_for_being_cut_off() -> None:
    assert score(OverlongPenalty(max_tokens=3), rollout(range(3))) == 0
    assert score(OverlongPenalty(max_tokens=3), rollout(range(4))) == -1
    assert score(OverlongPenalty(max_tokens=3), rollout(range(2), finish_reason="length")) == -1
    with pytest.raises(ValueError, match="margin_tokens"):
        OverlongPenalty(max_tokens=3, margin_tokens=4)


def test_repetition_is_the_share_of_n_grams_that_were_there_before() -> None:
    assert score(RepetitionPenalty(num_tokens=2), rollout([1, 2, 3, 4])) == 0
    assert score(RepetitionPenalty(num_tokens=2), rollout([1, 2, 1, 2, 1])) == -0.5  # 12 21 12 21: two of four
    assert score(RepetitionPenalty(num_tokens=2), rollout([7] * 5)) == -0.75  # 77 four times: one is new
    assert score(RepetitionPenalty(num_tokens=20), rollout([7] * 20)) == 0  # one n-gram cannot repeat
    assert score(RepetitionPenalty(num_tokens=1), rollout([256, 1, 0x01000100])) == 0  # bytes do not mix


def test_language_is_told_by_script() -> None:
    assert score(LanguageConsistency(), rollout(response="So it is 4.")) == 1
    assert score(LanguageConsistency(), rollout(response="Wait, 我们 think again")) == 0.75
    assert score(LanguageConsistency(script="cjk"), rollout(response="我们 think")) == 0.5
    assert score(LanguageConsistency(), rollout(response="Let $α + β$ be `x` \\omega")) == 1  # noqa: RUF001
    assert score(LanguageConsistency(), rollout(response="1 + 1")) == 1
    assert score(LanguageConsistency(), rollout(response="pаypal")) == 0  # noqa: RUF001 - a Cyrillic letter in it
    with pytest.raises(ValueError, match="klingon"):
        LanguageConsistency(script="klingon")


def test_the_use_of_tools() -> None:
    assert score(ToolUse(bonus=0.2), rollout()) == 0
    assert score(ToolUse(bonus=0.2), rollout(metrics={"tool_calls": 2.0, "tool_errors": 0.0})) == 0.2
    assert score(ToolUse(error_penalty=0.5), rollout(metrics={"tool_calls": 4.0, "tool_errors": 1.0})) == -0.125


def test_the_length_penalty_compares_siblings_and_does_not_praise_short_wrong_ones() -> None:
    right, wrong = {"correct": 1.0}, {"correct": 0.0}
    siblings = [
        rollout(range(10), metrics=right),
        rollout(range(15), metrics=right),
        rollout(range(20), metrics=right),
        rollout(range(10), metrics=wrong),
        rollout(range(20), metrics=wrong),
    ]
    assert scores(LengthPenalty(), *siblings) == [0.5, 0.0, -0.5, 0.0, -0.5]
    assert scores(LengthPenalty(), siblings[0], siblings[0]) == [0.0, 0.0]


def test_the_rewards_that_force_length() -> None:
    right = rollout(range(5), metrics={"correct": 1.0}, response="But wait. However, butter.")
    wrong = rollout(range(30), metrics={"correct": 0.0}, response="No")
    assert scores(LengthProportional(max_tokens=20), right, wrong) == [1.25, 0.0]
    assert scores(ActionWords(), right, wrong) == [1.15, -1.0]
    assert scores(ActionWords(most=2), right, wrong) == [2.0, -1.0]
