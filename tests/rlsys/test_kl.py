"""The KL penalty outside of the loss: estimates and weights, worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rlsys.kl import KlCoefficient, estimate
from rlsys.stage_config import RlConfig


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # d = reference - current = ln 2, -ln 2, 0.
        ("k1", [-math.log(2), math.log(2), 0.0]),
        ("k2", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2, 0.0]),
        ("k3", [1 - math.log(2), math.log(2) - 0.5, 0.0]),
    ],
)
def test_estimates_golden_numbers(estimator: Any, expected: list[float]) -> None:
    current = np.full(3, -2.0, dtype=np.float32)
    reference = current + np.array([math.log(2), -math.log(2), 0.0], dtype=np.float32)
    assert estimate(current, reference, estimator) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_over_what_the_policy_samples_the_unbiased_estimates_have_the_mean_of_the_kl(estimator: Any) -> None:
    policy, reference = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    found = estimate(np.log(policy), np.log(reference), estimator)
    assert float(policy @ found) == pytest.approx(float(policy @ np.log(policy / reference)))


def test_a_constant_weight_stays_whatever_the_kl() -> None:
    weight = KlCoefficient(RlConfig(kl_coef=0.1))
    weight.observe(100.0, num_rollouts=64)
    assert [weight.at(step) for step in (1, 50, 100)] == [0.1] * 3


def test_a_cosine_falls_to_nearly_zero() -> None:
    weight = KlCoefficient(RlConfig(kl_coef=0.2, kl_schedule="cosine", steps=4))
    # Half of it at progress 1/2; cos(pi / 4) and cos(3 pi / 4) between.
    found = [weight.at(step) for step in (1, 2, 3, 4)]
    assert found == pytest.approx([0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0.1 * (1 - math.sqrt(0.5))])


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (4.4, 0.1 * (1 + 0.1 * 64 / 640)),  # a tenth above the target of 4
        (3.6, 0.1 * (1 - 0.1 * 64 / 640)),
        (4.0, 0.1),
        (40.0, 0.1 * (1 + 0.2 * 64 / 640)),  # the error is bounded
        (-1.0, 0.1 * (1 - 0.2 * 64 / 640)),
        (math.nan, 0.1),
        (math.inf, 0.1),
    ],
)
def test_an_adaptive_weight_golden_numbers(kl: float, expected: float) -> None:
    config = RlConfig(kl_coef=0.1, kl_schedule="adaptive", kl_target=4.0, kl_horizon=640)
    weight = KlCoefficient(config)
    weight.observe(kl, num_rollouts=64)
    assert weight.at(2) == pytest.approx(expected)
    resumed = KlCoefficient(config, adapted=weight.adapted)
    assert resumed.at(2) == weight.at(2)
