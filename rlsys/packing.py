"""From rollouts to micro-batches: one token axis, no padding, shared prompts once, ranks balanced by tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlsys.types import Rollout, TrainBatch

_CHUNKS_PER_RANK = 4
"""Siblings that share a prompt are parted only as far as this many even pieces for each rank ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward's data: S segments end to end on one axis of T tokens, N of which train.

    A segment is a whole sequence, a prompt that several sequences share, or what one of these wrote after it.

    `tokens` and `positions` [T]; `boundaries` [S+1] where segments begin and end; `prefixes` [S] the earlier segment
    that each continues, -1 for none; `targets` [N] indices of the trained tokens (never the first of a sequence) and
    `sources` [N] of the tokens before them; `advantages`, `rollout_logprobs` and `weights` (of the tokens' losses) [N];
    `sequences` [N] numbers the sequences from 0.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    boundaries: NDArray[np.int32]
    prefixes: NDArray[np.int32]
    targets: NDArray[np.int64]
    sources: NDArray[np.int64]
    advantages: NDArray[np.float32]
    rollout_logprobs: NDArray[np.float32]
    weights: NDArray[np.float32]
    sequences: NDArray[np.int64]


class _Family(NamedTuple):
    """Sequences (by index) with one prompt of `prompt` tokens; 0 where nothing is shared."""

    prompt: int
    members: list[int]


class _Segment(NamedTuple):
    """Tokens `begin` to `end` of one sequence, behind segment `prefix`."""

    member: int
    begin: int
    end: int
    prefix: int


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
    """Lay these rollouts of the batch end to end, prompts that are the same only once."""
    segments: list[_Segment] = []
    for family in _families(batch.rollouts, indices):
        shared = family.prompt
        if shared:
            segments.append(_Segment(family.members[0], 0, shared, -1))
        prefix = len(segments) - 1 if shared else -1
        for member in family.members:
            if len(batch.rollouts[member]) > shared:
                segments.append(_Segment(member, shared, len(batch.rollouts[member]), prefix))
    boundaries = np.concatenate([[0], np.cumsum([s.end - s.begin for s in segments])]).astype(np.int32)

    def joined(parts: Iterable[NDArray[Any]], dtype: type) -> NDArray[Any]:
        whole: NDArray[Any] = np.concatenate([*parts, np.zeros(0, dtype)])
        return whole.astype(dtype, copy=False)

    def cut(arrays: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
        return joined((arrays[s.member][s.begin : s.end] for s in segments), dtype)

    def repeated(values: Sequence[float] | Mapping[int, int], dtype: type) -> NDArray[Any]:
        return joined((np.full(s.end - s.begin, values[s.member]) for s in segments), dtype)

    rollouts = batch.rollouts
    positions = joined((np.arange(s.begin, s.end) for s in segments), np.int32)
    trained = cut([rollout.loss_mask for rollout in rollouts], np.bool_)
    trained = trained & (positions > 0)  # nothing is before the first token of a sequence to predict it from
    # The token before is the one to the left, but for the first of a segment that continues another.
    before = np.arange(-1, len(positions) - 1)
    for index, segment in enumerate(segments):
        if segment.prefix >= 0:
            before[boundaries[index]] = boundaries[segment.prefix + 1] - 1
    return MicroBatch(
        tokens=cut([rollout.tokens for rollout in rollouts], np.int32),
        positions=positions,
        boundaries=boundaries,
        prefixes=np.array([s.prefix for s in segments], dtype=np.int32),
        targets=np.flatnonzero(trained),
        sources=before[trained],
        advantages=cut(batch.advantages, np.float32)[trained],
        rollout_logprobs=cut([rollout.logprobs for rollout in rollouts], np.float32)[trained],
        weights=repeated(batch.weights, np.float32)[trained],
        sequences=repeated({member: number for number, member in enumerate(indices)}, np.int64)[trained],
    )


def shard(batch: TrainBatch, *, num_ranks: int, max_tokens: int) -> list[list[MicroBatch]]:
    """The batch as one list of micro-batches for each rank; siblings stay together, so that they share their prompt."""
    families = _families(batch.rollouts, range(len(batch.rollouts)))
    total = sum(_cost(batch, family) for family in families)
    limit = min(max_tokens, total // (_CHUNKS_PER_RANK * num_ranks))
    chunks = [chunk for family in families for chunk in _parted(batch, family, limit)]
    costs = [_cost(batch, chunk) for chunk in chunks]
    plan = assign(costs, num_ranks=num_ranks, max_tokens=max_tokens)
    return [
        [pack(batch, [member for index in micro for member in chunks[index].members]) for micro in rank]
        for rank in plan
    ]


def _families(rollouts: Sequence[Rollout], indices: Iterable[int]) -> list[_Family]:
    """The sequences by prompt (all before the first trained token), in the order of their first ones."""
    found: dict[bytes | int, _Family] = {}
    for index in indices:
        mask = rollouts[index].loss_mask
        prompt = int(mask.argmax()) if mask.any() else len(mask)
        # Without a prompt there is nothing to share: such a sequence is a family of its own.
        key = rollouts[index].tokens[:prompt].tobytes() if prompt else index
        found.setdefault(key, _Family(prompt, [])).members.append(index)
    return [family if len(family.members) > 1 else _Family(0, family.members) for family in found.values()]


def _cost(batch: TrainBatch, family: _Family) -> int:
    """Tokens that the family takes in one pack."""
    return family.prompt + sum(len(batch.rollouts[member]) - family.prompt for member in family.members)


def _parted(batch: TrainBatch, family: _Family, limit: int) -> list[_Family]:
    """The family in as few even parts as keep within the limit, where more than one sequence allows it."""
    room = max(1, limit - family.prompt)
    own = _cost(batch, family) - family.prompt
    parts = min(len(family.members), max(1, -(-own // room)))
    while True:
        members = [family.members[i::parts] for i in range(parts)]
        result = [_Family(family.prompt if len(part) > 1 else 0, part) for part in members]
        if all(len(part.members) == 1 or _cost(batch, part) <= limit for part in result):
            return result
        parts += 1
