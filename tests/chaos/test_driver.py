"""The driver itself is killed, at named points of a save, or its cluster ends: what a second attempt finds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from faults import Fault, Faults

from tests.chaos.test_runs import Chaos
from tests.chaos.world import configured, wait_for_end

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
PLUGINS = Path(__file__).parents[1] / "plugins"
ROOT = Path(__file__).parents[2]


def to_its_end(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """What a process printed and how it ended, however that came."""
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )


class Command:
    """`rlsys train` in a process and with a Ray cluster of its own."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.faults = folder, Faults(folder / "faults")
        configured(folder, model)
        self.mark = f"rlsys-chaos-{folder}"

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """To its end, and to that of all that it started."""
        driver = [sys.executable, PLUGINS / "chaos_driver.py", self.folder / "faults"]
        done = to_its_end([*driver, "train", self.folder / "chaos.yaml", *arguments], RLSYS_TEST_RUN=self.mark)
        wait_for_end(self.left, seconds=60)
        return done

    @property
    def left(self) -> list[psutil.Process]:
        """All processes that were started by it or by what it started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RLSYS_TEST_RUN") == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@pytest.fixture
def command(tmp_path: Path, model: str) -> Command:
    return Command(tmp_path, model)


@pytest.fixture(scope="module")
def learned(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run learns that nothing strikes."""
    command = Command(tmp_path_factory.mktemp("undisturbed"), model)
    done = command.run()
    assert done.returncode == 0, done.stdout
    return seen(command).learned


def seen(command: Command) -> Chaos:
    """The run directory as the tests of runs look at it."""
    return Chaos(folder=command.folder, model="", faults=command.faults, session=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("point", "spared", "begins_again_at"),
    [
        ("before_commit", 1, 2),
        ("in_sync", 1, 0),
        ("in_sync", 6, 2),
        ("before_rename", 1, 2),
        ("after_rename", 1, 4),
        ("after_step", 3, 2),
    ],
)
def test_a_driver_that_is_killed_leaves_no_process_and_a_second_one_goes_on_and_learns_the_same(
    command: Command, learned: str, point: str, spared: int, begins_again_at: int
) -> None:
    command.faults.order(Fault(point=point, action="kill", who="driver", spared=spared))
    killed = command.run()
    assert killed.returncode == -9, killed.stdout
    resumed = command.run("--resume")
    assert resumed.returncode == 0, resumed.stdout
    said = " ".join(resumed.stdout.split())
    if begins_again_at:
        assert f"going on from step {begins_again_at}" in said
    run = seen(command)
    run.check_trained_once()
    assert run.learned == learned


def test_a_run_without_any_worker_left_ends_in_time_with_one_plain_message_and_is_no_success(command: Command) -> None:
    command.faults.order(*(Fault(point="in_generate", action="kill", who=f"worker {n}", spared=20) for n in range(2)))
    command.faults.order(*(Fault(point="in_start", action="raise", who=f"worker {n}") for n in range(2, 20)))
    started = time.monotonic()
    done = command.run("actors.wait_seconds=100")
    assert time.monotonic() - started < 240
    assert done.returncode == 1, done.stdout
    said = " ".join(done.stdout.split())
    assert "Traceback" not in said
    assert "is saved, before the run ends with an error" in said
    error = said.rpartition("error: ")[2]
    assert "rollout workers in a row could not start and none is left" in error
    assert "SYSTEM_ERROR" not in error, "it is told in our words, whatever Ray prints besides"
    assert seen(command).checkpoint is not None


def run_on_nodes(folder: Path, model: str, what: str) -> tuple[str, Chaos]:
    """What a run on several nodes printed, and the run; see `tests.chaos.on_nodes`."""
    faults = Faults(folder / "faults")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short:  # names of sockets are short
        try:
            done = to_its_end([sys.executable, "-m", "tests.chaos.on_nodes", folder, model, what], RAY_TMPDIR=short)
        finally:  # nothing else ends the nodes of a run that was given up
            for process in psutil.process_iter(["cmdline"]):
                if any(short in part for part in process.info["cmdline"] or ()):
                    process.kill()
    assert done.returncode == 0, done.stdout
    run = Chaos(folder=folder, model=model, faults=faults, session=None)  # type: ignore[arg-type]
    run.check_trained_once(steps=len(run.lines))
    wait_for_end(faults.processes())
    return done.stdout, run


def test_a_node_that_is_removed_takes_its_worker_along_and_one_that_joins_gets_another(
    tmp_path: Path, model: str
) -> None:
    said, _ = run_on_nodes(tmp_path, model, "disturb")
    workers = {path.name.split("-")[1] for path in (tmp_path / "faults" / "processes").glob("worker-*")}
    assert {"0", "1"} < workers, "one was started on the node that joined"
    assert "trained with two workers again" in said


def test_a_worker_whose_node_will_be_taken_away_leaves_in_time_and_nothing_begins_again(
    tmp_path: Path, model: str
) -> None:
    said, _ = run_on_nodes(tmp_path, model, "give_notice")
    assert "groups that began again: 0" in said
