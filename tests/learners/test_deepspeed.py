"""The learner on real ZeRO-2 and ZeRO-3: the same numbers as one process with plain transformers, and as FSDP2.

Two processes compute everything once, as this file run as a program; meanwhile the test process trains without any of
the learner's code.
"""

import asyncio
import json
import math
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.config import LearnersConfig
from rlsys.config_file import load_config
from rlsys.errors import CheckpointError, ConfigError
from rlsys.learner_group import LearnerGroup
from rlsys.learners import head
from rlsys.learners.deepspeed import DeepSpeedLearner
from rlsys.learners.fsdp import FsdpLearner
from rlsys.run import check
from rlsys.types import TrainBatch
from rlsys.weights import GLOO_BACKEND, WeightGroup, broadcast, checksum, join_gloo_group
from tests.learners.ranks import (
    LOSS,
    NARROW,
    OPTIMIZER,
    ROOT,
    TEMPERATURE,
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
    weights,
)

STAGES = ("zero-2", "zero-3")
# Small parameters would stay whole on every rank of ZeRO-3, and all of the tiny model's are small.
OPTIONS: dict[str, Json] = {
    "zero-2": {"stage": 2},
    "zero-3": {"stage": 3, "settings": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
}
PORTS = 40


# --- what two processes do -------------------------------------------------------------------------------------------


def masters(learner: DeepSpeedLearner) -> dict[str, Tensor]:
    """The weights that the optimizer updates."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in learner._named_parameters()}


def lonely(batch: TrainBatch) -> TrainBatch:
    """Its first rollout alone: one of two ranks has nothing to do."""
    return replace(
        batch,
        rollouts=batch.rollouts[:1],
        advantages=batch.advantages[:1],
        weights=batch.weights[:1],
        num_tokens=batch.rollouts[0].num_trained_tokens,
    )


def alone_and_crowded(ranks: Ranks) -> Json:
    """Many micro-batches of different sizes, and steps in which one rank has none, in turn."""
    learner = ranks.start()
    one, two, three, four = batches(ranks.folder)
    metrics = [
        ranks.step(learner, batch, budget=NARROW) for batch in (one, lonely(two), three, lonely(four), lonely(four))
    ]
    found = {"alone": metrics, "alone_weights": weights(learner)}
    learner.close()
    return found


def published(ranks: Ranks) -> Json:
    """Checksums that rank 0 sent, and those of what rank 1 received in the place of an engine."""
    learner = ranks.start()
    ranks.step(learner, batches(ranks.folder)[0])
    group = WeightGroup(master_address="127.0.0.1", master_port=ranks.ports.pop(0), world_size=2)
    received: dict[str, int] = {}

    def receive() -> None:
        members = join_gloo_group(group, rank=1, seconds=60)
        for name, parameter in learner._named_parameters():
            tensor = torch.empty(getattr(parameter, "ds_shape", parameter.shape))
            broadcast(tensor, members)
            received[name] = checksum(tensor)

    engine = threading.Thread(target=receive)
    if ranks.rank == 1:
        engine.start()
    learner.open_weights(group, backend=GLOO_BACKEND, timeout=60)
    sent = learner.send_weights()
    if ranks.rank == 1:
        engine.join()
    found = {"sent": sent, "received": received, "expected": {n: checksum(w) for n, w in weights(learner).items()}}
    learner.close()
    return found


def _main() -> None:
    folder, rank, ports = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    head._KEPT_BYTES = head._CHUNK_BYTES = 4000  # the head runs more often on one rank than on the other
    found: Json = {}
    for name in STAGES:
        ranks = Ranks(DeepSpeedLearner, folder, rank=rank, ports=ports, world_size=2, options=OPTIONS[name], name=name)
        found[name] = {**everything(ranks, masters), **alone_and_crowded(ranks), **published(ranks)}
    found["fsdp"] = alone_and_crowded(Ranks(FsdpLearner, folder, rank=rank, ports=ports, world_size=2))
    torch.save(found, folder / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Json:
    """What the first of two ranks, the second of two ranks and plain transformers found."""
    ports = json.dumps(free_ports(PORTS))
    return in_two_processes(__file__, folder, ports, meanwhile=lambda: {"plain": plain(folder)})


def total(results: Json, stage: str, step: int, name: str) -> float:
    return float(sum(results[rank][stage]["run"][step][f"sum/{name}"] for rank in ("first", "second")))


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_zero_learns_what_plain_transformers_learns_from_a_padded_batch(results: Json, stage: str) -> None:
    metrics, expected = results["plain"]
    assert any(step["grad_norm"] > OPTIMIZER.max_grad_norm for step in metrics), "else clipping is not tested"
    mine = results["first"][stage]
    assert [step["grad_norm"] for step in mine["run"]] == pytest.approx([m["grad_norm"] for m in metrics], rel=1e-4)
    assert [step["lr"] for step in mine["run"]] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.55e-3])
    assert_close(mine["weights"], expected)
    assert_equal(mine["weights"], results["second"][stage]["weights"])


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_kl_are_those_of_plain_transformers(results: Json, folder: Path, stage: str) -> None:
    for step, (metrics, batch) in enumerate(zip(results["plain"][0], batches(folder), strict=True)):
        assert total(results, stage, step, "loss") / batch.num_tokens == pytest.approx(metrics["loss"], abs=1e-5)
        assert total(results, stage, step, "kl") == pytest.approx(metrics["kl"], abs=1e-3)
        assert total(results, stage, step, "trained_tokens") == batch.num_tokens


@pytest.mark.parametrize("stage", STAGES)
def test_four_micro_batches_learn_what_one_learns(results: Json, stage: str) -> None:
    mine = results["first"][stage]
    assert {step["micro_batches"] for step in mine["run"]} == {1}
    assert min(step["micro_batches"] for step in mine["micro"]) >= 4
    assert_close(mine["micro_weights"], mine["weights"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_rollouts_changes_nothing_and_zero_is_fsdp(results: Json, stage: str) -> None:
    tokens = [[step["sum/tokens"] for step in results[rank][stage]["alone"]] for rank in ("first", "second")]
    assert [min(counts) == 0 for counts in zip(*tokens, strict=True)] == [False, True, False, True, True]
    assert_close(results["first"][stage]["alone_weights"], results["first"]["fsdp"]["alone_weights"])
    for mine, theirs in zip(results["first"][stage]["alone"], results["first"]["fsdp"]["alone"], strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert mine["parameter_norm"] == pytest.approx(theirs["parameter_norm"], rel=1e-6)
        assert mine["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-3)
        assert mine["sum/flops"] == theirs["sum/flops"]


# --- skipped steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", ["first", "second"])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(results: Json, rank: str, stage: str) -> None:
    mine = results[rank][stage]
    assert [step["skipped_in_a_row"] for step in mine["skip"]] == [1, 2]
    assert not any(math.isfinite(step["grad_norm"]) for step in mine["skip"])
    assert_equal(mine["before_skip"], mine["after_skip"])
    assert mine["after_skip_step"]["skipped_in_a_row"] == 0
    # Adam's first step moves every weight by about the learning rate: of step 2, 1e-3, since skipped steps count.
    moved = [
        float((mine["after_skip_weights"][name] - tensor * (1 - 1e-3 * 0.1)).abs().max())
        for name, tensor in mine["after_skip"].items()
    ]
    assert max(moved) == pytest.approx(1e-3, rel=1e-2)


# --- publishing, export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_receives_the_whole_tensors_that_the_learner_has(results: Json, stage: str) -> None:
    sent, received = results["first"][stage]["sent"], results["second"][stage]["received"]
    assert sent == received == results["first"][stage]["expected"]
    assert len(sent) > 20
    assert results["second"][stage]["sent"] == {}


@pytest.mark.parametrize("stage", STAGES)
def test_the_exported_folder_is_an_ordinary_model_with_equal_weights(results: Json, folder: Path, stage: str) -> None:
    exported = folder / f"{stage}-2" / "export"
    network = AutoModelForCausalLM.from_pretrained(exported)
    assert_equal({name: p.detach() for name, p in network.named_parameters()}, results["first"][stage]["weights"])
    assert_close({name: p.detach() for name, p in network.named_parameters()}, results["plain"][1])
    assert network.lm_head.weight is network.model.embed_tokens.weight
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(results["first"][stage]["weights"])
    assert AutoTokenizer.from_pretrained(exported).chat_template


# --- in Ray ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ray_actors_step_save_and_export_as_one_learner(
    on_ray: asyncio.Runner, folder: Path, tmp_path: Path
) -> None:
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        ["learners.use=rlsys.learners.deepspeed:DeepSpeedLearner", "learners.options.stage=3", "learners.count=2"],
    )

    async def use() -> dict[str, float]:
        group = await LearnerGroup.start(
            config,
            str(folder / "model"),
            optimizer=OPTIMIZER,
            total_steps=4,
            loss="rlsys.losses:clipped_policy_gradient",
            with_reference=True,
        )
        try:
            metrics = await group.step(batches(folder)[0], temperature=TEMPERATURE, **LOSS)
            await group.save(tmp_path / "checkpoint")
            await group.saved()
            await group.load(tmp_path / "checkpoint")
            await group.export(tmp_path / "model")
            return metrics
        finally:
            await group.close()

    metrics = on_ray.run(use())
    expected = plain(folder)[0][0]
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 32


# --- checkpoints, reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", ["first", "second"])
def test_a_learner_that_was_saved_and_loaded_goes_on_bit_for_bit(results: Json, rank: str, stage: str) -> None:
    mine = results[rank][stage]
    assert_equal(mine["loaded"], mine["saved"])
    assert_equal(mine["resumed_weights"], mine["weights"])
    for again, first in zip(mine["resumed"], mine["run"][2:], strict=True):
        assert timeless(again) == timeless(first)


@pytest.mark.parametrize("stage", STAGES)
def test_a_reset_reference_is_the_current_policy_and_survives_a_checkpoint(results: Json, stage: str) -> None:
    mine = results["first"][stage]
    assert mine["before_reset"]["sum/kl"] > 1e-3
    assert mine["reset"]["sum/kl"] == pytest.approx(0.0, abs=1e-9)
    assert mine["after_reset"]["sum/kl"] > 1e-4
    assert timeless(mine["after_reset_resumed"]) == timeless(mine["after_reset"])


def idle(**config: object) -> DeepSpeedLearner:
    """A learner that never met any others."""
    return DeepSpeedLearner(model_path="", config=LearnersConfig(**config), rank=0, world_size=1)  # type: ignore[arg-type]


def test_a_checkpoint_says_what_it_was_written_with(results: Json, folder: Path) -> None:
    assert results
    with pytest.raises(CheckpointError, match=r"learners.count=2 learners.options.stage=3 .*count=1 .*stage=3"):
        idle().load(str(folder / "zero-3-2" / "checkpoint"))
    with pytest.raises(CheckpointError, match=r"stage=2 .*cannot be resumed with .*stage=3"):
        idle().load(str(folder / "zero-2-2" / "checkpoint"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_another_model_is_refused(results: Json, folder: Path, stage: str) -> None:
    assert results
    learner = DeepSpeedLearner(
        model_path="", config=LearnersConfig(options={"stage": int(stage[-1])}), rank=0, world_size=2
    )
    learner._shapes = {"model.embed_tokens.weight": [300, 32]}
    with pytest.raises(CheckpointError, match=r"is of another model .*differences"):
        learner.load(str(folder / f"{stage}-2" / "checkpoint"))


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", '{"count": 1}'])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "learner.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        idle().load(str(tmp_path))


# --- number formats, options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_learns_nearly_the_same_with_float32_master_weights(results: Json, folder: Path, stage: str) -> None:
    mine = results["first"][stage]
    for rough, exact in zip(mine["bfloat16"], mine["run"], strict=False):
        assert rough["sum/loss"] == pytest.approx(exact["sum/loss"], abs=0.05 * exact["sum/trained_tokens"])
        assert rough["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert_equal(mine["bfloat16_born"], {name: p.detach() for name, p in network.named_parameters()})
    assert {tensor.dtype for tensor in mine["bfloat16_masters"].values()} == {torch.float32}
    assert any(not torch.equal(w, w.bfloat16().float()) for w in mine["bfloat16_masters"].values())
    assert mine["bfloat16_reset"]["sum/kl"] == 0.0, "the reference rounds as the policy does"
    exported = AutoModelForCausalLM.from_pretrained(folder / f"{stage}-2" / "bfloat16", dtype=torch.bfloat16)
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, mine["bfloat16_masters"][name].bfloat16()), name


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"learners.options.stage is 1; give 2 .*or 3"):
        idle(options={"stage": 1})
    with pytest.raises(ConfigError, match=r"unknown option 'stag'; did you mean `stage`"):
        idle(options={"stag": 2})
    with pytest.raises(ConfigError, match=r"bf16.*learners.dtype"):
        idle(options={"settings": {"bf16": {"enabled": True}}})
    with pytest.raises(ConfigError, match=r"set learners.options.stage instead"):
        idle(options={"settings": {"zero_optimization": {"stage": 1}}})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["learners.options={stag: 3}"], r"learners.options: unknown option 'stag'; did you mean `stage`"),
        (["learners.options={stage: 1}"], r"learners.options.stage is 1"),
        (["rl.optimizer.kind=muon"], r"rl.optimizer.kind is muon, but DeepSpeedLearner has adamw only"),
    ],
)
def test_what_deepspeed_cannot_do_is_found_before_anything_is_started(overrides: list[str], says: str) -> None:
    use = "learners.use=rlsys.learners.deepspeed:DeepSpeedLearner"
    with pytest.raises(ConfigError, match=says):
        check(load_config(ROOT / "configs/quickstart.yaml", [use, *overrides]))
    check(load_config(ROOT / "configs/quickstart.yaml", [use, "learners.options={stage: 2}"]))


def test_settings_reach_deepspeed_beside_the_stage() -> None:
    learner = idle(options={"stage": 2, "settings": {"zero_optimization": {"reduce_bucket_size": 7}, "seed": 1}})
    assert learner._settings["zero_optimization"] == {"reduce_bucket_size": 7, "stage": 2}
    assert learner._settings["seed"] == 1


if __name__ == "__main__":
    _main()
