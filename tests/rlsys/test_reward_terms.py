"""The terms of the reward: what counts as a grade, deadlines, what becomes of failures, groups, caps and schedules."""

from __future__ import annotations

import asyncio
import functools
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import reward_plugins

from rlsys.config import RewardConfig
from rlsys.errors import ConfigError, RewardError, RewardTimeoutError, RlsysError, TrainingStalledError
from rlsys.interfaces import RewardResult
from rlsys.reward_terms import MAX_MESSAGE_CHARACTERS, RewardTerm, check_reward, grade_group, grade_rollout
from rlsys.types import Problem, Rollout, RolloutGroup

PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "1 + 1?"},), answer="2")


def rollout(response: str = "2", **more: Any) -> Rollout:
    none = np.zeros(0, np.int32)
    return Rollout(
        tokens=none,
        loss_mask=none.astype(np.bool_),
        logprobs=none.astype(np.float32),
        versions=none,
        response=response,
        **more,
    )


def group(*responses: str) -> RolloutGroup:
    return RolloutGroup(problem=PROBLEM, rollouts=tuple(rollout(response) for response in responses))


def term(reward: Any, name: str = "mine", **settings: Any) -> RewardTerm:
    return RewardTerm(name=name, reward=reward, **settings)


def grade(reward: Any, response: str = "2", **settings: Any) -> RewardResult:
    return asyncio.run(term(reward, **settings).grade(PROBLEM, rollout(response)))


def gives(value: Any) -> Any:
    return lambda _problem, _response: value


# --- what counts as a grade ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (2, 2.0),
        (-0.5, -0.5),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (Fraction(1, 4), 0.25),
        (RewardResult(score=np.float64(7.0)), 7.0),
        (RewardResult(score=False, status="wrong"), 0.0),
    ],
)
def test_every_finite_number_is_a_grade(value: Any, score: float) -> None:
    result = grade(gives(value))
    assert (result.score, type(result.score)) == (score, float)


class Unspeakable:
    def __repr__(self) -> str:
        raise ValueError("nobody asks me")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (math.nan, "gave nan (float) as a score"),
        (-math.inf, "gave -inf (float) as a score"),
        (10**400, "(int) as a score"),
        ("0.5", "gave '0.5' (str) as a score"),
        (None, "gave None (NoneType) as a score"),
        (1j, "gave 1j (complex) as a score"),
        ([1.0], "gave [1.0] (list) as a score"),
        (np.zeros(1), "gave array([0.]) (ndarray) as a score"),
        (Decimal("1"), "gave Decimal('1') (Decimal) as a score"),
        (RewardResult, "(type) as a score"),
        (Unspeakable(), "gave (ValueError when asked what it is) (Unspeakable) as a score"),
        ("x" * 10**6, "xx... (str) as a score"),
        (RewardResult(score="1"), "gave '1' (str) as a score"),  # type: ignore[arg-type]
        (RewardResult(score=math.nan), "gave nan (float) as a score"),
        (RewardResult(score=1, terms={"a": math.inf}), "gave inf (float) as term 'a'"),
        (RewardResult(score=1, terms=[("a", 1)]), "as `terms`; give a mapping"),  # type: ignore[arg-type]
        (RewardResult(score=1, status=None), "gave None (NoneType) as a status"),  # type: ignore[arg-type]
        (RewardResult(score=1, status=""), "gave '' (str) as a status"),
        (RewardResult(score=1, status=np.zeros(2)), "(ndarray) as a status"),  # type: ignore[arg-type]
        (RewardResult(score=1, extracted=b"2"), "gave b'2' (bytes) as what it graded"),  # type: ignore[arg-type]
        (RewardResult(score=1, status="error"), "says 'error'"),
    ],
)
def test_everything_else_is_a_failure_that_names_reward_and_value(value: Any, says: str) -> None:
    with pytest.raises(RewardError) as caught:
        grade(gives(value))
    message = str(caught.value)
    assert message.startswith("reward 'mine' ")
    assert says in message
    assert len(message) < MAX_MESSAGE_CHARACTERS + 200
    assert caught.value.status == "error"


