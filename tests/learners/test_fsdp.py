"""The learner on real FSDP2: micro-batches, ranks, checkpoints and skipped steps change nothing that they should not.

Two processes compute everything that needs two ranks once, as this file run as a program; meanwhile the test process
computes the same with one rank and, without any of the learner's code, with plain transformers and a padded batch.
"""

import json
import math
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.errors import CheckpointError
from rlsys.learners.fsdp import FsdpLearner, learning_rate
from rlsys.learners.model import Policy
from rlsys.losses import LossOutputs, clipped_policy_gradient
from rlsys.packing import shard
from rlsys.scratch import ScratchModel, build_scratch_model
from rlsys.types import Rollout, TrainBatch

Json = dict[str, Any]

STEPS, TEMPERATURE = 4, 0.9
OPTIMIZER = OptimizerConfig(
    lr=1e-3, warmup_steps=2, schedule="cosine", weight_decay=0.1, betas=(0.9, 0.95), max_grad_norm=0.5
)
LOSS = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.1}
WIDE, NARROW = 10_000, 16
"""Token budgets: everything in one micro-batch, and at least four of them for each of two ranks."""


# --- what is learned -------------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """A tiny model, larger weights than at birth, and four batches that a slightly different policy sampled."""
    shape = ScratchModel(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        initializer_range=0.02,
        words=[],
    )
    build_scratch_model(folder / "model", shape)
    network = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder / "model")
    (folder / "batches.pickle").write_bytes(pickle.dumps([sampled(network, seed) for seed in range(STEPS)]))


def sampled(network: Any, seed: int) -> TrainBatch:
    random = np.random.default_rng(seed)
    rollouts = []
    for length in random.integers(2, 30, 11):
        tokens = random.integers(0, 265, length, dtype=np.int32)
        with torch.no_grad():
            scores = network(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0] / TEMPERATURE
        logprobs = scores[:-1].log_softmax(-1).gather(-1, torch.from_numpy(tokens[1:].astype(np.int64))[:, None])[:, 0]
        mask = random.random(length) < 0.7
        mask[0], mask[-1] = False, True
        noisy = np.concatenate([[0.0], logprobs.numpy() + 0.2 * random.standard_normal(length - 1)])
        versions = np.where(mask, 0, -1).astype(np.int32)
        rollouts.append(
            Rollout(
                tokens=tokens, loss_mask=mask, logprobs=np.where(mask, noisy, 0).astype(np.float32), versions=versions
            )
        )
    return TrainBatch(
        rollouts=tuple(rollouts),
        advantages=tuple(np.full(len(r), random.standard_normal(), dtype=np.float32) for r in rollouts),
        weights=tuple(random.uniform(0.5, 2.0, len(rollouts)).tolist()),
        num_tokens=sum(rollout.num_trained_tokens for rollout in rollouts),
    )


def batches(folder: Path) -> list[TrainBatch]:
    return list(pickle.loads((folder / "batches.pickle").read_bytes()))


def poisoned(batch: TrainBatch) -> TrainBatch:
    """The same with an infinite advantage in one rollout, so in the share of one rank only."""
    first, *rest = batch.advantages
    return replace(batch, advantages=(np.full_like(first, np.inf), *rest))


# --- learners --------------------------------------------------------------------------------------------------------


class Ranks:
    """This process's rank of a learner, with the number of ranks that this process was started with."""

    def __init__(self, folder: Path, rank: int, ports: list[int], world_size: int) -> None:
        self.folder, self.rank, self.ports, self.world_size = folder, rank, ports, world_size

    def start(self, **config: Any) -> FsdpLearner:
        learner = FsdpLearner(
            model_path=str(self.folder / "model"),
            config=LearnersConfig(**config),
            rank=self.rank,
            world_size=self.world_size,
        )
        learner.start(
            master=("127.0.0.1", self.ports.pop(0)),
            optimizer=OPTIMIZER,
            total_steps=STEPS,
            loss=clipped_policy_gradient,
            with_reference=True,
            timeout=120.0,
        )
        return learner

    def step(self, learner: FsdpLearner, batch: TrainBatch, *, budget: int = WIDE) -> dict[str, float]:
        share = shard(batch, num_ranks=self.world_size, max_tokens=budget)[self.rank]
        metrics = learner.step(share, num_tokens=batch.num_tokens, temperature=TEMPERATURE, **LOSS)
        return {**metrics, "micro_batches": len(share)}


def weights(learner: FsdpLearner) -> dict[str, Tensor]:
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in learner._named_parameters()
    }


