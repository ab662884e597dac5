"""Two FSDP2 ranks of which one is struck, also where the other waits for it: the weights in the end are those of a run
that nothing struck, bit for bit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, Faults

from rlsys.errors import CheckpointError
from rlsys.run import Session
from rlsys.scratch import ScratchModel, build_scratch_model
from tests.chaos.test_runs import STEPS, Chaos

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
REAL = (
    "learners.count=2",
    "learners.use=chaos_plugins:FaultyLearner",
    "rl.optimizer.lr=1e-3",
    "cluster.call_seconds=20",
    "learners.start_seconds=120",
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real model, of 0.1 million parameters."""
    model = ScratchModel(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=128)
    return str(build_scratch_model(tmp_path_factory.mktemp("scratch"), model))


def real_run(folder: Path, model: str) -> Chaos:
    return Chaos(folder=folder, model=model, faults=Faults(folder / "faults"), session=Session(), overrides=list(REAL))


def weights(run: Chaos) -> bytes:
    return (run.directory / "rl" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(on_ray: asyncio.Runner, scratch: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:  # noqa: ARG001
    """The weights that a run leaves which nothing strikes."""
    run = real_run(tmp_path_factory.mktemp("undisturbed"), scratch)
    assert run.run()["steps"] == STEPS
    return weights(run)


@pytest.mark.parametrize(
    ("point", "action", "who", "spared"),
    [
        ("in_step", "kill", "learner 1", 3),
        ("in_update", "kill", "learner 1", 2),
        ("in_update", "stop", "learner 0", 4),
        ("mid_send", "kill", "learner 0", 40),
        ("mid_send", "kill", "learner 1", 40),
        ("in_save", "kill", "learner 1", 1),
        ("after_shard", "kill", "learner 0", 1),
    ],
)
def test_a_rank_that_is_struck_takes_the_others_with_it_and_the_run_ends_with_the_same_weights(
    on_ray: asyncio.Runner,  # noqa: ARG001
    tmp_path: Path,
    scratch: str,
    undisturbed: bytes,
    point: str,
    action: Any,
    who: str,
    spared: int,
) -> None:
    run = real_run(tmp_path, scratch)
    run.faults.order(Fault(point=point, action=action, who=who, spared=spared))
    summary = run.run()
    assert run.error is None, run.error
    assert run.faults.struck == [f"{who}: {action} at {point}"]
    assert summary["steps"] == STEPS
    run.check_trained_once()
    assert weights(run) == undisturbed


def test_a_full_disk_under_one_rank_ends_the_run_with_a_typed_error_and_the_checkpoint_before_it(
    on_ray: asyncio.Runner,  # noqa: ARG001
    tmp_path: Path,
    scratch: str,
    undisturbed: bytes,
) -> None:
    run = real_run(tmp_path, scratch)
    run.faults.order(Fault(point="in_save", action="no_space", who="learner 1", spared=1, times=10))
    run.run()
    assert isinstance(run.error, CheckpointError), run.error
    assert "No space left" in str(run.error)
    saved = run.checkpoint
    assert saved is not None
    assert saved.step == 2
    run.faults.withdraw()
    assert run.run(resume=True)["steps"] == STEPS
    run.check_trained_once()
    assert weights(run) == undisturbed
