"""What the RL stage does when its learner is lost: start another one, and go on from the newest checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rlsys import cluster
from rlsys.checkpoint import CheckpointStore
from rlsys.config import Config
from rlsys.curriculum import Curriculum
from rlsys.errors import CheckpointError, LearnerLostError
from rlsys.fleet import RolloutFleet
from rlsys.learner_group import LearnerGroup, learner_demand, with_critic_ranks
from rlsys.ledger import Ledger
from rlsys.stages.common import Run
from rlsys.types import Problem

MAX_RECOVERIES = 3
"""So many times in a row, without a new checkpoint, a lost learner is started again."""


class Learners:
    """The policy's learner group and, where the stage has one, the critic's: started, lost and closed together."""

    policy: LearnerGroup
    critic: LearnerGroup | None = None

    def __init__(self, config: Config, model: Path) -> None:
        self._config, self._model = config, str(model)
        self._started: list[LearnerGroup] = []

    async def start(self) -> None:
        """Start them from the stage's model, side by side."""
        policy, critic = asyncio.create_task(self._start_policy()), asyncio.create_task(self._start_critic())
        try:
            self.policy, self.critic = await asyncio.gather(policy, critic)
        except BaseException:
            policy.cancel()
            critic.cancel()
            raise

    async def _start_policy(self) -> LearnerGroup:
        stage = self._config.rl
        policy_steps = stage.steps - (stage.critic.warmup_steps if stage.critic is not None else 0)
        group = await LearnerGroup.start(
            self._config,
            self._model,
            optimizer=stage.optimizer,
            total_steps=policy_steps * stage.updates_per_step,
            loss=stage.loss,
            with_reference=stage.kl_coef > 0,
        )
        self._started.append(group)
        return group

    async def _start_critic(self) -> LearnerGroup | None:
        """The critic begins as the policy's own model, with a head that says 0 of everything."""
        stage = self._config.rl
        if stage.critic is None:
            return None
        group = await LearnerGroup.start(
            with_critic_ranks(self._config),
            self._model,
            optimizer=stage.critic.optimizer,
            total_steps=stage.steps * stage.updates_per_step,
            loss="rlsys.losses:value_loss",
            network="scorer",
            what="critic rank",
        )
        self._started.append(group)
        return group

    @property
    def parts(self) -> dict[str, LearnerGroup]:
        """Those that there are, by the names of their folders in a checkpoint."""
        return {"learner": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    @property
    def demands(self) -> list[cluster.Demand]:
        """What they take from the cluster."""
        found = [learner_demand(self._config)]
        if self._config.rl.critic is not None:
            found.append(learner_demand(with_critic_ranks(self._config), what="critic rank"))
        return found

    async def load(self, folder: Path) -> None:
        """Read their shards in the folder of a checkpoint."""
        for name, group in self.parts.items():
            await group.load(folder / name)

    async def close(self) -> None:
        """End all ranks; nothing where that is done."""
        started, self._started = self._started, []
        await asyncio.gather(*(group.close() for group in started))


async def restore(
    run: Run, store: CheckpointStore, learners: Learners, problems: Sequence[Problem]
) -> tuple[Ledger, Curriculum, float | None]:
    """Where the stage goes on: from its newest valid checkpoint, or from the beginning with learners just started.

    Returns the ledger, the stream of problems behind what it has issued, and what the KL coefficient has become. What
    was recorded of later policy steps is set aside.

    Raises:
        CheckpointError: the checkpoint does not fit this run or this version.
    """
    config = run.config
    checkpoint = store.newest(tell=run.console.say)
    if checkpoint is None:
        ledger, curriculum, kl_coef = Ledger(), Curriculum(problems, config.rl, seed=config.seed), None
    else:
        state = checkpoint.state
        if "ledger" not in state:
            raise CheckpointError(
                f"{checkpoint.folder} was written by an earlier version: it counts problems and keeps no ledger of "
                "them; finish that run with the version that began it, or begin anew with --fresh"
            )
        ledger, kl_coef = Ledger.restored(state["ledger"]), state["kl_coef"]
        curriculum = Curriculum(problems, config.rl, seed=config.seed, after=ledger.last, state=state["curriculum"])
        await learners.load(checkpoint.folder)
        run.console.say(f"rl: going on from step {ledger.step} ({checkpoint.folder})")
    run.directory.forget_after("rl", ledger.step)
    return ledger, curriculum, kl_coef


class Recovery:
    """Starts learners again that were lost, but not for ever."""

    def __init__(self, run: Run, fleet: RolloutFleet, learners: Learners, store: CheckpointStore) -> None:
        self._run, self._fleet, self._learners, self._store = run, fleet, learners, store
        self._newest_step = -1
        self._in_a_row = 0

    async def recover(self, error: LearnerLostError) -> None:
        """Start the learners again, from the stage's model, for the rollout workers, which stay.

        Raises:
            LearnerLostError: for the fourth time in a row without a checkpoint in between.
            ResourceError: the cluster has no place for them any more.
        """
        lost = error
        while True:
            self._count(lost)
            self._run.console.say(f"rl: the learner is lost and will be started again: {lost}")
            self._fleet.note("learner", f"is lost and will be started again: {lost}")
            await self._learners.close()
            try:
                await cluster.require(self._learners.demands, wait_seconds=self._run.config.cluster.wait_seconds)
                await self._learners.start()
                self._learners.policy.serve(self._fleet)
                self._fleet.note("learner", "was started again")
                return
            except LearnerLostError as another:
                lost = another

    def _count(self, lost: LearnerLostError) -> None:
        newest = max(self._store.steps, default=0)
        self._in_a_row = 1 if newest > self._newest_step else self._in_a_row + 1
        self._newest_step = newest
        if self._in_a_row > MAX_RECOVERIES:
            raise LearnerLostError(
                f"the learner was lost {self._in_a_row} times in a row without a new checkpoint (the newest is of step "
                f"{newest}); the last time: {lost}"
            ) from lost
