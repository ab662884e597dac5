"""Losses: pure functions over the trained tokens of a micro-batch, all arrays of one length [N].

Every loss returns a *sum* over tokens; the learner divides it by the token count of the global batch, in one place,
so that neither micro-batches nor the number of ranks change the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss may use, each [N] float32. Only `logprobs` carries a gradient.

    `rollout_logprobs` were recorded by the engine that wrote the token; `ref_logprobs` belong to the frozen policy and
    are None where none is loaded.
    """

    logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutputs:
    """The loss as a sum over tokens, and sums to be logged (divided by the same token count)."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def clipped_policy_gradient(inputs: LossInputs) -> LossOutputs:
    """`-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) + kl_coef * KL`, summed over tokens.

    The ratio is the current policy over the one that wrote the token, whichever version that was, so stale tokens and
    repeated updates are inside the trust region too. Asymmetric clip: DAPO (arXiv 2503.14476); objective: PPO (arXiv
    1707.06347); KL by the k3 estimator `exp(d) - d - 1`, `d = ref - current` (http://joschu.net/blog/kl-approx.html).
    """
    ratio = torch.exp(inputs.logprobs - inputs.rollout_logprobs)
    clipped = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    unclipped_gain, clipped_gain = ratio * inputs.advantages, clipped * inputs.advantages
    loss = -torch.minimum(unclipped_gain, clipped_gain).sum()
    sums = {
        "clip_fraction": (clipped_gain < unclipped_gain).sum().float(),
        "ratio": ratio.detach().sum(),
    }
    if inputs.ref_logprobs is not None:
        difference = inputs.ref_logprobs - inputs.logprobs
        kl = (torch.exp(difference) - difference - 1).sum()
        loss = loss + inputs.kl_coef * kl
        sums["kl"] = kl.detach()
    return LossOutputs(loss=loss, sums=sums)


def cross_entropy(inputs: LossInputs) -> LossOutputs:
    """Negative log-likelihood of the demonstrated tokens, summed: supervised fine-tuning."""
    return LossOutputs(loss=-inputs.logprobs.sum())
