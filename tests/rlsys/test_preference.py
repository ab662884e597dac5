"""Preference losses: golden numbers worked by hand, gradients in closed form, invariances, extremes, refusals."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.preference import (
    KtoInputs,
    PreferenceInputs,
    PreferenceOutputs,
    RewardPairs,
    bradley_terry,
    dpo,
    ipo,
    kl_baseline,
    kto,
    orpo,
    robust_dpo,
    sequence_sums,
    simpo,
)

WITH_REFERENCE = [dpo, robust_dpo, ipo]
PAIRED = [*WITH_REFERENCE, simpo, orpo]
LN3 = math.log(3)
"""A difference at which the sigmoid is 3/4, so `-log s` is ln(4/3) and the slope of the loss is -1/4."""


def column(values: Sequence[float], *, gradient: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


def pairs(
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    lengths: Sequence[tuple[int, int]] | None = None,
    reference: tuple[Sequence[float], Sequence[float]] | None = None,
    beta: float = 0.5,
    **options: Any,
) -> PreferenceInputs:
    """Pairs with these log-probs, which carry a gradient; `lengths` are (chosen, rejected) of each pair, else 1."""
    lengths = lengths or [(1, 1)] * len(chosen)
    return PreferenceInputs(
        chosen_logprobs=column(chosen, gradient=True),
        rejected_logprobs=column(rejected, gradient=True),
        ref_chosen_logprobs=None if reference is None else column(reference[0]),
        ref_rejected_logprobs=None if reference is None else column(reference[1]),
        chosen_lengths=torch.tensor([length for length, _ in lengths], dtype=torch.int64),
        rejected_lengths=torch.tensor([length for _, length in lengths], dtype=torch.int64),
        beta=beta,
        **options,
    )


def gradients(outputs: PreferenceOutputs, inputs: PreferenceInputs) -> tuple[list[float], list[float]]:
    """Of the summed loss, by the log-probs of the chosen and of the rejected."""
    chosen, rejected = torch.autograd.grad(outputs.loss.sum(), [inputs.chosen_logprobs, inputs.rejected_logprobs])
    return chosen.tolist(), rejected.tolist()


def logged(outputs: PreferenceOutputs) -> dict[str, float]:
    return {name: float(value) for name, value in outputs.sums.items()}


def random_pairs(count: int = 6, **options: Any) -> PreferenceInputs:
    """Pairs of unequal lengths with a reference; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (2, count), generator=generator)
    noise = torch.rand(4, count, generator=generator, dtype=torch.float64) + 0.1
    logprobs = -noise * torch.cat([lengths, lengths])
    return PreferenceInputs(
        chosen_logprobs=logprobs[0].clone().requires_grad_(),
        rejected_logprobs=logprobs[1].clone().requires_grad_(),
        ref_chosen_logprobs=logprobs[2],
        ref_rejected_logprobs=logprobs[3],
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        beta=0.3,
        **options,
    )


def swapped(inputs: PreferenceInputs) -> PreferenceInputs:
    return replace(
        inputs,
        chosen_logprobs=inputs.rejected_logprobs,
        rejected_logprobs=inputs.chosen_logprobs,
        ref_chosen_logprobs=inputs.ref_rejected_logprobs,
        ref_rejected_logprobs=inputs.ref_chosen_logprobs,
        chosen_lengths=inputs.rejected_lengths,
        rejected_lengths=inputs.chosen_lengths,
    )


def log_ratio_difference(inputs: PreferenceInputs) -> Tensor:
    assert inputs.ref_chosen_logprobs is not None
    assert inputs.ref_rejected_logprobs is not None
    chosen = inputs.chosen_logprobs - inputs.ref_chosen_logprobs
    return (chosen - (inputs.rejected_logprobs - inputs.ref_rejected_logprobs)).detach()


# The log-ratios are ln 3 and -ln 3, so h = 0.5 * (ln 3 + ln 3) = ln 3.
def pair_at_ln3(**options: Any) -> PreferenceInputs:
    return pairs([-10.0], [-20.0 - LN3], reference=([-10.0 - LN3], [-20.0]), lengths=[(4, 7)], **options)


def test_dpo_golden_numbers_and_gradient() -> None:
    inputs = pair_at_ln3()
    outputs = dpo(inputs)
    # -log s(ln 3) = -log(3/4)
    assert outputs.loss.tolist() == pytest.approx([math.log(4 / 3)])
    # -beta * s(-h) = -0.5 * 1/4 by the chosen log-prob, and its negative by the rejected one
    assert gradients(outputs, inputs) == (pytest.approx([-0.125]), pytest.approx([0.125]))


