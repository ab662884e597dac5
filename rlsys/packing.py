"""From rollouts to micro-batches: one token axis, no padding, ranks balanced by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.types import TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward's data: S sequences end to end on one axis of T tokens, N of which train.

    `tokens` and `positions` [T]; `boundaries` [S+1] where sequences begin and end; `targets` [N] indices of the trained
    tokens (never the first of a sequence); `advantages` and `rollout_logprobs` [N].
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    boundaries: NDArray[np.int32]
    targets: NDArray[np.int64]
    advantages: NDArray[np.float32]
    rollout_logprobs: NDArray[np.float32]


def assign(lengths: Sequence[int], *, num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Indices of sequences by rank and micro-batch.

    Longest first to the least loaded bin. Every rank gets the same number of micro-batches (some may be empty), because
    sharded ranks must go through the same collectives; each holds at most `max_tokens` unless one sequence is longer.
    """
    num_micro = max(1, -(-sum(lengths) // (num_ranks * max_tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(num_ranks * num_micro)]
        loads = np.zeros(len(bins), dtype=np.int64)
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            target = int(loads.argmin())
            bins[target].append(index)
            loads[target] += lengths[index]
        crowded = [b for b, load in zip(bins, loads, strict=True) if load > max_tokens and len(b) > 1]
        if not crowded:
            break
        num_micro += 1
    # Deal the bins to ranks by falling load, back and forth, so that the ranks' totals stay level.
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    order = np.argsort(-loads, kind="stable")
    for position, bin_index in enumerate(order):
        turn, offset = divmod(position, num_ranks)
        ranks[offset if turn % 2 == 0 else num_ranks - 1 - offset].append(bins[int(bin_index)])
    return ranks


def pack(batch: TrainBatch, indices: Sequence[int]) -> MicroBatch:
    """Lay these rollouts of the batch end to end."""
    rollouts = [batch.rollouts[i] for i in indices]
    lengths = [len(rollout) for rollout in rollouts]
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
        return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)

    masks = [rollout.loss_mask.copy() for rollout in rollouts]
    for mask in masks:
        mask[:1] = False  # the first token of a sequence has nothing before it to be predicted from
    mask = joined(masks, np.bool_)
    return MicroBatch(
        tokens=joined([rollout.tokens for rollout in rollouts], np.int32),
        positions=joined([np.arange(length) for length in lengths], np.int32),
        boundaries=boundaries,
        targets=np.flatnonzero(mask),
        advantages=joined([batch.advantages[i] for i in indices], np.float32)[mask],
        rollout_logprobs=joined([rollout.logprobs for rollout in rollouts], np.float32)[mask],
    )


def shard(batch: TrainBatch, *, num_ranks: int, max_tokens: int) -> list[list[MicroBatch]]:
    """The batch as one list of micro-batches for each rank."""
    lengths = [len(rollout) for rollout in batch.rollouts]
    plan = assign(lengths, num_ranks=num_ranks, max_tokens=max_tokens)
    return [[pack(batch, indices) for indices in rank] for rank in plan]