def everything(ranks: Ranks) -> Json:
    """All that the tests below look at, on this rank."""
    folder, todo = ranks.folder, batches(ranks.folder)
    mine = folder / f"of-{ranks.world_size}"
    result: Json = {}

    learner = ranks.start()
    result["run"] = [ranks.step(learner, batch) for batch in todo[:2]]
    learner.save(str(mine / "checkpoint"))
    result["saved"] = weights(learner)
    result["run"] += [ranks.step(learner, batch) for batch in todo[2:]]
    result["weights"] = weights(learner)
    learner.export(str(mine / "export"))
    learner.close()

    learner = ranks.start()
    learner.load(str(mine / "checkpoint"))
    result["loaded"] = weights(learner)
    result["resumed"] = [ranks.step(learner, batch) for batch in todo[2:]]
    result["resumed_weights"] = weights(learner)
    learner.close()

    learner = ranks.start()
    ranks.step(learner, todo[0])
    result["before_reset"] = ranks.step(learner, todo[1])
    learner.reset_reference()
    result["reset"] = ranks.step(learner, todo[2])
    learner.save(str(mine / "reset"))
    result["after_reset"] = ranks.step(learner, todo[3])
    learner.close()

    learner = ranks.start()
    learner.load(str(mine / "reset"))
    result["after_reset_resumed"] = ranks.step(learner, todo[3])
    learner.close()

    learner = ranks.start()
    result["micro"] = [ranks.step(learner, batch, budget=NARROW) for batch in todo]
    result["micro_weights"] = weights(learner)
    learner.close()

    learner = ranks.start(activation_checkpointing=True)
    result["before_skip"] = weights(learner)
    result["skip"] = [ranks.step(learner, poisoned(todo[0])) for _ in range(2)]
    result["after_skip"] = weights(learner)
    result["after_skip_step"] = ranks.step(learner, todo[2])
    result["after_skip_weights"] = weights(learner)
    learner.close()

    learner = ranks.start(dtype="bfloat16")
    result["bfloat16"] = [ranks.step(learner, batch) for batch in todo[:2]]
    result["bfloat16_dtypes"] = {str(tensor.dtype) for tensor in weights(learner).values()}
    learner.export(str(mine / "bfloat16"))
    learner.close()
    return result


