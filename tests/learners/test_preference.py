"""Preference losses and a reward model on a real learner: where they begin, that they learn, what they leave."""

import asyncio
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlsys import preference
from rlsys.chat import Chat, load_tokenizer
from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.learners.fsdp import FsdpLearner
from rlsys.packing import shard, unpack
from rlsys.pair_data import arithmetic_pairs
from rlsys.pairs import labelled_batch, over_labelled, over_pairs, over_scored_pairs, pair_batch, with_logprobs
from rlsys.rewards.reward_model import RewardModel
from rlsys.scratch import ScratchModel, build_scratch_model
from rlsys.stages.offline import to_rollout
from rlsys.stages.preference import as_graded
from rlsys.types import Problem, Rollout, TrainBatch
from tests.learners.ranks import free_ports

STEPS = 12
PROBLEMS = [
    Problem(
        id=str(n),
        prompt=({"role": "user", "content": f"{n} + {n + 3}?"},),
        answer=str(2 * n + 3),
        metadata={"expression": f"{n} + {n + 3}"},
    )
    for n in range(10, 18)
]
PAIRS = arithmetic_pairs(PROBLEMS, size=8, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference") / "model"
    build_scratch_model(
        folder, ScratchModel(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=64)
    )
    return folder


@pytest.fixture
def start(model: Path) -> Iterator[Callable[..., FsdpLearner]]:
    started = []

    def make(loss: Any, **options: Any) -> FsdpLearner:
        learner = FsdpLearner(model_path=str(model), config=LearnersConfig(count=1), rank=0, world_size=1)
        started.append(learner)
        learner.start(
            master=("127.0.0.1", free_ports(1)[0]),
            optimizer=OptimizerConfig(lr=3e-3),
            total_steps=STEPS,
            loss=loss,
            timeout=60.0,
            **options,
        )
        return learner

    yield make
    for learner in started:
        learner.close()


def infer(learner: FsdpLearner, batch: TrainBatch) -> list[Any]:
    (micro_batches,) = shard(batch, num_ranks=1, max_tokens=200)
    return unpack(batch, micro_batches, learner.infer(micro_batches, temperature=1.0))


def step(learner: FsdpLearner, batch: TrainBatch, **options: Any) -> dict[str, float]:
    (micro_batches,) = shard(batch, num_ranks=1, max_tokens=200)
    assert len(micro_batches) > 1
    found = learner.step(micro_batches, num_tokens=batch.num_tokens, temperature=1.0, **options)
    return {name.removeprefix("sum/"): value / batch.num_tokens for name, value in found.items()}


def pairs_of(model: Path) -> list[tuple[Rollout, Rollout]]:
    chat = Chat(load_tokenizer(str(model)), [])
    return [
        (to_rollout(chosen, chat), to_rollout(rejected, chat)) for chosen, rejected in (p.demonstrations for p in PAIRS)
    ]


def with_reference(learner: FsdpLearner, pairs: list[tuple[Rollout, Rollout]]) -> list[tuple[Rollout, Rollout]]:
    flat = [rollout for pair in pairs for rollout in pair]
    flat = [with_logprobs(r, found) for r, found in zip(flat, infer(learner, pair_batch(pairs)), strict=True)]
    return list(zip(flat[0::2], flat[1::2], strict=True))


LOSSES = {
    "dpo": (partial(over_pairs, loss=preference.dpo, beta=0.1), math.log(2)),
    "robust_dpo": (partial(over_pairs, loss=preference.robust_dpo, beta=0.1, label_smoothing=0.1), math.log(2)),
    "ipo": (partial(over_pairs, loss=preference.ipo, beta=0.5), 1.0),
    "simpo": (partial(over_pairs, loss=preference.simpo, beta=2.0), None),
    "orpo": (partial(over_pairs, loss=preference.orpo, beta=1.0), None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_over_pairs_begins_where_it_must_and_learns_to_prefer(
    name: str, model: Path, start: Callable[..., FsdpLearner]
) -> None:
    loss, first = LOSSES[name]
    learner = start(loss)
    batch = pair_batch(with_reference(learner, pairs_of(model)))
    lines = [step(learner, batch) for _ in range(STEPS)]
    assert lines[0]["logprob_gap"] < 1e-6  # the policy is still the reference
    if first is not None:
        assert lines[0]["loss"] == pytest.approx(first, abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["accuracy"] == 1.0
    assert lines[-1]["reward_margin"] > lines[0]["reward_margin"]


def test_kto_raises_what_is_desirable_and_lowers_the_rest(model: Path, start: Callable[..., FsdpLearner]) -> None:
    learner = start(partial(over_labelled, beta=0.1))
    pairs = with_reference(learner, pairs_of(model))
    flat = [rollout for pair in pairs for rollout in pair]
    batch = labelled_batch(flat, [True, False] * len(pairs))
    lines = [step(learner, batch, kl_baseline=0.0) for _ in range(STEPS)]
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["reward_desirable"] > lines[-1]["reward_undesirable"]


def test_a_reward_model_learns_to_prefer_and_scores_alike_where_it_is_loaded(
    model: Path, start: Callable[..., FsdpLearner], tmp_path: Path
) -> None:
    learner = start(over_scored_pairs, network="scorer")
    render = as_graded(model)
    batch = pair_batch([(render(chosen), render(rejected)) for chosen, rejected in (p.demonstrations for p in PAIRS)])
    lines = [step(learner, batch) for _ in range(STEPS)]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["accuracy"] == 1.0
    last = [values[-1] for values in infer(learner, batch)]
    learner.export(str(tmp_path / "scorer"))

    async def scores() -> list[float]:
        reward = RewardModel(path=str(tmp_path / "scorer"))
        await reward.start()
        answers = [(pair.problem, demonstration.text) for pair in PAIRS for demonstration in pair.demonstrations]
        found = [(await reward.score(problem, text, batch.rollouts[0])).score for problem, text in answers]
        await reward.close()
        return found

    assert asyncio.run(scores()) == pytest.approx(last, abs=1e-5)
