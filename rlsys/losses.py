"""Losses: pure functions over the trained tokens of a micro-batch, all arrays of one length [N].

Every loss returns one number per token. The learner weighs them (`rl.aggregation`), sums them and divides by the token
count of the global batch, in one place, so that neither micro-batches nor the number of ranks change the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k2", "k3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss may use, each [N] float32 but for `sequences`. Only `logprobs` carries a gradient.

    `rollout_logprobs` were recorded by the engine that wrote the token; `sequences` [N] int64 number the sequences of
    the micro-batch (every sequence is whole) from 0; `ref_logprobs` belong to the frozen policy and are None where none
    is loaded.
    """

    logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    sequences: Tensor
    ref_logprobs: Tensor | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutputs:
    """The loss of every token [N], and sums over tokens to be logged (divided by the batch's token count)."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def clipped_policy_gradient(inputs: LossInputs) -> LossOutputs:
    """`-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) + kl_coef * KL` of every token.

    The ratio is the current policy over the one that wrote the token, whichever version that was, so stale tokens and
    repeated updates are inside the trust region too. Asymmetric clip: DAPO (arXiv 2503.14476); objective: PPO (arXiv
    1707.06347).
    """
    return _clipped(inputs, torch.exp(inputs.logprobs - inputs.rollout_logprobs))


def gspo(inputs: LossInputs) -> LossOutputs:
    """As `clipped_policy_gradient`, with one ratio for a whole sequence: the geometric mean of those of its tokens.

    GSPO (arXiv 2507.18071), which also takes `aggregation: sequence` and much narrower clips (3e-4 and 4e-4), because
    these ratios vary less.
    """
    differences = inputs.logprobs - inputs.rollout_logprobs
    count = int(inputs.sequences.max()) + 1 if len(inputs.sequences) else 0
    lengths = torch.bincount(inputs.sequences, minlength=count)
    means = torch.zeros(count, dtype=differences.dtype, device=differences.device)
    means = means.index_add(0, inputs.sequences, differences) / lengths
    return _clipped(inputs, torch.exp(means)[inputs.sequences])


def cispo(inputs: LossInputs) -> LossOutputs:
    """`-clip(ratio, 1 - low, 1 + high) * A * logprob`, the clipped ratio being a weight without a gradient.

    No token's gradient is cut off, however far its ratio went. CISPO, MiniMax-M1 (arXiv 2506.13585); `clip_low: 1`
    bounds the weights from above only, as there, and makes it truncated importance sampling.
    """
    ratio = torch.exp(inputs.logprobs - inputs.rollout_logprobs).detach()
    weight = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    loss = -weight * inputs.advantages * inputs.logprobs
    return _with_kl(inputs, loss, {"clip_fraction": (weight != ratio).sum().float(), "ratio": ratio.sum()})


def cross_entropy(inputs: LossInputs) -> LossOutputs:
    """Negative log-likelihood of the demonstrated tokens: supervised fine-tuning."""
    return LossOutputs(loss=-inputs.logprobs)


def _clipped(inputs: LossInputs, ratio: Tensor) -> LossOutputs:
    clipped = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    unclipped_gain, clipped_gain = ratio * inputs.advantages, clipped * inputs.advantages
    loss = -torch.minimum(unclipped_gain, clipped_gain)
    sums = {
        "clip_fraction": (clipped_gain < unclipped_gain).sum().float(),
        "ratio": ratio.detach().sum(),
    }
    return _with_kl(inputs, loss, sums)


def _with_kl(inputs: LossInputs, loss: Tensor, sums: dict[str, Tensor]) -> LossOutputs:
    """Add the penalty for leaving the reference policy, `d = ref - current` (http://joschu.net/blog/kl-approx.html).

    k3 is `exp(d) - d - 1`; k2 is `d^2 / 2`, whose gradient is on average that of the KL itself. k1, `-d`, is not
    offered: its gradient is zero on average.
    """
    if inputs.ref_logprobs is not None:
        difference = inputs.ref_logprobs - inputs.logprobs
        kl = difference**2 / 2 if inputs.kl_estimator == "k2" else torch.exp(difference) - difference - 1
        loss = loss + inputs.kl_coef * kl
        sums = {**sums, "kl": kl.detach().sum()}
    return LossOutputs(loss=loss, sums=sums)
