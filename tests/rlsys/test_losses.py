"""Losses: golden numbers worked by hand, and where their gradients begin and end."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.losses import LossInputs, LossOutputs, cispo, clipped_policy_gradient, cross_entropy, gspo

POLICY_LOSSES = [clipped_policy_gradient, gspo, cispo]
ALL = [*POLICY_LOSSES, cross_entropy]


def policy_gradient(
    ratios: list[float],
    advantages: list[float],
    *,
    loss: Any = clipped_policy_gradient,
    sequences: list[int] | None = None,
    **options: Any,
) -> tuple[LossOutputs, Tensor]:
    """The summed loss where the current policy is `ratios` times the one that sampled, and its gradient by log-prob."""
    logprobs = torch.tensor([math.log(ratio) - 2.0 for ratio in ratios], dtype=torch.float64, requires_grad=True)
    outputs = loss(
        LossInputs(
            logprobs=logprobs,
            rollout_logprobs=torch.full_like(logprobs, -2.0).detach(),
            advantages=torch.tensor(advantages, dtype=torch.float64),
            sequences=torch.tensor(sequences or [0] * len(ratios)),
            **options,
        )
    )
    assert outputs.loss.shape == logprobs.shape
    (gradient,) = torch.autograd.grad(outputs.loss.sum(), logprobs)
    return LossOutputs(loss=outputs.loss.detach().sum(), sums=outputs.sums), gradient


def test_inside_the_trust_region_the_loss_is_minus_ratio_times_advantage() -> None:
    # -(1.1 * 2) - (0.9 * -3) = -2.2 + 2.7
    outputs, _ = policy_gradient([1.1, 0.9], [2.0, -3.0])
    assert float(outputs.loss) == pytest.approx(0.5)
    assert float(outputs.sums["clip_fraction"]) == 0
    assert float(outputs.sums["ratio"]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # clip_low 0.2, clip_high 0.4: the ratio counts from 0.8 to 1.4.
        (2.0, 1.0, -1.4, 0.0),  # min(2.0, 1.4 * 1)
        (0.5, 1.0, -0.5, -0.5),  # min(0.5, 0.8): pulled back up, so not clipped
        (2.0, -1.0, 2.0, 2.0),  # min(-2.0, -1.4): pushed back down, so not clipped
        (0.5, -1.0, 0.8, 0.0),  # min(-0.5, -0.8)
        (1.3, 2.0, -2.6, -2.6),  # outside a symmetric 0.2, inside clip_high
        (0.75, -2.0, 1.6, 0.0),  # inside a symmetric 0.4, outside clip_low: min(-1.5, -1.6)
    ],
)
def test_the_asymmetric_clip_of_both_signs(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    outputs, found = policy_gradient([ratio], [advantage], clip_low=0.2, clip_high=0.4)
    assert float(outputs.loss) == pytest.approx(loss)
    assert float(found) == pytest.approx(gradient)
    assert float(outputs.sums["clip_fraction"]) == (gradient == 0)


def test_at_ratio_one_the_gradient_is_minus_the_advantage_times_that_of_the_log_prob() -> None:
    weight = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    logprobs = weight.log_softmax(0)
    advantages = torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64)
    outputs = clipped_policy_gradient(
        LossInputs(
            logprobs=logprobs,
            rollout_logprobs=logprobs.detach(),
            advantages=advantages,
            sequences=torch.zeros(3, dtype=torch.int64),
        )
    )
    (found,) = torch.autograd.grad(outputs.loss.sum(), weight)
    # d logp_i / d w_j = [i = j] - p_j, so the gradient is -A_j + sum(A) p_j; sum(A) = 0 here.
    assert torch.allclose(found, -advantages)
    assert float(outputs.loss.detach().sum()) == pytest.approx(0.0)


def test_kl_golden_numbers_and_gradient() -> None:
    # d = ref - current = ln 2, -ln 2, 0: exp(d) - d - 1 = 2 - ln 2 - 1, 0.5 + ln 2 - 1, 0; their sum is 0.5.
    reference = torch.tensor([math.log(2) - 2, -math.log(2) - 2, -2.0], dtype=torch.float64)
    outputs, gradient = policy_gradient([1.0] * 3, [0.0] * 3, ref_logprobs=reference, kl_coef=0.1)
    assert float(outputs.sums["kl"]) == pytest.approx(0.5)
    assert float(outputs.loss) == pytest.approx(0.05)
    # d KL / d current = 1 - exp(d) = -1, 0.5, 0, times the coefficient
    assert gradient.tolist() == pytest.approx([-0.1, 0.05, 0.0])


def test_a_kl_of_weight_zero_is_measured_and_does_not_train() -> None:
    reference = torch.tensor([-1.0], dtype=torch.float64)
    outputs, gradient = policy_gradient([1.0], [0.0], ref_logprobs=reference)
    assert float(outputs.sums["kl"]) == pytest.approx(math.e - 2)
    assert (float(outputs.loss), float(gradient)) == (0.0, 0.0)


def test_without_a_reference_no_kl_is_reported() -> None:
    outputs, _ = policy_gradient([1.0], [1.0], kl_coef=0.5)
    assert "kl" not in outputs.sums
    assert float(outputs.loss) == pytest.approx(-1.0)


def test_logged_sums_carry_no_gradient() -> None:
    outputs, _ = policy_gradient([1.1], [1.0], ref_logprobs=torch.tensor([-1.0], dtype=torch.float64))
    assert sorted(outputs.sums) == ["clip_fraction", "kl", "ratio"]
    assert not any(value.requires_grad for value in outputs.sums.values())


def test_k2_golden_numbers_and_gradient() -> None:
    # d = ln 2, -ln 2: d^2 / 2 twice is (ln 2)^2; its gradient by the current log-prob is -d.
    reference = torch.tensor([math.log(2) - 2, -math.log(2) - 2], dtype=torch.float64)
    outputs, gradient = policy_gradient([1.0] * 2, [0.0] * 2, ref_logprobs=reference, kl_coef=0.1, kl_estimator="k2")
    assert float(outputs.sums["kl"]) == pytest.approx(math.log(2) ** 2)
    assert gradient.tolist() == pytest.approx([-0.1 * math.log(2), 0.1 * math.log(2)])


def test_gspo_has_one_ratio_for_a_sequence() -> None:
    # Sequence 0: ratios 2 and 1/2, geometric mean 1, A = 1. Sequence 1: ratio 1.5 alone, A = -2: -min(-3, -2.4) = 3.
    outputs, gradient = policy_gradient([2.0, 1.5, 0.5], [1.0, -2.0, 1.0], loss=gspo, sequences=[0, 1, 0])
    assert float(outputs.loss) == pytest.approx(-1.0 + 3.0 - 1.0)
    assert float(outputs.sums["ratio"]) == pytest.approx(1.0 + 1.5 + 1.0)
    # Two tokens carry -s * A each, and each depends on both log-probs by half: -1 for either.
    assert gradient.tolist() == pytest.approx([-1.0, 3.0, -1.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "clipped"),
    [
        (1.1, 2.0, -2.2, 0.0),
        (3.0, 2.0, -2.8, 1.0),  # the weight stops at 1.4, and the token still trains
        (3.0, -2.0, 2.8, 1.0),
        (0.5, 1.0, -0.8, 1.0),  # clip_low 0.2
    ],
)
def test_cispo_bounds_the_weight_of_a_token_and_trains_it_all_the_same(
    ratio: float, advantage: float, gradient: float, clipped: float
) -> None:
    outputs, found = policy_gradient([ratio], [advantage], loss=cispo, clip_low=0.2, clip_high=0.4)
    assert float(found) == pytest.approx(gradient)
    assert float(outputs.sums["clip_fraction"]) == clipped


def test_cispo_with_clip_low_one_is_truncated_importance_sampling() -> None:
    _, found = policy_gradient([0.01, 9.0], [1.0, 1.0], loss=cispo, clip_low=1.0, clip_high=1.0)
    assert found.tolist() == pytest.approx([-0.01, -2.0])


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_on_policy_all_policy_losses_have_the_same_gradient(loss: Any) -> None:
    """At ratio 1 with one advantage for a sequence: minus the advantage."""
    _, gradient = policy_gradient([1.0] * 5, [0.5, 0.5, -2.0, -2.0, -2.0], loss=loss, sequences=[0, 0, 1, 1, 1])
    assert gradient.tolist() == pytest.approx([-0.5, -0.5, 2.0, 2.0, 2.0])


def test_cross_entropy_is_the_negative_log_prob_of_each_token() -> None:
    logprobs = torch.tensor([-0.5, -1.25, -3.0], requires_grad=True)
    zeros = torch.zeros(3)
    inputs = LossInputs(logprobs=logprobs, rollout_logprobs=zeros, advantages=zeros, sequences=zeros.long())
    loss = cross_entropy(inputs).loss
    assert loss.tolist() == [0.5, 1.25, 3.0]
    assert torch.autograd.grad(loss.sum(), logprobs)[0].tolist() == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize("loss", ALL)
def test_the_loss_of_no_token_is_empty_and_can_be_differentiated(loss: Any) -> None:
    logprobs = torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0)
    inputs = LossInputs(logprobs=logprobs, rollout_logprobs=empty, advantages=empty, sequences=empty.long())
    found = loss(inputs).loss
    found.sum().backward()
    assert found.shape == (0,)


@pytest.mark.parametrize("loss", ALL)
def test_sequences_do_not_mix(loss: Any) -> None:
    """The losses of a micro-batch are those of its sequences alone, so its cut does not matter."""
    torch.manual_seed(0)
    logprobs, rollout_logprobs, advantages, reference = torch.randn(4, 12, dtype=torch.float64)
    sequences = torch.tensor([0] * 5 + [1] * 7)

    def of(part: slice) -> list[float]:
        inputs = LossInputs(
            logprobs=logprobs[part],
            rollout_logprobs=rollout_logprobs[part],
            advantages=advantages[part],
            sequences=sequences[part] - sequences[part].min(),
            ref_logprobs=reference[part],
            kl_coef=0.3,
        )
        values: list[float] = loss(inputs).loss.tolist()
        return values

    assert of(slice(0, 12)) == pytest.approx([*of(slice(0, 5)), *of(slice(5, 12))])