def test_what_dpo_logs_of_its_pairs() -> None:
    # Rewards of pair 0: 0.5 * (-3 + 5) = 1 and 0.5 * (-8 + 2) = -3. Pair 1: 0.5 * (-4 + 3) = -0.5 and 0. Pair 2: a tie.
    inputs = pairs(
        [-3.0, -4.0, -1.0],
        [-8.0, -6.0, -1.0],
        reference=([-5.0, -3.0, -1.0], [-2.0, -6.0, -1.0]),
        lengths=[(3, 4), (10, 20), (1, 1)],
    )
    outputs = dpo(inputs)
    assert logged(outputs) == pytest.approx(
        {
            "reward_chosen": 0.5,
            "reward_rejected": -3.0,
            "reward_margin": 3.5,
            "accuracy": 1.0,  # the tie counts as wrong
            "logprob_chosen": -8.0,
            "logprob_rejected": -15.0,
            "length_chosen": 14.0,
            "length_rejected": 25.0,
        }
    )
    assert outputs.loss.shape == (3,)


def test_label_smoothing_makes_dpo_conservative() -> None:
    inputs = pair_at_ln3(label_smoothing=0.1)
    outputs = dpo(inputs)
    # 0.9 * ln(4/3) + 0.1 * ln 4, as s(-ln 3) = 1/4
    assert outputs.loss.tolist() == pytest.approx([0.9 * math.log(4 / 3) + 0.1 * math.log(4)])
    # beta * (-0.9 * 1/4 + 0.1 * 3/4) = 0.5 * -0.15
    assert gradients(outputs, inputs) == (pytest.approx([-0.075]), pytest.approx([0.075]))


def test_conservative_dpo_stops_at_the_log_odds_of_a_right_label_and_robust_dpo_does_not() -> None:
    # e = 1/4: ln((1 - e) / e) = ln 3, which is where the pair stands.
    inputs = pair_at_ln3(label_smoothing=0.25)
    assert gradients(dpo(inputs), inputs)[0] == pytest.approx([0.0], abs=1e-12)
    # -beta * (0.75 * 1/4 + 0.25 * 3/4) / 0.5 = -0.5 * 0.75
    assert gradients(robust_dpo(inputs), inputs)[0] == pytest.approx([-0.375])


def test_robust_dpo_golden_numbers() -> None:
    # (0.75 * ln(4/3) - 0.25 * ln 4) / 0.5 = 0.5 * ln((4/3)^3 / 4) = 0.5 * ln(16/27), which is below zero
    outputs = robust_dpo(pair_at_ln3(label_smoothing=0.25))
    assert outputs.loss.tolist() == pytest.approx([0.5 * math.log(16 / 27)])
    assert logged(outputs) == logged(dpo(pair_at_ln3()))


def test_robust_dpo_is_on_average_over_flipped_labels_the_clean_dpo() -> None:
    inputs = random_pairs(label_smoothing=0.2)
    average = 0.8 * robust_dpo(inputs).loss + 0.2 * robust_dpo(swapped(inputs)).loss
    clean = dpo(replace(inputs, label_smoothing=0.0)).loss
    assert torch.allclose(average, clean)
    conservative = 0.8 * dpo(inputs).loss + 0.2 * dpo(swapped(inputs)).loss
    assert not torch.allclose(conservative, clean)


def test_without_label_smoothing_robust_and_plain_dpo_are_one() -> None:
    assert torch.equal(robust_dpo(random_pairs()).loss, dpo(random_pairs()).loss)


def test_ipo_golden_numbers_and_gradient() -> None:
    # Log-ratios 6 over 4 tokens and -2 over 2: 1.5 and -1 per token, 2.5 apart. beta 0.25 aims at 1 / 0.5 = 2.
    inputs = pairs([-4.0], [-6.0], reference=([-10.0], [-4.0]), lengths=[(4, 2)], beta=0.25)
    outputs = ipo(inputs)
    assert outputs.loss.tolist() == pytest.approx([0.25])
    # 2 * 0.5 / 4 and -2 * 0.5 / 2: further apart than it should be, so the pair is pulled together
    assert gradients(outputs, inputs) == (pytest.approx([0.25]), pytest.approx([-0.5]))
    # 0.25 * 1.5 and 0.25 * -1
    assert logged(outputs)["reward_chosen"] == pytest.approx(0.375)
    assert logged(outputs)["reward_margin"] == pytest.approx(0.625)


