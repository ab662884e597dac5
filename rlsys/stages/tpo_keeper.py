"""How good a model is in the eyes of its judge, and which weights of an iteration are kept for it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.chat import Chat
from rlsys.checkpoint import CheckpointStore, CheckpointWriter
from rlsys.errors import CheckpointError
from rlsys.fleet import RolloutFleet
from rlsys.learner_group import LearnerGroup
from rlsys.plugins import resolve
from rlsys.reward_terms import grades_groups
from rlsys.stages.collection import RewardFailures
from rlsys.stages.common import Run
from rlsys.stages.evaluation import answered, evaluate, record
from rlsys.tables import file_rows
from rlsys.types import Problem, Rollout, RolloutGroup

_FIRST = "tpo-validation-000000"
"""The record of the first model's answers to the validation problems."""


class Yardstick:
    """The problems that models are measured on, and the engines that hold the model to be measured.

    Validation problems decide which weights are kept; held-out problems decide nothing, they are for the report.
    """

    def __init__(
        self, run: Run, fleet: RolloutFleet, chat: Chat, validation: Sequence[Problem], held_out: Sequence[Problem]
    ) -> None:
        self._run, self._fleet, self._chat = run, fleet, chat
        self._validation, self._held_out = validation, held_out
        rewards = enumerate(run.config.rewards)
        self._compares = any(grades_groups(resolve(reward.use, place=f"rewards.{n}.use")) for n, reward in rewards)

    async def validate(self, name: str, step: int) -> dict[str, float]:
        """The judge's mean score of answers to the validation problems, and the accuracy; logged in full as
        `name/validation`.

        A judge that compares says of siblings alone only which is better. So it is given them once more, with the
        answers of the model that the stage began with, and what it gives them there is added to the score.
        """
        groups = await answered(
            self._run,
            self._fleet,
            self._validation,
            size=self._run.config.tpo.validation_samples,
            name=f"{name}-validation-{step}",
            what="validation",
        )
        found = record(self._run, groups, stage=name, step=step, kind="validation", what="validation")
        score = found["reward"] + (await self._beside_the_first(groups) if self._compares else 0.0)
        return {"validation_score": score, "validation_accuracy": found["accuracy"]}

    async def _beside_the_first(self, groups: Sequence[RolloutGroup]) -> float:
        """The mean of what rewards that compare give these answers beside those of the stage's first model."""
        rows = read_rollouts(self._run.directory.folder / "rollouts" / f"{_FIRST}.parquet", self._chat)
        mixed = [replace(group, rollouts=(*group.rollouts, *rows.get(group.problem.id, ()))) for group in groups]
        compared = await asyncio.gather(*(self._fleet.compare(group) for group in mixed))
        failures = RewardFailures(self._run.config.max_failed_rewards)
        scores: list[float] = []
        for group, result in zip(groups, compared, strict=True):
            failures.add(result)
            if len(result.rollouts) > len(group.rollouts):  # else the comparison failed
                scores += [rollout.reward for rollout in result.rollouts[: len(group.rollouts)]]
        failures.check("the comparison of validation answers with those of the first model")
        return float(np.mean(scores)) if scores else 0.0

    async def of_stage(self, number: int, validated: Mapping[str, float]) -> dict[str, float]:
        """What the line of iteration `number` says of its model, which the engines hold: also of held-out problems."""
        found = await evaluate(self._run, self._fleet, self._held_out, stage="tpo", step=number)
        return {
            **validated,
            "held_out_accuracy": found["accuracy"],
            "held_out_score": found["reward"],
            **{f"held_out_{key}": found[key] for key in ("thought_tokens", "shown_tokens") if key in found},
        }


def read_rollouts(path: Path, chat: Chat) -> dict[str, list[Rollout]]:
    """Recorded rollouts as they were before they were graded, by the problem's id.

    Raises:
        DataError: there is no such file.
    """
    found: dict[str, list[Rollout]] = {}
    for _, _, row in file_rows(path):
        tokens, mask = np.array(row["tokens"], np.int32), np.array(row["loss_mask"], np.bool_)
        rollout = Rollout(
            tokens=tokens,
            loss_mask=mask,
            logprobs=np.array(row["logprobs"], np.float32),
            versions=np.array(row["versions"], np.int32),
            response=chat.decode(tokens[mask].tolist()),
            transcript=row["transcript"],
            finish_reason=row["finish_reason"],
            metrics=json.loads(row["metrics"]),
        )
        found.setdefault(row["problem_id"], []).append(chat.hide_thought(rollout))
    return found


class Keeper:
    """Looks at the validation problems while an iteration learns, and keeps the weights with the best score."""

    def __init__(
        self, run: Run, fleet: RolloutFleet, yardstick: Yardstick, *, number: int, name: str, num_pairs: int
    ) -> None:
        stage = run.config.tpo
        self._run, self._fleet, self._yardstick = run, fleet, yardstick
        self._number, self._name = number, name
        self._every = stage.validate_every or max(1, math.ceil(num_pairs / stage.learning.pairs_per_step))
        self._store = CheckpointStore(run.directory.stage(name) / "best", keep=1)
        self._kept: dict[str, Any] = {}
        self.result: dict[str, float] = {}
        """What the weights that were kept are, when all is done."""

    async def begin(self, learners: LearnerGroup) -> None:
        """Give the engines these learners' weights from now on; find what an earlier attempt kept."""
        learners.serve(self._fleet)
        kept = self._store.newest(tell=self._run.console.say)
        self._kept = {} if kept is None else dict(kept.state)

    async def step(self, step: int, learners: LearnerGroup) -> Mapping[str, float]:
        """Behind each step; mostly it is not the time to look."""
        return {} if step % self._every else await self._look(step, learners)

    async def _look(self, step: int, learners: LearnerGroup) -> dict[str, float]:
        await learners.publish(self._fleet, self._number)
        found = await self._yardstick.validate(self._name, step)
        if not self._kept or found["validation_score"] > self._kept["validation_score"]:
            self._kept = {**found, "best_step": float(step), "saves": self._kept.get("saves", 0) + 1}
            # Numbered by saves, not steps: after an interruption a better one may come of an earlier step.
            writer = CheckpointWriter(self._store, {"learner": learners}, tell=self._run.console.say)
            await writer.save(self._kept["saves"], self._kept)
            await writer.finish()
        return found

    async def finish(self, step: int, learners: LearnerGroup) -> None:
        """Give learners and engines the best weights and measure them on the held-out problems."""
        looked = [line["step"] for line in self._run.directory.metrics(f"{self._name}/validation")]
        if step not in looked or not self._kept:
            await self._look(step, learners)
        kept = self._store.newest(tell=self._run.console.say)
        if kept is None:
            raise CheckpointError(f"{self._name}: the best weights in {self._run.directory.stage(self._name)} are lost")
        await learners.load(kept.folder / "learner")
        await learners.publish(self._fleet, self._number)
        validated = {key: float(value) for key, value in kept.state.items() if key != "saves"}
        self.result = await self._yardstick.of_stage(self._number, validated)