class Particular(RewardError):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def leave(*_: Any) -> float:
    raise SystemExit(3)


async def leave_later(*_: Any) -> float:
    raise SystemExit(3)


async def cancel_oneself(*_: Any) -> float:
    raise asyncio.CancelledError


def nothing_found(*_: Any) -> float:
    return next(iter(()))  # raises StopIteration, which no coroutine can


def one_argument(_problem: Problem) -> float:
    return 1.0


def raising(error: Exception) -> Any:
    def raise_it(*_: Any) -> float:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("reward", "says", "status"),
    [
        (raising(ValueError("bad")), "reward 'mine' raised ValueError: bad", "error"),
        (raising(KeyError("x")), "reward 'mine' raised KeyError: 'x'", "error"),
        (raising(Mute()), "reward 'mine' raised Mute: (ValueError when asked what it is)", "error"),
        (raising(TimeoutError("the server")), "reward 'mine' raised TimeoutError: the server", "timeout"),
        (raising(RewardError("no place")), "reward 'mine': no place", "error"),
        (raising(RewardTimeoutError("reward 'other' is late")), "reward 'other' is late", "timeout"),
        (raising(Particular("two", "words")), "reward 'mine': two words", "error"),
        (raising(RlsysError("anything")), "reward 'mine' raised RlsysError: anything", "error"),
        (leave, "reward 'mine' raised SystemExit: 3", "error"),
        (leave_later, "reward 'mine' raised SystemExit: 3", "error"),
        (cancel_oneself, "reward 'mine' cancelled itself", "error"),
        (nothing_found, "reward 'mine' raised StopIteration: ", "error"),
        (one_argument, "reward 'mine' raised TypeError: one_argument() takes 1 positional", "error"),
        (
            gives(RewardResult(score=0, status="timeout", extracted="2")),
            "reward 'mine' says 'timeout' about '2'",
            "timeout",
        ),
    ],
)
def test_whatever_a_reward_raises_is_a_failure_of_one_grading(reward: Any, says: str, status: str) -> None:
    with pytest.raises(RewardError) as caught:
        grade(reward)
    assert str(caught.value).startswith(says)
    assert caught.value.status == status


# --- deadlines -------------------------------------------------------------------------------------------------------


async def for_ever(*_: Any) -> float:
    await asyncio.Event().wait()
    return 1.0


async def stubborn(*_: Any) -> float:
    for _ in range(2):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
    return 1.0


class AsynchronousCall:
    async def __call__(self, problem: Problem, response: str) -> float:  # noqa: ARG002
        return 3.0


@pytest.mark.parametrize("reward", [for_ever, stubborn, functools.partial(for_ever)])
def test_an_asynchronous_reward_ends_at_its_deadline_even_if_it_does_not_let_itself_be_cancelled(reward: Any) -> None:
    with pytest.raises(RewardTimeoutError, match=r"^reward 'mine' did not grade within 0\.05 s$"):
        grade(reward, timeout_seconds=0.05)


def test_a_synchronous_reward_that_hangs_stops_neither_the_others_nor_the_event_loop() -> None:
    released = threading.Event()

    def hang_on_request(_problem: Problem, response: str) -> float:
        if response == "hang":
            released.wait()
        return 1.0

    async def main() -> None:
        mine = term(hang_on_request, timeout_seconds=0.2)
        attempts = [mine.grade(PROBLEM, rollout("hang")) for _ in range(40)]
        found = await asyncio.gather(*attempts, mine.grade(PROBLEM, rollout("2")), return_exceptions=True)
        assert [type(result) for result in found] == [RewardTimeoutError] * 40 + [RewardResult]
        assert mine.threads.num_late == 40
        assert (await mine.grade(PROBLEM, rollout("2"))).score == 1.0
        released.set()
        async with asyncio.timeout(60):
            while mine.threads.num_late:
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_callable_object_may_be_asynchronous() -> None:
    assert grade(AsynchronousCall()).score == 3.0