def test_ipo_is_nought_where_the_margin_of_its_rewards_is_a_half() -> None:
    # beta 0.25 again: log-ratios per token 1 and -1 are 2 apart, 0.25 * 2 = 1/2.
    outputs = ipo(pairs([-3.0], [-9.0], reference=([-6.0], [-4.0]), lengths=[(3, 5)], beta=0.25))
    assert (outputs.loss.tolist(), logged(outputs)["reward_margin"]) == ([0.0], 0.5)


def test_simpo_golden_numbers_and_gradient() -> None:
    # Log-probs per token -2/8 = -0.25 and -3/2 = -1.5: rewards -0.5 and -3, margin 2.5; gamma leaves ln 3 of it.
    inputs = pairs([-2.0], [-3.0], lengths=[(8, 2)], beta=2.0, gamma=2.5 - LN3)
    outputs = simpo(inputs)
    assert outputs.loss.tolist() == pytest.approx([math.log(4 / 3)])
    # -beta / length * s(-ln 3) = -2/8 * 1/4 and 2/2 * 1/4
    assert gradients(outputs, inputs) == (pytest.approx([-1 / 16]), pytest.approx([1 / 4]))
    assert logged(outputs)["reward_chosen"] == pytest.approx(-0.5)
    assert logged(outputs)["reward_rejected"] == pytest.approx(-3.0)
    assert logged(outputs)["reward_margin"] == pytest.approx(2.5)


def test_orpo_golden_numbers_and_gradient() -> None:
    # Probabilities per token 3/4 and 1/4: odds 3 and 1/3, odds ratio 9, -log s(ln 9) = ln(10/9).
    inputs = pairs([2 * math.log(3 / 4)], [4 * math.log(1 / 4)], lengths=[(2, 4)], beta=0.5)
    outputs = orpo(inputs)
    assert outputs.loss.tolist() == pytest.approx([math.log(4 / 3) + 0.5 * math.log(10 / 9)])
    # The log-odds rise by 1 / (1 - p) with a log-prob: 4 and 4/3. s(-ln 9) = 1/10.
    # (-1 - 0.5 * 1/10 * 4) / 2 = -0.6 and 0.5 * 1/10 * 4/3 / 4 = 1/60
    assert gradients(outputs, inputs) == (pytest.approx([-0.6]), pytest.approx([1 / 60]))
    assert logged(outputs)["reward_chosen"] == pytest.approx(LN3)
    assert logged(outputs)["reward_rejected"] == pytest.approx(-LN3)
    assert logged(outputs)["nll"] == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("mean", [-20.0, -1.0, -0.7, -math.log(2), -0.69, -1e-2, -1e-5])
def test_orpo_log_odds_are_exact_to_the_last_digits_of_float32(mean: float) -> None:
    # e^m / (1 - e^m) = 1 / (e^-m - 1), in double precision
    inputs = pairs([mean], [-math.log(2)])
    single = replace(
        inputs, chosen_logprobs=inputs.chosen_logprobs.float(), rejected_logprobs=inputs.rejected_logprobs.float()
    )
    assert logged(orpo(single))["reward_chosen"] == pytest.approx(-math.log(math.expm1(-mean)), rel=1e-6, abs=1e-6)


def test_orpo_takes_a_response_that_is_certain_for_nearly_so() -> None:
    inputs = pairs([0.0, -1.0], [-1.0, 0.0])
    outputs = orpo(inputs)
    chosen, rejected = gradients(outputs, inputs)
    assert all(math.isfinite(value) for value in [*outputs.loss.tolist(), *chosen, *rejected])
    # Of the chosen one only the likelihood is left; the rejected one's odds have no slope.
    assert (chosen[0], rejected[1]) == (-1.0, 0.0)
    # -ln(e^1e-6 - 1) = 13.8155
    assert logged(outputs)["reward_chosen"] == pytest.approx(13.8155 - math.log(math.e - 1), abs=1e-4)


