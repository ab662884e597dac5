"""One policy step on fakes of its learners: what is asked, what trains on what, and what a checkpoint must know."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.errors import TrainingStalledError
from rlsys.stages.policy_step import PolicyStep
from rlsys.types import Problem, Rollout, RolloutGroup, TrainBatch

YAML = """\
name: demo
model: {scratch: {hidden_size: 32, num_heads: 2, num_kv_heads: 1}}
data:
  train: {use: "stack_plugins:words_problems", options: {size: 1}}
  held_out: {use: "stack_plugins:words_problems", options: {size: 1}}
rewards: [{use: "pool_plugins:zero"}]
rl:
  steps: 10
  groups_per_step: 2
  group_size: 2
  advantage: rlsys.advantages:dr_grpo
  sampling: {temperature: 0.7}
"""
PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "?"},))


class Learners:
    """A learner group that writes down what it is asked, and says that a rollout's every log-prob is its own number."""

    def __init__(self, *, kl: float | None = None, skipped: float = 0.0, reference: float = -3.0) -> None:
        self.kl, self.skipped, self.reference = kl, skipped, reference
        self.asked: list[str] = []
        self.temperatures: set[float] = set()
        self.batches: list[TrainBatch] = []
        self.options: list[dict[str, Any]] = []

    async def infer(self, batch: TrainBatch, *, temperature: float, reference: bool = False) -> list[Any]:
        self.asked.append("reference" if reference else "infer")
        self.temperatures.add(temperature)
        assert all(not advantage.any() for advantage in batch.advantages)
        if reference:
            return [np.full(len(rollout), self.reference, np.float32) for rollout in batch.rollouts]
        return [np.full(len(rollout), -float(rollout.tokens[0]), np.float32) for rollout in batch.rollouts]

    async def step(self, batch: TrainBatch, **options: Any) -> dict[str, float]:
        self.asked.append("step")
        self.batches.append(batch)
        self.options.append(options)
        metrics = {
            "loss": 1.0,
            "logprob_gap": 0.0,
            "ratio": float(len(self.batches)),
            "skipped_in_a_row": self.skipped,
            "seconds": 2.0,
            "lr": 0.1,
        }
        return metrics if self.kl is None else {**metrics, "kl": self.kl}


def rollout(number: int, reward: float) -> Rollout:
    """Its first token tells it apart from others; two more train."""
    return Rollout(
        tokens=np.array([number, 0, 0], dtype=np.int32),
        loss_mask=np.array([False, True, True]),
        logprobs=np.array([0, -1, -1], dtype=np.float32),
        versions=np.array([-1, 0, 0], dtype=np.int32),
        reward=reward,
    )