def test_a_rollout_that_is_cancelled_takes_its_grading_along() -> None:
    async def main() -> None:
        reward_plugins.GIVEN_UP.clear()
        task = asyncio.create_task(term(reward_plugins.Obedient()).grade(PROBLEM, rollout("sleep 600")))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert reward_plugins.GIVEN_UP == ["sleep 600"]

    asyncio.run(main())


# --- what becomes of failures ----------------------------------------------------------------------------------------


def graded(*terms: RewardTerm, response: str = "2", step: int = 0) -> Rollout:
    return asyncio.run(grade_rollout(PROBLEM, rollout(response), terms, step=step))


def test_a_failure_drops_the_rollout_unless_it_is_configured_otherwise() -> None:
    with pytest.raises(RewardError, match="gave nan"):
        graded(term(gives(1.0), "first"), term(gives(math.nan)))


def test_a_failure_may_score_zero_and_is_still_told_by_its_status_and_words() -> None:
    found = graded(term(raising(ValueError("bad")), on_failure="zero", weight=2.0), term(gives(1.0), "other"))
    assert found.reward == 1.0
    assert found.reward_terms == {"mine": 0.0, "other": 1.0}
    told = {name: value for name, value in found.metrics.items() if name != "reward_seconds"}
    assert told == {
        "correct": 0.0,
        "status/mine/error": 1.0,
        "status/other/ok": 1.0,
        "reward_error: reward 'mine' raised ValueError: bad": 1.0,
    }
    late = graded(term(for_ever, on_failure="zero", timeout_seconds=0.01))
    assert late.metrics["status/mine/timeout"] == 1.0


def test_a_failure_may_end_the_run() -> None:
    with pytest.raises(TrainingStalledError, match=r"reward 'mine' gave nan .*; the run ends, because on_failure"):
        graded(term(gives(math.nan), on_failure="fail"))


def test_a_sum_that_overflows_is_a_failure_and_no_crash() -> None:
    with pytest.raises(RewardError, match=r"reward 'mine' gave 1e\+300, with which the sum is inf; set a `cap`"):
        graded(term(gives(1e300), weight=1e300))
    assert graded(term(gives(1e300), weight=1e300, cap=2.0)).reward == 2e300


# --- caps and schedules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "expected"), [(0.3, 0.6), (5.0, 2.0), (-5.0, -2.0), (1.0, 2.0), (-1.0, -2.0)])
def test_a_score_counts_as_at_most_its_cap_and_is_logged_as_it_was(score: float, expected: float) -> None:
    found = graded(term(gives(score), cap=1.0, weight=2.0))
    assert found.reward == expected
    assert found.reward_terms == {"mine": score}


@pytest.mark.parametrize(
    # From 1 to 0 in 4 steps, by hand: 1, 3/4, 1/2, 1/4, 0, 0.
    ("step", "expected"),
    [(0, 8.0), (1, 6.0), (2, 4.0), (3, 2.0), (4, 0.0), (400, 0.0)],
)
def test_a_weight_moves_in_a_straight_line_and_stays_where_it_ends(step: int, expected: float) -> None:
    assert graded(term(gives(8.0), final_weight=0.0, final_step=4), step=step).reward == expected