def kto_inputs(ratios: Sequence[float], desirable: Sequence[bool], **options: Any) -> KtoInputs:
    """Responses that are so many nats more likely than under the reference."""
    settings = {"baseline": torch.tensor(2.0, dtype=torch.float64), "beta": 0.5, **options}
    return KtoInputs(
        logprobs=column([ratio - 30.0 for ratio in ratios], gradient=True),
        ref_logprobs=column([-30.0] * len(ratios)),
        lengths=torch.arange(1, len(ratios) + 1),
        desirable=torch.tensor(desirable, dtype=torch.bool),
        **settings,
    )


def test_kto_golden_numbers_and_gradient() -> None:
    # beta * (r - z) = 0.5 * (2 + 2 ln 3 - 2) = ln 3 for both: 1 - 3/4 if desirable, 3/4 if not, times weights 2 and 4.
    ratio = 2 + 2 * LN3
    inputs = kto_inputs([ratio, ratio], [True, False], desirable_weight=2.0, undesirable_weight=4.0)
    outputs = kto(inputs)
    assert outputs.loss.tolist() == pytest.approx([2 * 1 / 4, 4 * 3 / 4])
    # -w * beta * s * (1 - s) = -2 * 0.5 * 3/16, and 4 * 0.5 * 3/16
    (gradient,) = torch.autograd.grad(outputs.loss.sum(), inputs.logprobs)
    assert gradient.tolist() == pytest.approx([-3 / 16, 6 / 16])


def test_what_kto_logs_of_its_responses() -> None:
    # Rewards 0.5 * 4, 0.5 * -6, 0.5 * 1; lengths 1, 2, 3; baseline 2 for each of three.
    assert logged(kto(kto_inputs([4.0, -6.0, 1.0], [True, False, True]))) == pytest.approx(
        {
            "desirable": 2.0,
            "reward_desirable": 2.5,
            "reward_undesirable": -3.0,
            "length_desirable": 4.0,
            "length_undesirable": 2.0,
            "kl": 6.0,
        }
    )


def test_the_kl_baseline_is_the_mean_log_ratio_of_mismatched_responses_and_never_negative() -> None:
    reference = column([-30.0] * 3)
    # 1, -3 and 5: mean 1. Then 1, -3 and -1: mean -1, cut to 0.
    assert float(kl_baseline(column([-29.0, -33.0, -25.0]), reference)) == 1.0
    assert float(kl_baseline(column([-29.0, -33.0, -31.0]), reference)) == 0.0
    assert not kl_baseline(column([-29.0, -33.0, -25.0], gradient=True), reference).requires_grad


def test_a_desirable_response_far_above_the_baseline_still_has_a_loss() -> None:
    # s(-40) = e^-40 / (1 + e^-40): one minus the sigmoid would be 0 here.
    outputs = kto(kto_inputs([42.0], [True], beta=1.0))
    assert outputs.loss.tolist() == pytest.approx([math.exp(-40)], rel=1e-9, abs=0)


def test_bradley_terry_golden_numbers_and_gradient() -> None:
    # Differences ln 3 and 1 + ln 3, of which a margin of 1 leaves ln 3; s(ln 3) = 3/4 for both.
    chosen, rejected = column([2 + LN3, 1.0], gradient=True), column([2.0, -LN3], gradient=True)
    outputs = bradley_terry(RewardPairs(chosen_rewards=chosen, rejected_rewards=rejected, margins=column([0.0, 1.0])))
    assert outputs.loss.tolist() == pytest.approx([math.log(4 / 3)] * 2)
    found = torch.autograd.grad(outputs.loss.sum(), [chosen, rejected])
    assert [gradient.tolist() for gradient in found] == [pytest.approx([-1 / 4] * 2), pytest.approx([1 / 4] * 2)]
    assert logged(outputs) == pytest.approx(
        {"reward_chosen": 3 + LN3, "reward_rejected": 2 - LN3, "reward_margin": 1 + 2 * LN3, "accuracy": 2.0}
    )


def test_equal_rewards_have_the_loss_of_a_coin() -> None:
    inputs = RewardPairs(chosen_rewards=column([7.0]), rejected_rewards=column([7.0]))
    assert bradley_terry(inputs).loss.tolist() == pytest.approx([math.log(2)])


def test_the_gradient_of_dpo_in_closed_form() -> None:
    inputs = random_pairs(label_smoothing=0.15)
    difference = inputs.beta * log_ratio_difference(inputs)
    # d/dh of -(1 - e) log s(h) - e log s(-h) is s(h) - (1 - e)
    slope = inputs.beta * (torch.sigmoid(difference) - 0.85)
    chosen, rejected = gradients(dpo(inputs), inputs)
    assert chosen == pytest.approx(slope.tolist())
    assert rejected == pytest.approx((-slope).tolist())


