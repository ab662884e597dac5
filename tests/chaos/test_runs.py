"""Whole runs in which learners, workers and disks fail: what was trained, what was kept, and how they end."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from faults import Fault, Faults

from rlsys import checkpoint
from rlsys.checkpoint import CheckpointStore
from rlsys.errors import CheckpointError, FleetLostError, LearnerLostError, RlsysError
from rlsys.ledger import Ledger
from rlsys.run import Session, train
from tests.chaos.world import configured, shared_blocks, wait_for_end

STEPS = 6


@dataclass
class Chaos:
    """A folder for one run, and the faults that strike it."""

    folder: Path
    model: str
    faults: Faults
    session: Session
    overrides: list[str] = field(default_factory=list)
    error: RlsysError | None = None

    def run(self, *overrides: str, resume: bool = False) -> dict[str, Any]:
        """Go through the run; what ends it is kept in `error`. None of its processes is left behind."""
        config = configured(self.folder, self.model, *self.overrides, *overrides)
        self.session._connected = config.cluster  # the tests' own
        self.error = None
        try:
            return train(config, resume=resume, session=self.session)
        except RlsysError as error:
            self.error = error
            return {}
        finally:
            started = self.faults.processes()
            wait_for_end(started)
            assert not shared_blocks()

    @property
    def directory(self) -> Path:
        return self.folder / "run"

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The metrics of the policy steps that count."""
        texts = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, texts) if line["stage"] == "rl"]

    def trained(self, step: int) -> list[str]:
        """The problems of a policy step, one for each rollout."""
        rows = pq.read_table(self.directory / "rollouts" / f"rl-step-{step:06d}.parquet").to_pylist()
        return [row["problem_id"] for row in rows]

    @property
    def checkpoint(self) -> checkpoint.Checkpoint | None:
        """The newest one that is valid."""
        return CheckpointStore(self.directory / "rl" / "checkpoints", keep=2).newest(tell=print)

    def check_trained_once(self, steps: int = STEPS) -> None:
        """Every policy step happened once, no problem was trained twice, and no rollout is missing."""
        assert [line["step"] for line in self.lines] == list(range(1, steps + 1))
        counts = Counter(problem for step in range(1, steps + 1) for problem in self.trained(step))
        assert set(counts.values()) == {2}, counts
        assert len(counts) == 2 * steps
        for line in self.lines:
            names = ("in_flight", "done", "trained", "dropped")
            assert line["ledger/issued"] == sum(line[f"ledger/{name}"] for name in names)
            assert line["ledger/trained"] == 2 * line["step"]
            assert 0 <= line["staleness_max"] <= 0

    @property
    def learned(self) -> str:
        """A digest of all that the exported learner was ever given to learn, in its order."""
        return (self.directory / "rl" / "model" / "learned").read_text()


@pytest.fixture
def chaos(on_ray: asyncio.Runner, model: str, tmp_path: Path) -> Chaos:  # noqa: ARG001  # the tests' cluster
    return Chaos(folder=tmp_path, model=model, faults=Faults(tmp_path / "faults"), session=Session())


@pytest.fixture(scope="module")
def undisturbed(on_ray: asyncio.Runner, model: str, tmp_path_factory: pytest.TempPathFactory) -> Chaos:  # noqa: ARG001
    """A run that nothing has struck."""
    folder = tmp_path_factory.mktemp("undisturbed")
    made = Chaos(folder=folder, model=model, faults=Faults(folder / "faults"), session=Session())
    assert made.run()["steps"] == STEPS
    made.check_trained_once()
    return made


@pytest.mark.chaos
def test_two_runs_that_nothing_strikes_learn_the_same(chaos: Chaos, undisturbed: Chaos) -> None:
    """What the comparisons below stand on."""
    chaos.run("actors.count=1")
    assert chaos.learned == undisturbed.learned


@pytest.mark.parametrize(
    ("point", "spared"),
    [
        pytest.param("in_step", 3, marks=pytest.mark.chaos),
        pytest.param("in_step", 0, marks=pytest.mark.chaos),
        pytest.param("mid_send", 7, marks=pytest.mark.chaos),
        pytest.param("in_save", 0, marks=pytest.mark.chaos),
        pytest.param("in_save", 1, marks=pytest.mark.chaos),
        pytest.param("after_shard", 0, marks=pytest.mark.chaos),
        pytest.param("after_shard", 1, marks=pytest.mark.chaos),
    ],
)
@pytest.mark.parametrize("action", ["kill", pytest.param("stop", marks=pytest.mark.chaos)])
def test_a_learner_that_is_struck_starts_again_from_its_checkpoint_and_learns_what_an_undisturbed_one_does(
    chaos: Chaos, undisturbed: Chaos, point: str, spared: int, action: Any
) -> None:
    chaos.faults.order(Fault(point=point, action=action, who="learner 0", spared=spared))
    summary = chaos.run("cluster.call_seconds=8")
    assert chaos.error is None, chaos.error
    assert chaos.faults.struck == [f"learner 0: {action} at {point}"]
    assert summary["steps"] == STEPS
    chaos.check_trained_once()
    assert chaos.learned == undisturbed.learned


@pytest.mark.chaos
def test_a_learner_that_dies_again_and_again_without_a_new_checkpoint_ends_the_run_with_a_typed_error(
    chaos: Chaos,
) -> None:
    chaos.faults.order(Fault(point="in_step", action="kill", who="learner 0", times=10))
    chaos.run()
    assert isinstance(chaos.error, LearnerLostError)
    assert "in a row without a new checkpoint" in str(chaos.error)
    assert len(chaos.faults.struck) == 4


