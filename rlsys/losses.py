"""Losses: pure functions over the trained tokens of a micro-batch, all arrays of one length [N].

Every loss returns one number per token. The learner weighs them (`rl.aggregation`), sums them and divides by the token
count of the global batch, in one place, so that neither micro-batches nor the number of ranks change the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rlsys.stage_config import Correction, TrustRegion

KlEstimator = Literal["k2", "k3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss may use, each [N] float32 but for `sequences`. Only `logprobs` carries a gradient.

    `rollout_logprobs` were recorded by the engine that wrote the token; `sequences` [N] int64 number the sequences of
    the micro-batch (every sequence is whole) from 0; `ref_logprobs` belong to the frozen policy and are None where none
    is loaded; `proximal_logprobs` to the policy before the first update on the batch, None where they were not asked
    for; `weights` are what the learner will multiply the losses with. `entropy` has a gradient where `entropy_coef` is
    not 0; `kl_baseline` is KTO's, of the whole batch.
    """

    logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    sequences: Tensor
    ref_logprobs: Tensor | None = None
    proximal_logprobs: Tensor | None = None
    weights: Tensor | None = None
    entropy: Tensor | None = None
    entropy_coef: float = 0.0
    kl_baseline: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    trust_region: TrustRegion = "rollout"
    correction: Correction = "none"
    correction_limit: float = 2.0
    correction_floor: float = 0.5
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    value_clip: float = 0.0

    @property
    def old_logprobs(self) -> Tensor:
        """Of the policy in the middle of the trust region, [N]; the ratio of a loss is over these."""
        return self.rollout_logprobs if self.trust_region == "rollout" else self.before_update

    @property
    def before_update(self) -> Tensor:
        """What the network said before the first update, [N]: in that update itself, what it says now."""
        return self.logprobs.detach() if self.proximal_logprobs is None else self.proximal_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutputs:
    """The loss of every token [N], and sums over tokens to be logged (divided by the batch's token count)."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def clipped_policy_gradient(inputs: LossInputs) -> LossOutputs:
    """`-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) + kl_coef * KL - entropy_coef * H` of every token.

    With `trust_region: rollout` the ratio is the current policy over the one that wrote the token, whichever version
    that was, so stale tokens and repeated updates are inside the trust region too. With `proximal` it is over the
    policy before the first update, and `correction_factor` multiplies the gain. Asymmetric clip: DAPO (arXiv
    2503.14476); objective: PPO (arXiv 1707.06347); decoupled: AReaL (arXiv 2505.24298).
    """
    return _clipped(inputs, torch.exp(inputs.logprobs - inputs.old_logprobs))


def gspo(inputs: LossInputs) -> LossOutputs:
    """As `clipped_policy_gradient`, with one ratio for a whole sequence: the geometric mean of those of its tokens.

    GSPO (arXiv 2507.18071), which also takes `aggregation: sequence` and much narrower clips (3e-4 and 4e-4), because
    these ratios vary less.
    """
    sums, lengths = _sequence_sums(inputs.logprobs - inputs.old_logprobs, inputs.sequences)
    return _clipped(inputs, torch.exp(sums / lengths)[inputs.sequences])


def cispo(inputs: LossInputs) -> LossOutputs:
    """`-clip(ratio, 1 - low, 1 + high) * A * logprob`, the clipped ratio being a weight without a gradient.

    No token's gradient is cut off, however far its ratio went. CISPO, MiniMax-M1 (arXiv 2506.13585); `clip_low: 1`
    bounds the weights from above only, as there, and makes it truncated importance sampling.
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs).detach()
    weight = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    loss = -weight * inputs.advantages * inputs.logprobs
    return _finished(inputs, loss, {"clip_fraction": (weight != ratio).sum().float(), "ratio": ratio.sum()})


def cross_entropy(inputs: LossInputs) -> LossOutputs:
    """Negative log-likelihood of the demonstrated tokens: supervised fine-tuning."""
    return LossOutputs(loss=-inputs.logprobs)


