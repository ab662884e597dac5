"""What a sampling stage could not have: whether it is so much that the stage is to stop."""

from __future__ import annotations

from collections import Counter, deque

from rlsys.config import Config
from rlsys.errors import DataError, TrainingStalledError
from rlsys.samplers import SKIPPED, Answers
from rlsys.types import Problem

WINDOW = 64
"""The problems, last ones, that are looked at together."""

_UNGRADED = ("reward_timeout", "reward_error")
_HARMLESS = ("prompt_too_long",)


class Shortfall:
    """Answers to the last problems that could not be had, or not be graded, by reason.

    The `num_done` problems of attempts before were answered.
    """

    def __init__(self, config: Config, stage: str, *, num_problems: int, num_done: int = 0) -> None:
        self._config, self._stage = config, stage
        before = (config.samples[stage].samples_per_problem, Counter[str](), Counter[str]())
        self._last = deque([before] * min(WINDOW, num_done), maxlen=min(WINDOW, num_problems))

    def add(self, problem: Problem, answers: Answers) -> None:
        """Count a problem's answers.

        Raises:
            TrainingStalledError: of the last ones too many could not be had; names counts, limit and first message.
            DataError: a prompt is too long, and that is to be an error.
        """
        dropped = Counter(answers.dropped)
        if self._config.data.too_long == "error" and any(reason.startswith(_HARMLESS) for reason in dropped):
            raise DataError(
                f"samples.{self._stage}: problem {problem.id!r} leaves no room in actors.max_model_tokens "
                f"({self._config.actors.max_model_tokens}); raise it or set data.too_long=skip"
            )
        ungraded = Counter({reason: count for reason, count in dropped.items() if reason.startswith(_UNGRADED)})
        for sample in answers.samples:  # those that were graded 0 for it
            ungraded.update([reason for reason in sample.metrics if reason.startswith(_UNGRADED)][:1])
        known = (*_UNGRADED, *_HARMLESS, SKIPPED)
        missing = Counter({reason: count for reason, count in dropped.items() if not reason.startswith(known)})
        self._last.append((len(answers.samples) + dropped.total(), missing, ungraded))
        if len(self._last) == self._last.maxlen:
            limit = self._config.samples[self._stage].max_failed
            self._check([entry[1] for entry in self._last], limit, "had", f"samples.{self._stage}.max_failed")
            limit = self._config.max_failed_rewards
            self._check([entry[2] for entry in self._last], limit, "graded", "max_failed_rewards")

    def _check(self, failed: list[Counter[str]], limit: float, what: str, setting: str) -> None:
        asked = sum(entry[0] for entry in self._last)
        reasons: Counter[str] = Counter()
        for one in failed:
            reasons.update(one)
        if reasons.total() <= limit * asked:
            return
        kinds: Counter[str] = Counter()
        for reason, count in reasons.items():
            kinds[reason.partition(":")[0]] += count
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise TrainingStalledError(
            f"samples.{self._stage}: {reasons.total()} of the last {asked} answers could not be {what} ({told}), more "
            f"than {setting}={limit:g} allows; the first: {next(iter(reasons)).partition(': ')[2]}; what was answered "
            "is kept: when this is put right, go on with --resume"
        )
