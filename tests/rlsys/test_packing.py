"""Packing: nothing is lost, doubled or mixed up, and the ranks stay level."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.packing import MicroBatch, assign, pack, shard, unpack
from rlsys.types import Rollout, TrainBatch

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

lengths_of = st.lists(st.integers(1, 60), min_size=0, max_size=40)
ranks = st.integers(1, 5)
budgets = st.integers(1, 200)


def batch_of(lengths: list[int], seed: int = 0) -> TrainBatch:
    """Rollouts whose every number tells where it came from; masks are random."""
    random = np.random.default_rng(seed)
    rollouts = tuple(
        Rollout(
            tokens=np.arange(length, dtype=np.int32) + 1000 * index,
            loss_mask=random.random(length) < 0.6,
            logprobs=-np.arange(length, dtype=np.float32) - 100 * index,
            versions=np.zeros(length, dtype=np.int32),
        )
        for index, length in enumerate(lengths)
    )
    advantages = tuple(np.arange(length, dtype=np.float32) + 0.5 + 100 * i for i, length in enumerate(lengths))
    return TrainBatch(rollouts=rollouts, advantages=advantages, weights=(1.0,) * len(rollouts), num_tokens=1)


def loads(plan: list[list[list[int]]], lengths: list[int]) -> list[int]:
    return [sum(lengths[index] for bin_ in rank for index in bin_) for rank in plan]


@PATIENT
@given(lengths_of, ranks, budgets)
def test_every_rollout_is_in_exactly_one_micro_batch(lengths: list[int], num_ranks: int, budget: int) -> None:
    plan = assign(lengths, num_ranks=num_ranks, max_tokens=budget)
    assert sorted(index for rank in plan for bin_ in rank for index in bin_) == list(range(len(lengths)))


@PATIENT
@given(lengths_of, ranks, budgets)
def test_every_rank_has_the_same_number_of_micro_batches(lengths: list[int], num_ranks: int, budget: int) -> None:
    plan = assign(lengths, num_ranks=num_ranks, max_tokens=budget)
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1


@PATIENT
@given(lengths_of, ranks, budgets)
def test_the_budget_holds_but_for_a_sequence_that_is_longer(lengths: list[int], num_ranks: int, budget: int) -> None:
    for rank in assign(lengths, num_ranks=num_ranks, max_tokens=budget):
        for bin_ in rank:
            assert len(bin_) <= 1 or sum(lengths[index] for index in bin_) <= budget


@PATIENT
@given(lengths_of, ranks, budgets)
def test_no_two_ranks_differ_by_more_than_the_longest_sequence(lengths: list[int], num_ranks: int, budget: int) -> None:
    # Longest first to the least loaded leaves bins at most one sequence apart; dealing them back and forth keeps that.
    found = loads(assign(lengths, num_ranks=num_ranks, max_tokens=budget), lengths)
    assert max(found) - min(found) <= max(lengths, default=0)


@PATIENT
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_one_rank_gets_few_micro_batches(lengths: list[int], budget: int) -> None:
    # Where a bin of two or more overflows, every bin is more than half full: twice the least number is always enough.
    (rank,) = assign(lengths, num_ranks=1, max_tokens=budget)
    assert len(rank) <= max(2 * -(-sum(lengths) // budget), 1)


def test_a_balanced_batch_worked_by_hand() -> None:
    # 7 6 5 4 3 2 over two ranks: 7 | 6, then 5 to the 6, 4 to the 7, 3 to 11 or 11, 2 to the other: 14 and 13.
    plan = assign([2, 3, 4, 5, 6, 7], num_ranks=2, max_tokens=100)
    assert sorted(loads(plan, [2, 3, 4, 5, 6, 7])) == [13, 14]
    assert [len(rank) for rank in plan] == [1, 1]


def test_fewer_rollouts_than_ranks_leave_empty_micro_batches() -> None:
    shares = shard(batch_of([5]), num_ranks=3, max_tokens=8)
    sizes = sorted(len(rank[0].tokens) for rank in shares)
    assert sizes == [0, 0, 5]


def test_an_empty_micro_batch_has_empty_arrays_of_the_right_kinds() -> None:
    micro = pack(batch_of([3]), [])
    assert [len(micro.tokens), len(micro.positions), len(micro.targets)] == [0, 0, 0]
    assert [len(micro.advantages), len(micro.rollout_logprobs)] == [0, 0]
    assert micro.boundaries.tolist() == [0]
    assert (micro.tokens.dtype, micro.advantages.dtype) == (np.int32, np.float32)
    assert (len(micro.weights), len(micro.sequences)) == (0, 0)
    assert (micro.targets.dtype, micro.rollout_logprobs.dtype) == (np.int64, np.float32)


def unpacked(micro: MicroBatch) -> list[np.ndarray]:
    return [micro.tokens[begin:end] for begin, end in zip(micro.boundaries[:-1], micro.boundaries[1:], strict=True)]


@PATIENT
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 60), st.integers(0, 9))
def test_packing_and_unpacking_is_the_identity(lengths: list[int], num_ranks: int, budget: int, seed: int) -> None:
    batch = batch_of(lengths, seed)
    seen = []
    for rank in shard(batch, num_ranks=num_ranks, max_tokens=budget):
        for micro in rank:
            for begin, tokens in zip(micro.boundaries[:-1].tolist(), unpacked(micro), strict=True):
                index = int(tokens[0]) // 1000
                rollout = batch.rollouts[index]
                seen.append(index)
                end = begin + len(tokens)
                assert np.array_equal(tokens, rollout.tokens)
                assert np.array_equal(micro.positions[begin:end], np.arange(len(tokens)))
                here = (micro.targets >= begin) & (micro.targets < end)
                trained = micro.targets[here] - begin
                expected = np.flatnonzero(rollout.loss_mask[1:]) + 1
                assert np.array_equal(trained, expected)
                assert np.array_equal(micro.advantages[here], batch.advantages[index][expected])
                assert np.array_equal(micro.rollout_logprobs[here], rollout.logprobs[expected])
    assert sorted(seen) == list(range(len(lengths)))


@PATIENT
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 9))
def test_the_first_token_of_a_sequence_is_never_a_target(lengths: list[int], seed: int) -> None:
    batch = batch_of(lengths, seed)
    everything = tuple(
        Rollout(tokens=r.tokens, loss_mask=np.ones(len(r), dtype=np.bool_), logprobs=r.logprobs, versions=r.versions)
        for r in batch.rollouts
    )
    batch = TrainBatch(rollouts=everything, advantages=batch.advantages, weights=batch.weights, num_tokens=1)
    micro = pack(batch, range(len(lengths)))
    assert not set(micro.targets.tolist()) & set(micro.boundaries.tolist())
    assert len(micro.targets) == sum(lengths) - len(lengths)


def test_packing_leaves_the_masks_of_the_batch_as_they_are() -> None:
    batch = batch_of([4])
    mask = np.ones(4, dtype=np.bool_)
    rollout = Rollout(tokens=batch.rollouts[0].tokens, loss_mask=mask, logprobs=np.zeros(4, np.float32), versions=mask)
    pack(TrainBatch(rollouts=(rollout,), advantages=batch.advantages, weights=(1.0,), num_tokens=1), [0])
    assert mask.all()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_sequence_longer_than_the_budget_is_alone_and_the_rest_is_packed(num_ranks: int) -> None:
    plan = assign([500, 3, 3, 3, 3], num_ranks=num_ranks, max_tokens=6)
    bins = [bin_ for rank in plan for bin_ in rank]
    assert [0] in bins
    assert all(len(bin_) <= 2 for bin_ in bins)


def family(prompt: list[int], *answers: list[int]) -> list[Rollout]:
    return [
        Rollout(
            tokens=np.array([*prompt, *answer], dtype=np.int32),
            loss_mask=np.arange(len(prompt) + len(answer)) >= len(prompt),
            logprobs=-np.array([*prompt, *answer], dtype=np.float32),
            versions=np.zeros(len(prompt) + len(answer), dtype=np.int32),
        )
        for answer in answers
    ]


def batch_from(rollouts: list[Rollout]) -> TrainBatch:
    advantages = tuple(rollout.tokens.astype(np.float32) for rollout in rollouts)
    return TrainBatch(
        rollouts=tuple(rollouts), advantages=advantages, weights=tuple(range(len(rollouts))), num_tokens=1
    )


def test_a_shared_prompt_is_laid_down_once_worked_by_hand() -> None:
    rollouts = [*family([1, 2, 3], [10, 11], [20]), *family([4, 5], [30])]
    micro = pack(batch_from(rollouts), [0, 1, 2])
    assert micro.tokens.tolist() == [1, 2, 3, 10, 11, 20, 4, 5, 30]
    assert micro.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert micro.boundaries.tolist() == [0, 3, 5, 6, 9]
    assert micro.prefixes.tolist() == [-1, 0, 0, -1]
    assert micro.targets.tolist() == [3, 4, 5, 8]
    assert micro.sources.tolist() == [2, 3, 2, 7]
    assert micro.advantages.tolist() == [10, 11, 20, 30]
    assert micro.rollout_logprobs.tolist() == [-10, -11, -20, -30]
    assert micro.sequences.tolist() == [0, 0, 1, 2]
    assert micro.weights.tolist() == [0, 0, 1, 2]


def test_siblings_that_wrote_nothing_leave_only_their_prompt() -> None:
    micro = pack(batch_from(family([1, 2], [], [])), [0, 1])
    assert (micro.tokens.tolist(), micro.prefixes.tolist(), micro.targets.tolist()) == ([1, 2], [-1], [])


def test_whole_groups_stay_together_and_split_between_ranks() -> None:
    rollouts = [r for g in range(8) for r in family([g] * 10, *[[100 * g + i] * 4 for i in range(8)])]
    shares = shard(batch_from(rollouts), num_ranks=2, max_tokens=10_000)
    assert [[len(micro.tokens) for micro in rank] for rank in shares] == [[4 * (10 + 8 * 4)]] * 2


def test_a_single_group_is_parted_for_the_ranks() -> None:
    shares = shard(batch_from(family([7] * 10, *[[i] * 20 for i in range(8)])), num_ranks=2, max_tokens=10_000)
    trained = [sum(len(micro.targets) for micro in rank) for rank in shares]
    assert trained == [80, 80]


answers_of = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=6)


@PATIENT
@given(st.lists(answers_of, min_size=1, max_size=6), st.integers(0, 8), ranks, budgets)
def test_nothing_is_lost_where_prompts_are_shared(
    groups: list[list[list[int]]], prompt: int, num_ranks: int, budget: int
) -> None:
    rollouts = [r for i, answers in enumerate(groups) for r in family([50 + i] * prompt, *answers)]
    found = []
    for micro in (
        micro for rank in shard(batch_from(rollouts), num_ranks=num_ranks, max_tokens=budget) for micro in rank
    ):
        assert (micro.positions[micro.targets] == micro.positions[micro.sources] + 1).all()
        pieces = unpacked(micro)
        continued = set(micro.prefixes.tolist())
        for index, (piece, prefix) in enumerate(zip(pieces, micro.prefixes.tolist(), strict=True)):
            if index not in continued:
                found.append([*(pieces[prefix].tolist() if prefix >= 0 else []), *piece.tolist()])
        units = len(pieces) - len(continued - {-1})
        assert units <= 1 or len(micro.tokens) <= budget
    written = [rollout.tokens.tolist() for rollout in rollouts if rollout.num_trained_tokens]
    assert sorted(f for f in found if f in written) == sorted(written)


@PATIENT
@given(st.lists(answers_of, min_size=1, max_size=6), st.integers(0, 8), ranks, budgets)
def test_what_was_found_for_trained_tokens_comes_back_to_its_rollout(
    groups: list[list[list[int]]], prompt: int, num_ranks: int, budget: int
) -> None:
    batch = batch_from([r for i, answers in enumerate(groups) for r in family([50 + i] * prompt, *answers)])
    micro_batches = [m for rank in shard(batch, num_ranks=num_ranks, max_tokens=budget) for m in rank]
    found = unpack(batch, micro_batches, [micro.rollout_logprobs for micro in micro_batches])
    for rollout, values in zip(batch.rollouts, found, strict=True):
        trained = rollout.loss_mask & (np.arange(len(rollout)) > 0)
        assert np.array_equal(values, np.where(trained, rollout.logprobs, 0))


@PATIENT
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=12), ranks, budgets)
def test_the_two_of_a_pair_are_never_parted(pairs: list[tuple[int, int]], num_ranks: int, budget: int) -> None:
    # Three pairs each of one prompt, so that families have more than one pair.
    rollouts = [
        rollout
        for number, (chosen, rejected) in enumerate(pairs)
        for rollout in family([90 + number // 3] * 4, [1] * chosen, [2] * rejected)
    ]
    batch = replace(batch_from(rollouts), unit=2)
    seen = []
    for micro in (m for rank in shard(batch, num_ranks=num_ranks, max_tokens=budget) for m in rank):
        members = micro.members.tolist()
        assert members[0::2] == [member - 1 for member in members[1::2]]
        assert all(member % 2 == 0 for member in members[0::2])
        seen += members
    assert sorted(seen) == list(range(len(rollouts)))


def test_a_pair_with_two_prompts_is_refused() -> None:
    batch = replace(batch_from([*family([1, 2], [3]), *family([1, 9], [3])]), unit=2)
    with pytest.raises(ValueError, match="rollout 0 and the 1 that belong to it have different prompts"):
        shard(batch, num_ranks=1, max_tokens=100)


def test_a_batch_of_pairs_has_an_even_number_of_rollouts() -> None:
    with pytest.raises(ValueError, match="3 rollouts are no whole number of units of 2"):
        replace(batch_from(family([1, 2], [3], [4], [5])), unit=2)
