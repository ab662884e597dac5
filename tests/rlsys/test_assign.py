"""Placement on ranks: level in cost, round by round, whatever the costs are."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.packing import assign, shard
from rlsys.types import Rollout, TrainBatch

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

priced = st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1e6)), max_size=40)
lengths_of = st.lists(st.integers(1, 60), max_size=40)
ranks = st.integers(1, 5)
budgets = st.integers(1, 200)

Plan = list[list[list[int]]]


def loads(plan: Plan, costs: Sequence[float]) -> list[list[float]]:
    """What every micro-batch costs, by round and rank."""
    return [[sum(costs[index] for index in held) for held in round_] for round_ in zip(*plan, strict=True)]


def totals(plan: Plan, costs: Sequence[float]) -> list[float]:
    return [sum(costs[index] for held in rank for index in held) for rank in plan]


def test_an_exchange_repairs_what_longest_first_does_badly_worked_by_hand() -> None:
    # 3 | 3, 2 to each, and the last 2 makes 7 | 5. A 3 for a 2 makes 6 | 6, which only 3 3 | 2 2 2 does.
    plan = assign([3, 3, 2, 2, 2], num_ranks=2, max_tokens=100)
    assert sorted(sorted(held) for rank in plan for held in rank) == [[0, 1], [2, 3, 4]]


def test_rounds_meet_so_that_the_ranks_are_level_worked_by_hand() -> None:
    # 28 tokens in bins of 12 on two ranks are two rounds: 6 1 | 6 | 5 3 | 4 3, by falling load 8 7 and 7 6. The rank
    # with 8 gets the 6 of the second round.
    lengths = [6, 6, 5, 4, 3, 3, 1]
    plan = assign(lengths, num_ranks=2, max_tokens=12)
    assert totals(plan, lengths) == [14, 14]
    assert loads(plan, lengths) == [[8, 7], [6, 7]]


def test_the_costs_are_levelled_and_not_the_lengths() -> None:
    # By length 4 | 1 1 1 1; the long one costs as much as two short ones, so one of these joins it: 3 | 3 of 6.
    lengths, costs = [4, 1, 1, 1, 1], [2.0, 1.0, 1.0, 1.0, 1.0]
    by_length = assign(lengths, num_ranks=2, max_tokens=100)
    by_cost = assign(lengths, num_ranks=2, max_tokens=100, costs=costs)
    assert totals(by_length, lengths) == [4, 4]
    assert totals(by_cost, costs) == [3, 3]


def test_costs_in_another_unit_place_the_same() -> None:
    lengths = [int(length) for length in np.random.default_rng(0).lognormal(6, 1, 50)]
    plans = [
        assign(lengths, num_ranks=4, max_tokens=4096, costs=costs)
        for costs in (None, lengths, [4 * length for length in lengths], [length / 1024 for length in lengths])
    ]
    assert plans[0] == plans[1] == plans[2] == plans[3]


@PATIENT
@given(priced, ranks, budgets)
def test_whatever_the_costs_are_nothing_is_lost_and_the_budget_holds(
    sequences: list[tuple[int, float]], num_ranks: int, budget: int
) -> None:
    lengths, costs = [length for length, _ in sequences], [cost for _, cost in sequences]
    plan = assign(lengths, num_ranks=num_ranks, max_tokens=budget, costs=costs)
    assert sorted(index for rank in plan for held in rank for index in held) == list(range(len(lengths)))
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1
    assert all(len(held) <= 1 or sum(lengths[i] for i in held) <= budget for rank in plan for held in rank)


@PATIENT
@given(lengths_of, ranks, budgets)
def test_what_ranks_wait_for_one_another_in_all_rounds_is_at_most_the_longest_sequence(
    lengths: list[int], num_ranks: int, budget: int
) -> None:
    # Bins differ by at most one sequence; sorted, the spreads of the rounds add up to at most that of all bins.
    rounds = loads(assign(lengths, num_ranks=num_ranks, max_tokens=budget), lengths)
    assert sum(max(round_) - min(round_) for round_ in rounds) <= max(lengths, default=0)


@PATIENT
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(2, 5))
def test_no_exchange_is_left_that_would_help_the_dearest_rank(lengths: list[int], num_ranks: int) -> None:
    plan = assign(lengths, num_ranks=num_ranks, max_tokens=10_000)
    held = [rank[0] for rank in plan]
    found = totals(plan, lengths)
    top = found.index(max(found))
    for other in (rank for rank in range(num_ranks) if rank != top):
        for given_ in held[top]:
            for taken in (0, *(lengths[index] for index in held[other])):
                moved = lengths[given_] - taken
                assert max(found[top] - moved, found[other] + moved) >= found[top] or found[top] <= np.mean(found) * (
                    1 + 1e-5
                )


@pytest.mark.parametrize("num_ranks", [4, 8, 16, 32, 64])
def test_lognormal_lengths_are_level_to_a_thousandth(num_ranks: int) -> None:
    for seed in range(3):
        drawn = np.random.default_rng(seed).lognormal(np.log(2500), 0.9, 512)
        lengths = np.clip(drawn, 64, 16_384).astype(int).tolist()
        found = totals(assign(lengths, num_ranks=num_ranks, max_tokens=10**9), lengths)
        assert max(found) / np.mean(found) < 1.001


def test_sequences_of_which_two_fit_together_are_paired_however_much_room_is_left() -> None:
    # 16 of 8,300 in 24,000: by tokens three micro-batches a rank would do, but only two sequences fit into one.
    plan = assign([8300] * 16, num_ranks=2, max_tokens=24_000)
    assert [[len(held) for held in rank] for rank in plan] == [[2] * 4] * 2


def test_sequences_over_half_of_the_budget_are_alone() -> None:
    plan = assign([51] * 6, num_ranks=2, max_tokens=100)
    assert [[len(held) for held in rank] for rank in plan] == [[1] * 3] * 2


@pytest.mark.parametrize("costs", [None, [], [0.0] * 0])
def test_no_sequence_is_one_empty_micro_batch_for_each_rank(costs: list[float] | None) -> None:
    assert assign([], num_ranks=3, max_tokens=10, costs=costs) == [[[]], [[]], [[]]]


def test_sequences_that_cost_nothing_are_placed_too() -> None:
    plan = assign([5, 5, 5, 5], num_ranks=2, max_tokens=10, costs=[0.0] * 4)
    assert sorted(index for rank in plan for held in rank for index in held) == [0, 1, 2, 3]
    assert all(sum(5 for _ in held) <= 10 for rank in plan for held in rank)


def test_the_dearest_rounds_come_first() -> None:
    lengths = [int(length) for length in np.random.default_rng(1).integers(1, 900, 60)]
    rounds = loads(assign(lengths, num_ranks=3, max_tokens=1000), lengths)
    assert [sum(round_) for round_ in rounds] == sorted((sum(round_) for round_ in rounds), reverse=True)


def test_the_attention_of_a_long_sequence_counts_when_ranks_are_filled_worked_by_hand() -> None:
    # By tokens 24,576 + 8,192 | 4 x 8,192 is level. With L^2 / 24,576 the long one costs 49,152 and a short one 10,923:
    # 60,075 | 43,691 then, and 49,152 | 54,613 with the long one alone.
    lengths = [24_576] + [8_192] * 5
    rollouts = tuple(
        Rollout(
            tokens=np.full(length, index, np.int32),
            loss_mask=np.arange(length) > 0,
            logprobs=np.zeros(length, np.float32),
            versions=np.zeros(length, np.int32),
        )
        for index, length in enumerate(lengths)
    )
    batch = TrainBatch(
        rollouts=rollouts,
        advantages=tuple(np.zeros(length, np.float32) for length in lengths),
        weights=(1.0,) * 6,
        num_tokens=1,
    )
    shares = shard(batch, num_ranks=2, max_tokens=100_000)
    assert sorted(len(micro.tokens) for rank in shares for micro in rank) == [24_576, 5 * 8_192]
