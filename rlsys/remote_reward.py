"""A reward in actors of its own, as a rollout actor sees it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from rlsys.cluster import Actor
from rlsys.config import ANSWER_SECONDS, PoolConfig, RewardConfig
from rlsys.errors import ActorError, ActorTimeoutError, RewardError, RewardTimeoutError
from rlsys.interfaces import RewardResult
from rlsys.places import MAX_ATTEMPTS, Places
from rlsys.reward_terms import RewardTerm, grades_groups
from rlsys.types import Problem, Rollout, RolloutGroup

OPEN_SECONDS = 10.0
"""Whether there is a place is known at once, unless the actor hangs."""

log = logging.getLogger(__name__)


class _Remote:
    """Takes a place in an actor for each grading.

    Only what the reward is not to blame for is tried again, in another actor: one that died or forgot. What the reward
    raises is its answer, and one that is too late might hang the next actor as well.
    """

    def __init__(self, config: RewardConfig) -> None:
        assert config.actors is not None, "without an `actors` section there is no pool"
        self._name, self._pool, self._seconds = config.name, config.actors, config.timeout_seconds
        self._places = Places(f"reward {config.name!r}", config.actors, RewardError, open_seconds=OPEN_SECONDS)

    def use_actors(self, actors: Sequence[Actor]) -> None:
        """From now on, grade in these; gradings that are under way end where they are."""
        self._places.use_actors(actors)

    async def _grade(self, method: str, label: str, *subject: Any) -> Any:
        for _ in range(MAX_ATTEMPTS):
            place = await self._places.find(label)
            try:
                limit = self._seconds + ANSWER_SECONDS
                result = await place.actor.call(method, place.session_id, *subject, seconds=limit)
            except RewardError:
                self._places.give_back(place)
                raise
            except ActorTimeoutError as error:
                self._places.leave_behind(place)
                raise RewardTimeoutError(
                    f"reward {self._name!r}: {place.actor.name} did not answer within {self._seconds:g} s"
                ) from error
            except ActorError as error:
                failure = error
                log.warning("%s; graded again in another actor", error)
                self._places.leave_behind(place)
            except BaseException:  # the rollout was cancelled
                self._places.leave_behind(place)
                raise
            else:
                self._places.give_back(place)
                return result
        raise RewardError(
            f"reward {self._name!r}: {MAX_ATTEMPTS} actors in a row did not survive one grading; the last: {failure}"
        )


class RemoteReward(_Remote):
    """Stands for a reward that grades rollouts."""

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> RewardResult:  # noqa: ARG002
        """Grade in some actor.

        Raises:
            RewardError: the reward failed, no actor had a place within the pool's `wait_seconds`, or none survived.
            RewardTimeoutError: the grading did not end within the reward's `timeout_seconds`.
        """
        result: RewardResult = await self._grade("score", problem.id, problem, rollout)
        return result


class RemoteGroupReward(_Remote):
    """Stands for a reward that grades groups."""

    async def score_group(self, group: RolloutGroup) -> list[RewardResult]:
        """Grade in some actor; raises as `RemoteReward.score` does."""
        results: list[RewardResult] = await self._grade("score_group", group.problem.id, group)
        return results


def remote_term(config: RewardConfig, target: Any) -> RewardTerm:
    """The term of a reward (class) that lives in a pool. The reward itself is not made here: it may want a GPU.

    The actors keep its deadline, so that the wait for a place does not count; here is only the sum of what may happen.
    """
    pool: PoolConfig | None = config.actors
    assert pool is not None
    reward = RemoteGroupReward(config) if grades_groups(target) else RemoteReward(config)
    longest = MAX_ATTEMPTS * (pool.wait_seconds + config.timeout_seconds + ANSWER_SECONDS)
    return RewardTerm.configured(config, reward, timeout_seconds=longest)
