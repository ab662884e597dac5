"""Reinforcement learning with verifiable rewards: roll out, learn, publish, record."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.advantages import whiten
from rlsys.checkpoint import CheckpointStore
from rlsys.config import RlConfig
from rlsys.errors import ConfigError, WeightSyncError
from rlsys.fleet import LearnerGroup, RolloutFleet, check_finite
from rlsys.loop import Loop, LoopState
from rlsys.plugins import resolve
from rlsys.rollout import mean_metrics
from rlsys.selection import resolve_selections
from rlsys.stages.collection import Collection, by_kind
from rlsys.stages.common import Interrupted, Run, assemble, endless, load_problems, record_isolation, save_checkpoint
from rlsys.stages.evaluation import evaluate
from rlsys.types import Problem, Rollout, RolloutGroup


async def rl(run: Run, model: Path) -> Path:
    """Reinforcement learning with verifiable rewards, measured on held-out problems before and after."""
    config, stage = run.config, run.config.rl
    problems, held_out = load_problems(config, "train"), load_problems(config, "held_out")
    store = CheckpointStore(run.directory.stage("rl") / "checkpoints", keep=stage.keep_checkpoints)
    async with AsyncExitStack() as stack:
        fleet, learners = await _start_both(run, model, stack)
        state = LoopState()
        checkpoint = store.newest(tell=run.console.say)
        if checkpoint is not None:
            await learners.load(checkpoint.folder / "learner")
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
        trainer = _RlTrainer(run, fleet, learners, store, held_out, state)
        await trainer.train(endless(problems, seed=config.seed, skip=state.cursor))
        after = await evaluate(run, fleet, held_out, stage="rl", step=state.step)
        left = run.directory.stage("rl") / "model"
        await learners.export(left)
    run.directory.update_summary(
        accuracy_after=after["accuracy"],
        tool_rate_after=after["tool_rate"],
        steps=state.step,
        dropped=dict(by_kind(state.dropped)),
        **_gap_summary(run.directory.metrics("rl")),
    )
    return left


async def _start_both(run: Run, model: Path, stack: AsyncExitStack) -> tuple[RolloutFleet, LearnerGroup]:
    config, stage = run.config, run.config.rl
    what = f"starting {config.actors.count} rollout engines and {config.learners.count} learner ranks"
    with run.console.waiting(what):
        fleet_task = asyncio.create_task(RolloutFleet.start(config, str(model)))
        learner_task = asyncio.create_task(
            LearnerGroup.start(
                config,
                str(model),
                optimizer=stage.optimizer,
                total_steps=stage.steps * stage.updates_per_step,
                loss=stage.loss,
                with_reference=stage.kl_coef > 0,
            )
        )
        try:
            fleet, learners = await asyncio.gather(fleet_task, learner_task)
        except BaseException:
            for task in (fleet_task, learner_task):
                task.cancel()
            raise
        stack.push_async_callback(learners.close)
        stack.push_async_callback(fleet.close)
        await learners.open_weights(fleet)
        await record_isolation(run, fleet)
    return fleet, learners


class _RlTrainer:
    """What one policy step is: assemble, learn, publish, record."""

    def __init__(
        self,
        run: Run,
        fleet: RolloutFleet,
        learners: LearnerGroup,
        store: CheckpointStore,
        held_out: Sequence[Problem],
        state: LoopState,
    ) -> None:
        self._run, self._fleet, self._learners, self._store = run, fleet, learners, store
        self._held_out, self._state = held_out, state
        self._stage: RlConfig = run.config.rl
        self._advantage = resolve(self._stage.advantage, place="rl.advantage")
        self._selections = resolve_selections(self._stage.selections)
        self._collection = self._collection_for(state.step + 1)
        self._started_at = time.perf_counter()

    def _collection_for(self, step: int) -> Collection:
        return Collection(self._run.config, self._selections, step=step)

    async def train(self, problems: Iterator[Problem]) -> None:
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
            await loop.run(problems, steps=self._stage.steps, state=self._state, stop=self._run.stop)
        if self._run.stop.is_set() and self._state.step < self._stage.steps:
            await self._save(self._state.step)
            raise Interrupted(f"rl step {self._state.step}")

    async def _act(self, problem: Problem) -> RolloutGroup:
        return await self._fleet.act(
            problem,
            size=self._stage.group_size,
            sampling=self._stage.sampling,
            group_id=f"rl-{self._state.step}-{problem.id}",
        )

    def _drop_reason(self, group: RolloutGroup) -> str | None:
        return self._collection.add(group)

    async def _learn(self, step: int, groups: list[RolloutGroup], dropped: Mapping[str, int]) -> None:
        seconds = {"rollout": time.perf_counter() - self._started_at}
        assert len(groups) == len(self._collection.groups), "the loop and the collection disagree about what trains"
        collection, self._collection = self._collection, self._collection_for(step + 1)
        groups = collection.groups
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        advantages = self._advantages(groups)
        staleness = [step - 1 - rollout.first_version for rollout in rollouts if rollout.num_trained_tokens]
        assert max(staleness) <= self._stage.max_staleness, "the loop broke its staleness bound"
        metrics = await self._update(step, rollouts, advantages)
        if max(staleness) == 0 and metrics["logprob_gap"] > self._stage.max_logprob_gap:
            raise WeightSyncError(
                f"at step {step} learner and engine differ by {metrics['logprob_gap']:.2g} in the log-prob of a token "
                f"(rl.max_logprob_gap is {self._stage.max_logprob_gap:g}): they do not hold the same weights, or they "
                "sample and score differently"
            )
        seconds["learn"] = metrics.pop("seconds")
        if self._stage.kl_coef > 0 and self._stage.reference_every and step % self._stage.reference_every == 0:
            await self._learners.reset_reference()
        published = await self._learners.publish(self._fleet, step)
        seconds |= {"publish": published["total"], "publish_pause": published["pause"]}
        recording = time.perf_counter()
        self._run.directory.write_rollouts(f"rl-step-{step:06d}", groups, advantages=advantages)
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
            **{f"learner/{name}": value for name, value in metrics.items()},
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
            gap=metrics["logprob_gap"],
            seconds=total,
        )

    def _advantages(self, groups: Sequence[RolloutGroup]) -> list[float]:
        """One for each rollout, in the order of the groups."""
        parts = [np.asarray(self._advantage(group.rewards), dtype=np.float64) for group in groups]
        for group, part in zip(groups, parts, strict=True):
            if part.shape != group.rewards.shape or not np.isfinite(part).all():
                raise ConfigError(
                    f"rl.advantage={self._stage.advantage} made {part.tolist()} of the rewards "
                    f"{group.rewards.tolist()}; "
                    "it must return one finite number for each"
                )
        found = np.concatenate(parts)
        return [float(value) for value in (whiten(found) if self._stage.whiten_advantages else found)]

    async def _update(self, step: int, rollouts: list[Rollout], advantages: list[float]) -> dict[str, float]:
        """All optimizer steps of one policy step; the metrics are of the first, which sees the policy that sampled."""
        order = np.random.default_rng([self._run.config.seed, step]).permutation(len(rollouts))
        first: dict[str, float] = {}
        seconds = 0.0
        for part in np.array_split(order, self._stage.updates_per_step):
            if not any(rollouts[i].num_trained_tokens for i in part):
                continue
            metrics = await self._learners.step(
                assemble(
                    [rollouts[i] for i in part],
                    [advantages[i] for i in part],
                    aggregation=self._stage.aggregation,
                    constant=self._stage.sampling.max_response_tokens,
                ),
                temperature=self._stage.sampling.temperature,
                clip_low=self._stage.clip_low,
                clip_high=self._stage.clip_high,
                kl_coef=self._kl_coef(step),
                kl_estimator=self._stage.kl_estimator,
            )
            check_finite(metrics, self._stage.optimizer.max_skipped_steps)
            seconds += metrics["seconds"]
            first = first or metrics
        return {**first, "seconds": seconds, "kl_coef": self._kl_coef(step)}

    def _kl_coef(self, step: int) -> float:
        if self._stage.kl_schedule == "constant":
            return self._stage.kl_coef
        return self._stage.kl_coef * 0.5 * (1 + math.cos(math.pi * (step - 1) / self._stage.steps))

    async def _save(self, step: int, cursor: int | None = None) -> None:
        state = {"cursor": self._state.cursor if cursor is None else cursor, "dropped": dict(self._state.dropped)}
        await save_checkpoint(self._store, self._learners, step, state)


def _gap_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    gaps = [line["learner/logprob_gap"] for line in lines if "learner/logprob_gap" in line]
    return {"logprob_gap_mean": float(np.mean(gaps)), "logprob_gap_worst_step": float(max(gaps))} if gaps else {}
