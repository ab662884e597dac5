"""Reinforcement learning with verifiable rewards: start all, train, and go on where the learner was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from rlsys.checkpoint import CheckpointStore, CheckpointWriter
from rlsys.errors import LearnerLostError, RlsysError
from rlsys.fleet import RolloutFleet
from rlsys.stages.common import Run, load_problems, record_isolation
from rlsys.stages.evaluation import evaluate
from rlsys.stages.policy_step import PolicyStep
from rlsys.stages.rl_recovery import Learners, Recovery, restore
from rlsys.stages.rl_trainer import RlTrainer, gap_summary
from rlsys.types import Problem


async def rl(run: Run, model: Path) -> Path:
    """Reinforcement learning with verifiable rewards, measured on held-out problems before and after."""
    problems, held_out = load_problems(run.config, "train"), load_problems(run.config, "held_out")
    folder = run.directory.stage("rl")
    store = CheckpointStore(folder / "checkpoints", keep=run.config.rl.keep_checkpoints)
    async with AsyncExitStack() as stack:
        fleet, learners = await _start_all(run, model, stack)
        recovery = Recovery(run, fleet, learners, store)
        while True:
            try:
                await _attempt(run, fleet, learners, store, problems, held_out)
                await learners.policy.export(folder / "model")
                if learners.critic is not None:
                    await learners.critic.export(folder / "critic")
                break
            except LearnerLostError as error:
                if run.stop.is_set():
                    raise
                await recovery.recover(error)
    run.directory.update_summary(**gap_summary(run.directory.metrics("rl")))
    return folder / "model"


async def _start_all(run: Run, model: Path, stack: AsyncExitStack) -> tuple[RolloutFleet, Learners]:
    """Engines, learners and, where the stage has one, the critic, side by side; the stack ends them."""
    config = run.config
    learners = Learners(config, model)
    what = f"starting {config.actors.count} rollout engines and {config.learners.count} learner ranks"
    what += f" and {config.rl.critic.count} of a critic" if config.rl.critic is not None else ""
    stack.push_async_callback(learners.close)

    async def start_fleet() -> RolloutFleet:
        fleet = await RolloutFleet.start(config, str(model))
        stack.push_async_callback(fleet.close)
        return fleet

    with run.console.waiting(what):
        fleet_task, learner_task = asyncio.create_task(start_fleet()), asyncio.create_task(learners.start())
        try:
            fleet, _ = await asyncio.gather(fleet_task, learner_task)
        except BaseException:
            fleet_task.cancel()
            learner_task.cancel()
            await asyncio.gather(fleet_task, learner_task, return_exceptions=True)
            raise
        learners.policy.serve(fleet)
        await record_isolation(run, fleet)
    return fleet, learners


async def _attempt(
    run: Run,
    fleet: RolloutFleet,
    learners: Learners,
    store: CheckpointStore,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
) -> None:
    """From the newest checkpoint to the last policy step, and what was measured before and after.

    Any error that the learner outlives leaves a checkpoint of the last policy step.
    """
    ledger, curriculum, kl_coef = await restore(run, store, learners, problems)
    run.live.ledger = ledger
    if fleet.roster.version > ledger.step:
        fleet.roster.restored(ledger.step)
    await learners.policy.publish(fleet, ledger.step)
    if "accuracy_before" not in run.directory.summary():
        before = await evaluate(run, fleet, held_out, stage="rl", step=0)
        run.directory.update_summary(
            accuracy_before=before["accuracy"],
            tool_rate_before=before["tool_rate"],
            held_out=int(before["problems"]),
        )
    policy_step = PolicyStep(run.config, learners.policy, learners.critic, kl_coef=kl_coef)
    async with CheckpointWriter(store, learners.parts, tell=run.console.say) as writer:
        trainer = RlTrainer(run, fleet, learners.policy, policy_step, writer, held_out, ledger, curriculum)
        try:
            await trainer.train()
            after = await evaluate(run, fleet, held_out, stage="rl", step=ledger.step)
        except LearnerLostError:
            await learners.close()  # or the writer would wait for shards that nobody writes
            raise
        except RlsysError:
            await trainer.save_before_the_end()
            raise
    run.directory.update_summary(
        accuracy_after=after["accuracy"],
        tool_rate_after=after["tool_rate"],
        steps=ledger.step,
        dropped=dict(ledger.dropped),
    )
