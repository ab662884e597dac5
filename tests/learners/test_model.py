"""The packed policy against transformers, one sequence at a time: same log-probs, same gradients, same entropies."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlsys.learners import model as model_module
from rlsys.learners.model import Policy, to_tensors
from rlsys.packing import MicroBatch, pack
from rlsys.scratch import ScratchModel, build_scratch_model
from rlsys.types import Rollout, TrainBatch

CPU = torch.device("cpu")
LENGTHS = [9, 1, 17, 2, 30]


def build(folder: Path, num_kv_heads: int) -> Path:
    """A tiny model whose weights are large enough for its log-probs to differ from token to token."""
    shape = ScratchModel(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads, intermediate_size=48, words=[]
    )
    build_scratch_model(folder, shape)
    network = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[4, 2, 1], ids=["mha", "gqa", "mqa"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model"), 2)


def sequences(seed: int = 0) -> list[Rollout]:
    random = np.random.default_rng(seed)
    return [
        Rollout(
            tokens=random.integers(0, 265, length, dtype=np.int32),
            loss_mask=random.random(length) < 0.7,
            logprobs=np.zeros(length, dtype=np.float32),
            versions=np.zeros(length, dtype=np.int32),
        )
        for length in LENGTHS
    ]


def packed(rollouts: list[Rollout]) -> MicroBatch:
    zeros = tuple(np.zeros(len(rollout), dtype=np.float32) for rollout in rollouts)
    ones = (1.0,) * len(rollouts)
    batch = TrainBatch(rollouts=tuple(rollouts), advantages=zeros, weights=ones, num_tokens=1)
    return pack(batch, range(len(rollouts)))


def reference(network: Any, rollouts: list[Rollout], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the trained tokens, each sequence by itself through all of transformers."""
    logprobs, entropies = [], []
    for rollout in rollouts:
        tokens = torch.from_numpy(rollout.tokens.astype(np.int64))
        targets = torch.from_numpy(np.flatnonzero(rollout.loss_mask[1:]) + 1)
        scores = (network(tokens[None]).logits[0] / temperature).log_softmax(-1)[targets - 1]
        logprobs.append(scores.gather(-1, tokens[targets][:, None])[:, 0])
        entropies.append(-(scores.exp() * scores).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def siblings(prompt: int, lengths: list[int], seed: int = 3) -> list[Rollout]:
    """Sequences of one prompt; behind it some tokens train."""
    random = np.random.default_rng(seed)
    shared = random.integers(0, 265, prompt, dtype=np.int32)
    result = []
    for length in lengths:
        mask = np.concatenate([np.zeros(prompt, np.bool_), random.random(length) < 0.7])
        mask[prompt : prompt + 1] = True
        result.append(
            Rollout(
                tokens=np.concatenate([shared, random.integers(0, 265, length, dtype=np.int32)]),
                loss_mask=mask,
                logprobs=np.zeros(prompt + length, dtype=np.float32),
                versions=np.zeros(prompt + length, dtype=np.int32),
            )
        )
    return result


FAMILIES = {
    "nothing shared": sequences(),
    "short prompt": siblings(5, [9, 4, 11]),
    "long prompt": siblings(40, [9, 4, 11]),
    "two families and others": [*siblings(12, [3, 20], seed=4), *sequences(), *siblings(7, [1, 6, 2], seed=5)],
}


@pytest.mark.parametrize("rollouts", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(("attention", "temperature"), [("eager", 1.0), ("sdpa", 0.7)])
def test_a_pack_gives_every_sequence_what_it_gets_alone(
    folder: Path, attention: str, temperature: float, rollouts: list[Rollout]
) -> None:
    policy = Policy.load(str(folder))
    logprobs, entropies = policy(*to_tensors(packed(rollouts), CPU), temperature)
    alone = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    expected, expected_entropies = reference(alone, rollouts, temperature)
    assert len(logprobs) == sum(int(rollout.loss_mask[1:].sum()) for rollout in rollouts) > 10
    assert float(expected.detach().std()) > 0.3, "a uniform policy would prove nothing"
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-5, rtol=0)
    assert not entropies.requires_grad

    weights = torch.linspace(-1, 2, len(logprobs))
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(alone.named_parameters())
    mine = dict(policy.hf.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        gradient, other = parameter.grad, theirs[name].grad
        assert gradient is not None, name
        scale = float(other.abs().max())
        torch.testing.assert_close(
            gradient, other, atol=1e-5 * max(1.0, scale), rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_sequence_does_not_see_its_neighbours(one_folder: Path) -> None:
    rollouts = sequences()
    policy = Policy.load(str(one_folder))
    with torch.no_grad():
        before = policy(*to_tensors(packed(rollouts), CPU), 1.0)[0]
        rollouts[0] = sequences(seed=9)[0]
        after = policy(*to_tensors(packed(rollouts), CPU), 1.0)[0]
        first = int(sequences(seed=9)[0].loss_mask[1:].sum())
        later = int(sequences()[0].loss_mask[1:].sum())
    assert torch.equal(after[first:], before[later:])


def test_a_uniform_policy_has_the_log_prob_and_entropy_of_its_vocabulary(one_folder: Path) -> None:
    policy = Policy.load(str(one_folder))
    with torch.no_grad():
        policy.hf.lm_head.weight.zero_()  # type: ignore[union-attr,operator]
    vocabulary = policy.hf.config.vocab_size  # type: ignore[union-attr]
    logprobs, entropies = policy(*to_tensors(packed(sequences()), CPU), 1.0)
    assert logprobs.tolist() == pytest.approx([-math.log(vocabulary)] * len(logprobs), abs=1e-5)
    assert entropies.tolist() == pytest.approx([math.log(vocabulary)] * len(entropies), abs=1e-5)


def test_entropy_golden_numbers(one_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.load(str(one_folder))
    # Probabilities 1/2, 1/4, 1/4: entropy 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2. At temperature 1/2 the odds are squared:
    # 4 : 1 : 1, probabilities 2/3, 1/6, 1/6, entropy 2/3 ln 1.5 + 1/3 ln 6.
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    monkeypatch.setattr(policy.hf, "lm_head", torch.nn.Identity())
    logprob, entropy = policy._head(logits, torch.tensor([0]), 1.0)
    assert float(logprob) == pytest.approx(math.log(1 / 2))
    assert float(entropy) == pytest.approx(1.5 * math.log(2))
    logprob, entropy = policy._head(logits, torch.tensor([2]), 0.5)
    assert float(logprob) == pytest.approx(math.log(1 / 6))
    assert float(entropy) == pytest.approx(2 / 3 * math.log(1.5) + 1 / 3 * math.log(6))


@pytest.mark.parametrize("chunk", [1, 7, 34, 35, 1000])
def test_the_head_in_chunks_is_the_head_at_once(one_folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute() -> tuple[Tensor, Tensor, list[Tensor]]:
        policy = Policy.load(str(one_folder))
        logprobs, entropies = policy(*to_tensors(packed(sequences()), CPU), 0.9)
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        return logprobs.detach(), entropies, [parameter.grad for parameter in policy.parameters()]  # type: ignore[misc]

    monkeypatch.setattr(model_module, "_HEAD_CHUNK", 10**6)
    logprobs, entropies, gradients = compute()
    monkeypatch.setattr(model_module, "_HEAD_CHUNK", chunk)
    chunked_logprobs, chunked_entropies, chunked_gradients = compute()
    torch.testing.assert_close(chunked_logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked_entropies, entropies, atol=1e-5, rtol=0)
    for mine, theirs in zip(chunked_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_recomputed_activations_give_the_same_gradients(one_folder: Path) -> None:
    found = []
    for activation_checkpointing in (False, True):
        policy = Policy.load(str(one_folder), activation_checkpointing=activation_checkpointing).train()
        policy(*to_tensors(packed(sequences()), CPU), 1.0)[0].sum().backward()
        found.append([parameter.grad for parameter in policy.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_an_empty_micro_batch_goes_through_every_layer_and_trains_nothing(one_folder: Path) -> None:
    tokens, positions, layout, targets, sources = to_tensors(packed([]), CPU)
    assert (tokens.tolist(), positions.tolist(), layout) == ([0], [0], ([0, 1], [-1]))
    assert (targets.tolist(), sources.tolist()) == ([], [])
    policy = Policy.load(str(one_folder))
    logprobs, entropies = policy(tokens, positions, layout, targets, sources, 1.0)
    assert (len(logprobs), len(entropies)) == (0, 0)
    logprobs.sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part, so sharded ranks would wait for one another"
        assert not parameter.grad.any()


def test_a_micro_batch_that_trains_nothing_is_no_error(one_folder: Path) -> None:
    rollouts = [
        Rollout(
            tokens=rollout.tokens,
            loss_mask=np.zeros(len(rollout), dtype=np.bool_),
            logprobs=rollout.logprobs,
            versions=rollout.versions,
        )
        for rollout in sequences()
    ]
    policy = Policy.load(str(one_folder))
    logprobs, _ = policy(*to_tensors(packed(rollouts), CPU), 1.0)
    logprobs.sum().backward()
    assert len(logprobs) == 0


def test_the_layers_are_the_units_of_sharding(one_folder: Path) -> None:
    policy = Policy.load(str(one_folder))
    assert len(policy.layers) == 2
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
