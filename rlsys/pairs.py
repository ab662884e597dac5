"""Preference data on the learner: pairs as a batch of rollouts, and losses over whole sequences as losses over tokens.

The learner adds up one number for each trained token, times its weight, over the whole batch. So a loss over a pair is
spread evenly over the pair's tokens, and every token of a batch of P pairs weighs `tokens / P`: the sum divided by the
batch's tokens is then the mean over pairs, whatever the micro-batches and ranks are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.demonstrations import Demonstration, Recorded, Segments
from rlsys.errors import DataError
from rlsys.losses import LossInputs, LossOutputs
from rlsys.preference import (
    KtoInputs,
    PreferenceInputs,
    PreferenceOutputs,
    RewardPairs,
    bradley_terry,
    kto,
    sequence_sums,
)
from rlsys.types import Problem, Rollout, TrainBatch

PairLoss = Callable[[PreferenceInputs], PreferenceOutputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two answers to one problem, each as the segments of a `Demonstration`; `margin` is how much better the first is.

    Where an answer was generated, `chosen_recorded` and `rejected_recorded` hold the token ids, prompt included.
    `complete` says of both whether they came to their end, or were cut off.

    Raises:
        DataError: both are the same text, so there is nothing to prefer.
    """

    problem: Problem
    chosen: Segments
    rejected: Segments
    margin: float = 0.0
    chosen_recorded: Recorded | None = None
    rejected_recorded: Recorded | None = None
    complete: tuple[bool, bool] = (True, True)

    def __post_init__(self) -> None:
        texts = ["".join(text for text, _ in segments) for segments in (self.chosen, self.rejected)]
        if texts[0] == texts[1]:
            raise DataError(f"problem {self.problem.id!r}: chosen and rejected are the same text {texts[0][:80]!r}")
        for name, segments in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not any(trained and text for text, trained in segments):
                raise DataError(f"problem {self.problem.id!r}: nothing of the {name} answer trains")
        if not np.isfinite(self.margin):
            raise DataError(f"problem {self.problem.id!r}: the margin {self.margin} is not finite")

    @property
    def demonstrations(self) -> tuple[Demonstration, Demonstration]:
        """The chosen and the rejected answer."""
        return (
            Demonstration(
                problem=self.problem, segments=self.chosen, recorded=self.chosen_recorded, complete=self.complete[0]
            ),
            Demonstration(
                problem=self.problem, segments=self.rejected, recorded=self.rejected_recorded, complete=self.complete[1]
            ),
        )


class PairList(list[PreferencePair]):
    """Pairs that know what their source left out: `counts` by a name such as `removed/equal_text`."""

    def __init__(self, pairs: Iterable[PreferencePair] = (), *, counts: Mapping[str, int] | None = None) -> None:
        super().__init__(pairs)
        self.counts = dict(counts or {})


def pair_batch(pairs: Sequence[tuple[Rollout, Rollout]], *, margins: Sequence[float] | None = None) -> TrainBatch:
    """A batch of P pairs (chosen, rejected), never parted; a pair's margin stands in its advantages."""
    margins = margins or [0.0] * len(pairs)
    rollouts = [rollout for pair in pairs for rollout in pair]
    return _batch(rollouts, [margin for margin in margins for _ in range(2)], rows=len(pairs), unit=2)


def labelled_batch(rollouts: Sequence[Rollout], labels: Sequence[bool]) -> TrainBatch:
    """A batch of single answers, desirable or not (KTO): advantage 1 or -1."""
    return _batch(rollouts, [1.0 if label else -1.0 for label in labels], rows=len(rollouts), unit=1)


def _batch(rollouts: Sequence[Rollout], numbers: Sequence[float], *, rows: int, unit: int) -> TrainBatch:
    num_tokens = sum(rollout.num_trained_tokens for rollout in rollouts)
    return TrainBatch(
        rollouts=tuple(rollouts),
        advantages=tuple(
            np.full(len(rollout), number, np.float32) for rollout, number in zip(rollouts, numbers, strict=True)
        ),
        weights=(num_tokens / rows,) * len(rollouts),
        num_tokens=num_tokens,
        unit=unit,
    )


def with_logprobs(rollout: Rollout, logprobs: NDArray[np.float32]) -> Rollout:
    """The rollout with the reference's log-probs [T] in the place of those that an engine would have recorded."""
    return replace(rollout, logprobs=logprobs)


def with_end(rollout: Rollout) -> Rollout:
    """The rollout with its last token once more, trained: a scorer is read before each trained token, and must be read
    behind the last one."""
    return replace(
        rollout,
        tokens=np.append(rollout.tokens, rollout.tokens[-1:]),
        loss_mask=np.append(rollout.loss_mask, True),
        logprobs=np.append(rollout.logprobs, np.float32(0)),
        versions=np.append(rollout.versions, np.int32(-1)),
    )


