"""The values that travel: what is refused when they are made, and what they say about themselves."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from rlsys.types import Problem, Rollout, RolloutGroup, TrainBatch

PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "1 + 1?"},), answer="2")


def rollout(length: int = 3, **changes: Any) -> Rollout:
    values: dict[str, Any] = {
        "tokens": np.arange(length, dtype=np.int32),
        "loss_mask": np.arange(length) > 0,
        "logprobs": np.full(length, -0.5, dtype=np.float32),
        "versions": np.arange(length, dtype=np.int32) + 4,
    }
    return Rollout(**{**values, **changes})


def test_a_problem_without_a_message_is_refused_by_its_id() -> None:
    with pytest.raises(ValueError, match=r"problem 'sum-7' has an empty prompt"):
        Problem(id="sum-7", prompt=())


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "hello"}, {}])
def test_a_message_without_role_or_content_is_refused(message: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="needs `role` and `content`"):
        Problem(id="p", prompt=({"role": "system", "content": ""}, message))


@pytest.mark.parametrize("name", ["tokens", "loss_mask", "logprobs", "versions"])
def test_arrays_of_different_lengths_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="share one token axis"):
        rollout(3, **{name: np.zeros(4, dtype=np.float32)})


def test_arrays_with_two_axes_are_refused() -> None:
    square = np.zeros((2, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="share one token axis"):
        rollout(tokens=square, loss_mask=square, logprobs=square, versions=square)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_log_probs_and_rewards_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="log-probs must be finite"):
        rollout(3, logprobs=np.array([0.0, value, 0.0], dtype=np.float32))
    with pytest.raises(ValueError, match="reward must be finite"):
        rollout(reward=value)


def test_a_rollout_counts_its_trained_tokens_and_knows_its_oldest_weights() -> None:
    # The first token (version 4) is not trained, so the oldest weights that wrote are those of the second one.
    one = rollout(3)
    assert (len(one), one.num_trained_tokens, one.first_version) == (3, 2, 5)


def test_a_rollout_in_which_nothing_was_written_has_no_version() -> None:
    silent = rollout(2, loss_mask=np.zeros(2, dtype=np.bool_))
    assert (silent.num_trained_tokens, silent.first_version) == (0, -1)


def test_an_empty_rollout_can_be_made() -> None:
    assert len(rollout(0)) == 0


def test_the_rewards_of_a_group_keep_the_order_of_its_rollouts() -> None:
    group = RolloutGroup(problem=PROBLEM, rollouts=(rollout(reward=1.0), rollout(reward=-0.25)))
    assert group.rewards.tolist() == [1.0, -0.25]
    assert RolloutGroup(problem=PROBLEM, rollouts=()).rewards.shape == (0,)


def test_a_batch_needs_one_advantage_array_for_each_rollout() -> None:
    with pytest.raises(ValueError, match="2 rollouts, but 1 advantage arrays and 2 weights"):
        TrainBatch(
            rollouts=(rollout(), rollout()), advantages=(np.zeros(3, np.float32),), weights=(1.0, 1.0), num_tokens=4
        )


def test_a_batch_names_the_rollout_whose_advantages_have_another_length() -> None:
    good, bad = np.zeros(3, np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="rollout 1 has 3 tokens but advantages of shape"):
        TrainBatch(rollouts=(rollout(), rollout()), advantages=(good, bad), weights=(1.0, 1.0), num_tokens=4)


def test_a_batch_without_a_trained_token_is_refused() -> None:
    with pytest.raises(ValueError, match="without a single trained token"):
        TrainBatch(rollouts=(rollout(),), advantages=(np.zeros(3, np.float32),), weights=(1.0,), num_tokens=0)


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROBLEM.answer = "3"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollout().reward = 1.0  # type: ignore[misc]
