"""A learner group without Ray: one real rank in this process, or one that only writes down what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.config import Config
from rlsys.learner_group import _merge
from rlsys.packing import shard, unpack
from rlsys.types import TrainBatch
from tests.learners.ranks import free_ports


class FakeLearners:
    """Stands for `LearnerGroup`: every token has the log-prob -0.5, and the loss is that of the step's number."""

    started: dict[str, Any]
    batches: list[TrainBatch]
    measured: list[TrainBatch]

    @classmethod
    async def start(cls, config: Config, model: str, **options: Any) -> FakeLearners:
        group = cls()
        cls.started = {"config": config, "model": model, **options}
        cls.batches, cls.measured = [], []
        group.steps = 0
        return group

    steps: int

    async def step(self, batch: TrainBatch, **_options: Any) -> dict[str, float]:
        self.steps += 1
        self.batches.append(batch)
        return {"loss": 1.0 / self.steps, "tokens": float(sum(map(len, batch.rollouts))), "skipped_in_a_row": 0.0}

    async def infer(self, batch: TrainBatch, **_options: Any) -> list[NDArray[np.float32]]:
        self.measured.append(batch)
        return [np.where(rollout.loss_mask, -0.5, 0).astype(np.float32) for rollout in batch.rollouts]

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "steps").write_text(str(self.steps))

    async def saved(self) -> None:
        return None

    async def load(self, folder: Path) -> None:
        self.steps = int((folder / "steps").read_text())

    async def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "steps").write_text(str(self.steps))

    async def close(self) -> None:
        return None


class LearnerHere:
    """Stands for `LearnerGroup` with one real rank of FSDP2 in this process."""

    @classmethod
    async def start(cls, config: Config, model: str, *, total_steps: int, loss: Any, **options: Any) -> LearnerHere:
        from rlsys.learners.fsdp import FsdpLearner
        from rlsys.plugins import resolve

        group = cls()
        group._config = config
        group._rank = FsdpLearner(model_path=model, config=config.learners, rank=0, world_size=1)
        group._rank.start(
            master=("127.0.0.1", free_ports(1)[0]),
            optimizer=options["optimizer"],
            total_steps=total_steps,
            loss=resolve(loss, place="loss") if isinstance(loss, str) else loss,
            network=options["network"],
            timeout=60.0,
        )
        return group

    _config: Config
    _rank: Any

    async def step(self, batch: TrainBatch, *, temperature: float, **options: Any) -> dict[str, float]:
        (share,) = self._shares(batch)
        found = self._rank.step(share, num_tokens=batch.num_tokens, temperature=temperature, **options)
        return _merge([found], batch.num_tokens)

    async def infer(self, batch: TrainBatch, *, temperature: float) -> list[NDArray[np.float32]]:
        (share,) = self._shares(batch)
        return unpack(batch, share, self._rank.infer(share, temperature=temperature))

    def _shares(self, batch: TrainBatch) -> Any:
        return shard(batch, num_ranks=1, max_tokens=self._config.learners.max_tokens_per_micro_batch)

    async def save(self, folder: Path) -> None:
        self._rank.save(str(folder))

    async def saved(self) -> None:
        while not self._rank.saved():
            pass

    async def load(self, folder: Path) -> None:
        self._rank.load(str(folder))

    async def export(self, folder: Path) -> None:
        self._rank.export(str(folder))

    async def close(self) -> None:
        self._rank.close()
