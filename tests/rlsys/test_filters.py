"""Filters of samples: what each keeps, in the order of the samples, whatever the seed of the process."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys import filters
from rlsys.config import PlugIn
from rlsys.errors import ConfigError, DataError
from rlsys.near_duplicates import near_duplicates
from rlsys.sample_report import filtered, pass_rates, with_pass_rates
from rlsys.samples import Sample
from tests.rlsys.sampling_stage import sample


def texts(samples: list[Sample]) -> list[str]:
    return [found.text for found in samples]


def test_correct_ones_and_those_that_came_to_their_end() -> None:
    given_ = [
        sample(0, "right"),
        sample(0, "wrong", correct=False),
        sample(0, "nobody knows", correct=None),
        sample(0, "cut off", finish_reason="length"),
    ]
    assert texts(filters.correct(given_)) == ["right", "cut off"]
    assert texts(filters.completed(given_)) == ["right", "wrong", "nobody knows"]


def rated() -> list[Sample]:
    """Problem 0 never solved, 1 one time of two, 2 always; and one that nothing graded."""
    found = [sample(number, f"{number}{index}", correct=index < number) for number in range(3) for index in range(2)]
    return with_pass_rates([*found, sample(3, "ungraded", correct=None)])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ["00", "01", "10", "11", "20", "21"]),
        ({"at_least": 0.5}, ["10", "11", "20", "21"]),
        ({"at_least": 0.25, "at_most": 0.75}, ["10", "11"]),
        ({"at_most": 0.0}, ["00", "01"]),
    ],
)
def test_problems_by_their_difficulty(options: dict[str, float], kept: list[str]) -> None:
    assert texts(filters.pass_rate(rated(), **options)) == kept


def test_difficulty_is_that_of_the_whole_stage_whatever_was_filtered_before() -> None:
    assert texts(filters.pass_rate(filters.correct(rated()), at_most=0.5)) == ["10"]
    assert pass_rates(rated()) == {"0": 1, "0-0.25": 0, "0.25-0.5": 1, "0.5-0.75": 0, "0.75-1": 0, "1": 1}


def test_lengths_in_tokens() -> None:
    given_ = [sample(0, str(tokens), tokens=tokens) for tokens in (1, 5, 9)]
    assert texts(filters.length(given_, at_most=5)) == ["1", "5"]
    assert texts(filters.length(given_, at_least=2)) == ["5", "9"]


def test_calls_are_counted_where_a_rollout_counted_them_and_else_seen_in_the_text() -> None:
    given_ = [
        sample(0, "```python\n1\n```", metrics={"tool_calls": 0.0}),
        sample(0, "plain", metrics={"tool_calls": 2.0}),
        sample(0, "teacher: ```python\n1\n```"),
        sample(0, "teacher: none"),
    ]
    assert texts(filters.has_tool_call(given_)) == ["plain", "teacher: ```python\n1\n```"]
    assert len(filters.has_tool_call(given_, wanted=False)) == 2


def test_equal_texts_are_kept_once_within_a_problem_or_in_all() -> None:
    given_ = [sample(0, "a b"), sample(0, "a  b\n"), sample(1, "a b"), sample(1, "a c")]
    assert texts(filters.distinct(given_)) == ["a b", "a b", "a c"]
    assert texts(filters.distinct(given_, within="all")) == ["a b", "a c"]


def test_near_duplicates_by_the_share_of_word_sequences_worked_by_hand() -> None:
    # Ten words have nine pairs; the other has eight of them and one of its own: 8 / 10.
    text = "a b c d e f g h i j"
    near = "a b c d e f g h i k"
    assert near_duplicates([text, near], similarity=0.8, words=2) == {1}
    assert near_duplicates([text, near], similarity=0.81, words=2) == set()
    assert near_duplicates([text, near], similarity=1.0, words=2) == set()
    assert texts(filters.distinct([sample(0, text), sample(0, near)], similarity=0.8, words=2)) == [text]


def test_what_repeats_a_repetition_is_compared_with_what_is_kept_only() -> None:
    # Each has 4 of 6 pairs in common with the next and 3 of 7 with the one after: only the middle one goes.
    chain = ["a b c d e f", "b c d e f g", "c d e f g h"]
    assert near_duplicates(chain, similarity=0.6, words=2) == {1}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 30), st.integers(0, 1000))
def test_among_many_texts_those_are_found_that_differ_in_one_word(place: int, seed: int) -> None:
    base = [f"word{(seed * 31 + number) % 997}" for number in range(60)]
    changed = [*base[:place], "other", *base[place + 1 :]]
    fillers = [" ".join(f"filler{number}x{word}" for word in range(20)) for number in range(210)]
    found = near_duplicates([*fillers, " ".join(base), " ".join(changed)], similarity=0.7, words=3)
    assert found == {211}


def test_short_and_empty_texts_are_texts() -> None:
    assert near_duplicates(["", " ", "a", "b", "a"], similarity=0.5, words=5) == {1, 4}


@pytest.mark.parametrize(("prefer", "kept"), [("shortest", ["b", "d"]), ("longest", ["c", "d"])])
def test_so_many_of_each_problem_by_length(prefer: Any, kept: list[str]) -> None:
    given_ = [sample(0, "a", tokens=5), sample(0, "b", tokens=1), sample(0, "c", tokens=9), sample(1, "d")]
    assert texts(filters.per_problem(given_, prefer=prefer)) == kept


def test_a_random_choice_depends_on_the_seed_and_the_problem_alone() -> None:
    given_ = [sample(number, f"{number}-{index}") for number in range(6) for index in range(8)]
    chosen = filters.per_problem(given_, count=2)
    assert len(chosen) == 12
    assert chosen != filters.per_problem(given_, count=2, seed=1)
    assert filters.per_problem(given_[16:], count=2) == chosen[4:]
    assert texts(chosen)[:4] == ["0-0", "0-6", "1-4", "1-6"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: filters.pass_rate([], at_least=0.9, at_most=0.1), "pass_rate: at_least=0.9 is above at_most=0.1"),
        (lambda: filters.length([], at_least=9, at_most=1), "length: at_least=9 is above at_most=1"),
        (lambda: filters.distinct([], similarity=0), "similarity is 0"),
        (lambda: filters.distinct([], words=0), "words is 0"),
        (lambda: filters.distinct([], within="prompt"), "within is 'prompt'"),  # type: ignore[arg-type]
        (lambda: filters.per_problem([], count=0), "count is 0"),
        (lambda: filters.per_problem([], prefer="best"), "prefer is 'best'"),  # type: ignore[arg-type]
    ],
)
def test_options_that_cannot_be_are_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def use(name: str, **options: Any) -> PlugIn:
    return PlugIn(use=name if ":" in name else f"rlsys.filters:{name}", options=options)


def test_filters_follow_one_another_and_each_says_what_it_did() -> None:
    left, steps = filtered(rated(), [use("correct"), use("pass_rate", at_most=0.9)], place="samples.own")
    assert texts(left) == ["10"]
    assert [(step.filter, step.given, step.left) for step in steps] == [
        ("correct", 7, 3),
        ("pass_rate(at_most=0.9)", 3, 1),
    ]
    assert left[0].provenance["filters"] == ["correct", "pass_rate(at_most=0.9)"]


def count_only(samples: Any) -> Any:
    return [len(samples)]


def broken(_samples: Any) -> Any:
    raise KeyError("length")


@pytest.mark.parametrize(
    ("filter_", "error", "message"),
    [
        (use("length", at_least=2, at_most=1), ConfigError, r"samples.own.filters.0: length: at_least=2 is above"),
        (use("tests.rlsys.test_filters:count_only"), ConfigError, r"must return the samples to keep, not \[7\]"),
        (use("tests.rlsys.test_filters:broken"), DataError, r"filters.0: .*broken' raised KeyError: 'length'"),
        (use("correctt"), ConfigError, "did you mean `rlsys.filters:correct`"),
    ],
)
def test_a_filter_that_cannot_work_is_named(filter_: PlugIn, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        filtered(rated(), [filter_], place="samples.own")
