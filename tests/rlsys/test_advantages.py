"""Advantages: golden numbers worked by hand, and what holds for any rewards."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.advantages import dr_grpo, gae, grpo, reward_itself, rloo, whiten

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 3.0])  # mean 1, squared distances 0 1 1 0 4, variance 6 / 5
groups = st.lists(st.floats(-10, 10), min_size=2, max_size=16).map(np.array)


def test_grpo_golden_numbers() -> None:
    # (r - 1) / sqrt(1.2): 0, -0.912871, -0.912871, 0, 1.825742
    assert grpo(REWARDS) == pytest.approx([0.0, -0.912871, -0.912871, 0.0, 1.825742], abs=1e-6)
    # One right of four: mean 1/4, deviation sqrt(3) / 4, so 3/4 becomes sqrt(3) and -1/4 becomes -1 / sqrt(3).
    expected = [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]
    assert grpo(np.array([1.0, 0.0, 0.0, 0.0])) == pytest.approx(expected)


def test_dr_grpo_golden_numbers() -> None:
    assert dr_grpo(REWARDS).tolist() == [0.0, -1.0, -1.0, 0.0, 2.0]


def test_rloo_golden_numbers() -> None:
    # Each minus the mean of the other four: 1 - 4/4, 0 - 5/4, 0 - 5/4, 1 - 4/4, 3 - 2/4
    assert rloo(REWARDS) == pytest.approx([0.0, -1.25, -1.25, 0.0, 2.5])


@PATIENT
@given(groups)
def test_rloo_is_each_reward_minus_the_mean_of_the_others(rewards: np.ndarray) -> None:
    by_hand = [reward - np.delete(rewards, index).mean() for index, reward in enumerate(rewards)]
    assert rloo(rewards) == pytest.approx(by_hand, abs=1e-9)


@PATIENT
@given(groups)
def test_all_advantages_of_a_group_sum_to_zero(rewards: np.ndarray) -> None:
    for advantage in (grpo, dr_grpo, rloo):
        assert advantage(rewards).shape == rewards.shape
        assert np.abs(advantage(rewards).sum()) < 1e-4


@PATIENT
@given(st.floats(-10, 10), st.integers(2, 16))
def test_equal_rewards_give_no_credit_and_no_warning(reward: float, size: int) -> None:
    rewards = np.full(size, reward)
    with np.errstate(divide="raise", invalid="raise"):
        assert not grpo(rewards).any()
    for advantage in (dr_grpo, rloo):
        assert advantage(rewards) == pytest.approx(np.zeros(size), abs=1e-12)


@PATIENT
@given(groups, st.floats(0.5, 4.0), st.floats(-5, 5))
def test_grpo_does_not_see_the_scale_or_the_offset_of_the_rewards(rewards: np.ndarray, scale: float, by: float) -> None:
    if rewards.std() > 1e-3:
        assert grpo(rewards * scale + by) == pytest.approx(grpo(rewards), abs=1e-6)


def test_rloo_of_a_single_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 siblings, got 1"):
        rloo(np.array([1.0]))


def test_whitening_takes_the_whole_batch_worked_by_hand() -> None:
    # mean 2, deviations -1, -1, 2, 0; their squares have the mean 1.5
    assert whiten(np.array([1.0, 1.0, 4.0, 2.0])) == pytest.approx(np.array([-1, -1, 2, 0]) / math.sqrt(1.5))
    assert not whiten(np.array([3.0, 3.0])).any()


def test_a_reward_may_be_its_own_advantage() -> None:
    assert reward_itself(np.array([0.25, -1.0])).tolist() == [0.25, -1.0]


# --- GAE -------------------------------------------------------------------------------------------------------------

TOKEN_REWARDS = np.array([0.0, 0.0, 1.0])
VALUES = np.array([0.5, 0.25, 0.75])


def test_gae_golden_numbers() -> None:
    # gamma 1/2, lam 1/2. Errors: 0 + 0.125 - 0.5 = -0.375; 0 + 0.375 - 0.25 = 0.125; 1 - 0.75 = 0.25.
    # Backwards with decay 1/4: 0.25; 0.125 + 0.0625 = 0.1875; -0.375 + 0.046875 = -0.328125.
    found = gae(TOKEN_REWARDS, VALUES, gamma=0.5, lam=0.5)
    assert found.tolist() == [-0.328125, 0.1875, 0.25]


def test_gae_without_discount_and_decay_is_the_return_to_go_minus_the_value() -> None:
    rewards = np.array([-0.5, 0.25, 1.0])  # to go: 0.75, 1.25, 1
    assert gae(rewards, VALUES, gamma=1.0, lam=1.0).tolist() == [0.25, 1.0, 0.25]


def test_gae_with_lam_zero_is_the_error_of_the_critic() -> None:
    assert gae(TOKEN_REWARDS, VALUES, gamma=1.0, lam=0.0).tolist() == [-0.25, 0.5, 0.25]


def test_gae_of_a_critic_that_knows_everything_is_zero() -> None:
    assert not gae(TOKEN_REWARDS, np.ones(3), gamma=1.0, lam=0.95).any()


def test_gae_of_no_token_is_empty_and_of_one_is_the_reward_minus_the_value() -> None:
    assert gae(np.zeros(0), np.zeros(0), gamma=1.0, lam=0.95).shape == (0,)
    assert gae(np.array([2.0]), np.array([0.5]), gamma=0.3, lam=0.7).tolist() == [1.5]


def test_gae_wants_one_value_for_each_reward() -> None:
    with pytest.raises(ValueError, match=r"as many rewards as values, got the shapes \(3,\) and \(2,\)"):
        gae(TOKEN_REWARDS, VALUES[:2], gamma=1.0, lam=1.0)


@PATIENT
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1)
)
def test_gae_is_the_weighted_sum_of_all_later_errors(
    tokens: list[tuple[float, float]], gamma: float, lam: float
) -> None:
    rewards, values = np.array(tokens).T
    following = np.append(values[1:], 0.0)
    errors = rewards + gamma * following - values
    by_hand = [sum((gamma * lam) ** k * error for k, error in enumerate(errors[t:])) for t in range(len(errors))]
    assert gae(rewards, values, gamma=gamma, lam=lam) == pytest.approx(by_hand, abs=1e-9)
