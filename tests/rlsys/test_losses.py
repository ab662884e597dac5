"""Losses: golden numbers worked by hand, and where their gradients begin and end."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.losses import (
    LossInputs,
    LossOutputs,
    cispo,
    clipped_policy_gradient,
    correction_factor,
    cross_entropy,
    gspo,
    value_loss,
)

POLICY_LOSSES = [clipped_policy_gradient, gspo, cispo]
ALL = [*POLICY_LOSSES, cross_entropy, value_loss]
CORRECTIONS = ["none", "truncated", "masked", "sequence_truncated", "sequence_masked"]


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


@pytest.mark.parametrize("options", [{}, *({"trust_region": "proximal", "correction": kind} for kind in CORRECTIONS)])
@pytest.mark.parametrize("loss", ALL)
def test_sequences_do_not_mix(loss: Any, options: dict[str, Any]) -> None:
    """The losses of a micro-batch are those of its sequences alone, so its cut does not matter."""
    torch.manual_seed(0)
    logprobs, rollout_logprobs, proximal, advantages, reference, entropy = torch.randn(6, 12, dtype=torch.float64)
    sequences = torch.tensor([0] * 5 + [1] * 7)

    def of(part: slice) -> list[float]:
        inputs = LossInputs(
            logprobs=logprobs[part],
            rollout_logprobs=rollout_logprobs[part],
            advantages=advantages[part],
            sequences=sequences[part] - sequences[part].min(),
            ref_logprobs=reference[part],
            proximal_logprobs=proximal[part],
            entropy=entropy[part],
            kl_coef=0.3,
            entropy_coef=0.1,
            value_clip=0.2,
            **options,
        )
        values: list[float] = loss(inputs).loss.tolist()
        return values

    assert of(slice(0, 12)) == pytest.approx([*of(slice(0, 5)), *of(slice(5, 12))])


# --- a trust region around the proximal policy -----------------------------------------------------------------------


def shifted(factors: list[float]) -> Tensor:
    """Log-probs of a proximal policy that is `factors` times the one that sampled."""
    return torch.tensor([math.log(factor) - 2.0 for factor in factors], dtype=torch.float64)


@pytest.mark.parametrize(
    ("over_rollout", "factor", "advantage", "loss", "gradient"),
    [
        # The ratio over the proximal policy is over_rollout / factor; clip 0.2 on both sides.
        (0.55, 0.5, 2.0, -1.1, -1.1),  # ratio 1.1: -0.5 * 1.1 * 2
        (0.75, 0.5, 2.0, -1.2, 0.0),  # ratio 1.5: -0.5 * min(1.5 * 2, 1.2 * 2)
        (3.0, 3.0, 1.0, -3.0, -3.0),  # ratio 1, however far the policy went since the token was written
        (0.5, 1.0, -1.0, 0.8, 0.0),  # ratio 0.5: -min(-0.5, -0.8)
    ],
)
def test_decoupled_golden_numbers(
    over_rollout: float, factor: float, advantage: float, loss: float, gradient: float
) -> None:
    outputs, found = policy_gradient(
        [over_rollout], [advantage], trust_region="proximal", proximal_logprobs=shifted([factor])
    )
    assert float(outputs.loss) == pytest.approx(loss)
    assert float(found) == pytest.approx(gradient)
    assert float(outputs.sums["correction"]) == pytest.approx(factor)
    assert float(outputs.sums["clip_fraction"]) == (gradient == 0)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_a_proximal_policy_that_sampled_is_the_usual_trust_region(loss: Any) -> None:
    ratios, advantages = [2.0, 0.5, 1.1, 0.9], [1.0, -1.0, 2.0, -3.0]
    usual, usual_gradient = policy_gradient(ratios, advantages, loss=loss, sequences=[0, 0, 1, 1])
    same, gradient = policy_gradient(
        ratios,
        advantages,
        loss=loss,
        sequences=[0, 0, 1, 1],
        trust_region="proximal",
        proximal_logprobs=shifted([1.0] * 4),
    )
    assert float(same.loss) == pytest.approx(float(usual.loss))
    assert gradient.tolist() == pytest.approx(usual_gradient.tolist())


def test_in_the_only_update_the_proximal_policy_is_the_current_one() -> None:
    """The ratio is 1 and the factor current / rollout, without a gradient: -f * A and its gradient -f * A."""
    outputs, gradient = policy_gradient([0.5, 3.0], [1.0, -2.0], trust_region="proximal")
    assert float(outputs.loss) == pytest.approx(-0.5 + 6.0)
    assert gradient.tolist() == pytest.approx([-0.5, 6.0])
    assert float(outputs.sums["ratio"]) == pytest.approx(2.0)
    assert float(outputs.sums["clip_fraction"]) == 0.0


@pytest.mark.parametrize(
    ("correction", "factors", "cut"),
    [
        # The products of the two sequences are 0.4 * 4 * 1 = 1.6 and 6 * 0.5 = 3.
        ("none", [0.4, 4.0, 1.0, 6.0, 0.5], [False] * 5),
        ("truncated", [0.4, 2.0, 1.0, 2.0, 0.5], [False, True, False, True, False]),
        ("masked", [0.0, 0.0, 1.0, 0.0, 0.5], [True, True, False, True, False]),
        ("sequence_truncated", [1.6, 1.6, 1.6, 2.0, 2.0], [False] * 3 + [True] * 2),
        ("sequence_masked", [1.6, 1.6, 1.6, 0.0, 0.0], [False] * 3 + [True] * 2),
    ],
)
def test_corrections_golden_numbers(correction: Any, factors: list[float], cut: list[bool]) -> None:
    proximal = torch.log(torch.tensor([0.4, 4.0, 1.0, 6.0, 0.5], dtype=torch.float64))
    inputs = LossInputs(
        logprobs=torch.zeros(5, dtype=torch.float64),
        rollout_logprobs=torch.zeros(5, dtype=torch.float64),
        proximal_logprobs=proximal,
        advantages=torch.zeros(5),
        sequences=torch.tensor([0, 0, 0, 1, 1]),
        correction=correction,
        correction_limit=2.0,
        correction_floor=0.5 - 1e-9,
    )
    found, where = correction_factor(inputs)
    assert found.tolist() == pytest.approx(factors)
    assert where.tolist() == cut


def test_a_correction_weighs_the_gain_and_not_the_penalties() -> None:
    # Factor 6, truncated to 2: loss -2 * A. The k3 of d = ln 2 is 1 - ln 2, the entropy 3.
    outputs, _ = policy_gradient(
        [6.0],
        [1.0],
        trust_region="proximal",
        correction="truncated",
        ref_logprobs=shifted([12.0]),
        kl_coef=0.5,
        entropy=torch.tensor([3.0], dtype=torch.float64),
        entropy_coef=0.1,
    )
    assert float(outputs.loss) == pytest.approx(-2.0 + 0.5 * (1 - math.log(2)) - 0.3)
    assert float(outputs.sums["correction"]) == pytest.approx(2.0)
    assert float(outputs.sums["correction_cut"]) == 1.0


@pytest.mark.parametrize("correction", ["sequence_truncated", "sequence_masked"])
def test_the_product_over_a_long_sequence_may_overflow_and_the_loss_stays_a_number(correction: Any) -> None:
    outputs, gradient = policy_gradient([math.e] * 2000, [1.0] * 2000, trust_region="proximal", correction=correction)
    assert math.isfinite(float(outputs.loss))
    assert torch.isfinite(gradient).all()
    assert float(outputs.sums["correction_cut"]) == 2000


def test_a_masked_token_does_not_train() -> None:
    _, gradient = policy_gradient([9.0, 1.0, 0.1], [1.0] * 3, trust_region="proximal", correction="masked")
    assert gradient.tolist() == pytest.approx([0.0, -1.0, 0.0])


def test_an_entropy_bonus_is_taken_off_the_loss_and_trains() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    entropy = -(logprobs.exp() * logprobs).sum()[None]
    inputs = LossInputs(
        logprobs=logprobs[:1],
        rollout_logprobs=logprobs[:1].detach(),
        advantages=torch.zeros(1),
        sequences=torch.zeros(1, dtype=torch.int64),
        entropy=entropy,
        entropy_coef=0.25,
    )
    loss = clipped_policy_gradient(inputs).loss
    assert float(loss.detach()) == pytest.approx(-0.25 * float(entropy.detach()))
    (found,) = torch.autograd.grad(loss.sum(), logits)
    # dH / dz_i = -p_i (log p_i + H)
    p = logprobs.detach().exp()
    assert torch.allclose(found, 0.25 * p * (p.log() + entropy.detach()))


def test_the_loss_of_the_documentation_follows_the_trust_region() -> None:
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    module: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], module)
    outputs, _ = policy_gradient([3.0], [2.0], loss=module["unclipped"])
    assert float(outputs.loss) == pytest.approx(-6.0)
    options = {"trust_region": "proximal", "proximal_logprobs": shifted([2.0])}
    outputs, _ = policy_gradient([3.0], [2.0], loss=module["unclipped"], **options)
    assert float(outputs.loss) == pytest.approx(-3.0)


# --- the critic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        # Clip 0.5.
        (1.0, 1.0, 3.0, 2.0, -2.0),  # (1 - 3)^2 / 2
        (2.0, 1.0, 3.0, 1.125, 0.0),  # went far enough towards it: (1.5 - 3)^2 / 2 is worse than (2 - 3)^2 / 2
        (0.0, 1.0, 3.0, 4.5, -3.0),  # went the wrong way: (0 - 3)^2 / 2 is worse than (0.5 - 3)^2 / 2
        (1.2, 1.0, 1.0, 0.02, 0.2),  # inside
    ],
)
def test_the_value_loss_golden_numbers(value: float, old: float, target: float, loss: float, gradient: float) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logprobs=values,
        rollout_logprobs=torch.zeros(1),
        advantages=torch.tensor([target], dtype=torch.float64),
        sequences=torch.zeros(1, dtype=torch.int64),
        proximal_logprobs=torch.tensor([old], dtype=torch.float64),
        value_clip=0.5,
    )
    outputs = value_loss(inputs)
    assert float(outputs.loss.detach()) == pytest.approx(loss)
    assert float(torch.autograd.grad(outputs.loss.sum(), values)[0]) == pytest.approx(gradient)
    assert float(outputs.sums["clip_fraction"]) == (gradient == 0)


def test_a_value_without_a_clip_has_the_plain_square() -> None:
    zeros = torch.zeros(2)
    inputs = LossInputs(
        logprobs=torch.tensor([5.0, -1.0]), rollout_logprobs=zeros, advantages=zeros, sequences=zeros.long()
    )
    assert value_loss(inputs).loss.tolist() == [12.5, 0.5]
