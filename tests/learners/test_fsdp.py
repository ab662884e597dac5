"""The learner on real FSDP2: micro-batches, ranks, checkpoints and skipped steps change nothing that they should not.

Two processes compute everything that needs two ranks once, as this file run as a program; meanwhile the test process
computes the same with one rank and, without any of the learner's code, with plain transformers and a padded batch.
"""

import json
import math
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.config_file import load_config
from rlsys.errors import CheckpointError, ConfigError
from rlsys.learners.fsdp import FsdpLearner
from rlsys.learners.health import RATIO_SHARES
from rlsys.learners.model import Policy
from rlsys.learners.optimizers import learning_rate
from rlsys.losses import LossOutputs
from rlsys.packing import shard
from rlsys.run import check
from tests.learners.ranks import (
    OPTIMIZER,
    ROOT,
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
    timeless,
    wait_for,
    weights,
)

PORTS = 16


MUON = replace(OPTIMIZER, kind="muon")


def masters(learner: FsdpLearner) -> dict[str, Tensor]:
    """The weights that the optimizer updates."""
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in learner._named_parameters()
    }


def all_of(ranks: Ranks) -> Json:
    return {**everything(ranks, masters), **in_the_background(ranks), **muon(ranks)}


def in_the_background(ranks: Ranks) -> Json:
    """Saves that are held up, that fail on one rank, and the one after that."""
    one, two, three, _ = batches(ranks.folder)
    found: Json = {}
    ordinary, may_write = FileSystemWriter.write_data, threading.Event()

    def held(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return ordinary(*arguments)

    def full(*arguments: Any) -> Any:
        if ranks.rank == ranks.world_size - 1:
            raise OSError(28, "No space left on device")
        return ordinary(*arguments)

    learner = ranks.start()
    try:
        ranks.step(learner, one)
        FileSystemWriter.write_data = held  # type: ignore[method-assign]
        learner.save(str(ranks.mine / "held"))
        found["when_held"] = weights(learner)
        ranks.step(learner, two)
        learner.reset_reference()
        ranks.step(learner, three)
        found["saved_when_held"], found["whole_when_held"] = learner.saved(), (ranks.mine / "held/.metadata").exists()
        may_write.set()
        wait_for(learner)
        FileSystemWriter.write_data = full  # type: ignore[method-assign]
        learner.save(str(ranks.mine / "full"))
        with pytest.raises(CheckpointError) as error:
            wait_for(learner)
        found["full"] = str(error.value)
    finally:
        FileSystemWriter.write_data = ordinary  # type: ignore[method-assign]
    found["before_again"] = weights(learner)
    learner.save(str(ranks.mine / "again"))
    learner.close()  # waits
    learner = ranks.start()
    learner.load(str(ranks.mine / "held"))
    found["of_held"] = weights(learner)
    learner.load(str(ranks.mine / "again"))
    found["of_again"] = weights(learner)
    learner.close()
    return found


def muon(ranks: Ranks) -> Json:
    """Four steps of Muon, and the last two again from a checkpoint."""
    todo = batches(ranks.folder)
    learner = ranks.start(optimizer=MUON)
    found: Json = {"muon_born": weights(learner), "muon": [ranks.step(learner, batch) for batch in todo[:2]]}
    learner.save(str(ranks.mine / "muon"))
    found["muon"] += [ranks.step(learner, batch) for batch in todo[2:]]
    found["muon_weights"] = weights(learner)
    wait_for(learner)
    learner.load(str(ranks.mine / "muon"))
    found["muon_resumed"] = [ranks.step(learner, batch) for batch in todo[2:]]
    found["muon_resumed_weights"] = weights(learner)
    with pytest.raises(CheckpointError) as error:
        learner.load(str(ranks.mine / "checkpoint"))
    found["muon_from_adamw"] = str(error.value)
    learner.close()
    return found


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
        return {"plain": plain(folder), "one": all_of(one)}

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
        assert timeless(again) == timeless(first)


@pytest.mark.parametrize("who", ["one", "first"])
def test_a_reset_reference_is_the_current_policy_and_survives_a_checkpoint(results: Json, who: str) -> None:
    mine = results[who]
    assert mine["before_reset"]["sum/kl"] > 1e-3
    assert mine["reset"]["sum/kl"] == pytest.approx(0.0, abs=1e-9)
    assert mine["after_reset"]["sum/kl"] > 1e-4
    assert timeless(mine["after_reset_resumed"]) == timeless(mine["after_reset"])


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


# --- checkpoints that are written in the background ------------------------------------------------------------------


@pytest.mark.parametrize("who", ["one", "first", "second"])
def test_a_checkpoint_holds_the_weights_of_the_moment_though_training_went_on(results: Json, who: str) -> None:
    mine = results[who]
    assert (mine["saved_when_held"], mine["whole_when_held"]) == (False, False)
    assert_equal(mine["of_held"], mine["when_held"])
    assert any(not torch.equal(mine["before_again"][name], weight) for name, weight in mine["when_held"].items())


@pytest.mark.parametrize("who", ["one", "first", "second"])
def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks_and_the_next_save_is_good(
    results: Json, folder: Path, who: str
) -> None:
    mine = results[who]
    of = folder / ("of-1" if who == "one" else "of-2")
    assert mine["full"].startswith(f"{of / 'full'} could not be written: OSError: ")
    assert "No space left on device" in mine["full"]
    assert not (of / "full" / ".metadata").exists()
    assert_equal(mine["of_again"], mine["before_again"])


# --- Muon ------------------------------------------------------------------------------------------------------------


def moved(results: Json, who: str, kind: str) -> dict[str, Tensor]:
    born = results[who]["muon_born"]
    return {name: weight - born[name] for name, weight in results[who][kind].items()}


@pytest.mark.parametrize("who", ["one", "first", "second"])
def test_muon_goes_on_from_a_checkpoint_bit_for_bit(results: Json, who: str) -> None:
    mine = results[who]
    assert_equal(mine["muon_resumed_weights"], mine["muon_weights"])
    for again, first in zip(mine["muon_resumed"], mine["muon"][2:], strict=True):
        assert timeless(again) == timeless(first)
    assert "of-" in mine["muon_from_adamw"]
    assert "momentum_buffer" in mine["muon_from_adamw"]


def test_muon_updates_the_matrices_of_the_layers_and_adamw_the_rest(results: Json) -> None:
    by_muon, by_adamw = moved(results, "one", "muon_weights"), moved(results, "one", "weights")
    for name, update in by_muon.items():
        # Neither sees the other's weights but through the gradients, so the first steps nearly agree where AdamW rules.
        alike = torch.cosine_similarity(update.flatten(), by_adamw[name].flatten(), dim=0)
        is_matrix_of_a_layer = ".layers." in name and update.ndim == 2
        assert (alike < 0.9) == is_matrix_of_a_layer, f"{name}: {alike}"


def test_muon_learns_on_two_ranks_what_it_learns_on_one_but_for_its_bfloat16_iterations(results: Json) -> None:
    one, two = moved(results, "one", "muon_weights"), moved(results, "first", "muon_weights")
    for name, update in one.items():
        assert float((update - two[name]).norm() / update.norm()) < 0.1, name
    assert results["one"]["muon"][0]["update_norm"] == pytest.approx(
        results["first"]["muon"][0]["update_norm"], rel=0.02
    )
    assert results["one"]["muon"][0]["grad_norm"] == pytest.approx(results["one"]["run"][0]["grad_norm"])


# --- health ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["one", "first", "second"])
def test_the_norms_of_a_step_are_those_of_the_whole_weights_and_of_their_change(results: Json, who: str) -> None:
    before, after, step = results[who]["before_skip"], results[who]["after_skip"], results[who]["skip"][0]
    assert_equal(before, after)
    whole = math.sqrt(sum(float(weight.double().pow(2).sum()) for weight in before.values()))
    assert (step["parameter_norm"], step["update_norm"]) == (pytest.approx(whole, rel=1e-6), 0.0)
    step, moved_to = results[who]["after_skip_step"], results[who]["after_skip_weights"]
    change = math.sqrt(sum(float((moved_to[name] - weight).double().pow(2).sum()) for name, weight in after.items()))
    assert step["update_norm"] == pytest.approx(change, rel=1e-4)


def test_what_ranks_count_adds_up_to_what_one_counts(results: Json) -> None:
    for step in range(4):
        alone = results["one"]["run"][step]
        for name in ("flops", *RATIO_SHARES):
            assert total(results, "run", step, name) == pytest.approx(alone[f"sum/{name}"]), name
        assert sum(alone[f"sum/{name}"] for name in RATIO_SHARES) == alone["sum/trained_tokens"]
        assert alone["max/memory_gib"] > 0.05
        assert not any("peak_flops" in name for name in alone), "no peak of a CPU is known"


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


def test_options_for_fsdp_are_found_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match=r"learners.options: unknown option 'stage'; known: cpu_offload"):
        check(load_config(ROOT / "configs/quickstart.yaml", ["learners.options={stage: 3}"]))
    check(load_config(ROOT / "configs/quickstart.yaml", ["rl.optimizer.kind=muon"]))


def test_what_is_offloaded_to_the_host_learns_the_same(folder: Path, results: Json) -> None:
    ranks = Ranks(FsdpLearner, folder, rank=0, ports=free_ports(1), world_size=1, options={"cpu_offload": True})
    learner = ranks.start()
    metrics = [ranks.step(learner, batch) for batch in batches(folder)]
    found = weights(learner)
    learner.close()
    assert_equal(found, results["one"]["weights"])
    assert [line["grad_norm"] for line in metrics] == [line["grad_norm"] for line in results["one"]["run"]]


def _main() -> None:
    folder, rank, ports = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    ranks = Ranks(FsdpLearner, folder, rank=rank, ports=ports, world_size=2)
    torch.save(all_of(ranks), folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    _main()
