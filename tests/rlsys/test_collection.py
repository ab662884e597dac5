"""What a policy step collects: counts by reason, and the end of a run whose rewards do not grade."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.errors import ConfigError, DataError, TrainingStalledError
from rlsys.selection import completed_only
from rlsys.stages.collection import Collection, RewardFailures, by_kind, count_dropped
from rlsys.types import Problem, Rollout, RolloutGroup

YAML = """\
name: demo
model: {scratch: {hidden_size: 32, num_heads: 2, num_kv_heads: 1}}
data:
  train: {use: "stack_plugins:words_problems", options: {size: 1}}
  held_out: {use: "stack_plugins:words_problems", options: {size: 1}}
rewards: [{use: "pool_plugins:zero"}]
rl: {groups_per_step: 2, group_size: 4, skip_uninformative: true}
"""
PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "?"},))
LATE = "reward_timeout: reward 'r' did not grade within 1 s"
BROKEN = "reward_error: reward 'r' raised ValueError: no server: 503"


def load_file(folder: Path, more: str = "") -> Path:
    (folder / "run.yaml").write_text(YAML + more)
    return folder / "run.yaml"


def load(folder: Path, more: str = "") -> Config:
    return load_config(load_file(folder, more))


def rollout(reward: float = 0.0, *, finish: Any = "stop", **metrics: float) -> Rollout:
    return Rollout(
        tokens=np.zeros(3, np.int32),
        loss_mask=np.ones(3, np.bool_),
        logprobs=np.zeros(3, np.float32),
        versions=np.zeros(3, np.int32),
        reward=reward,
        finish_reason=finish,
        metrics=metrics,
    )


def group(*rollouts: Rollout, dropped: Mapping[str, int] | None = None) -> RolloutGroup:
    return RolloutGroup(problem=PROBLEM, rollouts=rollouts, dropped=dropped or {})


GOOD = group(rollout(0.0, **{"status/r/wrong": 1.0}), rollout(1.0, **{"status/r/correct": 1.0}))


def test_reasons_are_counted_by_their_kind() -> None:
    assert by_kind({BROKEN: 2, "reward_error: other": 3, LATE: 1, "uninformative": 1}) == {
        "reward_error": 5,
        "reward_timeout": 1,
        "uninformative": 1,
    }
    assert count_dropped([group(dropped={BROKEN: 1}), group(dropped={"reward_error: x": 1, LATE: 2})]) == {
        "reward_error": 2,
        "reward_timeout": 2,
    }


def test_a_step_counts_every_rollout_that_does_not_train_also_of_groups_that_were_dropped_whole(tmp_path: Path) -> None:
    config = load(tmp_path, "max_failed_rewards: 1.0\n")
    found = Collection(config, {"completed_only": completed_only}, step=1)
    assert found.add(GOOD) is None
    assert found.add(group(rollout(1.0), dropped={BROKEN: 2, LATE: 1})) == BROKEN
    assert found.add(group(dropped={LATE: 4})) == LATE
    assert found.add(group(rollout(1.0), rollout(1.0), rollout(0.0, finish="length"))) == "uninformative"
    assert found.add(group(rollout(1.0), rollout(0.0), rollout(1.0, finish="length"), dropped={BROKEN: 1})) is None
    assert [len(each.rollouts) for each in found.groups] == [2, 2]
    assert found.dropped == {
        "reward_error": 3,
        "reward_timeout": 5,
        "too_few_siblings": 1,
        "not_selected": 2,
        "uninformative": 2,
    }


def test_statuses_are_shares_of_all_that_have_a_reward_also_of_groups_that_do_not_train(tmp_path: Path) -> None:
    found = Collection(load(tmp_path, "max_failed_rewards: 1.0\n"), {}, step=1)
    found.add(GOOD)
    zeroed = rollout(**{"status/r/timeout": 1.0, LATE: 1.0})
    assert found.add(group(zeroed, zeroed)) == "uninformative"
    assert found.statuses == {"status/r/correct": 0.25, "status/r/timeout": 0.5, "status/r/wrong": 0.25}


def test_too_many_failures_in_one_step_stop_the_run_with_reward_counts_and_the_first_message(tmp_path: Path) -> None:
    # 3 of 8 could not be graded: more than a quarter
    found = Collection(load(tmp_path), {}, step=7)
    found.add(group(rollout(0.0), rollout(1.0), rollout(1.0), dropped={BROKEN: 1}))
    with pytest.raises(TrainingStalledError) as caught:
        found.add(group(rollout(0.0), rollout(1.0), dropped={LATE: 2, "tool_error: x": 4}))
    assert str(caught.value) == (
        "3 of 8 rollouts of policy step 7 could not be graded (1 reward_error, 2 reward_timeout), more than "
        "max_failed_rewards=0.25 allows; the first: reward 'r' raised ValueError: no server: 503"
    )


def test_as_many_failures_as_are_allowed_do_not_stop_a_run_and_a_part_of_a_step_does_not_either(tmp_path: Path) -> None:
    found = Collection(load(tmp_path), {}, step=1)
    assert found.add(group(dropped={LATE: 2})) == LATE  # one group of two: too early to say
    found.add(group(*(rollout(float(number)) for number in range(6))))  # 2 of 8 is a quarter
    with pytest.raises(TrainingStalledError, match="3 of 9 rollouts"):
        found.add(group(dropped={LATE: 1}))


def test_zeroed_rollouts_are_failures_too_whatever_a_selection_makes_of_them(tmp_path: Path) -> None:
    found = Collection(load(tmp_path), {"none": lambda each: [False] * len(each.rollouts)}, step=1)
    zeroed = rollout(**{"status/r/timeout": 1.0, LATE: 1.0, BROKEN: 1.0})
    found.add(group(zeroed, rollout(1.0)))
    with pytest.raises(TrainingStalledError, match=r"2 of 4 rollouts .* \(2 reward_timeout\)"):
        found.add(group(zeroed, rollout(1.0)))


@pytest.mark.parametrize(("limit", "failed", "stops"), [(0.0, 0, False), (0.0, 1, True), (1.0, 4, False)])
def test_the_share_may_be_none_or_all(limit: float, failed: int, stops: bool) -> None:
    failures = RewardFailures(limit)
    failures.add(group(*[rollout()] * (4 - failed), dropped={LATE: failed} if failed else {}))
    if stops:
        with pytest.raises(TrainingStalledError, match="the evaluation"):
            failures.check("the evaluation")
    else:
        failures.check("the evaluation")


def test_a_prompt_that_is_too_long_may_be_an_error(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert Collection(config, {}, step=1).add(group(dropped={"prompt_too_long": 4})) == "prompt_too_long"
    strict = load_config(tmp_path / "run.yaml", ["data.too_long=error"])
    with pytest.raises(DataError, match="problem 'p' leaves no room"):
        Collection(strict, {}, step=1).add(group(dropped={"prompt_too_long": 4}))


def test_a_group_without_a_reason_or_a_token_is_dropped(tmp_path: Path) -> None:
    silent = Rollout(
        tokens=np.zeros(1, np.int32),
        loss_mask=np.zeros(1, np.bool_),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
    )
    found = Collection(load(tmp_path), {}, step=1)
    assert (found.add(group()), found.add(group(silent, silent))) == ("no_rollouts", "no_tokens")


def test_a_group_that_was_given_up_is_dropped_as_such_whether_uninformative_ones_train_or_not(tmp_path: Path) -> None:
    config = load_config(load_file(tmp_path), ["rl.skip_uninformative=false"])
    found = Collection(config, {}, step=1)
    assert found.add(group(rollout(1.0), rollout(1.0), dropped={"given_up": 2})) == "given_up"
    assert (found.groups, found.dropped) == ([], {"given_up": 4})


def test_a_rollout_with_log_probs_that_are_not_finite_is_kept_aside_and_its_siblings_train(tmp_path: Path) -> None:
    found = Collection(load(tmp_path), {}, step=1)
    bad = rollout(0.5, not_finite=3.0)
    assert found.add(group(rollout(1.0), bad, rollout(0.0))) is None
    assert [each.rewards.tolist() for each in found.groups] == [[1.0, 0.0]]
    assert [each.rollouts for each in found.broken] == [(bad,)]
    assert found.dropped == {"not_finite": 1}
    assert found.add(group(rollout(1.0), bad)) == "not_finite"
    assert found.dropped == {"not_finite": 2, "too_few_siblings": 1}


@pytest.mark.parametrize("share", ["-0.1", "1.1"])
def test_a_share_lies_between_0_and_1(tmp_path: Path, share: str) -> None:
    with pytest.raises(ConfigError, match=rf"max_failed_rewards is {share}; a share lies between 0 and 1"):
        load(tmp_path, f"max_failed_rewards: {share}\n")
