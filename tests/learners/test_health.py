"""What a step says of its own health, with numbers worked out by hand."""

import asyncio
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlsys import learner_group
from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.errors import (
    ActorDiedError,
    ActorError,
    ActorTimeoutError,
    CheckpointError,
    LearnerLostError,
    RlsysError,
)
from rlsys.learner_group import LearnerGroup, _merge, _together
from rlsys.learners.health import (
    RATIO_EDGES,
    RATIO_SHARES,
    ModelSize,
    forget_peak_memory,
    named_peak_flops,
    peak_flops,
    peak_memory_gib,
    ratio_shares,
)
from rlsys.packing import MicroBatch, shard
from rlsys.types import Rollout, TrainBatch

CPU = torch.device("cpu")
SIZE = ModelSize(layer_parameters=100, head_parameters=1000, num_layers=2, attention_width=3)


def micro_of(*rollouts: list[bool]) -> MicroBatch:
    """Rollouts of so many tokens, true where they train; the same prompts have the same tokens."""
    made = tuple(
        Rollout(
            tokens=np.arange(len(trained), dtype=np.int32) + 100 * number * np.array(trained, dtype=np.int32),
            loss_mask=np.array(trained),
            logprobs=np.zeros(len(trained), np.float32),
            versions=np.where(trained, 0, -1).astype(np.int32),
        )
        for number, trained in enumerate(rollouts)
    )
    batch = TrainBatch(
        rollouts=made,
        advantages=tuple(np.zeros(len(rollout), np.float32) for rollout in made),
        weights=(1.0,) * len(made),
        num_tokens=sum(rollout.num_trained_tokens for rollout in made),
    )
    [[micro]] = shard(batch, num_ranks=1, max_tokens=1000)
    return micro


# --- importance ratios -----------------------------------------------------------------------------------------------


def test_every_token_is_in_the_bin_of_its_ratio() -> None:
    ratios = torch.tensor([0.0, 0.4, 0.6, 0.79, 0.81, 1.0, 1.0, 1.24, 1.3, 1.9, 2.1, 50.0, math.inf])
    found = ratio_shares(ratios.log() - 3.0, torch.full_like(ratios, -3.0))
    assert {name: int(count) for name, count in found.items()} == {
        "ratio_below_0.5": 2,
        "ratio_0.5_to_0.8": 2,
        "ratio_0.8_to_1.25": 4,
        "ratio_1.25_to_2": 2,
        "ratio_above_2": 3,
    }


def test_an_edge_belongs_to_the_bin_above_it() -> None:
    for index, edge in enumerate(RATIO_EDGES):
        found = ratio_shares(torch.tensor([edge]).log(), torch.zeros(1))
        assert [int(count) for count in found.values()].index(1) == index + 1


def test_without_tokens_all_bins_are_empty() -> None:
    found = ratio_shares(torch.zeros(0), torch.zeros(0))
    assert [float(count) for count in found.values()] == [0.0] * len(RATIO_SHARES)


# --- model FLOPs -----------------------------------------------------------------------------------------------------


def test_the_flops_of_one_sequence_are_those_worked_out_by_hand() -> None:
    micro = micro_of([False, False, True, True])
    # 4 tokens through the layers, 2 through the head; pairs 1 + 2 + 3 + 4 = 10, times 12 x 2 layers x width 3.
    assert SIZE.flops(micro) == 6 * (4 * 100 + 2 * 1000) + 72 * 10


def test_a_prompt_that_two_share_is_counted_once_and_attended_to_by_both() -> None:
    micro = micro_of([False, False, True, True], [False, False, True, True])
    assert len(micro.tokens) == 6
    # Pairs: the prompt 1 + 2, each response 3 + 4.
    assert SIZE.flops(micro) == 6 * (6 * 100 + 4 * 1000) + 72 * (3 + 2 * 7)


def test_an_empty_micro_batch_costs_nothing() -> None:
    micro = micro_of([False, True])
    empty = replace(micro, tokens=micro.tokens[:0], positions=micro.positions[:0], targets=micro.targets[:0])
    assert SIZE.flops(empty) == 0.0


def network(**config: Any) -> Any:
    """A layer of 12 + 4 weights and a head of 5 x 4."""
    layer = torch.nn.ModuleList([torch.nn.Linear(4, 3, bias=False), torch.nn.LayerNorm(4, bias=False)])
    text = SimpleNamespace(hidden_size=4, num_attention_heads=2, **config)
    hf = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text), lm_head=torch.nn.Linear(4, 5, bias=False)
    )
    return SimpleNamespace(hf=hf, layers=torch.nn.ModuleList([layer]))


def test_the_size_of_a_model_leaves_out_its_embedding() -> None:
    assert ModelSize.of(network()) == ModelSize(
        layer_parameters=16, head_parameters=20, num_layers=1, attention_width=4
    )
    assert ModelSize.of(network(head_dim=8)) == ModelSize(
        layer_parameters=16, head_parameters=20, num_layers=1, attention_width=16
    )


