"""Which problem comes next: all in turn, or the easy ones first, or those that still teach something."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlsys.config import RlConfig
from rlsys.errors import CheckpointError, DataError
from rlsys.types import Problem, RolloutGroup

_T = TypeVar("_T")
_MAX_REST = 8


def endless(items: Sequence[_T], *, seed: int, skip: int) -> Iterator[_T]:
    """The items for ever, shuffled anew in each epoch; the order depends on the seed alone, so `skip` resumes it."""
    first_epoch, offset = divmod(skip, len(items))
    for epoch in itertools.count(first_epoch):
        order = _order(len(items), seed, epoch)
        for index in order[offset if epoch == first_epoch else 0 :]:
            yield items[int(index)]


@lru_cache(maxsize=8)
def _order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


class Curriculum:
    """An endless stream of problems in a random order, some of which are passed over, by their numbers in it.

    With `rl.difficulty`, the key of a number in the problems' metadata (small ones are easy, or with `-` in front large
    ones), only the easiest share is drawn from at first, and a share that grows evenly to all at the last policy step.

    With `rl.rest_uninformative` a problem whose siblings were all rewarded alike is left out of its next turn, then of
    two, four and at most eight, until it is informative again: problems that were always or never solved stay so for a
    while (GRESO, arXiv 2506.02177, which leaves them out by chance).

    After a whole round without a problem, the next one comes all the same. A number means the same problem in every
    stream with this seed. Which ones are drawn depends on the step and the groups noted so far: `after` the last
    number of another stream and with its `state`, a stream goes on where that one was.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        config: RlConfig,
        *,
        seed: int,
        after: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if state is not None and state["problems"] != len(problems):
            raise CheckpointError(
                f"the checkpoint is of a run with {state['problems']} training problems, but data.train gives "
                f"{len(problems)}; resume with the same data, or begin a new run"
            )
        self._problems, self._config, self._seed = problems, config, seed
        self._ranks = _ranks(problems, config.difficulty)
        self._after = after
        # Of a problem that taught nothing: how many rounds it rests, and the last of them.
        self._rests: dict[str, tuple[int, int]] = {
            key: (turns, until) for key, (turns, until) in (state or {}).get("rests", {}).items()
        }
        self.step = 1
        """The policy step that is being collected for."""

    def __iter__(self) -> Iterator[int]:
        passed = 0
        for number in itertools.count(self._after + 1):
            if passed < len(self._problems) and not self._comes(self.problem(number), self._round(number)):
                passed += 1
                continue
            passed = 0
            yield number

    def problem(self, number: int) -> Problem:
        """The problem with this number, from 1, in the stream."""
        epoch, index = divmod(number - 1, len(self._problems))
        return self._problems[int(_order(len(self._problems), self._seed, epoch)[index])]

    def _comes(self, problem: Problem, this_round: int) -> bool:
        if self._ranks and self._ranks[problem.id] >= self._share():
            return False
        _, until = self._rests.get(problem.id, (0, -1))
        return this_round > until

    def _round(self, number: int) -> int:
        """How often all problems had their turn before the one with this number."""
        return (number - 1) // len(self._problems)

    def _share(self) -> float:
        """The share of problems, from the easiest on, that is drawn from."""
        start = self._config.difficulty_start
        return start + (1 - start) * min(1.0, (self.step - 1) / max(1, self._config.steps - 1))

    def note(self, number: int, group: RolloutGroup) -> None:
        """Learn what became of a problem: once for each number, when that is settled."""
        if not self._config.rest_uninformative:
            return
        name = group.problem.id
        if len(group.rollouts) and np.ptp(group.rewards) == 0:
            turns = min(_MAX_REST, 2 * self._rests[name][0]) if name in self._rests else 1
            self._rests[name] = (turns, self._round(number) + turns)
        else:
            self._rests.pop(name, None)

    def state(self) -> dict[str, Any]:
        """What a stream that goes on needs besides the last number of this one, as JSON."""
        return {"problems": len(self._problems), "rests": {key: list(value) for key, value in self._rests.items()}}


def _ranks(problems: Sequence[Problem], key: str | None) -> dict[str, float]:
    """For each problem the share of problems that are easier; empty without a key."""
    if key is None:
        return {}
    sign, name = (-1, key[1:]) if key.startswith("-") else (1, key)
    values = []
    for problem in problems:
        value = problem.metadata.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise DataError(
                f"rl.difficulty={key}: problem {problem.id!r} has {value!r} there, not a number; its metadata has "
                f"{', '.join(sorted(problem.metadata)) or 'nothing'}"
            )
        values.append(sign * float(value))
    ordered = np.sort(values)
    return {
        problem.id: float(np.searchsorted(ordered, value)) / len(values)
        for problem, value in zip(problems, values, strict=True)
    }
