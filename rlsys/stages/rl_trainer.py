"""What a policy step is: roll out, choose what trains, learn, publish, record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlsys.checkpoint import CheckpointWriter
from rlsys.config import RlConfig
from rlsys.curriculum import Curriculum
from rlsys.errors import RlsysError, WeightSyncError
from rlsys.fleet import RolloutFleet
from rlsys.learner_group import LearnerGroup
from rlsys.ledger import Ledger
from rlsys.loop import Loop
from rlsys.rollout import mean_metrics
from rlsys.selection import resolve_selections
from rlsys.stages.collection import Collection
from rlsys.stages.common import Interrupted, Run
from rlsys.stages.evaluation import evaluate
from rlsys.stages.policy_step import PolicyStep
from rlsys.types import NOT_FINITE, Problem, Rollout, RolloutGroup
from rlsys.workers import WorkerState


@dataclass(slots=True, kw_only=True)
class _Lesson:
    """A policy step that was learned and is not recorded yet."""

    collection: Collection
    means: Sequence[float]
    """The advantage of each rollout."""
    line: dict[str, float]
    """What is known of its line in the metrics."""
    seconds: dict[str, float]
    learned_at: float
    num_tokens: int


class RlTrainer:
    """One attempt at the policy steps that are left: until they are done, the user stops it or something fails."""

    def __init__(
        self,
        run: Run,
        fleet: RolloutFleet,
        learners: LearnerGroup,
        policy_step: PolicyStep,
        writer: CheckpointWriter,
        held_out: Sequence[Problem],
        ledger: Ledger,
        curriculum: Curriculum,
    ) -> None:
        self._run, self._fleet, self._learners = run, fleet, learners
        self._policy_step, self._writer, self._held_out = policy_step, writer, held_out
        self._ledger, self._curriculum = ledger, curriculum
        self._stage: RlConfig = run.config.rl
        self._selections = resolve_selections(self._stage.selections)
        self._saved_step = ledger.step
        self._is_learning = False
        """Whether the learner may be between two policy steps: then no checkpoint can be made of it."""
        self._lesson: _Lesson | None = None
        self._told_drops = ledger.dropped.copy()
        self._collect_for(ledger.step + 1)

    def _collect_for(self, step: int) -> None:
        self._collection = Collection(self._run.config, self._selections, step=step)
        self._curriculum.step = step

    async def train(self) -> None:
        """Run the loop to its end, or to the user's stop."""
        stage, ledger = self._stage, self._ledger
        loop = Loop(
            act=self._act,
            learn=self._learn,
            publish=self._publish,
            drop_reason=self._drop_reason,
            groups_per_step=stage.groups_per_step,
            max_staleness=stage.max_staleness,
            max_skipped_groups=stage.max_skipped_groups,
            at_groups=stage.update == "at_groups",
            is_generating=self._is_generating,
        )
        with self._run.console.steps("rl", total=stage.steps, done=ledger.step) as self._progress:
            self._step_began = time.perf_counter()
            await loop.run(ledger, iter(self._curriculum), steps=stage.steps, stop=self._run.stop)
        if self._run.stop.is_set() and ledger.step < stage.steps:
            await self._save()
            await self._writer.finish()
            raise Interrupted(f"rl step {ledger.step}")

    # --- what the loop asks for --------------------------------------------------------------------------------------

    async def _act(self, number: int, attempt: int) -> RolloutGroup:
        problem = self._curriculum.problem(number)
        budget = self._stage.budget(self._ledger.step + 1)
        return await self._fleet.act(
            problem,
            size=self._stage.group_size,
            sampling=replace(self._stage.sampling, max_response_tokens=budget),
            group_id=f"rl-{number}-{attempt}-{problem.id}",
            give_up_after=self._stage.give_up_after,
        )

    def _is_generating(self) -> bool:
        writing = (WorkerState.HEALTHY, WorkerState.DRAINING)
        return any(worker.in_flight for worker in self._fleet.roster.in_state(*writing))

    def _drop_reason(self, number: int, group: RolloutGroup) -> str | None:
        collection = self._collection
        num_broken = len(collection.broken)
        reason = collection.add(group)
        if len(collection.broken) > num_broken:
            self._run.directory.write_rollouts(f"rl-{NOT_FINITE}-{self._ledger.step + 1:06d}", collection.broken)
        if reason is not None:
            self._curriculum.note(number, group)
        return reason

    async def _learn(self, step: int, groups: Mapping[int, RolloutGroup]) -> None:
        seconds = {"rollout": time.perf_counter() - self._step_began}
        self._is_learning = True
        collection = self._collection
        assert len(groups) == len(collection.groups), "the loop and the collection disagree about what trains"
        rollouts = [rollout for group in collection.groups for rollout in group.rollouts]
        staleness = _staleness(rollouts, step)
        assert max(staleness) <= self._stage.max_staleness, "the loop broke its staleness bound"
        credit, metrics = await self._policy_step.take(step, collection.groups)
        if max(staleness) == 0:
            self._check_gap(step, metrics.get("learner/logprob_gap", 0.0))  # none where a critic warms up
        if self._stage.kl_coef > 0 and self._stage.reference_every and step % self._stage.reference_every == 0:
            await self._learners.reset_reference()
        for number, group in groups.items():
            self._curriculum.note(number, group)
        self._collect_for(step + 1)
        self._lesson = _Lesson(
            collection=collection,
            means=credit.means,
            line={
                **mean_metrics(rollouts),
                **collection.statuses,
                **metrics,
                "staleness_mean": float(np.mean(staleness)),
                "staleness_max": float(max(staleness)),
            },
            seconds=seconds,
            learned_at=time.perf_counter(),
            num_tokens=sum(rollout.num_trained_tokens for rollout in rollouts),
        )
        self._is_learning = False

    async def _publish(self, step: int) -> None:
        lesson = self._lesson
        assert lesson is not None, "nothing was learned"
        if self._stage.update == "at_groups":
            lesson.seconds["drain"] = time.perf_counter() - lesson.learned_at
        published = await self._learners.publish(self._fleet, step)
        lesson.seconds |= {"publish": published["total"], "publish_pause": published["pause"]}
        recording = time.perf_counter()
        self._write_rollouts(step, lesson)
        if step % self._stage.checkpoint_every == 0 and step < self._stage.steps:
            await self._save()
        lesson.seconds["record"] = time.perf_counter() - recording
        if self._stage.eval_every and step % self._stage.eval_every == 0 and step < self._stage.steps:
            evaluating = time.perf_counter()
            await evaluate(self._run, self._fleet, self._held_out, stage="rl", step=step)
            lesson.seconds["eval"] = time.perf_counter() - evaluating
        line = self._log(step, lesson)
        self._progress.advance(
            step,
            reward=line["reward"],
            accuracy=line["accuracy"],
            tools=line["tool_rate"],
            tokens=line["response_tokens"],
            gap=line.get("learner/logprob_gap", 0.0),
            seconds=line["seconds/step"],
        )

    # --- what is said and kept ---------------------------------------------------------------------------------------

    def _write_rollouts(self, step: int, lesson: _Lesson) -> None:
        groups = lesson.collection.groups
        self._run.directory.write_rollouts(f"rl-step-{step:06d}", groups, advantages=lesson.means)

    def _log(self, step: int, lesson: _Lesson) -> Mapping[str, float]:
        self._lesson = None
        total = time.perf_counter() - self._step_began
        self._step_began = time.perf_counter()
        drops, self._told_drops = self._ledger.dropped - self._told_drops, self._ledger.dropped.copy()
        line = {
            **lesson.line,
            "tokens_per_second": lesson.num_tokens / total,
            "seconds/step": total,
            **{f"seconds/{name}": value for name, value in lesson.seconds.items()},
            **_counts("dropped", lesson.collection.dropped),
            **_counts("dropped_groups", drops),
            **_counts("ledger", self._ledger.counts()),
        }
        self._run.directory.log("rl", step, line)
        return line

    def _check_gap(self, step: int, gap: float) -> None:
        if gap > self._stage.max_logprob_gap:
            raise WeightSyncError(
                f"at step {step} learner and engine differ by {gap:.2g} in the log-prob of a token "
                f"(rl.max_logprob_gap is {self._stage.max_logprob_gap:g}): they do not hold the same weights, or they "
                "sample and score differently"
            )

    async def _save(self) -> None:
        state = {
            "ledger": self._ledger.state(),
            "curriculum": self._curriculum.state(),
            "kl_coef": self._policy_step.kl.adapted,
        }
        self._saved_step = self._ledger.step
        await self._writer.save(self._ledger.step, state)

    async def save_before_the_end(self) -> None:
        """After an error that the learner outlived: what it has learned and nobody has recorded or saved yet.

        There is nothing where the error came in the middle of a policy step. What fails here is told, not raised.
        """
        step = self._ledger.step
        if self._is_learning:
            return
        try:
            if self._lesson is not None:  # its weights were not published, or their evaluation failed
                self._write_rollouts(step, self._lesson)
                self._log(step, self._lesson)
            if step <= self._saved_step:
                return
            await self._save()
            await self._writer.finish()
            self._run.console.say(f"rl: step {step} is saved, before the run ends with an error")
        except (RlsysError, OSError) as failure:
            self._run.console.say(f"rl: step {step} could not be saved: {type(failure).__name__}: {failure}")


def _staleness(rollouts: Sequence[Rollout], step: int) -> list[int]:
    """How many versions older than the learner each of them began, of those that wrote a token; 0 where none did."""
    return [step - 1 - rollout.first_version for rollout in rollouts if rollout.num_trained_tokens] or [0]


def _counts(prefix: str, counts: Mapping[str, int] | Counter[str]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(count) for name, count in counts.items()}


def gap_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean and worst step of how far learner and engine were from each other."""
    gaps = [line["learner/logprob_gap"] for line in lines if "learner/logprob_gap" in line]
    return {"logprob_gap_mean": float(np.mean(gaps)), "logprob_gap_worst_step": float(max(gaps))} if gaps else {}
