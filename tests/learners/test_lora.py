"""Adapters on a real learner: what they begin as, what they leave alone, what is published, saved and resumed."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

from rlsys.config import LearnersConfig, LoraConfig, OptimizerConfig
from rlsys.errors import ConfigError
from rlsys.learners.deepspeed import DeepSpeedLearner
from rlsys.learners.fsdp import FsdpLearner
from rlsys.learners.learner import Learner
from rlsys.losses import clipped_policy_gradient, cross_entropy
from rlsys.packing import shard, unpack
from rlsys.types import TrainBatch
from tests.learners.ranks import LOSS, STEPS, batches, build, free_ports, in_two_processes

RANK = 3
ADAPTERS = LoraConfig(rank=RANK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    build(folder)
    return folder


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Any]]:
    started: list[Learner] = []

    def make(*, learner: type[Learner] = FsdpLearner, lora: LoraConfig | None = ADAPTERS, **given: Any) -> Any:
        for one in started:
            one.close()
        started.clear()
        options = {name: given.pop(name) for name in ("options", "activation_checkpointing", "dtype") if name in given}
        config = LearnersConfig(count=1, lora=lora, **options)
        one = learner(model_path=str(folder / "model"), config=config, rank=0, world_size=1)
        started.append(one)
        one.start(
            master=("127.0.0.1", free_ports(1)[0]),
            optimizer=OptimizerConfig(lr=1e-2),
            total_steps=STEPS,
            timeout=60.0,
            **{"loss": cross_entropy, **given},
        )
        return one

    yield make
    for one in started:
        one.close()


def infer(learner: Learner, batch: TrainBatch, **options: Any) -> Tensor:
    (micro_batches,) = shard(batch, num_ranks=1, max_tokens=64)
    found = learner.infer(micro_batches, temperature=1.0, **options)
    return torch.from_numpy(np.concatenate(unpack(batch, micro_batches, found)))


def step(learner: Learner, batch: TrainBatch, **options: Any) -> float:
    (micro_batches,) = shard(batch, num_ranks=1, max_tokens=64)
    metrics = learner.step(micro_batches, num_tokens=batch.num_tokens, temperature=1.0, **options)
    assert metrics["grad_norm"] > 0
    return metrics["sum/loss"] / batch.num_tokens


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in learner._full_weights()}


def test_adapters_begin_as_nothing_learn_and_leave_the_weights_alone(folder: Path, start: Callable[..., Any]) -> None:
    first, *_ = batches(folder)
    plain = start(lora=None)
    expected, born = infer(plain, first), weights(plain)
    learner = start()
    torch.testing.assert_close(infer(learner, first), expected, atol=1e-6, rtol=1e-6)
    losses = [step(learner, first) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    after = weights(learner)
    assert list(after) == list(born)
    changed = {name for name in born if not torch.equal(born[name], after[name])}
    assert changed == {name for name in born if "_proj.weight" in name}
    for name in changed:
        assert int(torch.linalg.matrix_rank(after[name] - born[name], rtol=1e-4)) <= RANK


def test_what_is_exported_is_what_the_learner_has(folder: Path, start: Callable[..., Any], tmp_path: Path) -> None:
    first, second, *_ = batches(folder)
    learner = start()
    for _ in range(2):
        step(learner, first)
    learner.export(str(tmp_path / "merged"))
    found = infer(learner, second)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    begin = 0
    for rollout in second.rollouts:
        tokens = torch.from_numpy(rollout.tokens.astype(np.int64))
        with torch.no_grad():
            logprobs = merged(tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        mask = torch.from_numpy(rollout.loss_mask)[1:]
        torch.testing.assert_close(found[begin + 1 : begin + len(tokens)][mask], logprobs[mask], atol=1e-5, rtol=1e-5)
        begin += len(tokens)


def test_the_reference_is_the_model_without_its_adapters(folder: Path, start: Callable[..., Any]) -> None:
    first, *_ = batches(folder)
    learner = start(loss=clipped_policy_gradient, with_reference=True, activation_checkpointing=True)
    born = infer(learner, first)
    for _ in range(2):
        step(learner, first, **LOSS)
    torch.testing.assert_close(infer(learner, first, reference=True), born, atol=1e-6, rtol=1e-6)
    assert (infer(learner, first) - born).abs().max() > 1e-3


def test_a_checkpoint_holds_the_adapters_only_and_resumes_bit_for_bit(
    folder: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    todo = batches(folder)
    learner = start()
    for batch in todo[:2]:
        step(learner, batch)
    learner.save(str(tmp_path / "checkpoint"))
    while not learner.saved():
        pass
    for batch in todo[2:]:
        step(learner, batch)
    expected = weights(learner)
    kept = FileSystemReader(str(tmp_path / "checkpoint")).read_metadata().state_dict_metadata
    assert all("lora_" in name for name in kept if name.startswith("model."))
    assert not any("base_layer" in name or "embed" in name for name in kept)
    learner = start()
    learner.load(str(tmp_path / "checkpoint"))
    for batch in todo[2:]:
        step(learner, batch)
    found = weights(learner)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_scorer_trains_its_head_beside_the_adapters(start: Callable[..., Any]) -> None:
    learner = start(network="scorer")
    trained = {name for name, parameter in learner._policy.named_parameters() if parameter.requires_grad}
    assert "hf.score.weight" in trained
    assert all("lora_" in name or name == "hf.score.weight" for name in trained)


def test_targets_that_the_model_has_not_are_named_with_those_that_it_has(start: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"its linear layers are called .*down_proj.*q_proj"):
        start(lora=LoraConfig(targets=["query"]))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_and_publishes_the_same_adapters(
    stage: int, folder: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    todo = batches(folder)
    policy_loss: dict[str, Any] = {"loss": clipped_policy_gradient, "with_reference": True}
    learner = start(**policy_loss)
    expected = [step(learner, batch, **LOSS) for batch in todo]
    weights_expected = weights(learner)

    learner = start(learner=DeepSpeedLearner, options={"stage": stage}, **policy_loss)
    found = [step(learner, batch, **LOSS) for batch in todo[:2]]
    learner.save(str(tmp_path / "checkpoint"))
    found += [step(learner, batch, **LOSS) for batch in todo[2:]]
    assert found == pytest.approx(expected, abs=1e-5)
    after = weights(learner)
    for name, weight in weights_expected.items():
        torch.testing.assert_close(after[name], weight, atol=1e-4, rtol=1e-4)

    learner = start(learner=DeepSpeedLearner, options={"stage": stage}, **policy_loss)
    learner.load(str(tmp_path / "checkpoint"))
    for batch in todo[2:]:
        step(learner, batch, **LOSS)
    resumed = weights(learner)
    assert all(torch.equal(resumed[name], weight) for name, weight in after.items())


def on_ranks(folder: Path, rank: int, port: int, world_size: int) -> dict[str, Tensor]:
    """What one of so many ranks has after four steps."""
    config = LearnersConfig(count=world_size, lora=ADAPTERS)
    learner = FsdpLearner(model_path=str(folder / "model"), config=config, rank=rank, world_size=world_size)
    learner.start(
        master=("127.0.0.1", port),
        optimizer=OptimizerConfig(lr=1e-3),
        total_steps=STEPS,
        loss=clipped_policy_gradient,
        with_reference=True,
        timeout=60.0,
    )
    for batch in batches(folder):
        share = shard(batch, num_ranks=world_size, max_tokens=64)[rank]
        learner.step(share, num_tokens=batch.num_tokens, temperature=1.0, **LOSS)
    found = weights(learner)
    learner.close()
    return found


@pytest.mark.slow
def test_two_ranks_train_the_same_adapters_as_one(folder: Path) -> None:
    mine, theirs = free_ports(2)
    results = in_two_processes(__file__, folder, str(theirs), meanwhile=lambda: {"one": on_ranks(folder, 0, mine, 1)})
    for name, weight in results["one"].items():
        assert torch.equal(results["first"][name], results["second"][name])
        torch.testing.assert_close(results["first"][name], weight, atol=5e-5, rtol=0)


if __name__ == "__main__":
    place, number, at = sys.argv[1:]
    torch.save(on_ranks(Path(place), int(number), int(at), 2), Path(place) / f"rank-{number}.pt")
