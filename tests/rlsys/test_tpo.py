"""Best against worst: worked by hand, and what must hold for any scores and lengths."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.tpo import (
    ALL_FAILED,
    SAME_SCORE,
    SAME_TEXT,
    TOO_FEW,
    Candidate,
    Choice,
    balance,
    choose,
    corrected,
    normalised,
    select,
    weights_to_try,
)


def candidates(*rows: tuple[float | None, int]) -> list[Candidate]:
    return [Candidate(text=f"answer {place}", score=score, length=length) for place, (score, length) in enumerate(rows)]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_scores_and_lengths_are_normalised_within_their_set() -> None:
    # mean 3, squared distances 4, 0, 4: variance 8/3
    assert normalised([1.0, 3.0, 5.0]).tolist() == pytest.approx([-2 / math.sqrt(8 / 3), 0, 2 / math.sqrt(8 / 3)])
    assert normalised([7.0, 7.0]).tolist() == [0, 0]
    # two values are always one standard deviation below and above
    assert corrected([0.0, 10.0], [5, 9], 0.3).tolist() == pytest.approx([-1 + 0.3, 1 - 0.3])


def test_without_a_weight_the_highest_score_is_chosen_and_the_lowest_rejected() -> None:
    assert choose(candidates((0.2, 10), (0.9, 50), (0.5, 30), (0.1, 90)), 0.0) == Choice(chosen=1, rejected=3)


def test_length_costs_what_its_weight_says() -> None:
    # Scores 0, 4, 5: mean 3, deviations -3, 1, 2, standard deviation sqrt(14/3) = 2.160: norm -1.389, 0.463, 0.926.
    # Lengths 1, 1, 4: mean 2, standard deviation sqrt(2): norm -0.707, -0.707, 1.414.
    some = candidates((0.0, 1), (4.0, 1), (5.0, 4))
    # At 0.2: -1.247, 0.604, 0.643. At 0.3: -1.177, 0.675, 0.502.
    assert corrected([0.0, 4.0, 5.0], [1, 1, 4], 0.2).tolist() == pytest.approx([-1.2473, 0.6043, 0.6430], abs=1e-4)
    assert choose(some, 0.2) == Choice(chosen=2, rejected=0)
    assert choose(some, 0.3) == Choice(chosen=1, rejected=0)


def test_the_weight_is_the_smallest_at_which_chosen_ones_are_not_longer() -> None:
    some = candidates((0.0, 1), (4.0, 1), (5.0, 4))
    # From the numbers above the second overtakes the third at (0.926 - 0.463) / (1.414 + 0.707) = 0.218.
    found = balance([some], most=0.5, step=0.05)
    assert found.length_weight == 0.25
    assert found.choices == [Choice(chosen=1, rejected=0)]
    assert (found.chosen_length, found.rejected_length, found.balanced) == (1, 1, True)
    assert balance([some], most=0.5, step=0.01).length_weight == 0.22
    assert select([some], 0.0).balanced is False


def test_where_no_weight_is_enough_the_largest_is_taken_and_it_says_so() -> None:
    found = balance([candidates((0.0, 1), (9.0, 100))], most=0.5, step=0.2)
    assert (found.length_weight, found.balanced) == (0.5, False)
    assert found.choices == [Choice(chosen=1, rejected=0)]


def test_the_grid_has_both_ends() -> None:
    assert weights_to_try(0.5, 0.05) == [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]
    assert weights_to_try(0.5, 0.2) == [0, 0.2, 0.4, 0.5]
    assert weights_to_try(0.0, 0.05) == [0]


def test_a_parse_failure_is_rejected_before_any_score_and_never_chosen() -> None:
    assert choose(candidates((None, 0), (-9.0, 5), (3.0, 5), (None, 0)), 0.1) == Choice(chosen=2, rejected=0)
    assert choose(candidates((None, 0), (1.0, 5)), 0.0) == Choice(chosen=1, rejected=0)


def test_lengths_of_parse_failures_do_not_count() -> None:
    # With the failure's length 0 the chosen ones would be longer than the rejected ones.
    found = balance([candidates((1.0, 50), (None, 0)), candidates((1.0, 5), (0.0, 6))], most=0.5, step=0.1)
    assert (found.chosen_length, found.rejected_length, found.length_weight) == (5, 6, 0)


@pytest.mark.parametrize(
    ("some", "reason"),
    [
        (candidates(), TOO_FEW),
        (candidates((1.0, 1)), TOO_FEW),
        (candidates((None, 0), (None, 0)), ALL_FAILED),
        (candidates((1.0, 1), (1.0, 9)), SAME_SCORE),
        ([Candidate(text="same", score=score, length=4) for score in (0.0, 1.0)], SAME_TEXT),
    ],
)
def test_what_has_no_two_different_sides_gives_no_pair(some: list[Candidate], reason: str) -> None:
    assert choose(some, 0.2) == reason
    found = balance([some, candidates((0.0, 3), (1.0, 3))], most=0.5, step=0.1)
    assert found.choices == [None, Choice(chosen=1, rejected=0)]
    assert found.dropped == Counter({reason: 1})
    assert found.num_pairs == 1


def test_equal_texts_with_unlike_scores_are_not_paired_with_one_another() -> None:
    some = [
        Candidate(text="a", score=1.0, length=3),
        Candidate(text="a", score=-5.0, length=3),
        Candidate(text="b", score=0.0, length=3),
    ]
    assert choose(some, 0.0) == Choice(chosen=0, rejected=2)


# --- what must hold --------------------------------------------------------------------------------------------------

SCORES = st.one_of(st.none(), st.floats(-100, 100, allow_nan=False))
PROBLEM = st.lists(st.tuples(SCORES, st.integers(0, 1000)), max_size=8)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_what_is_normalised_has_mean_0_and_deviation_1_or_is_0(values: list[float]) -> None:
    found = normalised(values)
    assert np.isfinite(found).all()
    if found.any():
        assert found.mean() == pytest.approx(0, abs=1e-6)
        assert found.std() == pytest.approx(1, abs=1e-6)


@given(PROBLEM, st.floats(0, 0.5))
def test_a_pair_has_two_sides_of_which_the_first_has_a_response_and_is_worth_more(
    rows: list[tuple[float | None, int]], weight: float
) -> None:
    some = candidates(*rows)
    found = choose(some, weight)
    if isinstance(found, str):
        assert found in (TOO_FEW, ALL_FAILED, SAME_SCORE)
        return
    chosen, rejected = some[found.chosen], some[found.rejected]
    assert chosen.score is not None
    assert chosen.text != rejected.text
    failed = [candidate for candidate in some if candidate.score is None]
    assert (rejected in failed) == bool(failed)
    judged = [candidate for candidate in some if candidate.score is not None]
    values = corrected([float(c.score or 0) for c in judged], [c.length for c in judged], weight)
    assert values[judged.index(chosen)] == values.max()
    if rejected in judged:
        assert values[judged.index(rejected)] == values.min() < values.max()


@given(PROBLEM, st.floats(0.1, 10), st.floats(-50, 50))
def test_scale_and_origin_of_the_scores_do_not_matter(
    rows: list[tuple[float | None, int]], scale: float, origin: float
) -> None:
    rounded = [(None if score is None else round(score), length) for score, length in rows]
    moved = [(None if score is None else scale * score + origin, length) for score, length in rounded]
    plain, other = choose(candidates(*rounded), 0.0), choose(candidates(*moved), 0.0)
    assert plain == other


@given(st.lists(PROBLEM, max_size=6))
@settings(deadline=None)
def test_the_weight_found_is_balanced_or_the_largest_and_no_smaller_one_is_balanced(
    rows: list[list[tuple[float | None, int]]],
) -> None:
    problems = [candidates(*row) for row in rows]
    found = balance(problems, most=0.5, step=0.1)
    assert found.balanced or found.length_weight == 0.5
    for weight in weights_to_try(0.5, 0.1):
        if weight < found.length_weight:
            assert not select(problems, weight).balanced
    assert found.num_pairs + found.dropped.total() == len(problems) == len(found.choices)
    pairs = [(problem, choice) for problem, choice in zip(problems, found.choices, strict=True) if choice is not None]
    both = [(p[c.chosen].length, p[c.rejected].length) for p, c in pairs if p[c.rejected].score is not None]
    if both:
        assert [found.chosen_length, found.rejected_length] == pytest.approx(np.mean(both, axis=0).tolist())