def test_the_gradient_of_simpo_in_closed_form() -> None:
    inputs = random_pairs(gamma=0.7)
    chosen_mean = inputs.chosen_logprobs.detach() / inputs.chosen_lengths
    rejected_mean = inputs.rejected_logprobs.detach() / inputs.rejected_lengths
    slope = inputs.beta * torch.sigmoid(-(inputs.beta * (chosen_mean - rejected_mean) - 0.7))
    chosen, rejected = gradients(simpo(inputs), inputs)
    assert chosen == pytest.approx((-slope / inputs.chosen_lengths).tolist())
    assert rejected == pytest.approx((slope / inputs.rejected_lengths).tolist())


@pytest.mark.parametrize("loss", PAIRED)
def test_gradients_agree_with_finite_differences(loss: Any) -> None:
    inputs = random_pairs()

    def of(chosen: Tensor, rejected: Tensor) -> Tensor:
        values: Tensor = loss(replace(inputs, chosen_logprobs=chosen, rejected_logprobs=rejected)).loss
        return values

    assert torch.autograd.gradcheck(of, (inputs.chosen_logprobs, inputs.rejected_logprobs))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_swapping_the_sides_changes_the_logistic_losses_by_the_difference(smoothing: float) -> None:
    """`-log s(h) + log s(-h) = -h`, so a label costs as much as it says."""
    inputs = random_pairs(label_smoothing=smoothing)
    difference = inputs.beta * log_ratio_difference(inputs)
    changes = {loss: loss(inputs).loss - loss(swapped(inputs)).loss for loss in (dpo, robust_dpo)}
    assert torch.allclose(changes[dpo], -(1 - 2 * smoothing) * difference)
    assert torch.allclose(changes[robust_dpo], -difference / (1 - 2 * smoothing))


def test_swapping_the_sides_changes_ipo_by_twice_the_difference_over_beta() -> None:
    # (d - c)^2 - (d + c)^2 = -4 d c, with c = 1 / (2 beta)
    inputs = random_pairs()
    margin = (ipo(inputs).sums["reward_margin"] / inputs.beta).item()
    change = (ipo(inputs).loss - ipo(swapped(inputs)).loss).sum().item()
    assert change == pytest.approx(-2 * margin / inputs.beta)


@pytest.mark.parametrize("loss", PAIRED)
def test_swapping_the_sides_turns_margin_and_accuracy_round(loss: Any) -> None:
    right, wrong = logged(loss(random_pairs())), logged(loss(swapped(random_pairs())))
    assert wrong["reward_margin"] == pytest.approx(-right["reward_margin"])
    assert wrong["accuracy"] == 6 - right["accuracy"]
    assert wrong["length_chosen"] == right["length_rejected"]


@pytest.mark.parametrize("loss", [dpo, robust_dpo])
def test_dpo_sees_only_the_difference_of_the_two_sides(loss: Any) -> None:
    inputs = random_pairs()
    shifted = replace(
        inputs, chosen_logprobs=inputs.chosen_logprobs - 5, rejected_logprobs=inputs.rejected_logprobs - 5
    )
    assert torch.allclose(loss(shifted).loss, loss(inputs).loss)


@pytest.mark.parametrize("loss", WITH_REFERENCE)
def test_a_response_that_both_policies_find_less_likely_is_the_same_pair(loss: Any) -> None:
    inputs = random_pairs()
    assert inputs.ref_chosen_logprobs is not None
    shifted = replace(
        inputs, chosen_logprobs=inputs.chosen_logprobs - 5, ref_chosen_logprobs=inputs.ref_chosen_logprobs - 5
    )
    assert torch.allclose(loss(shifted).loss, loss(inputs).loss)


@pytest.mark.parametrize("loss", [ipo, simpo])
def test_losses_per_token_see_only_the_difference_per_token(loss: Any) -> None:
    inputs = random_pairs()
    shifted = replace(
        inputs,
        chosen_logprobs=inputs.chosen_logprobs - 0.5 * inputs.chosen_lengths,
        rejected_logprobs=inputs.rejected_logprobs - 0.5 * inputs.rejected_lengths,
    )
    assert torch.allclose(loss(shifted).loss, loss(inputs).loss)
    assert not torch.allclose(orpo(shifted).loss, orpo(inputs).loss)  # odds are no differences of log-probs