@pytest.mark.chaos
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_a_worker_that_is_struck_in_a_run_changes_nothing_of_what_is_learned(
    chaos: Chaos, undisturbed: Chaos, action: Any
) -> None:
    chaos.faults.order(
        Fault(point="in_generate", action=action, who="worker 0", spared=12),
        Fault(point="mid_broadcast", action=action, who="worker 1", spared=4),
    )
    assert chaos.run()["steps"] == STEPS
    assert len(chaos.faults.struck) == 2
    chaos.check_trained_once()
    assert chaos.learned == undisturbed.learned


@pytest.mark.chaos
def test_a_run_whose_workers_are_all_lost_ends_in_time_with_a_checkpoint_and_can_be_resumed(
    chaos: Chaos, undisturbed: Chaos
) -> None:
    chaos.faults.order(*(Fault(point="in_generate", action="kill", who=f"worker {n}", spared=20) for n in range(2)))
    chaos.faults.order(*(Fault(point="in_start", action="raise", who=f"worker {n}") for n in range(2, 20)))
    chaos.run("actors.wait_seconds=10")
    assert isinstance(chaos.error, FleetLostError), chaos.error
    saved = chaos.checkpoint
    assert saved is not None
    assert saved.step == len(chaos.lines) > 0
    assert Ledger.restored(saved.state["ledger"]).conserved

    chaos.faults.withdraw()
    assert chaos.run(resume=True)["steps"] == STEPS
    chaos.check_trained_once()
    assert chaos.learned == undisturbed.learned


@pytest.mark.chaos
def test_a_problem_that_crashes_every_engine_is_dropped_with_its_reason_and_the_run_goes_on(chaos: Chaos) -> None:
    chaos.faults.order(Fault(point="in_act", action="kill", what=first_problem(chaos), times=3))
    summary = chaos.run()
    assert summary["steps"] == STEPS
    assert summary["dropped"] == {"quarantined": 1}
    assert len(chaos.faults.struck) == 3
    assert first_problem(chaos) not in {problem for step in range(1, STEPS + 1) for problem in chaos.trained(step)}


def first_problem(chaos: Chaos) -> str:
    """The one that a run begins with."""
    from rlsys.curriculum import Curriculum
    from rlsys.stages.common import load_problems

    config = configured(chaos.folder, chaos.model)
    curriculum = Curriculum(load_problems(config, "train"), config.rl, seed=config.seed)
    return curriculum.problem(next(iter(curriculum))).id


@pytest.mark.chaos
def test_log_probs_that_are_no_numbers_are_dropped_counted_and_written_down(chaos: Chaos) -> None:
    chaos.faults.order(Fault(point="after_generate", action="nan", spared=3, times=2))
    summary = chaos.run("rl.steps=4")
    assert chaos.error is None, chaos.error
    assert len(chaos.faults.struck) == 2
    assert summary["steps"] == 4
    assert list((chaos.directory / "rollouts").glob("rl-not_finite-*"))


# --- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, *, writes: int, times: int = 1) -> Iterator[None]:
    """The disk of the driver is full at the write of a checkpoint with this number, and so many times."""
    import errno

    original, count = checkpoint._sync, iter(range(10**6))

    def sync(path: Path) -> None:
        if writes <= next(count) < writes + times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", sync)
        yield


@pytest.mark.chaos
def test_a_full_disk_never_costs_the_last_good_checkpoint_and_the_run_ends_with_a_typed_error_or_goes_on(
    chaos: Chaos, undisturbed: Chaos, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs_of_a_checkpoint = 5  # two files, the manifest, the draft, the store
    with full_disk(monkeypatch, writes=syncs_of_a_checkpoint + 2, times=10**6):
        chaos.run()
    assert isinstance(chaos.error, CheckpointError), chaos.error
    assert "No space left" in str(chaos.error)
    saved = chaos.checkpoint
    assert saved is not None
    assert saved.step == 2
    assert chaos.run(resume=True)["steps"] == STEPS
    chaos.check_trained_once()
    assert chaos.learned == undisturbed.learned


@pytest.mark.chaos
@pytest.mark.parametrize("damage", ["shard is cut", "shard is gone", "manifest is cut", "state is other"])
def test_a_run_goes_on_from_the_checkpoint_before_one_that_is_damaged(
    chaos: Chaos, undisturbed: Chaos, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chaos.faults.order(Fault(point="in_step", action="raise", spared=4))
    chaos.run()
    newest = chaos.directory / "rl" / "checkpoints" / "step-000004"
    assert newest.is_dir()
    damages: dict[str, Callable[[], object]] = {
        "shard is cut": lambda: os.truncate(newest / "learner" / "rank-0.json", 10),
        "shard is gone": lambda: (newest / "learner" / "rank-0.json").unlink(),
        "manifest is cut": lambda: os.truncate(newest / "manifest.json", 10),
        "state is other": lambda: (newest / "state.json").write_text("{}"),
    }
    damages[damage]()
    assert chaos.run(resume=True)["steps"] == STEPS
    said = " ".join(capsys.readouterr().out.split())
    assert "passing over" in said
    assert "going on from step 2" in said
    chaos.check_trained_once()
    assert chaos.learned == undisturbed.learned
