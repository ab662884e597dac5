"""Tensor parallelism in the FSDP2 learner: ranks that share the layers learn what one rank learns.

Two processes, this file run as a program, are a row of two ranks; meanwhile the test process computes the same with
one rank, which other tests hold against plain transformers. Four processes are two rows of two.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rlsys.config import LearnersConfig, LoraConfig, OptimizerConfig
from rlsys.learners.fsdp import FsdpLearner
from rlsys.losses import clipped_policy_gradient, value_loss
from rlsys.packing import shard, unpack
from rlsys.types import TrainBatch
from tests.learners.ranks import (
    LOSS,
    NARROW,
    OPTIMIZER,
    STEPS,
    TEMPERATURE,
    WIDE,
    Json,
    assert_close,
    assert_equal,
    batches,
    build,
    free_ports,
    in_processes,
    poisoned,
    timeless,
    wait_for,
    weights,
)

PORTS = 7
FEW = 64
"""A token budget for at least two micro-batches in each row."""

MUON = replace(OPTIMIZER, kind="muon")


def build_both(folder: Path) -> None:
    """The tiny Qwen2 of the other tests, and a Qwen3: norms of heads, a bias everywhere, a head of its own."""
    build(folder)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        attention_bias=True,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    network = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder / "qwen3")


class Rows:
    """This process's rank of learners on so many ranks, of which `size` are a row."""

    def __init__(self, folder: Path, *, rank: int, ports: list[int], world_size: int, size: int) -> None:
        self.folder, self.rank, self.ports, self.world_size, self.size = folder, rank, ports, world_size, size
        self.mine = folder / f"of-{world_size}"

    def start(
        self,
        *,
        model: str = "model",
        optimizer: OptimizerConfig = OPTIMIZER,
        loss: Callable[..., Any] = clipped_policy_gradient,
        options: Json | None = None,
        with_reference: bool = True,
        network: Any = "policy",
        **config: Any,
    ) -> FsdpLearner:
        options = {"tensor_parallel": self.size, **(options or {})}
        learner = FsdpLearner(
            model_path=str(self.folder / model),
            config=LearnersConfig(count=self.world_size, options=options, **config),
            rank=self.rank,
            world_size=self.world_size,
        )
        learner.start(
            master=("127.0.0.1", self.ports.pop(0)),
            optimizer=optimizer,
            total_steps=STEPS,
            loss=loss,
            with_reference=with_reference,
            network=network,
            timeout=120.0,
        )
        return learner

    def share(self, batch: TrainBatch, budget: int) -> list[Any]:
        return shard(batch, num_ranks=self.world_size // self.size, max_tokens=budget)[self.rank // self.size]

    def step(self, learner: FsdpLearner, batch: TrainBatch, *, budget: int = WIDE, **options: Any) -> Json:
        options = options or LOSS
        share = self.share(batch, budget)
        return learner.step(share, num_tokens=batch.num_tokens, temperature=TEMPERATURE, **options)

    def infer(self, learner: FsdpLearner, batch: TrainBatch, **options: Any) -> Tensor:
        """What this rank's share says, laid out as the whole batch."""
        share = self.share(batch, NARROW)
        found = learner.infer(share, temperature=TEMPERATURE, **options)
        return torch.from_numpy(np.concatenate(unpack(batch, share, found)))


def training(rows: Rows) -> Json:
    """Steps, a checkpoint in the middle, what is inferred, a reference that is reset, a step that is skipped."""
    one, two, three, four = batches(rows.folder)
    learner = rows.start()
    found: Json = {"born": weights(learner)}
    found["steps"] = [rows.step(learner, one), rows.step(learner, two, budget=NARROW)]
    learner.save(str(rows.mine / "checkpoint"))
    found["saved"] = weights(learner)
    found["steps"].append(rows.step(learner, three))
    found["weights"] = weights(learner)
    found["infer"] = rows.infer(learner, four)
    found["infer_reference"] = rows.infer(learner, four, reference=True)
    found["skip"] = rows.step(learner, poisoned(four))
    found["after_skip"] = weights(learner)
    wait_for(learner)
    learner.export(str(rows.mine / "export"))
    learner.load(str(rows.mine / "checkpoint"))
    found["loaded"] = weights(learner)
    found["again"] = rows.step(learner, three)
    found["weights_again"] = weights(learner)
    learner.reset_reference()
    found["reset"] = rows.step(learner, four)
    found["after_reset"] = rows.step(learner, one)
    if rows.world_size == 4:  # the others are done
        for of in ("of-1", "of-2"):
            learner.load(str(rows.folder / of / "checkpoint"))
            found[of] = weights(learner)
    learner.close()
    return found


KINDS: dict[str, Json] = {
    "qwen3": {"model": "qwen3", "activation_checkpointing": True},
    "lora": {"model": "qwen3", "lora": LoraConfig(rank=3)},
    "critic": {"network": "scorer", "loss": value_loss, "with_reference": False},
    "offloaded": {"options": {"cpu_offload": True}},
    "muon": {"optimizer": MUON},
    "bfloat16": {"dtype": "bfloat16"},
}
"""What else can be trained."""

OF_A_ROW = ["qwen3", "lora", "critic", "offloaded", "bfloat16"]
OF_TWO_ROWS = ["qwen3", "muon"]


def two_steps(rows: Rows, kind: str) -> Json:
    """Of one kind, in a few micro-batches; and what it infers then."""
    todo = batches(rows.folder)
    learner = rows.start(**KINDS[kind])
    options: Json = {"value_clip": 0.0} if kind == "critic" else LOSS
    found: Json = {"born": weights(learner)}
    found["steps"] = [rows.step(learner, batch, budget=FEW, **options) for batch in todo[:2]]
    found |= {"weights": weights(learner), "infer": rows.infer(learner, todo[2])}
    learner.close()
    return found


def everything(rows: Rows, kinds: Iterable[str]) -> Json:
    return {**training(rows), **{kind: two_steps(rows, kind) for kind in kinds}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    build_both(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Json:
    """What one rank found as `one`, and the two of a row as `first` and `second`."""

    def alone() -> Json:
        return everything(Rows(folder, rank=0, ports=free_ports(PORTS), world_size=1, size=1), KINDS)

    arguments = (json.dumps([2, 2, free_ports(PORTS), OF_A_ROW]),)
    one, (first, second) = in_processes(__file__, folder, *arguments, count=2, meanwhile=alone)
    return {"one": one, "first": first, "second": second}


@pytest.fixture(scope="module")
def table(folder: Path, results: Json) -> list[Json]:
    """What each of four ranks in two rows found, which came after the others."""
    assert results
    arguments = (json.dumps([4, 2, free_ports(PORTS), OF_TWO_ROWS]),)
    return in_processes(__file__, folder, *arguments, count=4, meanwhile=dict)[1]


def assert_same_steps(one: list[Json], ranks: list[list[Json]]) -> None:
    """What holds for all ranks is said by all, sums over shares are told once for each, and both are those of one."""
    for step, alone in enumerate(one):
        told = [steps[step] for steps in ranks]
        for name, value in alone.items():
            if name.startswith("sum/"):
                found = sum(metrics.get(name, 0.0) for metrics in told)
                assert found == pytest.approx(value, rel=1e-4, abs=1e-3), name
            elif name.startswith("max/logprob"):
                assert max(metrics[name] for metrics in told) == pytest.approx(value, rel=1e-4), name
            elif name not in ("seconds", "max/memory_gib"):
                assert [metrics[name] for metrics in told] == [told[0][name]] * len(told), name
                assert told[0][name] == pytest.approx(value, rel=1e-4), name
        for second in told[1::2]:
            assert {name for name in second if name.startswith("sum/")} == {"sum/flops"}


# --- one row of two --------------------------------------------------------------------------------------------------


def test_two_ranks_that_share_the_layers_learn_what_one_rank_learns(results: Json) -> None:
    one, first, second = results.values()
    assert_equal(one["born"], first["born"])
    assert_same_steps(one["steps"], [first["steps"], second["steps"]])
    assert any(step["grad_norm"] > OPTIMIZER.max_grad_norm for step in one["steps"]), "else clipping is not tested"
    assert_close(one["weights"], first["weights"])
    assert_equal(first["weights"], second["weights"])


@pytest.mark.parametrize("run", ["infer", "infer_reference"])
def test_both_ranks_of_a_row_infer_what_one_rank_infers(results: Json, run: str) -> None:
    one, first, second = (of[run] for of in results.values())
    torch.testing.assert_close(first, one, atol=1e-4, rtol=1e-4)
    assert torch.equal(first, second)
    assert float(one.abs().max()) > 1


def test_a_gradient_that_is_not_finite_skips_the_step_on_both_ranks(results: Json) -> None:
    for who in ("first", "second"):
        assert not math.isfinite(results[who]["skip"]["grad_norm"])
        assert results[who]["skip"]["skipped_in_a_row"] == 1
        assert_equal(results[who]["after_skip"], results[who]["weights"])


def test_a_checkpoint_of_a_row_is_resumed_bit_for_bit(results: Json) -> None:
    for who in ("first", "second"):
        assert_equal(results[who]["loaded"], results[who]["saved"])
        assert timeless(results[who]["again"]) == timeless(results[who]["steps"][2])
        assert_equal(results[who]["weights_again"], results[who]["weights"])


def test_a_reset_reference_is_the_current_policy(results: Json) -> None:
    one, first = (results[who]["after_reset"] for who in ("one", "first"))
    assert results["first"]["reset"]["sum/kl"] == pytest.approx(0.0, abs=1e-9)
    assert first["sum/kl"] == pytest.approx(one["sum/kl"], rel=1e-2)
    assert first["sum/kl"] > 1e-4


def test_a_checkpoint_of_a_row_is_resumed_by_one_rank(results: Json, folder: Path) -> None:
    learned = resumed_by_one(folder, "of-2", expecting=results["first"]["saved"])
    assert_close(learned, results["first"]["weights"])


def resumed_by_one(folder: Path, of: str, *, expecting: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one rank that did the third step from a checkpoint of several."""
    rows = Rows(folder, rank=0, ports=free_ports(1), world_size=1, size=1)
    learner = rows.start()
    try:
        learner.load(str(folder / of / "checkpoint"))
        assert_equal(weights(learner), expecting)
        rows.step(learner, batches(folder)[2])
        return weights(learner)
    finally:
        learner.close()


def test_what_a_row_exports_is_an_ordinary_model(results: Json, folder: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(folder / "of-2" / "export")
    assert_equal({name: p.detach() for name, p in network.named_parameters()}, results["first"]["weights"])


def assert_same(kind: str, one: Json, *ranks: Json) -> None:
    """These ranks learned what one did, as nearly as its arithmetic allows."""
    for rank in ranks:
        assert_equal(rank["weights"], ranks[0]["weights"])
    mine, theirs = ranks[0], one
    if kind == "bfloat16":
        for rough, exact in zip(mine["steps"], theirs["steps"], strict=True):
            assert rough["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    elif kind == "muon":
        for name, born in theirs["born"].items():
            difference = mine["weights"][name] - theirs["weights"][name]
            assert float(difference.norm() / (theirs["weights"][name] - born).norm()) < 0.1, name
    else:
        assert_same_steps(one["steps"], [rank["steps"] for rank in ranks])
        assert_close(theirs["weights"], mine["weights"])
        stayed = {name for name, weight in mine["weights"].items() if torch.equal(mine["born"][name], weight)}
        assert all(kind == "lora" and "_proj.weight" not in name for name in stayed), stayed


@pytest.mark.parametrize("kind", OF_A_ROW)
def test_whatever_one_rank_can_train_a_row_can(results: Json, kind: str) -> None:
    one, first, second = (of[kind] for of in results.values())
    assert_same(kind, one, first, second)
    tolerance = 0.5 if kind == "bfloat16" else 1e-4
    torch.testing.assert_close(first["infer"], one["infer"], atol=tolerance, rtol=tolerance)


# --- two rows of two -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_rows_of_two_learn_what_one_rank_learns(results: Json, table: list[Json]) -> None:
    one, four = results["one"], table
    assert_same_steps(one["steps"], [rank["steps"] for rank in four])
    for rank in four:
        assert_equal(rank["born"], one["born"])
        assert_close(rank["weights"], one["weights"])
        assert_equal(rank["weights"], four[0]["weights"])
        assert_equal(rank["after_skip"], rank["weights"])
        assert_equal(rank["loaded"], rank["saved"])
        assert_equal(rank["weights_again"], rank["weights"])
    for run in ("infer", "infer_reference"):
        assert torch.equal(four[0][run], four[1][run])
        assert torch.equal(four[2][run], four[3][run])
        torch.testing.assert_close(four[0][run] + four[2][run], one[run], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_checkpoints_go_between_one_rank_one_row_and_two(results: Json, table: list[Json], folder: Path) -> None:
    learned = resumed_by_one(folder, "of-4", expecting=table[0]["saved"])
    assert_close(learned, table[0]["weights"])
    for rank in table:
        assert_equal(rank["of-1"], results["one"]["saved"])
        assert_equal(rank["of-2"], results["first"]["saved"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_TWO_ROWS)
def test_whatever_one_rank_can_train_two_rows_can(results: Json, table: list[Json], kind: str) -> None:
    assert_same(kind, results["one"][kind], *(rank[kind] for rank in table))


def _main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    world_size, size, ports, kinds = json.loads(sys.argv[3])
    rows = Rows(folder, rank=rank, ports=ports, world_size=world_size, size=size)
    torch.save(everything(rows, kinds), folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    _main()
