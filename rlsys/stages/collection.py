"""What a policy step or an evaluation collects: which groups train, what is missing and why, when it is too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlsys.config import Config
from rlsys.errors import DataError, TrainingStalledError
from rlsys.selection import Selection, select
from rlsys.types import GIVEN_UP, NOT_FINITE, RolloutGroup

_FAILURES = ("reward_timeout", "reward_error")


def by_kind(reasons: Mapping[str, int]) -> Counter[str]:
    """Counts by the word before the colon: "reward_error: what it said" is counted as "reward_error"."""
    kinds: Counter[str] = Counter()
    for reason, count in reasons.items():
        kinds[reason.partition(":")[0]] += count
    return kinds


@dataclass(slots=True)
class RewardFailures:
    """How many rollouts could not be graded, dropped and zeroed ones together."""

    limit: float
    """The share that stops the run (`max_failed_rewards`)."""
    num_rollouts: int = 0
    """Those that were to be graded."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Failed ones by reason, the first one first."""

    def add(self, group: RolloutGroup) -> None:
        """Count a group as the rollout actor gave it."""
        failed = Counter({key: count for key, count in group.dropped.items() if key.startswith(_FAILURES)})
        self.num_rollouts += len(group.rollouts) + failed.total()
        for rollout in group.rollouts:
            first = next((key for key in rollout.metrics if key.startswith(_FAILURES)), None)
            if first is not None:  # zeroed, perhaps by several rewards
                failed[first] += 1
        self.reasons.update(failed)

    def check(self, what: str) -> None:
        """Stop the run where too many failed.

        Raises:
            TrainingStalledError: names the reward, the counts and the first message.
        """
        failed = self.reasons.total()
        if failed <= self.limit * self.num_rollouts:
            return
        kinds = ", ".join(f"{count} {kind}" for kind, count in by_kind(self.reasons).items())
        raise TrainingStalledError(
            f"{failed} of {self.num_rollouts} rollouts of {what} could not be graded ({kinds}), more than "
            f"max_failed_rewards={self.limit:g} allows; the first: {next(iter(self.reasons)).partition(': ')[2]}"
        )


class Collection:
    """The groups of one policy step, as they come in."""

    def __init__(self, config: Config, selections: dict[str, Selection], *, step: int) -> None:
        self._config, self._selections, self._step = config, selections, step
        self._failures = RewardFailures(config.max_failed_rewards)
        self._num_groups = 0
        self._num_rollouts = 0
        self._statuses: Counter[str] = Counter()
        self.groups: list[RolloutGroup] = []
        """Those that train, with the siblings that train."""
        self.dropped: Counter[str] = Counter()
        """Rollouts that do not train, by the kind of reason, those of groups that were dropped whole included."""
        self.broken: list[RolloutGroup] = []
        """The siblings that were dropped because a log-prob of theirs was not finite."""

    @property
    def statuses(self) -> dict[str, float]:
        """`status/REWARD/STATUS`: its share of all rollouts that have a reward, whether they train or not."""
        return {name: count / self._num_rollouts for name, count in sorted(self._statuses.items())}

    def add(self, group: RolloutGroup) -> str | None:
        """Take in a group; returns why it does not train, or None.

        Raises:
            TrainingStalledError: too many rollouts of this step could not be graded.
            DataError: a prompt is too long and that is to be an error.
            ConfigError: a selection did not return one bool for each sibling.
        """
        group = self._without_broken(group)
        self._num_groups += 1
        self._failures.add(group)
        self._num_rollouts += len(group.rollouts)
        for rollout in group.rollouts:
            self._statuses.update(name for name in rollout.metrics if name.startswith("status/"))
        if self._num_groups >= self._config.rl.groups_per_step:
            self._failures.check(f"policy step {self._step}")
        group = select(group, self._selections)
        self.dropped.update(by_kind(group.dropped))
        reason = self._drop_reason(group)
        if reason is None:
            self.groups.append(group)
        elif group.rollouts:
            kind = "too_few_siblings" if len(group.rollouts) < 2 else reason
            self.dropped[kind] += len(group.rollouts)
        return reason

    def _without_broken(self, group: RolloutGroup) -> RolloutGroup:
        broken = tuple(rollout for rollout in group.rollouts if NOT_FINITE in rollout.metrics)
        if not broken:
            return group
        self.broken.append(replace(group, rollouts=broken))
        whole = tuple(rollout for rollout in group.rollouts if NOT_FINITE not in rollout.metrics)
        return replace(group, rollouts=whole, dropped={**group.dropped, NOT_FINITE: len(broken)})

    def _drop_reason(self, group: RolloutGroup) -> str | None:
        if GIVEN_UP in group.dropped:
            return GIVEN_UP
        if len(group.rollouts) < 2:
            reasons = sorted(group.dropped, key=lambda reason: -group.dropped[reason])
            if reasons and reasons[0] == "prompt_too_long" and self._config.data.too_long == "error":
                raise DataError(
                    f"problem {group.problem.id!r} leaves no room in actors.max_model_tokens "
                    f"({self._config.actors.max_model_tokens}); raise it or set data.too_long=skip"
                )
            return reasons[0] if reasons else "no_rollouts"
        if not any(rollout.num_trained_tokens for rollout in group.rollouts):
            return "no_tokens"
        if self._config.rl.skip_uninformative and len(set(group.rewards.tolist())) == 1:
            return "uninformative"
        return None


def count_dropped(groups: Sequence[RolloutGroup]) -> Counter[str]:
    """Rollouts that are missing in these groups, by the kind of reason."""
    dropped: Counter[str] = Counter()
    for group in groups:
        dropped.update(by_kind(group.dropped))
    return dropped