def plain(folder: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The same training with transformers alone: a padded batch, the loss written out, AdamW, one process."""
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    frozen = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, betas=OPTIMIZER.betas, weight_decay=0.1, foreach=False)
    metrics = []
    # Warm-up over two steps to 1e-3; then the cosine from 1e-3 at progress 0 to the middle, 0.55e-3, at progress 1/2.
    for batch, lr in zip(batches(folder), [0.5e-3, 1e-3, 1e-3, 0.55e-3], strict=True):
        longest = max(map(len, batch.rollouts))

        def padded(arrays: Any, dtype: torch.dtype, longest: int = longest) -> Tensor:
            return torch.stack(
                [torch.tensor(np.pad(array, (0, longest - len(array))), dtype=dtype) for array in arrays]
            )

        tokens = padded([rollout.tokens for rollout in batch.rollouts], torch.int64)
        attention = padded([np.ones(len(rollout)) for rollout in batch.rollouts], torch.int64)
        mask = padded([rollout.loss_mask for rollout in batch.rollouts], torch.float32)[:, 1:]
        old = padded([rollout.logprobs for rollout in batch.rollouts], torch.float32)[:, 1:]
        advantages = padded(batch.advantages, torch.float32)[:, 1:]

        def logprobs(of: Any, tokens: Tensor = tokens, attention: Tensor = attention) -> Tensor:
            scores = of(input_ids=tokens, attention_mask=attention).logits[:, :-1] / TEMPERATURE
            return scores.log_softmax(-1).gather(-1, tokens[:, 1:, None])[:, :, 0]

        now = logprobs(network)
        with torch.no_grad():
            reference = logprobs(frozen)
        ratio = (now - old).exp()
        bounded = ratio.clamp(0.8, 1.28)
        gain = torch.where(advantages >= 0, torch.min(ratio, bounded), torch.max(ratio, bounded)) * advantages
        kl = (reference - now).exp() - (reference - now) - 1
        loss = ((-gain + 0.1 * kl) * mask * torch.tensor(batch.weights)[:, None]).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in network.parameters()))
        for parameter in network.parameters():
            parameter.grad.mul_(min(1.0, 0.5 / (norm + 1e-6)))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        metrics.append({"loss": float(loss.detach()), "grad_norm": norm, "kl": float((kl * mask).sum().detach())})
    return metrics, {name: parameter.detach() for name, parameter in network.named_parameters()}


# --- two processes, once ---------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Json:
    """What one rank, the first of two ranks, the second of two ranks and plain transformers found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ports = json.dumps(free_ports(12))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank), ports],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        found: Json = {"plain": plain(folder), "one": everything(Ranks(folder, 0, free_ports(12), 1))}
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    first, second = (torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2))
    return {**found, "first": first, "second": second}


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal but for rounding, which Adam blows up for the few weights whose gradient is near its epsilon."""
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        difference = (tensor - theirs[name]).abs()
        assert float(difference.mean()) < 2e-7, name
        assert float(difference.max()) < 5e-5, f"{name}: a twentieth of one step"


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def total(results: Json, run: str, step: int, name: str) -> float:
    return float(results["first"][run][step][f"sum/{name}"] + results["second"][run][step][f"sum/{name}"])


# --- invariants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["one", "first"])
def test_the_learner_learns_what_plain_transformers_learns_from_a_padded_batch(results: Json, who: str) -> None:
    metrics, expected = results["plain"]
    assert any(step["grad_norm"] > OPTIMIZER.max_grad_norm for step in metrics), "else clipping is not tested"
    assert [step["grad_norm"] for step in results[who]["run"]] == pytest.approx(
        [step["grad_norm"] for step in metrics], rel=1e-4
    )
    assert_close(results[who]["weights"], expected)


def test_losses_and_logged_sums_are_those_of_plain_transformers(results: Json, folder: Path) -> None:
    for step, (metrics, batch) in enumerate(zip(results["plain"][0], batches(folder), strict=True)):
        assert total(results, "run", step, "loss") / batch.num_tokens == pytest.approx(metrics["loss"], abs=1e-5)
        assert total(results, "run", step, "kl") == pytest.approx(metrics["kl"], abs=1e-3)
        assert total(results, "run", step, "trained_tokens") == batch.num_tokens
        assert total(results, "run", step, "tokens") == sum(map(len, batch.rollouts))
        assert total(results, "run", step, "clip_fraction") > 0
        alone = results["one"]["run"][step]
        for name in ("loss", "kl", "entropy", "ratio", "clip_fraction", "logprob_gap", "tokens"):
            assert alone[f"sum/{name}"] == pytest.approx(total(results, "run", step, name), rel=1e-4)
        gaps = [results[rank]["run"][step]["max/logprob_gap"] for rank in ("first", "second")]
        assert alone["max/logprob_gap"] == pytest.approx(max(gaps), rel=1e-4)


def test_one_rank_learns_what_two_ranks_learn(results: Json) -> None:
    assert_close(results["one"]["weights"], results["first"]["weights"])
    assert_equal(results["first"]["weights"], results["second"]["weights"])


@pytest.mark.parametrize("who", ["one", "first"])
def test_many_micro_batches_learn_what_one_learns(results: Json, who: str) -> None:
    assert {step["micro_batches"] for step in results[who]["run"]} == {1}
    assert min(step["micro_batches"] for step in results[who]["micro"]) >= 4
    assert_close(results[who]["micro_weights"], results[who]["weights"])


def test_both_ranks_report_the_same_gradient_norm_and_learning_rate(results: Json) -> None:
    for mine, theirs in zip(results["first"]["run"], results["second"]["run"], strict=True):
        assert (mine["grad_norm"], mine["lr"]) == (theirs["grad_norm"], theirs["lr"])
    assert [step["lr"] for step in results["first"]["run"]] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.55e-3])


# --- skipped steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["one", "first", "second"])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank_and_is_counted(results: Json, who: str) -> None:
    mine = results[who]
    assert [step["skipped_in_a_row"] for step in mine["skip"]] == [1, 2]
    assert not any(math.isfinite(step["grad_norm"]) for step in mine["skip"])
    assert_equal(mine["before_skip"], mine["after_skip"])
    assert mine["after_skip_step"]["skipped_in_a_row"] == 0
    assert math.isfinite(mine["after_skip_step"]["grad_norm"])
    assert all(torch.isfinite(tensor).all() for tensor in mine["after_skip_weights"].values())


def test_a_skipped_step_leaves_no_trace_in_the_next(results: Json) -> None:
    # Adam's first step moves every weight by about the learning rate: of step 2, 1e-3, since skipped steps count.
    moved = [
        float((results["one"]["after_skip_weights"][name] - tensor * (1 - 1e-3 * 0.1)).abs().max())
        for name, tensor in results["one"]["after_skip"].items()
    ]
    assert max(moved) == pytest.approx(1e-3, rel=1e-2)
    assert_close(results["one"]["after_skip_weights"], results["first"]["after_skip_weights"])


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["one", "first", "second"])
def test_a_learner_that_was_saved_and_loaded_goes_on_bit_for_bit(results: Json, who: str) -> None:
    mine = results[who]
    assert_equal(mine["loaded"], mine["saved"])
    assert_equal(mine["resumed_weights"], mine["weights"])
    for again, first in zip(mine["resumed"], mine["run"][2:], strict=True):
        assert {**again, "seconds": 0} == {**first, "seconds": 0}


@pytest.mark.parametrize("who", ["one", "first"])
def test_a_reset_reference_is_the_current_policy_and_survives_a_checkpoint(results: Json, who: str) -> None:
    mine = results[who]
    assert mine["before_reset"]["sum/kl"] > 1e-3
    assert mine["reset"]["sum/kl"] == pytest.approx(0.0, abs=1e-9)
    assert mine["after_reset"]["sum/kl"] > 1e-4
    assert {**mine["after_reset_resumed"], "seconds": 0} == {**mine["after_reset"], "seconds": 0}


def test_a_loss_function_that_sums_is_refused(folder: Path) -> None:
    learner = FsdpLearner(model_path=str(folder / "model"), config=LearnersConfig(), rank=0, world_size=1)
    learner._policy = Policy.load(str(folder / "model"))
    learner._loss = lambda inputs: LossOutputs(loss=-inputs.logprobs.sum())
    micro = shard(batches(folder)[0], num_ranks=1, max_tokens=WIDE)[0][0]
    with pytest.raises(ValueError, match="return one number for each token"):
        learner._loss_of(micro, 1.0, {})


def test_a_checkpoint_of_two_ranks_is_loaded_by_one(results: Json, folder: Path) -> None:
    ranks = Ranks(folder, 0, free_ports(1), 1)
    learner = ranks.start()
    try:
        learner.load(str(folder / "of-2" / "checkpoint"))
        assert_equal(weights(learner), results["first"]["saved"])
        for batch in batches(folder)[2:]:
            ranks.step(learner, batch)
        assert_close(weights(learner), results["first"]["weights"])
        with pytest.raises(CheckpointError, match="nowhere"):
            learner.load(str(folder / "nowhere"))
    finally:
        learner.close()


@pytest.mark.parametrize(("of", "who"), [("of-1", "one"), ("of-2", "first")])
def test_the_exported_folder_is_an_ordinary_model_with_equal_weights(
    results: Json, folder: Path, of: str, who: str
) -> None:
    network = AutoModelForCausalLM.from_pretrained(folder / of / "export")
    assert_equal({name: p.detach() for name, p in network.named_parameters()}, results[who]["weights"])
    assert network.lm_head.weight is network.model.embed_tokens.weight
    # Written a second time, an engine would take the shared head for weights of its own.
    with safe_open(folder / of / "export" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(results[who]["weights"])
    assert AutoTokenizer.from_pretrained(folder / of / "export").chat_template
    assert network.generation_config.eos_token_id == network.config.eos_token_id


# --- number formats, schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["one", "first"])
def test_bfloat16_learns_nearly_the_same_with_float32_master_weights(results: Json, folder: Path, who: str) -> None:
    for rough, exact in zip(results[who]["bfloat16"], results[who]["run"], strict=False):
        assert rough["sum/loss"] == pytest.approx(exact["sum/loss"], abs=0.05 * exact["sum/trained_tokens"])
        assert rough["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    assert results[who]["bfloat16_dtypes"] == {"torch.float32"}
    of = "of-1" if who == "one" else "of-2"
    network = AutoModelForCausalLM.from_pretrained(folder / of / "bfloat16", dtype=torch.bfloat16)
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_the_learning_rate_golden_numbers() -> None:
    constant = OptimizerConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(step, constant, 10) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    # Cosine over the 8 steps behind the warm-up, from 2 to 0.2: half-way 1.1, at a quarter 0.2 + 1.8 * 0.853553.
    cosine = OptimizerConfig(lr=2.0, warmup_steps=2, schedule="cosine")
    found = {step: learning_rate(step, cosine, 10) for step in (0, 1, 2, 4, 6, 10, 99)}
    assert found == pytest.approx({0: 1.0, 1: 2.0, 2: 2.0, 4: 1.736396, 6: 1.1, 10: 0.2, 99: 0.2})
    assert learning_rate(0, OptimizerConfig(lr=2.0), 1) == 2.0


def _main() -> None:
    folder, rank, ports = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    torch.save(everything(Ranks(folder, rank, ports, 2)), folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    _main()
