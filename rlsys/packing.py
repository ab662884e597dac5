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

_ATTENTION_LENGTH = 24_576
"""Length at which the attention of a sequence costs as much as all else: 12 times a hidden size of 2048.

A layer of width h has about 12 h^2 weights, with 2 operations on each for a token; causal attention adds 2 h L^2 for L
tokens. So a sequence costs as `L + L^2 / 12 h`. Another width makes the ranks a little less level, and nothing else.
"""

_LEVEL_ENOUGH = 1e-5
"""A round of micro-batches is level when its dearest is dearer than the mean by at most this share."""

_LEAST_GAIN = 1e-7
"""An exchange helps by at least this share: sums of floats are not exact, and rounding alone could go in circles."""

_TRIED_OF_A_BIN = 64
"""Sequences of one micro-batch that are tried for an exchange: this squared, times ranks, is the work of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward's data: S segments end to end on one axis of T tokens, N of which train.

    A segment is a whole sequence, a prompt that several sequences share, or what one of these wrote after it.

    `tokens` and `positions` [T]; `boundaries` [S+1] where segments begin and end; `prefixes` [S] the earlier segment
    that each continues, -1 for none; `targets` [N] indices of the trained tokens (never the first of a sequence) and
    `sources` [N] of the tokens before them; `advantages`, `rollout_logprobs`, `proximal_logprobs` (where the batch has
    them) and `weights` (of the tokens' losses) [N]; `sequences` [N] numbers the sequences from 0, in the order of
    `members`, their places in the batch.
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
    members: NDArray[np.int64]
    proximal_logprobs: NDArray[np.float32] | None = None


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


def assign(
    lengths: Sequence[int], *, num_ranks: int, max_tokens: int, costs: Sequence[float] | None = None
) -> list[list[list[int]]]:
    """Indices of sequences by rank and micro-batch, level in `costs` (in any unit; the lengths where none are given).

    Every rank gets the same number of micro-batches (some may be empty), because sharded ranks must go through the same
    collectives; each holds at most `max_tokens` unless one sequence is longer. Ranks wait for one another in every
    round, so each round is levelled by itself: dearest first to the cheapest bin with room, bins of like cost in one
    round, then exchanges within it. Rounds meet by differencing, the dearest bin to the rank that has least so far.
    """
    tokens, prices = np.asarray(lengths, dtype=np.int64), np.asarray(lengths if costs is None else costs, dtype=float)
    alone = int((2 * tokens > max_tokens).sum())  # no two of these fit together
    num_rounds = max(1, -(-int(tokens.sum()) // (num_ranks * max_tokens)), -(-alone // num_ranks))
    while True:
        bins, left_over = _filled(tokens, prices, num_ranks * num_rounds, max_tokens)
        if not left_over:
            break
        num_rounds += -(-left_over // (num_ranks * max_tokens))
    bins.sort(key=lambda held: -prices[held].sum())
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = np.zeros(num_ranks)
    for first in range(0, len(bins), num_ranks):
        chosen = bins[first : first + num_ranks]
        _level(chosen, tokens, prices, max_tokens)
        chosen.sort(key=lambda held: -prices[held].sum())
        for rank, held in zip(np.argsort(totals, kind="stable").tolist(), chosen, strict=True):
            ranks[rank].append(held)
            totals[rank] += prices[held].sum()
    return ranks


def _filled(
    tokens: NDArray[np.int64], prices: NDArray[np.float64], num_bins: int, max_tokens: int
) -> tuple[list[list[int]], int]:
    """The sequences in bins, dearest first to the cheapest with room, and the tokens of those that found none."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    fill, loads = np.zeros(num_bins, dtype=np.int64), np.zeros(num_bins)
    left_over = 0
    for index in np.argsort(-prices, kind="stable").tolist():
        room = (fill + tokens[index] <= max_tokens) | (fill == 0)
        target = int(np.where(room, loads, np.inf).argmin())
        if not room[target]:
            left_over += max(1, int(tokens[index]))
            continue
        bins[target].append(index)
        fill[target] += tokens[index]
        loads[target] += prices[index]
    return bins, left_over