def value_loss(inputs: LossInputs) -> LossOutputs:
    """`max((v - R)^2, (clip(v, old - c, old + c) - R)^2) / 2` of every token, for the returns R: what a critic learns.

    The worse of both counts, so a value that went further than c from what it was before the step's updates is not
    pulled on, unless it went the wrong way. PPO with a clipped value, as in the baselines of arXiv 1707.06347;
    `value_clip: 0` leaves the plain square.
    """
    values, returns = inputs.logprobs, inputs.advantages
    square = (values - returns) ** 2
    if inputs.value_clip == 0:
        return LossOutputs(loss=square / 2)
    old = inputs.before_update
    clipped = (torch.clamp(values, old - inputs.value_clip, old + inputs.value_clip) - returns) ** 2
    sums = {"clip_fraction": (clipped > square).sum().float()}
    return LossOutputs(loss=torch.maximum(square, clipped) / 2, sums=sums)


def correction_factor(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """The factor proximal / rollout that a token's gain is weighed with, [N], and where it was cut, [N] bool.

    It makes up for stale weights and for an engine that computes other probabilities than the learner, and carries no
    gradient. `none` leaves it as it is (AReaL, arXiv 2505.24298); `truncated` is min(factor, limit) (Yao et al. 2025,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"); `masked` is 0 outside of [floor, limit]
    (IcePop, arXiv 2510.18855). The two of sequences do the same with the product over all trained tokens of a sequence,
    which is its importance weight; the longer the sequences, the further it strays from 1.
    """
    differences = inputs.before_update - inputs.rollout_logprobs
    if inputs.correction in ("sequence_truncated", "sequence_masked"):
        differences = _sequence_sums(differences, inputs.sequences)[0][inputs.sequences]
    factor = torch.exp(differences)
    if inputs.correction in ("truncated", "sequence_truncated"):
        return factor.clamp(max=inputs.correction_limit), factor > inputs.correction_limit
    if inputs.correction in ("masked", "sequence_masked"):
        cut = (factor > inputs.correction_limit) | (factor < inputs.correction_floor)
        return factor.masked_fill(cut, 0.0), cut
    return factor, torch.zeros_like(factor, dtype=torch.bool)


def _sequence_sums(values: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the trained tokens of each sequence of the micro-batch and their numbers, both [S]."""
    count = int(sequences.max()) + 1 if len(sequences) else 0
    sums = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, sequences, values)
    return sums, torch.bincount(sequences, minlength=count)


def _clipped(inputs: LossInputs, ratio: Tensor) -> LossOutputs:
    clipped = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    unclipped_gain, clipped_gain = ratio * inputs.advantages, clipped * inputs.advantages
    loss = -torch.minimum(unclipped_gain, clipped_gain)
    sums = {
        "clip_fraction": (clipped_gain < unclipped_gain).sum().float(),
        "ratio": ratio.detach().sum(),
    }
    return _finished(inputs, loss, sums)


def _finished(inputs: LossInputs, loss: Tensor, sums: dict[str, Tensor]) -> LossOutputs:
    """Weigh the gain of a policy, then add what is not part of it: KL penalty and entropy bonus.

    The penalty for leaving the reference policy, with `d = ref - current` (http://joschu.net/blog/kl-approx.html): k3
    is `exp(d) - d - 1`; k2 is `d^2 / 2`, whose gradient is on average that of the KL itself. k1, `-d`, is not offered:
    its gradient is zero on average.
    """
    if inputs.trust_region == "proximal":
        factor, cut = correction_factor(inputs)
        loss = loss * factor
        sums = {**sums, "correction": factor.sum(), "correction_cut": cut.sum().float()}
    if inputs.ref_logprobs is not None:
        difference = inputs.ref_logprobs - inputs.logprobs
        kl = difference**2 / 2 if inputs.kl_estimator == "k2" else torch.exp(difference) - difference - 1
        loss = loss + inputs.kl_coef * kl
        sums = {**sums, "kl": kl.detach().sum()}
    if inputs.entropy_coef:
        assert inputs.entropy is not None, "the learner gives the entropy wherever it has a weight"
        loss = loss - inputs.entropy_coef * inputs.entropy
    return LossOutputs(loss=loss, sums=sums)
