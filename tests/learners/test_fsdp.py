"""The learner on real FSDP2: micro-batches, ranks, checkpoints and skipped steps change nothing that they should not.

Two processes compute everything that needs two ranks once, as this file run as a program; meanwhile the test process
computes the same with one rank and, without any of the learner's code, with plain transformers and a padded batch.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.errors import CheckpointError, ConfigError
from rlsys.learners.fsdp import FsdpLearner
from rlsys.learners.learner import learning_rate
from rlsys.learners.model import Policy
from rlsys.losses import LossOutputs
from rlsys.packing import shard
from tests.learners.ranks import (
    OPTIMIZER,
    WIDE,
    Json,
    Ranks,
    assert_close,
    assert_equal,
    batches,
    build,
    everything,
    free_ports,
    in_two_processes,
    plain,
    weights,
)

PORTS = 13


def masters(learner: FsdpLearner) -> dict[str, Tensor]:
    """The weights that the optimizer updates."""
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in learner._named_parameters()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Json:
    """What one rank, the first of two ranks, the second of two ranks and plain transformers found."""

    def alone() -> Json:
        one = Ranks(FsdpLearner, folder, rank=0, ports=free_ports(PORTS), world_size=1)
        return {"plain": plain(folder), "one": everything(one, masters)}

    return in_two_processes(__file__, folder, json.dumps(free_ports(PORTS)), meanwhile=alone)


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
    ranks = Ranks(FsdpLearner, folder, rank=0, ports=free_ports(1), world_size=1)
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
    assert {str(tensor.dtype) for tensor in results[who]["bfloat16_masters"].values()} == {"torch.float32"}
    assert results[who]["bfloat16_published"] == {"torch.bfloat16"}
    assert results[who]["bfloat16_reset"]["sum/kl"] == 0.0, "the reference rounds as the policy does"
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


def test_fsdp_has_no_options() -> None:
    with pytest.raises(ConfigError, match=r"learners\.options.*stage"):
        FsdpLearner(model_path="", config=LearnersConfig(options={"stage": 2}), rank=0, world_size=1)


def _main() -> None:
    folder, rank, ports = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    ranks = Ranks(FsdpLearner, folder, rank=rank, ports=ports, world_size=2)
    torch.save(everything(ranks, masters), folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    _main()