def _level(bins: list[list[int]], tokens: NDArray[np.int64], prices: NDArray[np.float64], max_tokens: int) -> None:
    """Give a sequence of the dearest bin to another, or swap it for one there, as long as that helps the dearest.

    Of every bin only the last ones are tried: those that were put in last are the cheapest, which level best.
    """
    tokens, prices = np.append(tokens, 0), np.append(prices, 0.0)  # index -1 is no sequence
    fill, loads = np.array([tokens[held].sum() for held in bins]), np.array([prices[held].sum() for held in bins])
    while loads.max() > loads.mean() * (1 + _LEVEL_ENOUGH):
        top = int(loads.argmax())
        tried = [(o, i) for o, held in enumerate(bins) if o != top for i in (-1, *held[-_TRIED_OF_A_BIN:])]
        other, theirs = np.array(tried).T
        mine = np.array(bins[top][-_TRIED_OF_A_BIN:])
        dearer, longer = (array[mine][:, None] - array[theirs] for array in (prices, tokens))
        after = np.maximum(loads[top] - dearer, loads[other] + dearer)
        after[(fill[top] - longer > max_tokens) | (fill[other] + longer > max_tokens)] = np.inf
        row, column = divmod(int(after.argmin()), len(theirs))
        if not after[row, column] < loads[top] * (1 - _LEAST_GAIN):
            return
        given, taken, taker = int(mine[row]), int(theirs[column]), int(other[column])
        for held, loses, gains in ((bins[top], given, taken), (bins[taker], taken, given)):
            held[:] = [index for index in (*held, gains) if index not in (loses, -1)]
            held.sort(key=lambda index: -prices[index])
        for which in (top, taker):
            fill[which], loads[which] = tokens[bins[which]].sum(), prices[bins[which]].sum()


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

    rollouts, proximal = batch.rollouts, batch.proximal_logprobs
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
        members=np.array(indices, dtype=np.int64),
        proximal_logprobs=None if proximal is None else cut(proximal, np.float32)[trained],
    )


def shard(batch: TrainBatch, *, num_ranks: int, max_tokens: int) -> list[list[MicroBatch]]:
    """The batch as one list of micro-batches for each rank; siblings stay together, so that they share their prompt."""
    families = _families(batch.rollouts, range(len(batch.rollouts)))
    _check_units(families, batch.unit)
    total = sum(_cost(batch, family) for family in families)
    limit = min(max_tokens, total // (_CHUNKS_PER_RANK * num_ranks))
    chunks = [chunk for family in families for chunk in _parted(batch, family, limit)]
    costs = [_cost(batch, chunk) for chunk in chunks]
    prices = [_price(batch, chunk) for chunk in chunks]
    plan = assign(costs, num_ranks=num_ranks, max_tokens=max_tokens, costs=prices)
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


def unpack(batch: TrainBatch, micro_batches: Iterable[MicroBatch], found: Iterable[NDArray[Any]]) -> list[NDArray[Any]]:
    """What was found for the trained tokens of micro-batches, as one array [T] for each rollout, 0 elsewhere."""
    result = [np.zeros(len(rollout), np.float32) for rollout in batch.rollouts]
    for micro, values in zip(micro_batches, found, strict=True):
        for number, member in enumerate(micro.members):
            mask = batch.rollouts[member].loss_mask.copy()
            mask[:1] = False  # nothing is before it to predict it from
            result[member][mask] = values[micro.sequences == number]
    return result


def _cost(batch: TrainBatch, family: _Family) -> int:
    """Tokens that the family takes in one pack."""
    return family.prompt + sum(len(batch.rollouts[member]) - family.prompt for member in family.members)


def _price(batch: TrainBatch, family: _Family) -> float:
    """What the family takes to compute, in tokens without attention: `L + L^2 / _ATTENTION_LENGTH` for one sequence."""
    prompt = family.prompt**2
    pairs = prompt + sum(len(batch.rollouts[member]) ** 2 - prompt for member in family.members)
    return _cost(batch, family) + pairs / _ATTENTION_LENGTH


def _parted(batch: TrainBatch, family: _Family, limit: int) -> list[_Family]:
    """The family in as few even parts as keep within the limit, where more than one sequence allows it."""
    room = max(1, limit - family.prompt)
    own = _cost(batch, family) - family.prompt
    units = [family.members[i : i + batch.unit] for i in range(0, len(family.members), batch.unit)]
    parts = min(len(units), max(1, -(-own // room)))
    while True:
        members = [[member for unit in units[i::parts] for member in unit] for i in range(parts)]
        result = [_Family(family.prompt if len(part) > 1 else 0, part) for part in members]
        if all(len(part.members) == batch.unit or _cost(batch, part) <= limit for part in result):
            return result
        parts += 1


def _check_units(families: Iterable[_Family], unit: int) -> None:
    for family in families:
        for first in range(0, len(family.members) if unit > 1 else 0, unit):
            together = family.members[first : first + unit]
            if together != list(range(together[0] // unit * unit, together[0] // unit * unit + unit)):
                raise ValueError(f"rollout {together[0]} and the {unit - 1} that belong to it have different prompts")
