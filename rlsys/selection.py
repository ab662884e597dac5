"""Which siblings of a group train: pure functions from a group to one bool for each sibling.

STILL-3 (arXiv 2503.04548) lengthens responses by choosing what is trained on instead of rewarding length; the three
ways that it compares are here. "Correct" is what the first reward says (`metrics["correct"]`), the length of a rollout
is the number of tokens that the policy wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rlsys.errors import ConfigError
from rlsys.plugins import resolve
from rlsys.types import Rollout, RolloutGroup

Selection = Callable[[RolloutGroup], Sequence[bool]]

NOT_SELECTED = "not_selected"
"""Under this reason siblings are counted that a selection left out."""


def completed_only(group: RolloutGroup) -> list[bool]:
    """Siblings that ended by themselves; those that the token budget cut off do not train."""
    return [rollout.finish_reason != "length" for rollout in group.rollouts]


def longer_correct_only(group: RolloutGroup) -> list[bool]:
    """All siblings where the correct ones are on average longer than the wrong ones, and there are both; else none."""
    right = [rollout.num_trained_tokens for rollout in group.rollouts if _is_correct(rollout)]
    wrong = [rollout.num_trained_tokens for rollout in group.rollouts if not _is_correct(rollout)]
    longer = bool(right and wrong) and np.mean(right) > np.mean(wrong)
    return [bool(longer)] * len(group.rollouts)


def longest_correct_shortest_wrong(group: RolloutGroup) -> list[bool]:
    """Two siblings, the longest correct and the shortest wrong one, if the former is longer; else none.

    The first one counts among equals.
    """
    lengths = {index: rollout.num_trained_tokens for index, rollout in enumerate(group.rollouts)}
    right = [index for index, rollout in enumerate(group.rollouts) if _is_correct(rollout)]
    wrong = [index for index in lengths if index not in right]
    if not right or not wrong:
        return [False] * len(lengths)
    longest, shortest = max(right, key=lengths.__getitem__), min(wrong, key=lengths.__getitem__)
    chosen = (longest, shortest) if lengths[longest] > lengths[shortest] else ()
    return [index in chosen for index in lengths]


def _is_correct(rollout: Rollout) -> bool:
    return rollout.metrics["correct"] > 0


def resolve_selections(references: Sequence[str]) -> dict[str, Selection]:
    """The functions that `rl.selections` names, in order.

    Raises:
        ConfigError: one does not exist or cannot be called.
    """
    found: dict[str, Selection] = {}
    for index, reference in enumerate(references):
        place = f"rl.selections.{index}"
        found[reference] = resolve(reference, place=place)
        if not callable(found[reference]):
            raise ConfigError(
                f"{place}: {reference!r} is no function; give one from a group to a bool for each sibling"
            )
    return found


def select(group: RolloutGroup, selections: dict[str, Selection]) -> RolloutGroup:
    """What all selections, one after the other, leave of the group; the rest is counted as dropped.

    Raises:
        ConfigError: a selection raised, or did not return one bool for each sibling.
    """
    for reference, selection in selections.items():
        try:
            chosen = list(selection(group))
        except Exception as error:  # anything may come out of a user's function
            raise ConfigError(
                f"rl.selections: {reference} raised {type(error).__name__} for problem {group.problem.id!r}: {error}"
            ) from error
        if len(chosen) != len(group.rollouts) or not all(isinstance(value, bool | np.bool_) for value in chosen):
            raise ConfigError(
                f"rl.selections: {reference} returned {chosen} for the {len(group.rollouts)} siblings of problem "
                f"{group.problem.id!r}; it must return one bool for each"
            )
        kept = tuple(rollout for rollout, value in zip(group.rollouts, chosen, strict=True) if value)
        missing = len(group.rollouts) - len(kept)
        if missing:
            dropped = {**group.dropped, NOT_SELECTED: group.dropped.get(NOT_SELECTED, 0) + missing}
            group = replace(group, rollouts=kept, dropped=dropped)
    return group