@pytest.mark.parametrize("loss", [simpo, orpo])
def test_a_loss_without_a_reference_does_not_look_at_one(loss: Any) -> None:
    inputs = random_pairs()
    alone = replace(inputs, ref_chosen_logprobs=None, ref_rejected_logprobs=None)
    assert torch.equal(loss(inputs).loss, loss(alone).loss)


@pytest.mark.parametrize("loss", PAIRED)
def test_logged_sums_of_pairs_carry_no_gradient(loss: Any) -> None:
    assert not any(value.requires_grad for value in loss(random_pairs()).sums.values())


def test_logged_sums_of_rewards_carry_no_gradient() -> None:
    rewards = RewardPairs(chosen_rewards=column([1.0], gradient=True), rejected_rewards=column([2.0], gradient=True))
    sums = [*bradley_terry(rewards).sums.values(), *kto(kto_inputs([1.0], [True])).sums.values()]
    assert not any(value.requires_grad for value in sums)


@pytest.mark.parametrize("loss", PAIRED)
def test_pairs_do_not_mix(loss: Any) -> None:
    """The losses and the sums of a batch are those of its parts, so its cut does not matter."""
    inputs = random_pairs()
    names = [
        f"{prefix}{side}_{kind}"
        for prefix, kind in (("", "logprobs"), ("ref_", "logprobs"), ("", "lengths"))
        for side in ("chosen", "rejected")
    ]
    whole = loss(inputs)
    parts = [
        loss(replace(inputs, **{name: getattr(inputs, name)[part] for name in names}))
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(torch.cat([part.loss for part in parts]), whole.loss)
    for name, value in whole.sums.items():
        assert float(parts[0].sums[name] + parts[1].sums[name]) == pytest.approx(float(value)), name


@pytest.mark.parametrize("loss", PAIRED)
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4), (-1e-4, -1e4)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_loss_and_no_gradient_overflows_in_float32(
    loss: Any, chosen: float, rejected: float, smoothing: float
) -> None:
    """Log-ratios of up to 1e4 either way, with a beta of 1 and in a single token."""
    inputs = PreferenceInputs(
        chosen_logprobs=torch.tensor([chosen], requires_grad=True),
        rejected_logprobs=torch.tensor([rejected], requires_grad=True),
        ref_chosen_logprobs=torch.tensor([-1.0]),
        ref_rejected_logprobs=torch.tensor([-1.0]),
        chosen_lengths=torch.tensor([1]),
        rejected_lengths=torch.tensor([1]),
        beta=1.0,
        label_smoothing=smoothing if loss in (dpo, robust_dpo) else 0.0,
    )
    outputs = loss(inputs)
    by_chosen, by_rejected = gradients(outputs, inputs)
    values = [*outputs.loss.tolist(), *logged(outputs).values(), *by_chosen, *by_rejected]
    assert all(math.isfinite(value) for value in values)


def test_a_wrong_pair_at_the_extreme_has_a_linear_loss_and_the_full_gradient() -> None:
    # h = 1 * (-1e4 - 0): -log s(h) = 1e4, slope -1; the other way round both are 0.
    wrong = pairs([-1e4, 0.0], [0.0, -1e4], reference=([0.0, 0.0], [0.0, 0.0]), beta=1.0)
    outputs = dpo(wrong)
    assert outputs.loss.tolist() == [1e4, 0.0]
    assert gradients(outputs, wrong)[0] == [-1.0, 0.0]


@pytest.mark.parametrize("ratio", [-1e4, 1e4])
def test_kto_and_bradley_terry_hold_at_the_extremes(ratio: float) -> None:
    inputs = kto_inputs([ratio, ratio], [True, False], beta=1.0)
    assert kto(inputs).loss.tolist() == ([1.0, 0.0] if ratio < 0 else [0.0, 1.0])
    chosen, rejected = column([ratio], gradient=True), column([0.0], gradient=True)
    loss = bradley_terry(RewardPairs(chosen_rewards=chosen, rejected_rewards=rejected)).loss
    assert loss.tolist() == [max(0.0, -ratio)]
    found = torch.autograd.grad(loss.sum() + kto(inputs).loss.sum(), [chosen, inputs.logprobs])
    assert all(torch.isfinite(gradient).all() for gradient in found)


