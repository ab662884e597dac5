"""Preference losses: pure functions over the sequence log-probs of pairs [P], or of single labelled responses [N].

Every loss returns one number per pair (`kto`: per response) and averages nothing: the caller sums and divides by the
count of the global batch, so neither micro-batches nor the number of ranks change the gradient. From the log-probs of
trained tokens to a loss, the first P sequences being the chosen ones and the next P the rejected:

    sums, lengths = sequence_sums(logprobs, sequences, num_sequences=2 * P)
    ref_sums, _ = sequence_sums(ref_logprobs, sequences, num_sequences=2 * P)
    pairs = PreferenceInputs(
        chosen_logprobs=sums[:P], rejected_logprobs=sums[P:],
        ref_chosen_logprobs=ref_sums[:P], ref_rejected_logprobs=ref_sums[P:],
        chosen_lengths=lengths[:P], rejected_lengths=lengths[P:], beta=0.1,
    )
    (dpo(pairs).loss.sum() / pairs_of_the_global_batch).backward()

What is logged as a *reward* is what a loss compares of the two sides; accuracy is the share of pairs in which the
chosen side has the greater one, ties counting as wrong (so it is 0 where policy and reference are still the same).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_MEAN_LOGPROB = -1e-6
"""Where `orpo` takes a response for certain: the odds of probability 1 are infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceInputs:
    """What a loss over pairs may use: arrays [P], row i of each belonging to pair i.

    Log-probs are sums over the trained tokens of a response, float32 or float64, and only those of the policy carry a
    gradient; the reference's are None where a loss has no use for them. Lengths are the trained tokens summed, integers
    from 1. `beta` has no default, because its meaning and scale differ (0.1 is usual for `dpo`, 2 for `simpo`);
    `label_smoothing`, from 0 to below 0.5, is the share of pairs taken to be labelled the wrong way round (`dpo` and
    `robust_dpo` only); `gamma` is the margin of `simpo` only. A setting that a loss would ignore is refused by it.
    """

    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen_logprobs: Tensor | None = None
    ref_rejected_logprobs: Tensor | None = None
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        reference = {
            "ref_chosen_logprobs": self.ref_chosen_logprobs,
            "ref_rejected_logprobs": self.ref_rejected_logprobs,
        }
        missing = [name for name, logprobs in reference.items() if logprobs is None]
        if len(missing) == 1:
            raise ValueError(f"a reference has log-probs of both sides, but {missing[0]} is None; give both or neither")
        policy = {"chosen_logprobs": self.chosen_logprobs, "rejected_logprobs": self.rejected_logprobs}
        lengths = {"chosen_lengths": self.chosen_lengths, "rejected_lengths": self.rejected_lengths}
        given = {name: logprobs for name, logprobs in reference.items() if logprobs is not None}
        _check_shapes("pairs", {**policy, **given, **lengths})
        _check_precision({**policy, **given})
        _check_without_gradient(given)
        _check_lengths(lengths)
        _check_positive("beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is a share of wrong labels from 0 to below 0.5, got {self.label_smoothing}; "
                "where more than half are wrong, swap chosen and rejected"
            )
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma is a margin that is not negative, got {self.gamma}; 0 is no margin")


