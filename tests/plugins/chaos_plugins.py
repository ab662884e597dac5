"""Plug-ins that faults can strike (see `faults`): an engine, a rollout actor, learners with and without a model."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from faults import Injector
from numpy.typing import NDArray
from torch import Tensor

from rlsys.actors.fake_engine import FakeEngine
from rlsys.actors.receivers import WeightReceiver
from rlsys.actors.rollout import RolloutActor
from rlsys.config import ActorsConfig, LearnersConfig, OptimizerConfig
from rlsys.learners.fsdp import FsdpLearner
from rlsys.learners.learner import Learner
from rlsys.learners.sender import WeightSender, open_sender
from rlsys.packing import MicroBatch
from rlsys.types import Completion, Problem, RolloutGroup
from rlsys.weights import WeightGroup, WeightPlan


def score(_problem: Problem, response: str) -> float:
    """Something that differs between siblings."""
    return sum(map(ord, response)) % 101 / 100


def numbered_problems(*, size: int, first: int = 0) -> list[Problem]:
    """Problems without an answer, each of which can be told from the others."""
    ids = range(first, first + size)
    return [Problem(id=f"p{number}", prompt=({"role": "user", "content": f"Say {number}"},)) for number in ids]


# --- what acts -------------------------------------------------------------------------------------------------------


class FaultyEngine(FakeEngine):
    """Passes `in_start`, `in_generate`, `in_pause`, `in_resume`, `in_open`, `mid_broadcast`, `before_ack`, `in_pulse`.

    `engine_options.faults` is the folder; it goes by the name "worker SEED", which is its number where the run's own
    seed is 0.
    """

    def __init__(self, *, model_path: str, config: ActorsConfig, seed: int) -> None:
        options = dict(config.engine_options)
        self.injector = Injector(options.pop("faults"), f"worker {seed}")
        self.injector.pass_by("in_start")
        super().__init__(model_path=model_path, config=replace(config, engine_options=options), seed=seed)

    async def _pass_by(self, point: str) -> str:
        action = await self.injector.pass_by_waiting(point)
        if action == "engine_dies":
            self.close()
        return action

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
        completion = await super().generate(prompt, sampling=sampling)
        if await self._pass_by("after_generate") == "nan":
            return replace(completion, logprobs=np.full_like(completion.logprobs, np.nan))
        return completion

    async def _take_time(self, num_tokens: int) -> None:
        await super()._take_time(num_tokens)
        await self._pass_by("in_generate")

    async def pause(self) -> None:
        await self._pass_by("in_pause")
        await super().pause()

    async def resume(self, version: int) -> None:
        await self._pass_by("in_resume")
        await super().resume(version)

    async def pulse(self) -> dict[str, int]:
        await self._pass_by("in_pulse")
        return await super().pulse()

    async def open_weights(self, group: WeightGroup, *, rank: int) -> None:
        await self._pass_by("in_open")
        await super().open_weights(group, rank=rank)
        assert self._receiver is not None
        self._receiver = FaultyReceiver(self._receiver, self.injector)

    async def receive_weights(self, plan: WeightPlan) -> dict[str, int]:
        checksums = await super().receive_weights(plan)
        await self._pass_by("before_ack")
        return checksums


class FaultyReceiver:
    """Passes `mid_broadcast` behind each tensor."""

    def __init__(self, receiver: WeightReceiver, injector: Injector) -> None:
        self._receiver, self._injector = receiver, injector
        self.close = receiver.close

    def receive(self, plan: WeightPlan) -> Iterator[tuple[str, Tensor]]:
        for named in self._receiver.receive(plan):
            yield named
            self._injector.pass_by("mid_broadcast")


class FaultyRolloutActor(RolloutActor):
    """Passes `in_act` and `before_answer`, each with the id of the problem."""

    def __init__(self, *, config: Any, model_path: str, index: int) -> None:
        self.injector = Injector(config.actors.engine_options["faults"], f"worker {index}")
        super().__init__(config=config, model_path=model_path, index=index)

    async def act(self, problem: Problem, **options: Any) -> RolloutGroup:
        await self.injector.pass_by_waiting("in_act", problem.id)
        group = await super().act(problem, **options)
        await self.injector.pass_by_waiting("before_answer", problem.id)
        return group


class TellingRolloutActor(RolloutActor):
    """Says in which processes it and its engine live, so that a test can strike them."""

    async def processes(self) -> list[tuple[int, str]]:
        """Number and name of its own process, then of those that it started."""
        own = psutil.Process()
        return [(process.pid, process.name()) for process in [own, *own.children(recursive=True)]]


# --- what learns -----------------------------------------------------------------------------------------------------


class FakeLearner:
    """One rank without a model: its weights are a digest of all that it was ever given to learn, so they tell.

    Passes `in_step`, `mid_send`, `in_save`, `after_shard`; `options.faults` is the folder, the name "learner RANK".
    `options.seconds` is how long a step takes.
    """

    def __init__(self, *, model_path: str, config: LearnersConfig, rank: int, world_size: int) -> None:  # noqa: ARG002
        self.injector = Injector(config.options["faults"], f"learner {rank}")
        self._seconds = float(config.options.get("seconds", 0.0))
        self._model_path, self._rank = model_path, rank
        self._learned = b""
        self._step = 0
        self._sender: WeightSender | None = None

    rendezvous = Learner.rendezvous

    def start(self, **_options: Any) -> WeightPlan:
        return WeightPlan(names=["digest", "step"], dtype_names=["uint8", "int64"], shapes=[[32], [1]])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        digest = hashlib.sha256(self._learned).digest()
        for name, tensor in (
            ("digest", torch.tensor(list(digest), dtype=torch.uint8)),
            ("step", torch.tensor([self._step])),
        ):
            self.injector.pass_by("mid_send")
            yield name, tensor

    def step(
        self, micro_batches: Sequence[MicroBatch], *, num_tokens: int, temperature: float, **_options: Any
    ) -> dict[str, float]:
        self.injector.pass_by("in_step")
        time.sleep(self._seconds)
        for micro in micro_batches:
            self._learned = hashlib.sha256(self._learned + micro.tokens.tobytes()).digest()
        self._step += 1
        trained = float(sum(len(micro.targets) for micro in micro_batches))
        return {
            "sum/tokens": float(sum(len(micro.tokens) for micro in micro_batches)),
            "sum/trained_tokens": trained,
            "sum/loss": trained / num_tokens,
            "sum/logprob_gap": 0.0,
            "grad_norm": temperature,
            "lr": 0.0,
            "skipped_in_a_row": 0.0,
            "seconds": max(self._seconds, 1e-3),
        }

    def infer(self, micro_batches: Sequence[MicroBatch], **_options: Any) -> list[NDArray[np.float32]]:
        return [np.full(len(micro.targets), -1.0, dtype=np.float32) for micro in micro_batches]

    def open_weights(self, group: WeightGroup, *, backend: str, timeout: float) -> None:
        self.leave_weights()
        if self._rank == 0:
            self._sender = open_sender(backend, group, seconds=timeout, device=torch.device("cpu"))

    def published_weights(self) -> None:
        return None

    def send_weights(self) -> dict[str, int]:
        return {} if self._sender is None else self._sender.send(self._tensors())

    def save(self, folder: str) -> None:
        self.injector.pass_by("in_save")
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {"learned": self._learned.hex(), "step": self._step}
        (Path(folder) / f"rank-{self._rank}.json").write_text(json.dumps(state))

    def saved(self) -> bool:
        self.injector.pass_by("after_shard")
        return True

    def load(self, folder: str) -> None:
        state = json.loads((Path(folder) / f"rank-{self._rank}.json").read_text())
        self._learned, self._step = bytes.fromhex(state["learned"]), state["step"]

    def export(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            (Path(folder) / "learned").write_text(self._learned.hex())

    def leave_weights(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    close = leave_weights


class FaultyLearner(FsdpLearner):
    """FSDP2 that passes the same points and, where its ranks wait for one another, `in_update`.

    "no_space" at `in_save` lets the rank's shard go to a device that is full.
    """

    def __init__(self, *, model_path: str, config: LearnersConfig, rank: int, world_size: int) -> None:
        self.injector = Injector(config.options["faults"], f"learner {rank}")
        super().__init__(model_path=model_path, config=_without_faults(config), rank=rank, world_size=world_size)

    @classmethod
    def check_config(cls, config: LearnersConfig, optimizers: Mapping[str, OptimizerConfig]) -> None:
        FsdpLearner.check_config(_without_faults(config), optimizers)

    @classmethod
    def ranks_per_share(cls, config: LearnersConfig) -> int:
        return FsdpLearner.ranks_per_share(_without_faults(config))

    def step(self, micro_batches: Sequence[MicroBatch], **options: Any) -> dict[str, float]:
        self.injector.pass_by("in_step")
        return super().step(micro_batches, **options)

    def _apply(self, lr: float) -> float:
        self.injector.pass_by("in_update")
        return super()._apply(lr)

    def _full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for named in super()._full_weights():
            self.injector.pass_by("mid_send")
            yield named

    def save(self, folder: str) -> None:
        try:
            self.injector.pass_by("in_save")
        except OSError:
            Path(folder).mkdir(parents=True, exist_ok=True)
            os.symlink("/dev/full", Path(folder) / f"__{self._rank}_0.distcp")
        super().save(folder)

    def saved(self) -> bool:
        done = super().saved()
        if done:
            self.injector.pass_by("after_shard")
        return done


def _without_faults(config: LearnersConfig) -> LearnersConfig:
    return replace(config, options={name: value for name, value in config.options.items() if name != "faults"})