@pytest.mark.parametrize("loss", PAIRED)
def test_a_log_prob_that_is_no_number_is_not_hidden(loss: Any) -> None:
    outputs = loss(pairs([math.nan, -1.0], [-1.0, -2.0], reference=([-1.0, -1.0], [-1.0, -1.0])))
    assert [math.isnan(value) for value in outputs.loss.tolist()] == [True, False]


@pytest.mark.parametrize("loss", PAIRED)
def test_the_loss_of_no_pair_is_empty_and_can_be_differentiated(loss: Any) -> None:
    inputs = pairs([], [], reference=([], []))
    outputs = loss(inputs)
    assert outputs.loss.shape == (0,)
    assert gradients(outputs, inputs) == ([], [])
    assert set(logged(outputs).values()) == {0.0}


def test_sequence_sums_of_interleaved_tokens() -> None:
    # Sequence 0: -1 - 4, sequence 1: -2 - 3 - 5, sequence 2 has no token, sequence 3: -6.
    logprobs = column([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], gradient=True)
    sums, lengths = sequence_sums(logprobs, torch.tensor([0, 1, 1, 0, 1, 3]), num_sequences=4)
    assert (sums.tolist(), lengths.tolist()) == ([-5.0, -10.0, 0.0, -6.0], [2, 3, 0, 1])
    # A gradient by a sum goes to all of its tokens.
    (gradient,) = torch.autograd.grad((sums * column([1.0, 2.0, 3.0, 4.0])).sum(), logprobs)
    assert gradient.tolist() == [1.0, 2.0, 2.0, 1.0, 2.0, 4.0]


