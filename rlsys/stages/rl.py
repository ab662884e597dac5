"""Reinforcement learning with verifiable rewards: roll out, learn, publish, record."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.checkpoint import CheckpointStore, CheckpointWriter
from rlsys.config import Config, RlConfig
from rlsys.curriculum import Curriculum
from rlsys.errors import WeightSyncError
from rlsys.fleet import LearnerGroup, RolloutFleet, with_critic_ranks
from rlsys.loop import Loop, LoopState
from rlsys.rollout import mean_metrics
from rlsys.selection import resolve_selections
from rlsys.stages.collection import Collection, by_kind
from rlsys.stages.common import Interrupted, Run, load_problems, record_isolation
from rlsys.stages.evaluation import evaluate
from rlsys.stages.policy_step import PolicyStep
from rlsys.types import Problem, RolloutGroup


async def rl(run: Run, model: Path) -> Path:
    """Reinforcement learning with verifiable rewards, measured on held-out problems before and after."""
    config, stage = run.config, run.config.rl
    problems, held_out = load_problems(config, "train"), load_problems(config, "held_out")
    store = CheckpointStore(run.directory.stage("rl") / "checkpoints", keep=stage.keep_checkpoints)
    async with AsyncExitStack() as stack:
        fleet, learners, critic = await _start_all(run, model, stack)
        state, kl_coef, order = LoopState(), None, None
        checkpoint = store.newest(tell=run.console.say)
        if checkpoint is not None:
            await learners.load(checkpoint.folder / "learner")
            if critic is not None:
                await critic.load(checkpoint.folder / "critic")
            kl_coef, order = checkpoint.state.get("kl_coef"), checkpoint.state["curriculum"]
            state = LoopState(
                step=checkpoint.step, cursor=checkpoint.state["cursor"], dropped=Counter(checkpoint.state["dropped"])
            )
            run.console.say(f"rl: going on from step {state.step} ({checkpoint.folder})")
        run.directory.forget_after("rl", state.step)
        await learners.publish(fleet, state.step)
        if "accuracy_before" not in run.directory.summary():
            before = await evaluate(run, fleet, held_out, stage="rl", step=0)
            run.directory.update_summary(
                accuracy_before=before["accuracy"],
                tool_rate_before=before["tool_rate"],
                held_out=int(before["problems"]),
            )
        policy_step = PolicyStep(config, learners, critic, kl_coef=kl_coef)
        parts = {"learner": learners} | ({} if critic is None else {"critic": critic})
        writer = await stack.enter_async_context(CheckpointWriter(store, parts, tell=run.console.say))
        curriculum = Curriculum(problems, stage, seed=config.seed, state=order)
        trainer = _RlTrainer(run, fleet, learners, policy_step, writer, held_out, state, curriculum)
        await trainer.train()
        after = await evaluate(run, fleet, held_out, stage="rl", step=state.step)
        left = run.directory.stage("rl") / "model"
        await learners.export(left)
        if critic is not None:
            await critic.export(run.directory.stage("rl") / "critic")
    run.directory.update_summary(
        accuracy_after=after["accuracy"],
        tool_rate_after=after["tool_rate"],
        steps=state.step,
        dropped=dict(by_kind(state.dropped)),
        **_gap_summary(run.directory.metrics("rl")),
    )
    return left


async def _start_all(
    run: Run, model: Path, stack: AsyncExitStack
) -> tuple[RolloutFleet, LearnerGroup, LearnerGroup | None]:
    """Engines, learners and, where the stage has one, the critic, side by side; the stack ends them."""
    config, stage = run.config, run.config.rl
    what = f"starting {config.actors.count} rollout engines and {config.learners.count} learner ranks"
    policy_steps = stage.steps
    if stage.critic is not None:
        what += f" and {stage.critic.count} of a critic"
        policy_steps -= stage.critic.warmup_steps
    with run.console.waiting(what):
        fleet_task = asyncio.create_task(RolloutFleet.start(config, str(model)))
        learner_task = asyncio.create_task(
            LearnerGroup.start(
                config,
                str(model),
                optimizer=stage.optimizer,
                total_steps=policy_steps * stage.updates_per_step,
                loss=stage.loss,
                with_reference=stage.kl_coef > 0,
            )
        )
        critic_task = asyncio.create_task(_start_critic(config, model))
        try:
            fleet, learners, critic = await asyncio.gather(fleet_task, learner_task, critic_task)
        except BaseException:
            for task in (fleet_task, learner_task, critic_task):
                task.cancel()
            raise
        stack.push_async_callback(learners.close)
        if critic is not None:
            stack.push_async_callback(critic.close)
        stack.push_async_callback(fleet.close)
        await learners.open_weights(fleet)
        await record_isolation(run, fleet)
    return fleet, learners, critic


async def _start_critic(config: Config, model: Path) -> LearnerGroup | None:
    """The critic begins as the policy's own model, with a head that says 0 of everything."""
    stage = config.rl
    if stage.critic is None:
        return None
    return await LearnerGroup.start(
        with_critic_ranks(config),
        str(model),
        optimizer=stage.critic.optimizer,
        total_steps=stage.steps * stage.updates_per_step,
        loss="rlsys.losses:value_loss",
        network="scorer",
        what="critic rank",
    )


