"""The packed networks against transformers, one sequence at a time: same numbers, same gradients."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlsys.errors import ConfigError
from rlsys.learners import head as head_module
from rlsys.learners.model import Policy, Scorer, to_tensors
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


@pytest.mark.parametrize("chunk", [1, 7, 34, 35, 1000])
def test_the_head_in_chunks_is_the_head_at_once(one_folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute() -> tuple[Tensor, Tensor, list[Tensor]]:
        policy = Policy.load(str(one_folder))
        logprobs, entropies = policy(*to_tensors(packed(sequences()), CPU), 0.9, entropy_gradient=True)
        (logprobs * torch.linspace(-1, 1, len(logprobs)) + 0.3 * entropies).sum().backward()
        return logprobs.detach(), entropies.detach(), [parameter.grad for parameter in policy.parameters()]  # type: ignore[misc]

    logprobs, entropies, gradients = compute()
    assert len(logprobs) == 35
    row = 4 * Policy.load(str(one_folder)).hf.config.vocab_size  # type: ignore[union-attr,operator]
    monkeypatch.setattr(head_module, "_CHUNK_BYTES", chunk * row)
    monkeypatch.setattr(head_module, "_KEPT_BYTES", chunk * row)
    chunked_logprobs, chunked_entropies, chunked_gradients = compute()
    torch.testing.assert_close(chunked_logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked_entropies, entropies, atol=1e-5, rtol=0)
    for mine, theirs in zip(chunked_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("least", "forwards", "backwards"), [(1, 1, 0), (2, 2, 2), (7, 7, 7)])
@pytest.mark.parametrize("some", [True, False], ids=["some tokens", "no tokens"])
def test_ranks_that_must_run_the_head_equally_often_do_so_in_both_passes(
    one_folder: Path, least: int, forwards: int, backwards: int, some: bool
) -> None:
    policy = Policy.load(str(one_folder))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    policy.hf.lm_head.register_forward_hook(count)  # type: ignore[union-attr,operator]
    policy.least_chunks = least
    logprobs, _ = policy(*to_tensors(packed(sequences() if some else []), CPU), 1.0)
    assert calls == forwards
    logprobs.sum().backward()
    assert calls == forwards + backwards


@pytest.mark.parametrize("chunked", [True, False])
def test_an_entropy_has_a_gradient_where_it_is_asked_for(one_folder: Path, chunked: bool) -> None:
    rollouts = sequences()
    policy = Policy.load(str(one_folder))
    policy.least_chunks = 3 if chunked else 1
    entropies = policy(*to_tensors(packed(rollouts), CPU), 0.7, entropy_gradient=True)[1]
    alone = AutoModelForCausalLM.from_pretrained(one_folder, dtype=torch.float32)
    expected = reference(alone, rollouts, 0.7)[1]
    weights = torch.linspace(-1, 2, len(entropies))
    (entropies * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(alone.named_parameters())
    for name, parameter in policy.hf.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4, msg=name)


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


def test_a_model_that_changes_its_logits_is_refused(one_folder: Path, tmp_path: Path) -> None:
    changed = with_settings(one_folder, tmp_path / "changed", logit_scale=0.0625)
    with pytest.raises(ConfigError, match=r"logit_scale: 0\.0625"):
        Policy.load(str(changed))
    Policy.load(str(with_settings(one_folder, tmp_path / "same", logit_scale=1.0)))


# --- one number for a token ------------------------------------------------------------------------------------------


def with_settings(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy of a model folder with these settings in its config.json."""
    shutil.copytree(folder, target)
    found = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**found, **settings}))
    return target