def test_from_the_log_probs_of_packed_tokens_to_a_gradient_by_token() -> None:
    # Chosen: tokens 0 and 1, rejected: tokens 2 to 4. The policy is its reference, so h = 0 and the slope is -beta / 2.
    logprobs = column([-1.0, -2.0, -0.5, -0.5, -4.0], gradient=True)
    sequences = torch.tensor([0, 0, 1, 1, 1])
    sums, lengths = sequence_sums(logprobs, sequences, num_sequences=2)
    reference, _ = sequence_sums(logprobs.detach(), sequences, num_sequences=2)
    inputs = PreferenceInputs(
        chosen_logprobs=sums[:1],
        rejected_logprobs=sums[1:],
        ref_chosen_logprobs=reference[:1],
        ref_rejected_logprobs=reference[1:],
        chosen_lengths=lengths[:1],
        rejected_lengths=lengths[1:],
        beta=0.4,
    )
    outputs = dpo(inputs)
    assert outputs.loss.tolist() == pytest.approx([math.log(2)])
    assert float(outputs.sums["accuracy"]) == 0.0
    (gradient,) = torch.autograd.grad(outputs.loss.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([-0.2, -0.2, 0.2, 0.2, 0.2])


def test_sequence_sums_of_nothing() -> None:
    sums, lengths = sequence_sums(column([]), torch.zeros(0, dtype=torch.int64), num_sequences=2)
    assert (sums.tolist(), lengths.tolist()) == ([0.0, 0.0], [0, 0])


@pytest.mark.parametrize("sequences", [[0, 2], [-1, 0]])
def test_a_token_of_a_sequence_that_is_not_there_is_refused(sequences: list[int]) -> None:
    with pytest.raises(ValueError, match=r"tokens belong to sequences .* but there are 2"):
        sequence_sums(column([-1.0, -1.0]), torch.tensor(sequences), num_sequences=2)


def test_tokens_that_do_not_match_their_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens share one axis, row by row, got .*'logprobs': \[1\]"):
        sequence_sums(column([-1.0]), torch.tensor([0, 1]), num_sequences=2)


@pytest.mark.parametrize("loss", WITH_REFERENCE)
def test_a_missing_reference_is_named_with_the_losses_that_need_none(loss: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{loss.__name__} compares with a reference.*simpo or orpo"):
        loss(pairs([-1.0], [-2.0]))


@pytest.mark.parametrize("loss", [dpo, robust_dpo, ipo, orpo])
def test_a_margin_that_would_be_ignored_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{loss.__name__} has no margin, got gamma 0.5"):
        loss(random_pairs(gamma=0.5))


@pytest.mark.parametrize("loss", [ipo, simpo, orpo])
def test_label_smoothing_that_would_be_ignored_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{loss.__name__} smooths no labels, got label_smoothing 0.1"):
        loss(random_pairs(label_smoothing=0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0 and finite, got 0.0"),
        ({"beta": -0.1}, "beta must be above 0 and finite, got -0.1"),
        ({"beta": math.nan}, "beta must be above 0 and finite, got nan"),
        ({"beta": math.inf}, "beta must be above 0 and finite, got inf"),
        ({"label_smoothing": 0.5}, "from 0 to below 0.5, got 0.5; .*swap chosen and rejected"),
        ({"label_smoothing": -0.1}, "from 0 to below 0.5, got -0.1"),
        ({"label_smoothing": math.nan}, "from 0 to below 0.5, got nan"),
        ({"gamma": -1.0}, "not negative, got -1.0"),
        ({"gamma": math.inf}, "not negative, got inf"),
        ({"ref_chosen_logprobs": None}, "ref_chosen_logprobs is None; give both or neither"),
        ({"ref_rejected_logprobs": None}, "ref_rejected_logprobs is None; give both or neither"),
        ({"rejected_logprobs": torch.zeros(3)}, r"pairs share one axis.*'rejected_logprobs': \[3\]"),
        ({"rejected_lengths": torch.ones(1, dtype=torch.int64)}, r"pairs share one axis.*'rejected_lengths': \[1\]"),
        ({"chosen_logprobs": torch.zeros(2, 1)}, r"pairs share one axis.*'chosen_logprobs': \[2, 1\]"),
        ({"chosen_logprobs": torch.tensor(0.0)}, r"pairs share one axis.*'chosen_logprobs': \[\]"),
        ({"rejected_lengths": torch.tensor([4, 0])}, r"rejected_lengths\[1\] is 0: .* drop it with its pair"),
        ({"chosen_lengths": torch.tensor([-2, 4])}, r"chosen_lengths\[0\] is -2"),
        ({"chosen_lengths": torch.tensor([2.0, 4.0])}, "chosen_lengths counts tokens, got torch.float32"),
        ({"chosen_lengths": torch.tensor([True, True])}, "chosen_lengths counts tokens, got torch.bool"),
        ({"chosen_logprobs": torch.zeros(2, dtype=torch.bfloat16)}, "chosen_logprobs is torch.bfloat16"),
        ({"rejected_logprobs": torch.zeros(2, dtype=torch.int64)}, "rejected_logprobs is torch.int64"),
        (
            {"ref_chosen_logprobs": torch.zeros(2, requires_grad=True)},
            r"ref_chosen_logprobs carries a gradient; compute it under torch.no_grad\(\)",
        ),
    ],
)
def test_pairs_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    good = random_pairs(2)
    with pytest.raises(ValueError, match=message):
        replace(good, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"desirable_weight": 0.0}, "desirable_weight must be above 0 and finite, got 0.0"),
        ({"undesirable_weight": -1.0}, "undesirable_weight must be above 0 and finite, got -1.0"),
        ({"lengths": torch.tensor([1, 0])}, r"lengths\[1\] is 0"),
        ({"desirable": torch.tensor([1, 0])}, "desirable is a bool for each response, got torch.int64"),
        ({"desirable": torch.tensor([True])}, r"responses share one axis.*'desirable': \[1\]"),
        ({"baseline": torch.zeros(2)}, r"the baseline is one number for all responses, got shape \[2\]"),
        ({"baseline": torch.tensor(0.0, requires_grad=True)}, "baseline carries a gradient"),
        ({"ref_logprobs": torch.zeros(2, requires_grad=True)}, "ref_logprobs carries a gradient"),
        ({"logprobs": torch.zeros(2, dtype=torch.float16)}, "logprobs is torch.float16"),
    ],
)
def test_responses_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    good = kto_inputs([1.0, 2.0], [True, False])
    with pytest.raises(ValueError, match=message):
        replace(good, **changes)


def test_reward_pairs_that_cannot_be_meant_are_refused() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"pairs share one axis.*'margins': \[2\]"):
        RewardPairs(chosen_rewards=one, rejected_rewards=one, margins=torch.zeros(2))
    with pytest.raises(ValueError, match="margins carries a gradient"):
        RewardPairs(chosen_rewards=one, rejected_rewards=one, margins=torch.zeros(1, requires_grad=True))
    with pytest.raises(ValueError, match=r"rejected_rewards is torch\.bfloat16"):
        RewardPairs(chosen_rewards=one, rejected_rewards=one.bfloat16())


def test_a_kl_baseline_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mean over mismatched responses, got none"):
        kl_baseline(column([]), column([]))
