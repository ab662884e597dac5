"""Which problems come: in a round each, the easy ones first, and not at once again where nothing was learned."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config import RlConfig, SamplingConfig
from rlsys.curriculum import Curriculum, endless
from rlsys.errors import CheckpointError, ConfigError, DataError
from rlsys.types import Problem, Rollout, RolloutGroup


def problems(count: int) -> list[Problem]:
    return [
        Problem(id=str(n), prompt=({"role": "user", "content": "?"},), metadata={"pass_rate": 1 - n / count})
        for n in range(count)
    ]


def group(problem: Problem, *rewards: float) -> RolloutGroup:
    token = {"tokens": np.zeros(1, np.int32), "loss_mask": np.ones(1, np.bool_), "logprobs": np.zeros(1, np.float32)}
    rollouts = tuple(Rollout(**token, versions=np.zeros(1, np.int32), reward=reward) for reward in rewards)
    return RolloutGroup(problem=problem, rollouts=rollouts)


def ids(stream: Curriculum, count: int) -> list[int]:
    return [int(stream.problem(number).id) for number in itertools.islice(stream, count)]


def learned(curriculum: Curriculum, count: int, *, hopeless: set[int]) -> list[int]:
    """The next problems, each noted at once; the hopeless ones are never solved."""
    return [found for _, found in numbered(curriculum, count, hopeless=hopeless)]


def numbered(curriculum: Curriculum, count: int, *, hopeless: set[int]) -> list[tuple[int, int]]:
    """The same with the numbers that they have in the stream."""
    found = []
    for number in itertools.islice(curriculum, count):
        problem = curriculum.problem(number)
        found.append((number, int(problem.id)))
        curriculum.note(number, group(problem, 0.0, 0.0 if int(problem.id) in hopeless else 1.0))
    return found


def test_without_settings_every_problem_has_its_turn_in_each_round() -> None:
    items = problems(7)
    plain = [int(problem.id) for problem in itertools.islice(endless(items, seed=3, skip=0), 21)]
    assert learned(Curriculum(items, RlConfig(), seed=3), 21, hopeless={1, 2}) == plain


def test_a_problem_that_taught_nothing_rests_for_one_round_then_two_then_four() -> None:
    curriculum = Curriculum(problems(4), RlConfig(rest_uninformative=True), seed=0)
    # Rounds 1, 3, 6, 11 and 20 have the hopeless one as well: 5 times 4 problems, and 15 times 3.
    found = learned(curriculum, 5 * 4 + 15 * 3, hopeless={2})
    assert found.count(2) == 5
    assert [found.count(other) for other in (0, 1, 3)] == [20, 20, 20]


def test_a_problem_that_teaches_again_has_its_turn_again() -> None:
    curriculum = Curriculum(problems(3), RlConfig(rest_uninformative=True), seed=0)
    found = numbered(curriculum, 3 + 2 + 3, hopeless={1})  # the third round, from which it did not rest, taught nothing
    assert curriculum.state()["rests"]["1"][0] == 2
    later = Curriculum(
        problems(3), RlConfig(rest_uninformative=True), seed=0, after=found[-1][0], state=curriculum.state()
    )
    assert learned(later, 2 + 2 + 3, hopeless=set()).count(1) == 1
    assert later.state()["rests"] == {}


def test_where_all_rest_somebody_still_comes() -> None:
    curriculum = Curriculum(problems(3), RlConfig(rest_uninformative=True), seed=0)
    assert len(learned(curriculum, 40, hopeless={0, 1, 2})) == 40


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40), st.sets(st.integers(0, 11)))
def test_a_stream_goes_on_where_another_was(size: int, before: int, after: int, hopeless: set[int]) -> None:
    config = RlConfig(rest_uninformative=True, difficulty="pass_rate")
    first = Curriculum(problems(size), config, seed=1)
    begun = numbered(first, before, hopeless=hopeless)
    state = json.loads(json.dumps(first.state()))
    resumed = Curriculum(problems(size), config, seed=1, after=begun[-1][0] if begun else 0, state=state)
    uninterrupted = Curriculum(problems(size), config, seed=1)
    whole = numbered(uninterrupted, before + after, hopeless=hopeless)
    assert begun + numbered(resumed, after, hopeless=hopeless) == whole
    assert resumed.state() == uninterrupted.state()


@given(st.integers(1, 9), st.integers(0, 5))
def test_a_number_means_the_same_problem_in_every_stream_with_one_seed(size: int, seed: int) -> None:
    one = Curriculum(problems(size), RlConfig(), seed=seed)
    other = Curriculum(problems(size), RlConfig(rest_uninformative=True), seed=seed, after=17)
    numbers = list(range(1, 20 * size + 1))
    in_order = [one.problem(number).id for number in numbers]
    assert in_order == [
        problem.id for problem in itertools.islice(endless(problems(size), seed=seed, skip=0), 20 * size)
    ]
    backwards = [other.problem(number).id for number in reversed(numbers)]
    assert backwards == in_order[::-1]


def test_a_stream_over_other_data_than_before_is_refused() -> None:
    state = Curriculum(problems(5), RlConfig(), seed=0).state()
    with pytest.raises(CheckpointError, match=r"with 5 training problems, but data\.train gives 4"):
        Curriculum(problems(4), RlConfig(), seed=0, after=3, state=state)


def test_easy_problems_come_first_and_all_of_them_at_the_last_step() -> None:
    curriculum = Curriculum(problems(8), RlConfig(steps=5, difficulty="-pass_rate", difficulty_start=0.25), seed=0)
    assert set(ids(curriculum, 20)) == {0, 1}
    curriculum.step = 3
    assert set(ids(curriculum, 60)) == {0, 1, 2, 3, 4}  # 0.25 + 0.75 / 2 = 0.625 of 8
    curriculum.step = 5
    assert set(ids(curriculum, 60)) == set(range(8))
    hard_first = Curriculum(problems(8), RlConfig(steps=5, difficulty="pass_rate"), seed=0)
    assert set(ids(hard_first, 20)) == {6, 7}


def test_a_difficulty_that_is_no_number_is_named() -> None:
    with pytest.raises(DataError, match="problem '0' has None there, not a number; its metadata has pass_rate"):
        Curriculum(problems(2), RlConfig(difficulty="level"), seed=0)


def test_the_budget_of_a_response_grows_by_the_step() -> None:
    config = RlConfig(sampling=SamplingConfig(max_response_tokens=200), response_tokens={1: 80, 4: 200})
    assert [config.budget(step) for step in (1, 3, 4, 9)] == [80, 80, 200, 200]
    assert RlConfig(sampling=SamplingConfig(max_response_tokens=70)).budget(1) == 70


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({2: 80}, "says nothing of step 1"),
        ({1: 300}, r"300 from step 1; the most is rl.sampling.max_response_tokens \(256\)"),
        ({1: 0}, "0 from step 1"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_an_error(schedule: dict[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RlConfig(response_tokens=schedule)