GROUPS = [
    RolloutGroup(problem=PROBLEM, rollouts=(rollout(1, 1.0), rollout(2, 0.0))),
    RolloutGroup(problem=PROBLEM, rollouts=(rollout(3, 1.0), rollout(4, 1.0))),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path


def load(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "run.yaml", overrides)


def take(
    config: Config, learners: Learners, critic: Learners | None = None, *, step: int = 1, kl_coef: float | None = None
) -> tuple[Any, dict[str, float], PolicyStep]:
    policy_step = PolicyStep(config, learners, critic, kl_coef=kl_coef)  # type: ignore[arg-type]
    credit, metrics = asyncio.run(policy_step.take(step, GROUPS))
    return credit, metrics, policy_step


def numbers(batch: TrainBatch) -> list[int]:
    return [int(each.tokens[0]) for each in batch.rollouts]


def test_by_default_one_step_is_all_that_is_asked(folder: Path) -> None:
    learners = Learners()
    credit, metrics, _ = take(load(folder), learners)
    assert learners.asked == ["step"]
    (batch,), (options,) = learners.batches, learners.options
    assert sorted(numbers(batch)) == [1, 2, 3, 4]
    expected = {1: 0.5, 2: -0.5, 3: 0.0, 4: 0.0}
    assert [part[0] for part in batch.advantages] == [expected[number] for number in numbers(batch)]
    assert credit.means == [0.5, -0.5, 0.0, 0.0]
    assert batch.proximal_logprobs is None
    assert (options["trust_region"], options["correction"], options["entropy_coef"]) == ("rollout", "none", 0.0)
    assert (metrics["learner/loss"], metrics["seconds/learn"], metrics["learner/kl_coef"]) == (1.0, 2.0, 0.0)
    assert "learner/last_ratio" not in metrics


def test_a_proximal_policy_costs_no_forward_pass_where_there_is_one_update(folder: Path) -> None:
    learners = Learners()
    take(load(folder, "rl.trust_region=proximal", "rl.correction=truncated"), learners)
    assert learners.asked == ["step"]
    assert learners.options[0]["trust_region"] == "proximal"
    assert learners.options[0]["correction"] == "truncated"


def test_with_several_updates_the_proximal_log_probs_are_those_before_the_first(folder: Path) -> None:
    learners = Learners()
    _, metrics, _ = take(load(folder, "rl.trust_region=proximal", "rl.updates_per_step=2"), learners)
    assert (metrics["learner/ratio"], metrics["learner/last_ratio"], metrics["seconds/learn"]) == (1.0, 2.0, 4.0)
    assert learners.asked == ["infer", "step", "step"]
    assert learners.temperatures == {0.7}
    assert sorted(number for batch in learners.batches for number in numbers(batch)) == [1, 2, 3, 4]
    for batch in learners.batches:
        assert batch.proximal_logprobs is not None
        assert [-part[1] for part in batch.proximal_logprobs] == numbers(batch)


def test_kl_in_the_reward_is_no_part_of_the_loss(folder: Path) -> None:
    learners = Learners(reference=-3.0)
    overrides = ["rl.kl_in=reward", "rl.kl_estimator=k1", "rl.kl_coef=0.25"]
    credit, metrics, _ = take(load(folder, *overrides), learners)
    assert learners.asked == ["reference", "step"]
    assert learners.options[0]["reference"] is False
    assert "kl_coef" not in learners.options[0]
    # The recorded log-prob is -1: k1 of each token is 2, of a rollout 4, which costs each of them 1.
    assert credit.means == [0.5, -0.5, 0.0, 0.0]
    assert (metrics["learner/kl"], metrics["learner/kl_rollout"]) == (2.0, 4.0)


def test_kl_in_the_reward_is_of_the_proximal_policy_where_its_log_probs_are_known(folder: Path) -> None:
    learners = Learners(reference=-3.0)
    overrides = ["rl.kl_in=reward", "rl.kl_estimator=k1", "rl.kl_coef=0.25", "rl.updates_per_step=2"]
    credit, metrics, _ = take(load(folder, *overrides, "rl.trust_region=proximal"), learners)
    assert learners.asked == ["infer", "reference", "step", "step"]
    # Rollout n has the log-probs -n, so its KL is 2 * (3 - n), its reward less a quarter of that: 0, -0.5; 1, 1.5.
    assert credit.means == [0.25, -0.25, -0.25, 0.25]
    assert metrics["learner/kl_rollout"] == pytest.approx(1.0)


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_an_adaptive_weight_follows_the_kl_and_goes_on_from_a_checkpoint(folder: Path, kl_in: str) -> None:
    overrides = [f"rl.kl_in={kl_in}", "rl.kl_coef=0.5", "rl.kl_schedule=adaptive", "rl.kl_horizon=40"]
    config = load(folder, *overrides, "rl.kl_target=3.2", "rl.kl_estimator=k2")
    # k2 of d = -2 is 2, so 4 for a rollout; the learner's mean over tokens is 2. Both are a quarter above the target.
    learners = Learners(kl=2.0 if kl_in == "loss" else None)
    _, metrics, policy_step = take(config, learners)
    assert metrics["learner/kl_coef"] == 0.5
    assert metrics["learner/kl_rollout"] == pytest.approx(4.0)
    assert policy_step.kl.adapted == pytest.approx(0.5 * (1 + 0.2 * 4 / 40))
    _, resumed, _ = take(config, learners, step=2, kl_coef=policy_step.kl.adapted)
    assert resumed["learner/kl_coef"] == policy_step.kl.adapted


def test_the_policy_trains_on_gae_and_the_critic_on_its_returns(folder: Path) -> None:
    learners, critic = Learners(), Learners()
    overrides = ["rl.advantage=rlsys.advantages:grpo", "rl.critic.lam=1.0", "rl.critic.clip=0.3"]
    credit, metrics, _ = take(load(folder, *overrides), learners, critic)
    assert critic.asked == ["infer", "step"]
    assert critic.temperatures == {1.0}
    assert learners.asked == ["step"]
    # The critic says -n of all tokens of rollout n.
    assert credit.means == [2.0, 2.0, 4.0, 5.0]
    (batch,) = critic.batches
    assert numbers(batch) == numbers(learners.batches[0])
    rewards = {1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0}
    assert [part.tolist() for part in batch.advantages] == [[0, rewards[n], rewards[n]] for n in numbers(batch)]
    assert batch.proximal_logprobs is not None
    assert [-part[1] for part in batch.proximal_logprobs] == numbers(batch)
    assert critic.options[0] == {"temperature": 1.0, "value_clip": 0.3}
    assert metrics["critic/loss"] == 1.0
    assert "critic/logprob_gap" not in metrics
    assert metrics["critic/return"] == 0.75


def test_while_the_critic_warms_up_the_policy_rests(folder: Path) -> None:
    overrides = ["rl.advantage=rlsys.advantages:grpo", "rl.critic.warmup_steps=2"]
    for step, expected in ((1, []), (2, []), (3, ["step"])):
        learners, critic = Learners(), Learners()
        _, metrics, _ = take(load(folder, *overrides), learners, critic, step=step)
        assert learners.asked == expected
        assert critic.asked == ["infer", "step"]
        assert ("learner/loss" in metrics) == bool(expected)


def test_a_critic_without_finite_gradients_stops_the_run(folder: Path) -> None:
    config = load(folder, "rl.advantage=rlsys.advantages:grpo", "rl.critic={}")
    with pytest.raises(TrainingStalledError, match="no finite gradient"):
        take(config, Learners(), Learners(skipped=5.0))


def test_updates_of_one_step_part_the_rollouts_by_seed_and_step(folder: Path) -> None:
    def order(step: int, *overrides: str) -> list[list[int]]:
        learners = Learners()
        take(load(folder, "rl.updates_per_step=2", *overrides), learners, step=step)
        return [numbers(batch) for batch in learners.batches]

    assert order(1) == order(1)
    assert [len(part) for part in order(1)] == [2, 2]
    assert len({str(order(step)) for step in range(1, 9)}) > 1
    assert len({str(order(1, f"seed={seed}")) for seed in range(8)}) > 1
