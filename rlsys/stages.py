"""The stages of a run, each on one screen: what is started, what one step is, what is left behind.

A stage takes a model folder and leaves one. It is resumable inside (from its newest valid checkpoint) and as a whole
(a finished stage is not run again).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlsys.chat import Chat
from rlsys.checkpoint import CheckpointStore
from rlsys.config import Config, RlConfig
from rlsys.console import Console
from rlsys.demonstrations import Demonstration
from rlsys.errors import DataError, TrainingStalledError
from rlsys.fleet import LearnerGroup, RolloutFleet, check_finite
from rlsys.loop import Loop, LoopState
from rlsys.plugins import resolve
from rlsys.records import RunDirectory
from rlsys.rollout import mean_metrics
from rlsys.types import Problem, Rollout, RolloutGroup, TrainBatch

_T = TypeVar("_T")


class Interrupted(Exception):
    """The user asked the run to stop; what was done so far is in a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every stage needs."""

    config: Config
    directory: RunDirectory
    console: Console
    stop: asyncio.Event


# --- data ------------------------------------------------------------------------------------------------------------


def load_problems(config: Config, which: str) -> list[Problem]:
    """The problems of `data.train` or `data.held_out`."""
    plug_in = getattr(config.data, which)
    problems: list[Problem] = resolve(plug_in.use, place=f"data.{which}.use")(**plug_in.options)
    if not problems:
        raise DataError(f"data.{which} gave no problem")
    return problems


def endless(items: Sequence[_T], *, seed: int, skip: int) -> Iterator[_T]:
    """The items for ever, shuffled anew in each epoch; the order depends on the seed alone, so `skip` resumes it."""
    first_epoch, offset = divmod(skip, len(items))
    for epoch in itertools.count(first_epoch):
        order = np.random.default_rng([seed, epoch]).permutation(len(items))
        for index in order[offset if epoch == first_epoch else 0 :]:
            yield items[int(index)]


def to_rollout(demonstration: Demonstration, chat: Chat) -> Rollout:
    """A demonstration on the token axis of a rollout, each segment tokenized by itself as a rollout would be."""
    tokens = chat.render(demonstration.problem)
    mask = [False] * len(tokens)
    for text, trained in [*demonstration.segments, (chat.tokenizer.eos_token, True)]:
        ids = chat.encode(text)
        tokens += ids
        mask += [trained] * len(ids)
    return Rollout(
        tokens=np.array(tokens, dtype=np.int32),
        loss_mask=np.array(mask, dtype=np.bool_),
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        versions=np.full(len(tokens), -1, dtype=np.int32),
    )


def assemble(rollouts: Sequence[Rollout], advantages: Sequence[float]) -> TrainBatch:
    """A batch with one advantage for all tokens of a rollout."""
    return TrainBatch(
        rollouts=tuple(rollouts),
        advantages=tuple(
            np.full(len(rollout), advantage, dtype=np.float32)
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ),
        num_tokens=sum(rollout.num_trained_tokens for rollout in rollouts),
    )


# --- supervised fine-tuning ------------------------------------------------------------------------------------------


async def sft(run: Run, model: Path) -> Path:
    """Learn to imitate demonstrations."""
    config, stage = run.config, run.config.sft
    assert stage.demonstrations is not None
    make = resolve(stage.demonstrations.use, place="sft.demonstrations.use")
    demonstrations = make(load_problems(config, "train"), **stage.demonstrations.options)
    chat = Chat.load(str(model), [], config.chat)
    rollouts = [to_rollout(demonstration, chat) for demonstration in demonstrations]
    store = CheckpointStore(run.directory.stage("sft") / "checkpoints", keep=1)
    async with AsyncExitStack() as stack:
        with run.console.waiting(f"starting {config.learners.count} learner ranks"):
            learners = await LearnerGroup.start(
                config,
                str(model),
                optimizer=stage.optimizer,
                total_steps=stage.steps,
                loss="rlsys.losses:cross_entropy",
            )
        stack.push_async_callback(learners.close)
        checkpoint = store.newest(tell=run.console.say)
        step = 0
        if checkpoint is not None:
            await learners.load(checkpoint.folder / "learner")
            step = checkpoint.step
            run.directory.forget_after("sft", step)
            run.console.say(f"sft: going on from step {step} ({checkpoint.folder})")
        with run.console.steps("sft", total=stage.steps, done=step) as progress:
            while step < stage.steps:
                batch = _sft_batch(rollouts, step, stage.demonstrations_per_step, config.seed)
                metrics = await learners.step(batch, temperature=1.0)
                check_finite(metrics, stage.optimizer.max_skipped_steps)
                step += 1
                run.directory.log("sft", step, metrics)
                progress.advance(step, loss=metrics["loss"], lr=metrics["lr"])
                if step % stage.checkpoint_every == 0 or run.stop.is_set():
                    await save_checkpoint(store, learners, step, {})
                if run.stop.is_set():
                    raise Interrupted(f"sft step {step}")
        left = run.directory.stage("sft") / "model"
        await learners.export(left)
    run.directory.update_summary(sft_steps=step)
    return left


def _sft_batch(rollouts: Sequence[Rollout], step: int, size: int, seed: int) -> TrainBatch:
    """The batch of this step: the demonstrations in a new order each epoch, `size` at a time."""
    stream = endless(rollouts, seed=seed, skip=step * size)
    return assemble(list(itertools.islice(stream, size)), [0.0] * size)


async def save_checkpoint(store: CheckpointStore, learners: LearnerGroup, step: int, state: dict[str, Any]) -> None:
    """Write a whole checkpoint or none."""
    draft = store.draft(step)
    await learners.save(draft / "learner")
    store.commit(draft, step=step, state=state)


# --- reinforcement learning ------------------------------------------------------------------------------------------


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
            run.directory.forget_after("rl", state.step)
            run.console.say(f"rl: going on from step {state.step} ({checkpoint.folder})")
        await learners.publish(fleet, state.step)
        if "accuracy_before" not in run.directory.summary():
            before = await evaluate(run, fleet, held_out, stage="rl", step=0)
            run.directory.update_summary(
                accuracy_before=before["accuracy"], tool_rate_before=before["tool_rate"], held_out=len(held_out)
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
        dropped=dict(state.dropped),
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
        self._started_at = time.perf_counter()

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
        if len(group.rollouts) < 2:
            reasons = sorted(group.dropped, key=lambda reason: -group.dropped[reason])
            if reasons and reasons[0] == "prompt_too_long" and self._run.config.data.too_long == "error":
                raise DataError(
                    f"problem {group.problem.id!r} leaves no room in actors.max_model_tokens "
                    f"({self._run.config.actors.max_model_tokens}); raise it or set data.too_long=skip"
                )
            return reasons[0] if reasons else "no_rollouts"
        if not any(rollout.num_trained_tokens for rollout in group.rollouts):
            return "no_tokens"
        if self._stage.skip_uninformative and len(set(group.rewards.tolist())) == 1:
            return "uninformative"
        return None

    async def _learn(self, step: int, groups: list[RolloutGroup], dropped: Mapping[str, int]) -> None:
        seconds = {"rollout": time.perf_counter() - self._started_at}
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        advantages = [float(a) for group in groups for a in self._advantage(group.rewards)]
        staleness = [step - 1 - rollout.first_version for rollout in rollouts if rollout.num_trained_tokens]
        assert max(staleness) <= self._stage.max_staleness, "the loop broke its staleness bound"
        metrics = await self._update(step, rollouts, advantages)
        seconds["learn"] = metrics.pop("seconds")
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
            **{f"learner/{name}": value for name, value in metrics.items()},
            "staleness_mean": float(np.mean(staleness)),
            "staleness_max": float(max(staleness)),
            "tokens_per_second": sum(rollout.num_trained_tokens for rollout in rollouts) / total,
            "seconds/step": total,
            **{f"seconds/{name}": value for name, value in seconds.items()},
            **{f"dropped/{reason.partition(':')[0]}": float(count) for reason, count in dropped.items()},
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

    async def _update(self, step: int, rollouts: list[Rollout], advantages: list[float]) -> dict[str, float]:
        """All optimizer steps of one policy step; the metrics are of the first, which sees the policy that sampled."""
        order = np.random.default_rng([self._run.config.seed, step]).permutation(len(rollouts))
        first: dict[str, float] = {}
        seconds = 0.0
        for part in np.array_split(order, self._stage.updates_per_step):
            metrics = await self._learners.step(
                assemble([rollouts[i] for i in part], [advantages[i] for i in part]),
                temperature=self._stage.sampling.temperature,
                clip_low=self._stage.clip_low,
                clip_high=self._stage.clip_high,
                kl_coef=self._kl_coef(step),
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


# --- evaluation ------------------------------------------------------------------------------------------------------


async def evaluate(
    run: Run, fleet: RolloutFleet, problems: Sequence[Problem], *, stage: str, step: int
) -> dict[str, float]:
    """Measure the policy on these problems, record every rollout, return the means."""
    settings = run.config.eval
    chosen = problems[: settings.max_problems]
    with run.console.counting(f"evaluating on {len(chosen)} held-out problems", total=len(chosen)) as tick:

        async def measured(problem: Problem) -> RolloutGroup:
            group = await fleet.act(
                problem,
                size=settings.samples_per_problem,
                sampling=settings.sampling,
                group_id=f"eval-{stage}-{step}-{problem.id}",
            )
            tick()
            return group

        groups = await asyncio.gather(*(measured(problem) for problem in chosen))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        raise TrainingStalledError(f"none of the {len(chosen)} held-out problems could be measured: {groups[0].dropped}")
    run.directory.write_rollouts(f"{stage}-eval-{step:06d}", groups)
    missing = sum(count for group in groups for count in group.dropped.values())
    metrics = {**mean_metrics(rollouts), "problems": float(len(chosen)), "not_measured": float(missing)}
    run.directory.log(f"{stage}/eval", step, metrics)
    run.console.say(
        f"{stage} step {step}: held-out accuracy {metrics['accuracy']:.3f}, tool rate {metrics['tool_rate']:.2f}, "
        f"{metrics['response_tokens']:.0f} tokens a response, {metrics['completed_ratio']:.2f} completed"
    )
    return metrics


async def eval_(run: Run, model: Path) -> Path:
    """Measure the model folder itself, as a user of the trained model would load it."""
    async with AsyncExitStack() as stack:
        with run.console.waiting(f"starting {run.config.actors.count} rollout engines with {model}"):
            fleet = await RolloutFleet.start(run.config, str(model))
        stack.push_async_callback(fleet.close)
        metrics = await evaluate(run, fleet, load_problems(run.config, "held_out"), stage="eval", step=0)
    run.directory.update_summary(accuracy=metrics["accuracy"], tool_rate=metrics["tool_rate"])
    return model


STAGES = {"sft": sft, "rl": rl, "eval": eval_}
