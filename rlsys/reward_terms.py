"""The terms of the reward: each grades rollouts or groups within its deadline, and says so where it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rlsys.config import RewardConfig
from rlsys.errors import ConfigError, RewardError, RewardTimeoutError, TrainingStalledError
from rlsys.interfaces import RewardResult
from rlsys.plugins import build, check_options, resolve
from rlsys.thoughts import is_failure, shown, shown_group
from rlsys.threads import Outcome, Threads
from rlsys.types import Problem, Rollout, RolloutGroup

MAX_MESSAGE_CHARACTERS = 400
"""Messages are counted, so they are kept short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One configured reward: an object with `score` or `score_group`, or a plain function; see `RewardConfig`.

    What is synchronous runs in threads, several at a time, so that neither generation nor the deadline waits for it. A
    thread cannot be ended: what hangs in one holds it for ever. Reward actors are killed instead.
    """

    name: str
    reward: Any
    weight: float = 1.0
    cap: float | None = None
    final_weight: float | None = None
    final_step: int = 0
    timeout_seconds: float = 60.0
    on_failure: Literal["drop", "zero", "fail"] = "drop"
    threads: Threads = field(default_factory=lambda: Threads("reward"))

    @classmethod
    def configured(cls, config: RewardConfig, reward: Any, *, timeout_seconds: float | None = None) -> RewardTerm:
        """This reward as the term that the configuration makes of it, perhaps with another deadline."""
        return cls(
            name=config.name,
            reward=reward,
            weight=config.weight,
            cap=config.cap,
            final_weight=config.final_weight,
            final_step=config.final_step,
            timeout_seconds=timeout_seconds or config.timeout_seconds,
            on_failure=config.on_failure,
        )

    @property
    def grades_groups(self) -> bool:
        """Whether it compares siblings, instead of grading each by itself."""
        return grades_groups(self.reward)

    @property
    def isolation(self) -> dict[str, str]:
        """How well it isolates what it runs, if it says so (`tier`), by its name."""
        tier = getattr(self.reward, "tier", None)
        return {} if tier is None else {self.name: tier}

    def credit(self, score: float, step: int) -> float:
        """What the score adds to the reward at this policy step: capped, then weighted."""
        if self.cap is not None:
            score = min(self.cap, max(-self.cap, score))
        if self.final_weight is None:
            return self.weight * score
        share = min(1.0, step / self.final_step)
        return ((1 - share) * self.weight + share * self.final_weight) * score

    async def grade(self, problem: Problem, rollout: Rollout) -> RewardResult:
        """Score of one rollout, whatever of the accepted forms the reward has. A hidden thought is not shown to it.

        Raises:
            RewardError: it raised, or gave something else than a finite number or a RewardResult with finite numbers,
                or says itself (status "error") that it failed.
            RewardTimeoutError: it did not end within `timeout_seconds`, or says so itself (status "timeout").
        """
        score, rollout = getattr(self.reward, "score", None), shown(rollout)
        if score is not None:
            return self._checked(await self._within_deadline(score, problem, rollout.response, rollout))
        return self._checked(await self._within_deadline(self.reward, problem, rollout.response))

    async def grade_group(self, group: RolloutGroup) -> list[RewardResult]:
        """Scores of all siblings, in their order; raises as `grade` does, for the group as a whole."""
        values = await self._within_deadline(self.reward.score_group, shown_group(group))
        wanted = len(group.rollouts)
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if isinstance(values, str | bytes) or not isinstance(values, Sequence):
            raise self._refusal(values, f"scores; give a list of {wanted}")
        if len(values) != wanted:
            raise RewardError(
                f"reward {self.name!r} gave {len(values)} scores for {wanted} siblings; give one for each"
            )
        return [self._checked(value) for value in values]

    async def _within_deadline(self, function: Callable[..., Any], *args: Any) -> Any:
        task = asyncio.ensure_future(self._outcome(function, *args))
        try:
            # Not `wait_for`, which waits for ever for a coroutine that does not let itself be cancelled.
            done, _ = await asyncio.wait({task}, timeout=self.timeout_seconds)
        finally:
            task.cancel()  # late, or the rollout was given up; nothing where it is done
        if not done:
            raise RewardTimeoutError(f"reward {self.name!r} did not grade within {self.timeout_seconds:g} s")
        if task.cancelled():
            raise RewardError(f"reward {self.name!r} cancelled itself")
        raised, value = task.result()
        if raised is not None:
            raise self._failure(raised) from raised
        return value

    async def _outcome(self, function: Callable[..., Any], *args: Any) -> Outcome:
        try:
            if inspect.iscoroutinefunction(function):
                return None, await function(*args)
            raised, value = await self.threads.call(function, *args)
            return raised, await value if inspect.isawaitable(value) else value
        except (Exception, SystemExit) as error:  # anything may come out of a user's function
            return error, None

    def _failure(self, raised: BaseException) -> RewardError:
        said = _brief(str, raised)
        if isinstance(raised, RewardError):
            kind = RewardTimeoutError if isinstance(raised, RewardTimeoutError) else RewardError
            return kind(said if said.startswith("reward ") else f"reward {self.name!r}: {said}")
        kind = RewardTimeoutError if isinstance(raised, TimeoutError) else RewardError
        return kind(f"reward {self.name!r} raised {type(raised).__name__}: {said}")

    def _checked(self, value: Any) -> RewardResult:
        """The one place where it is decided what counts as a grade."""
        if not isinstance(value, RewardResult):
            return RewardResult(score=self._number(value, "a score; give a finite number or a RewardResult"))
        if not isinstance(value.status, str) or not value.status:
            raise self._refusal(value.status, "a status; give a word")
        if not isinstance(value.extracted, str | None):
            raise self._refusal(value.extracted, "what it graded (`extracted`); give a text")
        if value.status in ("timeout", "error"):
            kind = RewardTimeoutError if value.status == "timeout" else RewardError
            graded = f" about {_brief(repr, value.extracted)}" if value.extracted else ""
            raise kind(f"reward {self.name!r} says {value.status!r}{graded}")
        if not isinstance(value.terms, Mapping):
            raise self._refusal(value.terms, "`terms`; give a mapping from names to numbers")
        return replace(
            value,
            score=self._number(value.score, "a score; give a finite number"),
            terms={_brief(str, key): self._number(term, f"term {key!r}") for key, term in value.terms.items()},
        )

    def _number(self, value: Any, what: str) -> float:
        if isinstance(value, numbers.Real | np.bool_):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
        raise self._refusal(value, what)

    def _refusal(self, value: Any, what: str) -> RewardError:
        return RewardError(f"reward {self.name!r} gave {_brief(repr, value)} ({type(value).__name__}) as {what}")


def _brief(text_of: Callable[[Any], str], value: Any) -> str:
    """A text about something of which not even the text can be trusted."""
    try:
        text = text_of(value)
    except Exception as error:  # a user's __str__ or __repr__
        return f"({type(error).__name__} when asked what it is)"
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else f"{text[: MAX_MESSAGE_CHARACTERS - 3]}..."


def grades_groups(reward: Any) -> bool:
    """Whether a reward, or a class of rewards, grades groups."""
    return callable(getattr(reward, "score_group", None))


def check_reward(config: RewardConfig, *, place: str) -> None:
    """Find what is wrong with a reward's reference, options and form; makes none of a class, which might need its host.

    Raises:
        ConfigError: names the place and the fix.
    """
    target = resolve(config.use, place=f"{place}.use")
    if inspect.isclass(target):
        check_options(target, config.options, place=place)
    elif config.options:
        build(config.use, config.options, place=place)  # says what is wrong with options for what is no class
    forms = _forms_of(target)
    if len(forms) != 1:
        which = "has both `score` and `score_group`" if forms else "is neither"
        raise ConfigError(f"{place}.use: {config.use!r} {which}: {_FORMS}")
    called, num_arguments = forms[0]
    with contextlib.suppress(ValueError):  # code in C that does not say what it takes
        try:
            inspect.signature(called).bind(*[None] * (num_arguments + inspect.isclass(target)))
        except TypeError as error:
            raise ConfigError(f"{place}.use: {config.use!r} cannot be called: {error}; {_FORMS}") from error


_FORMS = (
    "a reward is a function of (problem, response), or a class with either `score(problem, response, rollout)` or "
    "`score_group(group)`"
)


def _forms_of(target: Any) -> list[tuple[Any, int]]:
    """What is called of a reward or a class of rewards, and with how many arguments."""
    methods = {"score": 3, "score_group": 1}
    forms = [(getattr(target, name), count) for name, count in methods.items() if callable(getattr(target, name, None))]
    if not forms and inspect.isclass(target):
        calls = [vars(kind)["__call__"] for kind in target.__mro__ if "__call__" in vars(kind)]
        return [(call, 2) for call in calls[:1]]
    return forms or [(target, 2)] * callable(target)


def reason(error: RewardError) -> str:
    """Under which words a rollout is counted that was dropped or zeroed for this."""
    return f"reward_{error.status}: {error}"


async def grade_rollout(problem: Problem, rollout: Rollout, terms: Sequence[RewardTerm], *, step: int) -> Rollout:
    """The rollout with the credits of all terms that grade rollouts; those that grade groups come later.

    One without a response to its hidden thought is not graded: it keeps the reward of such failures.

    Raises:
        RewardError: a term failed whose `on_failure` is "drop".
        TrainingStalledError: a term failed whose `on_failure` is "fail".
    """
    if is_failure(rollout):
        return rollout
    started = time.perf_counter()
    for term in terms:
        if term.grades_groups:
            continue
        try:
            rollout = _credited(rollout, term, await term.grade(problem, rollout), terms, step)
        except RewardError as error:
            rollout = _failed(rollout, term, error, terms, step)
    return _timed(rollout, time.perf_counter() - started)


async def grade_group(group: RolloutGroup, terms: Sequence[RewardTerm], *, step: int) -> RolloutGroup:
    """The group with the credits of the terms that grade groups; what fails, fails for all siblings.

    Siblings without a response to their hidden thought are not among those compared; none of the others gets less.

    Raises:
        TrainingStalledError: a term failed whose `on_failure` is "fail".
    """
    graded = await _grade_siblings(
        replace(group, rollouts=tuple(r for r in group.rollouts if not is_failure(r))), terms, step
    )
    lowest = min((rollout.reward for rollout in graded.rollouts), default=math.inf)
    others = iter(graded.rollouts)
    merged = [
        replace(rollout, reward=min(lowest, rollout.reward)) if is_failure(rollout) else next(others, None)
        for rollout in group.rollouts
    ]
    return replace(graded, rollouts=tuple(rollout for rollout in merged if rollout is not None))


async def _grade_siblings(group: RolloutGroup, terms: Sequence[RewardTerm], step: int) -> RolloutGroup:
    started = time.perf_counter()
    for term in terms:
        if not term.grades_groups or not group.rollouts:
            continue
        try:
            results = await term.grade_group(group)
            graded = [
                _credited(r, term, result, terms, step) for r, result in zip(group.rollouts, results, strict=True)
            ]
        except RewardError as error:
            try:
                graded = [_failed(rollout, term, error, terms, step) for rollout in group.rollouts]
            except RewardError as dropped:
                lost = {**group.dropped, reason(dropped): len(group.rollouts)}
                return replace(group, rollouts=(), dropped=lost)
        group = replace(group, rollouts=tuple(graded))
    seconds = time.perf_counter() - started
    return replace(group, rollouts=tuple(_timed(rollout, seconds) for rollout in group.rollouts))


def _credited(
    rollout: Rollout, term: RewardTerm, result: RewardResult, terms: Sequence[RewardTerm], step: int
) -> Rollout:
    total = rollout.reward + term.credit(result.score, step)
    if not math.isfinite(total):
        raise RewardError(f"reward {term.name!r} gave {result.score:g}, with which the sum is {total}; set a `cap`")
    found = {term.name: result.score, **{f"{term.name}/{name}": value for name, value in result.terms.items()}}
    metrics = {f"status/{term.name}/{result.status}": 1.0}
    if term is terms[0]:
        metrics["correct"] = float(result.status == "correct" if result.status != "ok" else result.score > 0)
    return replace(
        rollout,
        reward=total,
        reward_terms={**rollout.reward_terms, **found},
        metrics={**rollout.metrics, **metrics},
    )


def _failed(rollout: Rollout, term: RewardTerm, error: RewardError, terms: Sequence[RewardTerm], step: int) -> Rollout:
    if term.on_failure == "drop":
        raise error
    if term.on_failure == "fail":
        raise TrainingStalledError(f"{error}; the run ends, because on_failure of this reward is `fail`") from error
    zeroed = _credited(rollout, term, RewardResult(score=0.0, status=error.status), terms, step)
    return replace(zeroed, metrics={**zeroed.metrics, reason(error): 1.0})


def _timed(rollout: Rollout, seconds: float) -> Rollout:
    so_far = rollout.metrics.get("reward_seconds", 0.0)
    return replace(rollout, metrics={**rollout.metrics, "reward_seconds": so_far + seconds})