def test_a_schedule_may_rise_and_change_its_sign() -> None:
    rising = term(gives(1.0), weight=-0.1, final_weight=0.7, final_step=2)
    # exactly the configured weights at both ends, -0.1 + 0.8 / 2 = 0.3 in the middle
    assert [rising.credit(1.0, step) for step in (0, 2, 3)] == [-0.1, 0.7, 0.7]
    assert rising.credit(1.0, 1) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cap": 0.0}, "reward 'reward': cap is 0.0; .* give a number above 0"),
        ({"cap": math.nan}, "cap is nan"),
        ({"weight": math.inf}, "weight is inf; give a finite number"),
        ({"final_weight": 0.5}, "final_weight is 0.5 and final_step 0; give both"),
        ({"final_step": 5}, "final_weight is None and final_step 5; give both"),
        ({"final_weight": 0.5, "final_step": -1}, "final_step -1; give both, the step at least 1"),
        ({"final_weight": math.nan, "final_step": 1}, "final_weight is nan"),
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0.0; a deadline must be finite and above 0"),
        ({"timeout_seconds": math.inf}, "timeout_seconds is inf"),
    ],
)
def test_a_term_that_cannot_be_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RewardConfig(use="a:b", **settings)


# --- groups ----------------------------------------------------------------------------------------------------------