class _RlTrainer:
    """What one policy step is: assemble, learn, publish, record."""

    def __init__(
        self,
        run: Run,
        fleet: RolloutFleet,
        learners: LearnerGroup,
        policy_step: PolicyStep,
        writer: CheckpointWriter,
        held_out: Sequence[Problem],
        state: LoopState,
        curriculum: Curriculum,
    ) -> None:
        self._run, self._fleet, self._learners = run, fleet, learners
        self._policy_step, self._writer = policy_step, writer
        self._held_out, self._state = held_out, state
        self._curriculum, self._order = curriculum, curriculum.state()
        curriculum.step = state.step + 1
        self._stage: RlConfig = run.config.rl
        self._selections = resolve_selections(self._stage.selections)
        self._collection = self._collection_for(state.step + 1)
        self._started_at = time.perf_counter()

    def _collection_for(self, step: int) -> Collection:
        return Collection(self._run.config, self._selections, step=step)

    async def train(self) -> None:
        """Run the loop to its end, or to the user's stop."""
        loop = Loop(
            act=self._act,
            learn=self._learn,
            drop_reason=self._drop_reason,
            groups_per_step=self._stage.groups_per_step,
            max_staleness=self._stage.max_staleness,
            max_skipped_groups=self._stage.max_skipped_groups,
        )
        with self._run.console.steps("rl", total=self._stage.steps, done=self._state.step) as self._progress:
            self._started_at = time.perf_counter()
            problems = iter(self._curriculum)
            await loop.run(problems, steps=self._stage.steps, state=self._state, stop=self._run.stop)
        if self._run.stop.is_set() and self._state.step < self._stage.steps:
            await self._save(self._state.step)
            await self._writer.finish()
            raise Interrupted(f"rl step {self._state.step}")

    async def _act(self, problem: Problem) -> RolloutGroup:
        budget = self._stage.budget(self._state.step + 1)
        return await self._fleet.act(
            problem,
            size=self._stage.group_size,
            sampling=replace(self._stage.sampling, max_response_tokens=budget),
            group_id=f"rl-{self._state.step}-{problem.id}",
        )

    def _drop_reason(self, group: RolloutGroup) -> str | None:
        self._curriculum.note(group)
        return self._collection.add(group)

    async def _learn(self, step: int, groups: list[RolloutGroup], dropped: Mapping[str, int]) -> None:
        seconds = {"rollout": time.perf_counter() - self._started_at}
        assert len(groups) == len(self._collection.groups), "the loop and the collection disagree about what trains"
        collection, self._collection = self._collection, self._collection_for(step + 1)
        # As of now: what is collected later and not learned from comes again.
        self._order, self._curriculum.step = self._curriculum.state(), step + 1
        groups = collection.groups
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        staleness = [step - 1 - rollout.first_version for rollout in rollouts if rollout.num_trained_tokens]
        staleness = staleness or [0]  # no rollout of this step wrote a token
        assert max(staleness) <= self._stage.max_staleness, "the loop broke its staleness bound"
        credit, metrics = await self._policy_step.take(step, groups)
        gap = metrics.get("learner/logprob_gap", 0.0)  # none where a critic warms up
        if max(staleness) == 0:
            self._check_gap(step, gap)
        if self._stage.kl_coef > 0 and self._stage.reference_every and step % self._stage.reference_every == 0:
            await self._learners.reset_reference()
        published = await self._learners.publish(self._fleet, step)
        seconds |= {"publish": published["total"], "publish_pause": published["pause"]}
        recording = time.perf_counter()
        self._run.directory.write_rollouts(f"rl-step-{step:06d}", groups, advantages=credit.means)
        if step % self._stage.checkpoint_every == 0 and step < self._stage.steps:
            await self._save(step, cursor=self._state.cursor)
        seconds["record"] = time.perf_counter() - recording
        if self._stage.eval_every and step % self._stage.eval_every == 0 and step < self._stage.steps:
            evaluating = time.perf_counter()
            await evaluate(self._run, self._fleet, self._held_out, stage="rl", step=step)
            seconds["eval"] = time.perf_counter() - evaluating
        total = time.perf_counter() - self._started_at
        self._started_at = time.perf_counter()
        line = {
            **mean_metrics(rollouts),
            **collection.statuses,
            **metrics,
            "staleness_mean": float(np.mean(staleness)),
            "staleness_max": float(max(staleness)),
            "tokens_per_second": sum(rollout.num_trained_tokens for rollout in rollouts) / total,
            "seconds/step": total,
            **{f"seconds/{name}": value for name, value in seconds.items()},
            **{f"dropped/{kind}": float(count) for kind, count in collection.dropped.items()},
            **{f"dropped_groups/{kind}": float(count) for kind, count in by_kind(dropped).items()},
        }
        self._run.directory.log("rl", step, line)
        self._progress.advance(
            step,
            reward=line["reward"],
            accuracy=line["accuracy"],
            tools=line["tool_rate"],
            tokens=line["response_tokens"],
            gap=gap,
            seconds=total,
        )

    def _check_gap(self, step: int, gap: float) -> None:
        if gap > self._stage.max_logprob_gap:
            raise WeightSyncError(
                f"at step {step} learner and engine differ by {gap:.2g} in the log-prob of a token "
                f"(rl.max_logprob_gap is {self._stage.max_logprob_gap:g}): they do not hold the same weights, or they "
                "sample and score differently"
            )

    async def _save(self, step: int, cursor: int | None = None) -> None:
        state = {
            "cursor": self._state.cursor if cursor is None else cursor,
            "dropped": dict(self._state.dropped),
            "kl_coef": self._policy_step.kl.adapted,
            "curriculum": self._order,
        }
        await self._writer.save(step, state)


def _gap_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    gaps = [line["learner/logprob_gap"] for line in lines if "learner/logprob_gap" in line]
    return {"logprob_gap_mean": float(np.mean(gaps)), "logprob_gap_worst_step": float(max(gaps))} if gaps else {}
