"""The algorithms of the RL stage on a real learner: log-probs from before an update, entropy, a critic that learns."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys.config import CriticConfig, LearnersConfig, OptimizerConfig
from rlsys.learners.fsdp import FsdpLearner
from rlsys.losses import LossInputs, LossOutputs, clipped_policy_gradient, value_loss
from rlsys.packing import shard, unpack
from rlsys.stages.common import assemble
from rlsys.stages.credit import of_critic
from rlsys.types import NetworkKind, TrainBatch
from tests.learners.ranks import TEMPERATURE, assert_close, assert_equal, batches, build, free_ports, weights

BUDGET = 64
"""Several micro-batches for each step."""


class Group:
    """One rank in this process, asked as the driver asks a group."""

    def __init__(self, learner: FsdpLearner) -> None:
        self.learner = learner

    def step(self, batch: TrainBatch, **options: Any) -> dict[str, float]:
        (share,) = shard(batch, num_ranks=1, max_tokens=BUDGET)
        metrics = self.learner.step(share, num_tokens=batch.num_tokens, temperature=TEMPERATURE, **options)
        return {name.removeprefix("sum/"): value for name, value in metrics.items()}

    def infer(self, batch: TrainBatch, *, reference: bool = False) -> list[Any]:
        (share,) = shard(batch, num_ranks=1, max_tokens=BUDGET)
        return unpack(batch, share, self.learner.infer(share, temperature=TEMPERATURE, reference=reference))


Start = Callable[..., Group]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("algorithms")
    build(folder)
    return folder


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts a learner; the one before it ends, because a process is one rank of one group."""
    current: list[FsdpLearner] = []

    def begin(
        loss: Callable[[LossInputs], LossOutputs] = clipped_policy_gradient,
        *,
        network: NetworkKind = "policy",
        lr: float = 1e-3,
        with_reference: bool = False,
    ) -> Group:
        end()
        learner = FsdpLearner(model_path=str(folder / "model"), config=LearnersConfig(), rank=0, world_size=1)
        current.append(learner)
        learner.start(
            master=("127.0.0.1", free_ports(1)[0]),
            optimizer=OptimizerConfig(lr=lr),
            total_steps=10,
            loss=loss,
            network=network,
            with_reference=with_reference,
            timeout=60.0,
        )
        return Group(learner)

    def end() -> None:
        while current:
            current.pop().close()

    yield begin
    end()


def recorded(batch: TrainBatch, logprobs: list[Any]) -> TrainBatch:
    """The batch as if an engine with exactly these log-probs had written it."""
    rollouts = tuple(replace(r, logprobs=values) for r, values in zip(batch.rollouts, logprobs, strict=True))
    return replace(batch, rollouts=rollouts)


def saved(learner: FsdpLearner, folder: Path) -> str:
    learner.save(str(folder))
    asyncio.run(_until_saved(learner))
    return str(folder)


async def _until_saved(learner: FsdpLearner) -> None:
    while not learner.saved():
        await asyncio.sleep(0.01)


def test_on_fresh_rollouts_the_proximal_trust_region_learns_what_the_usual_one_learns(
    start: Start, folder: Path
) -> None:
    batch = batches(folder)[0]
    learned: dict[str, dict[str, Tensor]] = {}
    for trust_region in ("rollout", "proximal"):
        group = start()
        fresh = recorded(batch, group.infer(batch))
        metrics = group.step(fresh, trust_region=trust_region)
        assert metrics["ratio"] == pytest.approx(batch.num_tokens, rel=1e-4)
        learned[trust_region] = weights(group.learner)
    assert_close(learned["proximal"], learned["rollout"])


