"""Credit of a policy step: by comparing siblings or by a critic, with KL penalties in the reward or without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlsys.advantages import dr_grpo, gae, grpo, reward_itself
from rlsys.errors import ConfigError
from rlsys.stage_config import CriticConfig, RlConfig
from rlsys.stages.credit import kl_penalties, of_critic, of_groups, trained_tokens
from rlsys.types import Problem, Rollout, RolloutGroup

PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "?"},))


def rollout(mask: list[int], reward: float = 0.0) -> Rollout:
    """Tokens of which those with a 1 were written by the policy, with log-prob -1."""
    written = np.array(mask, dtype=np.bool_)
    return Rollout(
        tokens=np.arange(len(mask), dtype=np.int32),
        loss_mask=written,
        logprobs=np.where(written, -1.0, 0.0).astype(np.float32),
        versions=np.where(written, 0, -1).astype(np.int32),
        reward=reward,
    )


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(problem=PROBLEM, rollouts=rollouts)


TOOL_USER = rollout([0, 1, 1, 0, 0, 1], 1.0)
"""A prompt of one token, two of the policy, two of a tool, one more of the policy."""
SILENT = rollout([0, 0], 1.0)


def test_all_tokens_of_a_rollout_have_the_advantage_that_it_has_among_its_siblings() -> None:
    groups = [group(rollout([0, 1], 1.0), rollout([0, 1, 1], 0.0)), group(rollout([0, 1], 3.0), rollout([0, 1], 5.0))]
    credit = of_groups(groups, dr_grpo, RlConfig())
    assert [part.tolist() for part in credit.advantages] == [[0.5] * 2, [-0.5] * 3, [-1.0] * 2, [1.0] * 2]
    assert credit.means == [0.5, -0.5, -1.0, 1.0]
    assert credit.advantages[0].dtype == np.float32
    assert not credit.returns
    assert not credit.metrics


def test_penalties_are_taken_from_the_rewards_before_siblings_are_compared() -> None:
    groups = [group(rollout([0, 1], 1.0), rollout([0, 1, 1], 1.0)), group(rollout([0, 1], 0.0), rollout([0, 1], 0.0))]
    penalties = [np.array(values) for values in ([0, 0.25], [0, 0.5, 0.75], [0, -0.5], [0, 0.5])]
    # 0.75 and -0.25; 0.5 and -0.5
    credit = of_groups(groups, dr_grpo, RlConfig(), penalties)
    assert credit.means == [0.5, -0.5, 0.5, -0.5]


def test_whitening_is_over_the_rollouts_of_all_groups() -> None:
    groups = [group(rollout([0, 1], 0.0), rollout([0, 1], 0.0)), group(rollout([0, 1], 2.0), rollout([0, 1], 2.0))]
    credit = of_groups(groups, reward_itself, RlConfig(whiten_advantages=True))
    assert credit.means == [-1.0, -1.0, 1.0, 1.0]


@pytest.mark.parametrize("made", [[1.0], [1.0, float("nan")], 1.0, [[1.0, 2.0]]])
def test_an_advantage_that_is_not_one_finite_number_for_each_is_refused(made: Any) -> None:
    stage = RlConfig(advantage="mine:broken")
    with pytest.raises(ConfigError, match=r"rl\.advantage=mine:broken made .* of the rewards \[0\.5, 1\.0\]"):
        of_groups([group(rollout([0, 1], 0.5), rollout([0, 1], 1.0))], lambda _: made, stage)


def test_what_a_tool_wrote_is_no_step_of_gae() -> None:
    values = np.array([9, 0.5, 0.25, 9, 9, 0.75], dtype=np.float32)
    credit = of_critic([TOOL_USER], [values], CriticConfig(gamma=1.0, lam=0.0), whitened=False)
    # Errors over the three tokens of the policy: 0.25 - 0.5, 0.75 - 0.25, 1 - 0.75.
    assert credit.advantages[0].tolist() == [0, -0.25, 0.5, 0, 0, 0.25]
    assert credit.returns[0].tolist() == [0, 0.25, 0.75, 0, 0, 1.0]
    assert credit.means == pytest.approx([0.5 / 3])


def test_without_decay_every_token_returns_the_reward() -> None:
    values = np.array([0, 0.5, 0.25, 0, 0, 0.75], dtype=np.float32)
    credit = of_critic([TOOL_USER], [values], CriticConfig(gamma=1.0, lam=1.0), whitened=False)
    assert credit.returns[0].tolist() == [0, 1, 1, 0, 0, 1]
    assert credit.advantages[0].tolist() == [0, 0.5, 0.75, 0, 0, 0.25]


def test_with_a_critic_each_token_pays_its_own_penalty() -> None:
    penalties = [np.array([7, 0.25, -0.5, 7, 7, 0.125])]
    credit = of_critic(
        [TOOL_USER], [np.zeros(6, np.float32)], CriticConfig(lam=1.0), whitened=False, penalties=penalties
    )
    # Rewards -0.25, 0.5, 0.875, from the end.
    assert credit.returns[0].tolist() == [0, 1.125, 1.375, 0, 0, 0.875]


def test_whitening_with_a_critic_is_over_tokens_and_leaves_the_returns() -> None:
    rollouts = [TOOL_USER, SILENT, rollout([0, 1], 0.0)]
    values = [np.array([0, 0.5, 0.25, 0, 0, 0.75], np.float32), np.zeros(2, np.float32), np.array([0, 3], np.float32)]
    plain = of_critic(rollouts, values, CriticConfig(lam=0.7), whitened=False)
    whitened = of_critic(rollouts, values, CriticConfig(lam=0.7), whitened=True)
    masks = [trained_tokens(each) for each in rollouts]
    before = np.concatenate([part[mask] for part, mask in zip(plain.advantages, masks, strict=True)])
    after = np.concatenate([part[mask] for part, mask in zip(whitened.advantages, masks, strict=True)])
    assert after == pytest.approx((before - before.mean()) / before.std(), abs=1e-6)
    assert not any(part[~mask].any() for part, mask in zip(whitened.advantages, masks, strict=True))
    assert [part.tolist() for part in whitened.returns] == [part.tolist() for part in plain.returns]


def test_a_rollout_in_which_nothing_trains_has_no_credit_and_spoils_none() -> None:
    values = np.array([0, 0.5], np.float32)
    credit = of_critic(
        [SILENT, rollout([0, 1], 1.0)], [np.zeros(2, np.float32), values], CriticConfig(), whitened=False
    )
    assert credit.advantages[0].tolist() == [0, 0]
    assert credit.advantages[1].tolist() == [0, 0.5]
    assert credit.means == [0.0, 0.5]


def test_a_first_token_that_the_policy_wrote_cannot_be_predicted_and_is_left_out() -> None:
    whole = rollout([1, 1, 1], 1.0)
    assert trained_tokens(whole).tolist() == [False, True, True]
    credit = of_critic([whole], [np.zeros(3, np.float32)], CriticConfig(lam=1.0), whitened=False)
    assert credit.advantages[0].tolist() == [0, 1, 1]


def test_how_much_the_critic_foresaw_is_reported() -> None:
    rollouts = [rollout([0, 1], 0.0), rollout([0, 1], 1.0), rollout([0, 1], 2.0)]
    values = [np.array([0, value], np.float32) for value in (0.0, 1.0, 2.0)]
    perfect = of_critic(rollouts, values, CriticConfig(), whitened=False).metrics
    assert perfect == {"critic/value": 1.0, "critic/return": 1.0, "critic/explained_variance": 1.0}
    blank = of_critic(rollouts, [np.zeros(2, np.float32)] * 3, CriticConfig(), whitened=False).metrics
    assert blank["critic/explained_variance"] == pytest.approx(0.0)
    same = of_critic(rollouts[:1] * 2, values[:1] * 2, CriticConfig(), whitened=False).metrics
    assert same["critic/explained_variance"] == 0.0


def test_penalties_are_estimated_where_a_token_trains() -> None:
    reference = np.array([5, -3, -1, 5, 5, -0.5], dtype=np.float32)
    (found,) = kl_penalties([TOOL_USER], [TOOL_USER.logprobs], [reference], "k1")
    assert found.tolist() == [0, 2, 0, 0, 0, -0.5]


def test_one_rollout_of_a_group_has_no_effect_on_another_group() -> None:
    first, second = group(rollout([0, 1], 1.0), rollout([0, 1], 0.0)), group(rollout([0, 1], 9.0), rollout([0, 1], 1.0))
    together = of_groups([first, second], grpo, RlConfig()).means
    alone = of_groups([first], grpo, RlConfig()).means + of_groups([second], grpo, RlConfig()).means
    assert together == alone


def test_gae_here_is_the_function_of_the_formula() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(6).astype(np.float32)
    mask = trained_tokens(TOOL_USER)
    credit = of_critic([TOOL_USER], [values], CriticConfig(gamma=0.9, lam=0.8), whitened=False)
    expected = gae(np.array([0, 0, 1.0]), values[mask].astype(np.float64), gamma=0.9, lam=0.8)
    assert credit.advantages[0][mask] == pytest.approx(expected, abs=1e-6)