@pytest.mark.parametrize("experts", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_no_number_is_made_up_for_a_mixture_of_experts(experts: str) -> None:
    assert ModelSize.of(network(**{experts: 8})) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name_or_not_at_all(name: str, peak: float | None) -> None:
    assert named_peak_flops(name) == peak


def test_a_cpu_has_no_peak_but_memory() -> None:
    assert peak_flops(CPU, torch.bfloat16) is None
    forget_peak_memory(CPU)
    assert 0.01 < peak_memory_gib(CPU) < 10_000


# --- ranks together --------------------------------------------------------------------------------------------------


def of_rank(**more: float) -> dict[str, float]:
    return {"sum/tokens": 10.0, "sum/trained_tokens": 4.0, "sum/loss": 2.0, "seconds": 2.0, "grad_norm": 3.0, **more}


def test_the_numbers_of_two_ranks_become_those_of_one_learner() -> None:
    known = {"sum/flops": 6e14, "sum/peak_flops": 1e15}
    merged = _merge(
        [of_rank(**known, **{"max/memory_gib": 1.0}), of_rank(**known, **{"max/memory_gib": 3.0}, seconds=2.1)], 8
    )
    assert merged == {
        "tokens": 20.0,
        "trained_tokens": 8.0,
        "tokens_per_second": 10.0,
        "model_flops_per_second": 6e14,
        "mfu": pytest.approx(0.3),
        "memory_gib_max": 3.0,
        "loss": 0.5,
        "seconds": 2.0,
        "grad_norm": 3.0,
    }


def test_where_the_peak_is_not_known_there_is_no_mfu_and_where_the_model_is_not_there_are_no_flops() -> None:
    assert "mfu" not in _merge([of_rank(**{"sum/flops": 1.0})], 4)
    assert not {"mfu", "model_flops_per_second"} & _merge([of_rank()], 4).keys()


class Rank:
    """A rank that has written what it saved when it was asked so many times."""

    def __init__(self, *, asks: int, failing: str = "") -> None:
        self.asks, self.failing = asks, failing

    async def call(self, method: str) -> bool:
        assert method == "saved"
        self.asks -= 1
        if self.asks <= 0 and self.failing:
            raise CheckpointError(self.failing)
        return self.asks <= 0


def group_of(*ranks: Rank) -> LearnerGroup:
    return LearnerGroup(list(ranks), None, None)  # type: ignore[arg-type]


def test_a_checkpoint_is_written_when_all_ranks_have_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_group, "_SAVED_EVERY_SECONDS", 0.0)
    quick, slow = Rank(asks=1), Rank(asks=4)
    asyncio.run(group_of(quick, slow).saved())
    assert (quick.asks, slow.asks) == (-3, 0)
    with pytest.raises(CheckpointError, match="disk is full"):
        asyncio.run(group_of(Rank(asks=1), Rank(asks=2, failing="the disk is full")).saved())


Outcome = tuple[float, BaseException | int | None]
"""After how many seconds a rank answers, and what; None where it never does."""


async def answer(seconds: float, what: BaseException | int | None) -> int | None:
    await asyncio.sleep(seconds if what is not None else 3600)
    if isinstance(what, BaseException):
        raise what
    return what


def together(*outcomes: Outcome) -> list[int]:
    async def main() -> list[int]:
        try:
            return await _together(answer(*outcome) for outcome in outcomes)
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing is left behind"

    return asyncio.run(main())


DIED, HANGS = ActorDiedError("learner rank 1 died"), ActorTimeoutError("learner rank 1 did not answer")
CLOSED, FULL = ActorError("learner rank 0 raised: Connection closed by peer"), CheckpointError("the disk is full")


def test_what_ranks_answer_is_in_the_order_of_the_ranks() -> None:
    assert together((0.02, 7), (0.0, 8), (0.01, 9)) == [7, 8, 9]


@pytest.mark.parametrize("lost", [DIED, HANGS])
@pytest.mark.parametrize("after", [0.0, 0.05])
def test_a_rank_that_is_lost_is_the_reason_also_where_the_others_fail_of_it_before_that_is_known(
    lost: ActorError, after: float
) -> None:
    with pytest.raises(LearnerLostError, match="the learner cannot go on: learner rank 1 di"):
        together((0.02, CLOSED), (after, lost), (0.0, None), (0.03, CLOSED))


@pytest.mark.parametrize("failure", [CLOSED, FULL])
def test_a_rank_that_raised_is_the_reason_where_all_live(monkeypatch: pytest.MonkeyPatch, failure: RlsysError) -> None:
    with pytest.raises(type(failure), match=str(failure)):
        together((0.0, failure), (0.01, CLOSED), (0.0, 1))
    monkeypatch.setattr(learner_group, "_NEWS_SECONDS", 0.05)
    with pytest.raises(type(failure), match=str(failure)):
        together((0.0, failure), (0.01, CLOSED), (0.0, None))


def test_ranks_of_which_one_dies_as_they_start_are_all_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Starting:
        def __init__(self, failure: ActorError | None) -> None:
            self.failure, self.killed = failure, False

        async def call(self, method: str, **_: Any) -> Any:
            if method == "start":
                await answer(0.01, self.failure)
            return ("127.0.0.1", 20_000)

        def kill(self) -> None:
            self.killed = True

    ranks = [Starting(CLOSED), Starting(DIED), Starting(None)]
    monkeypatch.setattr(learner_group.cluster, "place", lambda *_, **__: ranks)
    config: Any = SimpleNamespace(learners=LearnersConfig(count=3), cluster=SimpleNamespace(call_seconds=1.0))
    with pytest.raises(LearnerLostError, match="learner rank 1 died"):
        asyncio.run(
            LearnerGroup.start(config, "nowhere", optimizer=OptimizerConfig(), total_steps=1, loss=lambda _: None)
        )
    assert [rank.killed for rank in ranks] == [True] * 3