@pytest.fixture(scope="module")
def scorer_folder(one_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of transformers with one label, and a head whose numbers differ from token to token."""
    folder = tmp_path_factory.mktemp("scorer") / "model"
    shutil.copytree(one_folder, folder)
    network = AutoModelForSequenceClassification.from_pretrained(one_folder, num_labels=1)
    torch.nn.init.normal_(network.score.weight, std=1.0)
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rollouts", FAMILIES.values(), ids=FAMILIES)
def test_a_scorer_gives_what_the_classifier_gives_for_the_text_up_to_each_token(
    scorer_folder: Path, rollouts: list[Rollout]
) -> None:
    values, nothing = (scorer := Scorer.load(str(scorer_folder)))(*to_tensors(packed(rollouts), CPU), 0.7)
    alone = AutoModelForSequenceClassification.from_pretrained(scorer_folder, dtype=torch.float32)
    prefixes = [
        torch.from_numpy(rollout.tokens[:target].astype(np.int64))
        for rollout in rollouts
        for target in np.flatnonzero(rollout.loss_mask[1:]) + 1
    ]
    # All of them padded on the right, in one batch; the padding must not be a token that occurs.
    pad = alone.config.vocab_size - 1
    assert all(int(prefix.max()) < pad for prefix in prefixes)
    alone.config.pad_token_id = pad
    rows = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True, padding_value=pad)
    expected = alone(rows, attention_mask=(rows != pad).long()).logits[:, 0]
    assert float(expected.detach().std()) > 0.3
    assert (values.dtype, values.shape) == (torch.float32, (len(prefixes),))
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=0)
    assert nothing.tolist() == [0.0] * len(prefixes)
    assert not nothing.requires_grad

    weights = torch.linspace(-1, 2, len(values))
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(alone.named_parameters())
    for name, parameter in scorer.hf.named_parameters():
        gradient, other = parameter.grad, theirs[name].grad
        assert gradient is not None, name
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(gradient, other, atol=2e-5 * scale, rtol=0, msg=name)


def test_a_scorer_made_of_a_language_model_begins_at_zero_and_without_a_warning(
    one_folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        scorer = Scorer.load(str(one_folder))
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert caplog.records == []
    assert "score.weight" not in capfd.readouterr().err
    values, _ = scorer(*to_tensors(packed(sequences()), CPU), 1.0)
    assert values.tolist() == [0.0] * 35
    (values - 1).square().sum().backward()
    assert scorer.hf.score.weight.grad.abs().max() > 0.1  # type: ignore[union-attr,operator]
    theirs = AutoModelForCausalLM.from_pretrained(one_folder).model.state_dict()
    for name, weight in scorer.hf.model.state_dict().items():  # type: ignore[union-attr,operator]
        assert torch.equal(weight, theirs[name]), name


def test_a_scorer_that_was_exported_is_the_same_and_a_reward_model_of_transformers(
    scorer_folder: Path, tmp_path: Path
) -> None:
    scorer = Scorer.load(str(scorer_folder))
    scorer.hf.save_pretrained(tmp_path)  # type: ignore[operator]
    again = Scorer.load(str(tmp_path))
    arguments = to_tensors(packed(sequences()), CPU)
    assert torch.equal(scorer(*arguments, 1.0)[0], again(*arguments, 1.0)[0])
    classifier, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert classifier.config.num_labels == 1
    assert classifier.config.pad_token_id is not None
    assert not report["missing_keys"]
    assert torch.equal(classifier.score.weight, scorer.hf.score.weight)  # type: ignore[union-attr,arg-type]


def test_a_scorer_takes_its_pad_token_from_the_tokenizer_where_the_model_names_none(
    one_folder: Path, tmp_path: Path
) -> None:
    named = json.loads((one_folder / "config.json").read_text())["pad_token_id"]
    scorer = Scorer.load(str(with_settings(one_folder, tmp_path / "without", pad_token_id=None)))
    assert isinstance(named, int)
    assert scorer.hf.config.pad_token_id == named  # type: ignore[union-attr,operator]


def test_a_scorer_on_an_empty_micro_batch_goes_through_every_layer(scorer_folder: Path) -> None:
    scorer = Scorer.load(str(scorer_folder), activation_checkpointing=True).train()
    scorer.least_chunks = 3
    assert (len(scorer.layers), scorer.num_chunks(10**9)) == (2, 1)
    values, nothing = scorer(*to_tensors(packed([]), CPU), 1.0)
    assert (len(values), len(nothing)) == (0, 0)
    values.sum().backward()
    for name, parameter in scorer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any()


def with_three_labels(folder: Path, target: Path) -> None:
    network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    network.save_pretrained(target)


def without_a_layer(folder: Path, target: Path) -> None:
    with_settings(folder, target, num_hidden_layers=3, layer_types=["full_attention"] * 3)


def of_another_width(folder: Path, target: Path) -> None:
    with_settings(folder, target, intermediate_size=56)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (with_three_labels, "has a head of more than one label"),
        (without_a_layer, r"lacks the weights model\.layers\.2"),
        (of_another_width, r"lacks the weights model\.layers\.0\.mlp.*or they have other shapes"),
        (lambda *_: None, "no model for a scalar head in"),
    ],
)
def test_what_is_no_scorer_is_refused(one_folder: Path, tmp_path: Path, damage: Any, says: str) -> None:
    damage(one_folder, tmp_path / "damaged")
    with pytest.raises(ConfigError, match=says):
        Scorer.load(str(tmp_path / "damaged"))