def over_pairs(
    inputs: LossInputs,
    *,
    loss: PairLoss,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    nll_coef: float = 0.0,
) -> LossOutputs:
    """A loss over pairs as one over tokens; the rollouts' recorded log-probs are the reference's.

    `nll_coef` adds that much of the chosen answer's mean negative log-likelihood (RPO, arXiv 2404.19733).
    """
    rows, pair_of = _rows(inputs, unit=2)
    sums, lengths = sequence_sums(inputs.logprobs, inputs.sequences, num_sequences=2 * rows)
    reference, _ = sequence_sums(inputs.rollout_logprobs, inputs.sequences, num_sequences=2 * rows)
    outputs = loss(
        PreferenceInputs(
            chosen_logprobs=sums[0::2],
            rejected_logprobs=sums[1::2],
            ref_chosen_logprobs=reference[0::2],
            ref_rejected_logprobs=reference[1::2],
            chosen_lengths=lengths[0::2],
            rejected_lengths=lengths[1::2],
            beta=beta,
            label_smoothing=label_smoothing,
            gamma=gamma,
        )
    )
    nll = -sums[0::2] / lengths[0::2]
    outputs = PreferenceOutputs(
        loss=outputs.loss + nll_coef * nll, sums={**outputs.sums, "nll_chosen": nll.detach().sum()}
    )
    return _spread(inputs, outputs, pair_of)


def over_labelled(
    inputs: LossInputs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> LossOutputs:
    """KTO as a loss over tokens; recorded log-probs are the reference's, an advantage above 0 is desirable."""
    rows, row_of = _rows(inputs, unit=1)
    sums, lengths = sequence_sums(inputs.logprobs, inputs.sequences, num_sequences=rows)
    reference, _ = sequence_sums(inputs.rollout_logprobs, inputs.sequences, num_sequences=rows)
    desirable = torch.zeros(rows, dtype=torch.bool, device=sums.device)
    desirable[inputs.sequences] = inputs.advantages > 0
    outputs = kto(
        KtoInputs(
            logprobs=sums,
            ref_logprobs=reference,
            lengths=lengths,
            desirable=desirable,
            baseline=torch.tensor(inputs.kl_baseline, dtype=sums.dtype, device=sums.device),
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )
    )
    return _spread(inputs, outputs, row_of)


def by_label(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a KTO step with those of one label as means over the answers of that label, and their margin.

    The learner divides every sum by the answers of the batch, of which `desirable` is the share with the one label.
    """
    found = dict(metrics)
    shares = {"desirable": metrics["desirable"], "undesirable": 1 - metrics["desirable"]}
    for label, share in shares.items():
        for name in (f"reward_{label}", f"length_{label}"):
            if share > 0:
                found[name] /= share
            else:
                del found[name]
    if all(share > 0 for share in shares.values()):
        found["reward_margin"] = found["reward_desirable"] - found["reward_undesirable"]
    return found


def over_scored_pairs(inputs: LossInputs) -> LossOutputs:
    """The Bradley-Terry loss of a scorer; a pair's scores are those behind its last tokens (see `with_end`)."""
    rows, pair_of = _rows(inputs, unit=2)
    places = torch.arange(len(inputs.sequences), device=inputs.sequences.device)
    last = torch.zeros(2 * rows, dtype=torch.int64, device=places.device)
    last = last.scatter_reduce(0, inputs.sequences, places, "amax")
    scores, margins = inputs.logprobs[last], inputs.advantages[last]
    outputs = bradley_terry(
        RewardPairs(chosen_rewards=scores[0::2], rejected_rewards=scores[1::2], margins=margins[0::2])
    )
    return _spread(inputs, outputs, pair_of)


def _rows(inputs: LossInputs, *, unit: int) -> tuple[int, Tensor]:
    """How many pairs or answers the micro-batch has, and which of them each token belongs to [N]."""
    count = int(inputs.sequences.max()) + 1 if len(inputs.sequences) else 0
    return -(-count // unit), inputs.sequences // unit


def _spread(inputs: LossInputs, outputs: PreferenceOutputs, row_of: Tensor) -> LossOutputs:
    """A loss per row as one per token; the logged sums weigh as the losses will."""
    assert inputs.weights is not None
    tokens = torch.bincount(row_of, minlength=len(outputs.loss))
    weight = inputs.weights[0] if len(inputs.weights) else inputs.weights.sum()
    return LossOutputs(
        loss=(outputs.loss / tokens)[row_of], sums={name: value * weight for name, value in outputs.sums.items()}
    )