@dataclass(frozen=True, slots=True, kw_only=True)
class KtoInputs:
    """What `kto` uses: arrays [N], one row for a response with a label of its own, and no pairs.

    Log-probs and lengths are as in `PreferenceInputs`; `desirable` [N] bool is true for the good ones; `baseline` [] is
    that of the global batch, from `kl_baseline`. The weights make up for unequal numbers of the two labels: weight
    times count should be about the same for both.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    lengths: Tensor
    desirable: Tensor
    baseline: Tensor
    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        logprobs = {"logprobs": self.logprobs, "ref_logprobs": self.ref_logprobs}
        _check_shapes("responses", {**logprobs, "lengths": self.lengths, "desirable": self.desirable})
        _check_precision(logprobs)
        _check_without_gradient({"ref_logprobs": self.ref_logprobs, "baseline": self.baseline})
        _check_lengths({"lengths": self.lengths})
        if self.desirable.dtype != torch.bool:
            raise ValueError(f"desirable is a bool for each response, got {self.desirable.dtype}; compare, as in > 0")
        if self.baseline.shape != ():
            raise ValueError(f"the baseline is one number for all responses, got shape {_shape(self.baseline)}")
        _check_positive("beta", self.beta)
        _check_positive("desirable_weight", self.desirable_weight)
        _check_positive("undesirable_weight", self.undesirable_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPairs:
    """What `bradley_terry` uses, arrays [P]: a reward model's outputs for both sides, and how far apart they should be.

    `margins` grow with how much better the chosen side was judged; None is 0 for all.
    """

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor | None = None

    def __post_init__(self) -> None:
        columns = {"chosen_rewards": self.chosen_rewards, "rejected_rewards": self.rejected_rewards}
        if self.margins is not None:
            columns["margins"] = self.margins
        _check_shapes("pairs", columns)
        _check_precision(columns)
        _check_without_gradient({} if self.margins is None else {"margins": self.margins})


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceOutputs:
    """The loss of every pair [P] (`kto`: response [N]), and sums over them to be logged (divided by their count)."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def sequence_sums(logprobs: Tensor, sequences: Tensor, *, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Sums [num_sequences] of the log-probs [N] of packed tokens, and how many tokens each is of (int64).

    `sequences` [N] int64 say which sequence a token belongs to, from 0, in any order. A sequence without a trained
    token has sum 0 and length 0, which the losses refuse.
    """
    _check_shapes("tokens", {"logprobs": logprobs, "sequences": sequences})
    _check_precision({"logprobs": logprobs})
    if len(sequences) and not (int(sequences.min()) >= 0 and int(sequences.max()) < num_sequences):
        raise ValueError(
            f"tokens belong to sequences {int(sequences.min())} to {int(sequences.max())}, but there are "
            f"{num_sequences}, numbered from 0; give num_sequences of the whole micro-batch"
        )
    sums = torch.zeros(num_sequences, dtype=logprobs.dtype, device=logprobs.device)
    return sums.index_add(0, sequences, logprobs), torch.bincount(sequences, minlength=num_sequences)


def dpo(inputs: PreferenceInputs) -> PreferenceOutputs:
    """`-(1 - e) log s(h) - e log s(-h)`, with `h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))`.

    s is the sigmoid and e `label_smoothing`: 0 is DPO (arXiv 2305.18290); above it this is conservative DPO (cDPO,
    https://ericmitchell.ai/cdpo.pdf), which is least at `h = ln((1 - e) / e)` and pulls larger h back. The rewards are
    `beta * (logprob - ref_logprob)`. Left out: other divergences than the reverse KL.
    """
    chosen, rejected = _log_ratios(inputs, "dpo")
    _refuse_gamma(inputs, "dpo")
    difference = inputs.beta * (chosen - rejected)
    smoothing = inputs.label_smoothing
    loss = -logsigmoid(difference)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * logsigmoid(-difference)
    return _outputs(inputs, loss, inputs.beta * chosen, inputs.beta * rejected)


def robust_dpo(inputs: PreferenceInputs) -> PreferenceOutputs:
    """`(-(1 - e) log s(h) + e log s(-h)) / (1 - 2e)`, with h as in `dpo` and e `label_smoothing`.

    Robust DPO (arXiv 2403.00409). Not cDPO: the flipped term is subtracted, so that with labels flipped at rate e the
    expectation is the loss of `dpo` on clean labels. The price: it is negative for large h and has no lower bound, and
    its gradient never turns round; by h it is at most `-e / (1 - 2e)`.
    """
    chosen, rejected = _log_ratios(inputs, "robust_dpo")
    _refuse_gamma(inputs, "robust_dpo")
    difference = inputs.beta * (chosen - rejected)
    smoothing = inputs.label_smoothing
    loss = smoothing * logsigmoid(-difference) - (1 - smoothing) * logsigmoid(difference)
    return _outputs(inputs, loss / (1 - 2 * smoothing), inputs.beta * chosen, inputs.beta * rejected)


def ipo(inputs: PreferenceInputs) -> PreferenceOutputs:
    """`((chosen - ref_chosen) / length - (rejected - ref_rejected) / length - 1 / (2 beta))^2`, each side's own length.

    IPO (arXiv 2310.12036, eq. 17, where beta is tau) on log-ratios per token. The paper writes sequence probabilities
    and no lengths; with sums, one distance `1 / (2 beta)` would ask a tenth of each token of a response ten times as
    long. Its authors run it per token, as they told TRL's (https://huggingface.co/blog/pref-tuning). The rewards are
    `beta` times the log-ratio per token, so the margin aimed at is 1/2.
    """
    chosen, rejected = _log_ratios(inputs, "ipo")
    _refuse_gamma(inputs, "ipo")
    _refuse_label_smoothing(inputs, "ipo")
    chosen, rejected = chosen / inputs.chosen_lengths, rejected / inputs.rejected_lengths
    loss = (chosen - rejected - 1 / (2 * inputs.beta)) ** 2
    return _outputs(inputs, loss, inputs.beta * chosen, inputs.beta * rejected)


def simpo(inputs: PreferenceInputs) -> PreferenceOutputs:
    """`-log s(beta * chosen / length - beta * rejected / length - gamma)`, each side's own length.

    SimPO (arXiv 2405.14734): the reward is `beta` times the log-prob per token, without a reference (one that is given
    is not looked at). The margin that is logged is before gamma. Left out: label smoothing, which the paper has not.
    """
    _refuse_label_smoothing(inputs, "simpo")
    chosen = inputs.beta * inputs.chosen_logprobs / inputs.chosen_lengths
    rejected = inputs.beta * inputs.rejected_logprobs / inputs.rejected_lengths
    return _outputs(inputs, -logsigmoid(chosen - rejected - inputs.gamma), chosen, rejected)


def orpo(inputs: PreferenceInputs) -> PreferenceOutputs:
    """`-m_c - beta * log s(o(m_c) - o(m_r))`, with `m = logprob / length` and the log-odds `o(m) = m - ln(1 - e^m)`.

    ORPO (arXiv 2403.07691, where beta is lambda): the likelihood of the chosen response and the odds ratio, without a
    reference (one that is given is not looked at). Probabilities are geometric means over tokens, as in the paper. The
    rewards are the log-odds. Above `MAX_MEAN_LOGPROB` a response's odds are those at it, without a gradient: beyond,
    they are infinite. Left out: a likelihood of the prompt, and one over tokens instead of pairs.
    """
    _refuse_gamma(inputs, "orpo")
    _refuse_label_smoothing(inputs, "orpo")
    mean_chosen = inputs.chosen_logprobs / inputs.chosen_lengths
    chosen, rejected = _log_odds(mean_chosen), _log_odds(inputs.rejected_logprobs / inputs.rejected_lengths)
    outputs = _outputs(inputs, -mean_chosen - inputs.beta * logsigmoid(chosen - rejected), chosen, rejected)
    return PreferenceOutputs(loss=outputs.loss, sums={**outputs.sums, "nll": -mean_chosen.detach().sum()})


def kl_baseline(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`max(0, mean(logprob - ref_logprob))` [] of responses [M] under prompts that are not theirs, without a gradient.

    The estimate of the KL in KTO (arXiv 2402.01306): every prompt is paired with the response to another one. Give it
    the responses of the global batch, not of a micro-batch: a mean of these numbers is another one.
    """
    columns = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    _check_shapes("mismatched responses", columns)
    _check_precision(columns)
    if len(logprobs) == 0:
        raise ValueError("the KL baseline is a mean over mismatched responses, got none; pair prompts with others'")
    return (logprobs - ref_logprobs).detach().mean().clamp(min=0)


def kto(inputs: KtoInputs) -> PreferenceOutputs:
    """`w_d * s(beta * (z - r))` of the desirable, `w_u * s(beta * (r - z))` of the others, `r = logprob - ref_logprob`.

    KTO (arXiv 2402.01306), s being the sigmoid, z the baseline and w the weights; the rewards are `beta * r`.
    Their sums are apart for the two labels, with the number of desirable responses to divide by.
    """
    ratio = inputs.logprobs - inputs.ref_logprobs
    above = inputs.beta * (ratio - inputs.baseline)
    desirable = inputs.desirable
    # The sigmoid of the negative, not one minus the sigmoid, which rounds to 0 from about 17 on.
    weighted = inputs.desirable_weight * torch.sigmoid(-above), inputs.undesirable_weight * torch.sigmoid(above)
    rewards, lengths = (inputs.beta * ratio).detach(), inputs.lengths.to(ratio.dtype)
    sums = {
        "desirable": desirable.sum().to(ratio.dtype),
        "reward_desirable": rewards[desirable].sum(),
        "reward_undesirable": rewards[~desirable].sum(),
        "length_desirable": lengths[desirable].sum(),
        "length_undesirable": lengths[~desirable].sum(),
        "kl": inputs.baseline * len(ratio),
    }
    return PreferenceOutputs(loss=torch.where(desirable, *weighted), sums=sums)


def bradley_terry(inputs: RewardPairs) -> PreferenceOutputs:
    """`-log s(chosen - rejected - margin)`, s being the sigmoid: the loss of a scalar reward model.

    InstructGPT (arXiv 2203.02155); margins: Llama 2 (arXiv 2307.09288). Only the difference of two rewards is learned;
    a penalty that centres them is left out.
    """
    difference = inputs.chosen_rewards - inputs.rejected_rewards
    margins = 0.0 if inputs.margins is None else inputs.margins
    return PreferenceOutputs(
        loss=-logsigmoid(difference - margins), sums=_compared(inputs.chosen_rewards, inputs.rejected_rewards)
    )


def _log_ratios(inputs: PreferenceInputs, loss: str) -> tuple[Tensor, Tensor]:
    """How much more likely than under the reference each side is, in nats, each [P]."""
    if inputs.ref_chosen_logprobs is None or inputs.ref_rejected_logprobs is None:
        raise ValueError(
            f"{loss} compares with a reference, but ref_chosen_logprobs and ref_rejected_logprobs are None; "
            "compute them with the frozen policy, or take a loss without a reference: simpo or orpo"
        )
    return inputs.chosen_logprobs - inputs.ref_chosen_logprobs, inputs.rejected_logprobs - inputs.ref_rejected_logprobs


def _log_odds(mean: Tensor) -> Tensor:
    """`m - ln(1 - e^m)` of mean log-probs m; expm1 keeps the digits of probabilities near 1."""
    mean = mean.clamp(max=MAX_MEAN_LOGPROB)
    return mean - torch.log(-torch.expm1(mean))


def _outputs(inputs: PreferenceInputs, loss: Tensor, chosen: Tensor, rejected: Tensor) -> PreferenceOutputs:
    """The loss with what is logged of it; `chosen` and `rejected` are the rewards."""
    sums = {
        **_compared(chosen, rejected),
        "logprob_chosen": inputs.chosen_logprobs.detach().sum(),
        "logprob_rejected": inputs.rejected_logprobs.detach().sum(),
        "length_chosen": inputs.chosen_lengths.sum().to(loss.dtype),
        "length_rejected": inputs.rejected_lengths.sum().to(loss.dtype),
    }
    return PreferenceOutputs(loss=loss, sums=sums)


def _compared(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
        "reward_margin": (chosen - rejected).sum(),
        "accuracy": (chosen > rejected).sum().to(chosen.dtype),
    }


def _refuse_gamma(inputs: PreferenceInputs, loss: str) -> None:
    if inputs.gamma:
        raise ValueError(f"{loss} has no margin, got gamma {inputs.gamma}; set it to 0, or take simpo")


def _refuse_label_smoothing(inputs: PreferenceInputs, loss: str) -> None:
    if inputs.label_smoothing:
        raise ValueError(
            f"{loss} smooths no labels, got label_smoothing {inputs.label_smoothing}; "
            "set it to 0, or take dpo or robust_dpo"
        )


def _shape(column: Tensor) -> list[int]:
    return list(column.shape)


def _check_shapes(rows: str, columns: Mapping[str, Tensor]) -> None:
    shapes = {name: _shape(column) for name, column in columns.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"{rows} share one axis, row by row, got {shapes}")


def _check_precision(columns: Mapping[str, Tensor]) -> None:
    """Refuse 16 bits: from 128 nats on, bfloat16 has only whole ones."""
    for name, column in columns.items():
        if column.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {column.dtype}, too coarse for differences of log-probs or rewards; "
                "convert the summands to float32 before they are summed"
            )


def _check_without_gradient(columns: Mapping[str, Tensor]) -> None:
    for name, column in columns.items():
        if column.requires_grad:
            raise ValueError(f"{name} carries a gradient; compute it under torch.no_grad(), or detach it")


def _check_lengths(columns: Mapping[str, Tensor]) -> None:
    for name, column in columns.items():
        if column.dtype.is_floating_point or column.dtype == torch.bool:
            raise ValueError(f"{name} counts tokens, got {column.dtype}; give integers")
        if len(column) and int(column.min()) < 1:
            row = int(column.argmin())
            raise ValueError(
                f"{name}[{row}] is {int(column[row])}: a response without a trained token has no log-prob; "
                "drop it with its pair"
            )


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be above 0 and finite, got {value}")
