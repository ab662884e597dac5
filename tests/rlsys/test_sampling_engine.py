"""A sampling stage on a real engine: what it writes is what was generated, and what a learner is given again."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import PlugIn, SampleConfig, SamplingConfig
from rlsys.console import Console
from rlsys.conversation import to_rollout
from rlsys.demonstrations import sample_demonstrations
from rlsys.fleet import RolloutFleet
from rlsys.records import RunDirectory
from rlsys.run_chat import run_chat
from rlsys.samples import read_samples
from rlsys.stages import Run, stage_of
from rlsys.types import RolloutGroup
from tests.conftest import Stack


def test_answers_of_an_engine_train_on_the_very_tokens_that_it_generated(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[RolloutGroup] = []

    class Shared:
        """The engines of the session, which outlive the stage; notes what they give."""

        isolation = stack.fleet.isolation

        async def act(self, *args: Any, **options: Any) -> RolloutGroup:
            groups.append(await stack.fleet.act(*args, **options))
            return groups[-1]

        async def close(self) -> None:
            return None

    async def shared(*_: Any) -> Shared:
        return Shared()

    monkeypatch.setattr(RolloutFleet, "start", shared)
    stage = SampleConfig(
        max_problems=6,
        samples_per_problem=3,
        problems_per_part=2,
        sampling=SamplingConfig(max_response_tokens=24, temperature=0.8),
        filters=[PlugIn(use="rlsys.filters:length", options={"at_least": 1})],
    )
    config = replace(stack.config, stages=["own"], samples={"own": stage}, run_dir=str(tmp_path / "run"), trackers=[])
    directory = RunDirectory.open(config, resume=False, fresh=False)

    async def go() -> None:
        # Whoever had the engines before may have left them frozen, as a failed weight update does.
        await stack.fleet.call_all("resume", 1000, seconds=60)
        run = Run(config=config, directory=directory, console=Console(), stop=asyncio.Event())
        await stage_of(config, "own")(run, Path(stack.model))

    stack.run(go())
    path = tmp_path / "run" / "own" / "samples.parquet"
    samples = read_samples(path)
    generated = {(group.problem.id, rollout.tokens.tobytes()) for group in groups for rollout in group.rollouts}
    assert len(samples) == 18
    chat = stack.run(run_chat(config, stack.model))
    for sample, demonstration in zip(samples, sample_demonstrations([], path=str(path)), strict=True):
        rollout = to_rollout(demonstration, chat)
        assert (sample.problem.id, rollout.tokens.tobytes()) in generated
        assert rollout.num_trained_tokens == sample.num_tokens <= 24
        prompt = chat.render(sample.problem)
        assert rollout.tokens[: len(prompt)].tolist() == prompt
        np.testing.assert_array_equal(np.flatnonzero(rollout.loss_mask)[:1], [len(prompt)])
        assert sample.provenance["model"] == stack.model