class GroupOf:
    """A group reward that gives what it is told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.seen: list[RolloutGroup] = []

    async def score_group(self, siblings: RolloutGroup) -> Any:
        self.seen.append(siblings)
        return self.answer


def grade_all(siblings: RolloutGroup, *terms: RewardTerm, step: int = 0) -> RolloutGroup:
    """As the rollout actor does it."""

    async def main() -> RolloutGroup:
        rollouts = [await grade_rollout(PROBLEM, each, terms, step=step) for each in siblings.rollouts]
        return await grade_group(replace(siblings, rollouts=tuple(rollouts)), terms, step=step)

    return asyncio.run(main())


def test_a_group_reward_is_added_to_what_the_siblings_have_so_far() -> None:
    compares = GroupOf([1.0, RewardResult(score=-3.0, status="lost", terms={"wins": 0})])
    length = term(reward_plugins.length, "length", weight=0.5)
    found = grade_all(group("ab", "abcd"), term(compares, "rank", weight=2.0, cap=1.0), length)
    # 0.5 * 2 + 2 * 1 and 0.5 * 4 - 2 * 1
    assert found.rewards.tolist() == [3.0, 0.0]
    assert compares.seen[0].rewards.tolist() == [1.0, 2.0]
    assert found.rollouts[1].reward_terms == {"length": 4.0, "rank": -3.0, "rank/wins": 0.0}
    assert found.rollouts[1].metrics["status/rank/lost"] == 1.0
    # the first configured term says what is correct, although it grades last
    assert [each.metrics["correct"] for each in found.rollouts] == [1.0, 0.0]


def test_a_synchronous_group_reward_and_a_schedule() -> None:
    ranks = term(reward_plugins.Ranks(), weight=1.0, final_weight=3.0, final_step=2)
    assert grade_all(group("a", "abc", "ab"), ranks, step=1).rewards.tolist() == pytest.approx([0.0, 4 / 3, 2 / 3])


def test_a_later_group_reward_sees_what_an_earlier_one_gave() -> None:
    second = GroupOf([0.0, 0.0])
    grade_all(group("a", "b"), term(GroupOf([1.0, 2.0]), "first"), term(second, "second"))
    assert second.seen[0].rewards.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([1.0], "reward 'mine' gave 1 scores for 2 siblings; give one for each"),
        ([1.0, 2.0, 3.0], "gave 3 scores for 2 siblings"),
        ([1.0, math.nan], "gave nan (float) as a score"),
        ([1.0, None], "gave None (NoneType) as a score"),
        ([1.0, RewardResult(score=1.0, status="error")], "says 'error'"),
        (None, "gave None (NoneType) as scores; give a list of 2"),
        ("ab", "gave 'ab' (str) as scores"),
        (np.array(1.0), "gave 1.0 (float) as scores"),
        (np.zeros((2, 1)), "gave [0.0] (list) as a score"),
        ({0: 1.0, 1: 1.0}, "(dict) as scores"),
        ((value for value in (1.0, 2.0)), "(generator) as scores"),
    ],
)
def test_what_is_no_list_of_grades_fails_for_all_siblings(answer: Any, says: str) -> None:
    found = grade_all(group("a", "b"), term(GroupOf(answer)))
    assert found.rollouts == ()
    (reason,) = found.dropped
    assert reason.startswith("reward_error: reward 'mine' ")
    assert says in reason
    assert found.dropped[reason] == 2


def test_arrays_are_lists_of_grades() -> None:
    assert grade_all(group("a", "b"), term(GroupOf(np.array([1.0, 2.0])))).rewards.tolist() == [1.0, 2.0]


class SlowGroup:
    async def score_group(self, siblings: RolloutGroup) -> Sequence[float]:  # noqa: ARG002
        await asyncio.Event().wait()
        return []


def test_the_deadline_and_the_policy_hold_for_groups() -> None:
    late = grade_all(group("a", "b"), term(SlowGroup(), timeout_seconds=0.01))
    assert late.dropped == {"reward_timeout: reward 'mine' did not grade within 0.01 s": 2}
    zeroed = grade_all(group("fail", "b"), term(gives(1.0), "one"), term(reward_plugins.Ranks(), on_failure="zero"))
    assert zeroed.rewards.tolist() == [1.0, 1.0]
    assert all(each.metrics["status/mine/error"] == 1.0 for each in zeroed.rollouts)
    with pytest.raises(TrainingStalledError, match="not to be compared"):
        grade_all(group("fail", "b"), term(reward_plugins.Ranks(), on_failure="fail"))


def test_a_group_of_which_nobody_is_left_is_not_graded() -> None:
    compares = GroupOf([])
    empty = replace(group(), dropped={"tool_error: x": 2})
    assert grade_all(empty, term(compares)) == empty
    assert not compares.seen


# --- before a run ----------------------------------------------------------------------------------------------------


class NoMethod:
    pass


class Both:
    def score(self, problem: Problem, response: str, rollout: Rollout) -> float: ...  # type: ignore[empty-body]

    def score_group(self, siblings: RolloutGroup) -> list[float]: ...  # type: ignore[empty-body]


class TooFew:
    def score(self, problem: Problem, response: str) -> float: ...  # type: ignore[empty-body]


class Configurable:
    def __init__(self, *, scale: float) -> None: ...

    def score(self, problem: Problem, response: str, rollout: Rollout) -> float: ...  # type: ignore[empty-body]


class Callable:
    def __call__(self, problem: Problem, response: str) -> float: ...  # type: ignore[empty-body]


number = 3
instance = reward_plugins.Obedient()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """This module's name for references."""
    monkeypatch.setitem(sys.modules, "these_rewards", sys.modules[__name__])
    return "these_rewards"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("leave", {}),
        ("for_ever", {}),
        ("GroupOf", {"answer": 1}),
        ("Configurable", {"scale": 1}),
        ("Callable", {}),
        ("instance", {}),
    ],
)
def test_every_form_of_a_reward_is_found_good(here: str, name: str, options: Mapping[str, Any]) -> None:
    check_reward(RewardConfig(use=f"{here}:{name}", options=dict(options)), place="rewards.0")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("NoMethod", {}, "'these_rewards:NoMethod' is neither: a reward is a function of"),
        ("Both", {}, "has both `score` and `score_group`"),
        ("TooFew", {}, "cannot be called: too many positional arguments"),
        ("one_argument", {}, "cannot be called: too many positional arguments"),
        ("number", {}, "is neither"),
        ("Configurable", {}, "scale must be given"),
        ("Configurable", {"scael": 1}, "did you mean `scale`"),
        ("leave", {"scale": 1}, "is a function and takes no options"),
        ("Nothing", {}, "has no 'Nothing'"),
    ],
)
def test_what_is_no_reward_is_said_before_the_run(here: str, name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^rewards\.0.*{says}"):
        check_reward(RewardConfig(use=f"{here}:{name}", options=options), place="rewards.0")