def test_a_second_update_is_measured_against_the_policy_before_the_first(start: Start, folder: Path) -> None:
    batch = batches(folder)[0]
    group = start(lr=1e-2)
    before = group.infer(batch)
    batch = replace(batch, proximal_logprobs=tuple(before))
    first = group.step(batch, trust_region="proximal", correction="truncated", correction_limit=1.1)
    second = group.step(batch, trust_region="proximal", correction="truncated", correction_limit=1.1)
    assert first["ratio"] == pytest.approx(batch.num_tokens, rel=1e-4)
    assert first["clip_fraction"] == 0
    assert abs(second["ratio"] - batch.num_tokens) > 0.01 * batch.num_tokens
    assert second["clip_fraction"] > 0
    # The factor is of the policies before: no update changes it. The engine's log-probs were disturbed.
    assert second["correction"] == pytest.approx(first["correction"], rel=1e-5)
    factors = np.concatenate(
        [
            np.exp(mine - rollout.logprobs)[rollout.loss_mask]
            for mine, rollout in zip(before, batch.rollouts, strict=True)
        ]
    )
    assert first["correction"] == pytest.approx(float(np.minimum(factors, 1.1).sum()), rel=1e-4)
    assert first["correction_cut"] == (factors > 1.1).sum() > 0


def test_an_entropy_bonus_alone_makes_the_policy_less_certain(start: Start, folder: Path) -> None:
    batch = batches(folder)[0]
    batch = replace(batch, advantages=tuple(np.zeros_like(part) for part in batch.advantages))
    group = start(lr=3e-3)
    found = [group.step(batch, entropy_coef=0.1)["entropy"] for _ in range(5)]
    assert all(later > earlier for earlier, later in itertools.pairwise(found))


def test_the_reference_is_asked_apart_and_spared_where_the_loss_does_not_need_it(start: Start, folder: Path) -> None:
    batch = batches(folder)[0]
    group = start(with_reference=True, lr=1e-2)
    frozen = group.infer(batch, reference=True)
    assert "kl" not in group.step(batch, reference=False)
    for mine, now, then in zip(group.infer(batch), group.infer(batch, reference=True), frozen, strict=True):
        assert np.array_equal(now, then)
        assert not np.array_equal(mine, then)
    assert group.step(batch, kl_coef=0.1)["kl"] > 0


def critic_batch(critic: Group, batch: TrainBatch) -> tuple[TrainBatch, dict[str, float]]:
    """What a critic learns from the rollouts of a batch, whose reward is the length of what was written."""
    rollouts = [replace(r, reward=r.num_trained_tokens / 10) for r in batch.rollouts]
    values = critic.infer(assemble(rollouts, [0.0] * len(rollouts)))
    credit = of_critic(rollouts, values, CriticConfig(lam=1.0), whitened=False)
    return assemble(rollouts, list(credit.returns), proximal_logprobs=list(credit.values)), credit.metrics


def test_a_critic_begins_at_zero_and_learns_to_foresee_the_return(start: Start, folder: Path) -> None:
    critic = start(value_loss, network="scorer", lr=1e-2)
    source = batches(folder)[0]
    foreseen, losses = [], []
    for _ in range(30):
        batch, metrics = critic_batch(critic, source)
        foreseen.append(metrics)
        losses.append(critic.step(batch, value_clip=0.5)["loss"] / batch.num_tokens)
    assert foreseen[0]["critic/value"] == 0.0
    assert foreseen[0]["critic/explained_variance"] == pytest.approx(0.0)
    assert foreseen[-1]["critic/explained_variance"] > 0.8
    assert losses[-1] < 0.2 * losses[0]


def test_a_critic_that_was_saved_and_loaded_goes_on_bit_for_bit(start: Start, folder: Path, tmp_path: Path) -> None:
    source = batches(folder)
    critic = start(value_loss, network="scorer")
    critic.step(critic_batch(critic, source[0])[0], value_clip=0.2)
    checkpoint = saved(critic.learner, tmp_path / "critic")
    later = [critic_batch(critic, batch)[0] for batch in source[1:3]]
    for batch in later:
        critic.step(batch, value_clip=0.2)
    expected = weights(critic.learner)

    resumed = start(value_loss, network="scorer")
    resumed.learner.load(checkpoint)
    for batch in source[1:3]:
        found = critic_batch(resumed, batch)[0]
        resumed.step(found, value_clip=0.2)
    assert_equal(weights(resumed.learner), expected)


def test_an_exported_critic_is_a_model_with_one_score(start: Start, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    critic = start(value_loss, network="scorer")
    critic.step(critic_batch(critic, batches(folder)[0])[0], value_clip=0.2)
    critic.learner.export(str(tmp_path / "critic"))
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert network.config.num_labels == 1
    assert torch.count_nonzero(network.score.weight) > 0
