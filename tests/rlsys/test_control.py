"""One driver for each run directory, and asking a live one for more or fewer workers: real processes, fake workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import live_driver
import pytest
from typer.testing import CliRunner

from rlsys import driver as driver_module
from rlsys.cli import app
from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.control import CONTROL, Answer, Request, counts_of, find_run, scale, write_whole
from rlsys.driver import LOCK, Driver, DriverLock
from rlsys.errors import ConfigError, ResourceError
from rlsys.records import RunDirectory
from rlsys.status import read_status

SECONDS = 60.0
"""Ends a test that hangs."""


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
    return found


class Process:
    """A driver in a process of its own."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        arguments = [f"{name}={value}" for name, value in settings.items()]
        command = [sys.executable, live_driver.__file__, str(folder), *arguments]
        self.folder = folder
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        until(lambda: "ready" in self.said or self.process.poll() is not None)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(line.rstrip("\n") for line in self.process.stdout)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(SECONDS)

    def scale(self, *, timeout: float = SECONDS, wait: bool = True, **counts: int) -> Answer:
        return scale(
            self.folder, {name.replace("__", "."): count for name, count in counts.items()}, timeout=timeout, wait=wait
        )

    def keeps(self, count: int) -> bool:
        """Whether so many workers serve, and no other number is aimed at."""
        assert self.process.poll() is None
        until(lambda: self.serving() == count)
        fleet = (read_status(self.folder) or {})["fleet"]
        return fleet is None or bool(fleet["target"] == count)

    def serving(self) -> int:
        status = read_status(self.folder)
        assert status is not None
        return sum(worker["state"] == "healthy" for worker in status["workers"])


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(**settings: Any) -> Process:
        processes.append(Process(tmp_path / "run", **settings))
        return processes[-1]

    yield start
    for process in processes:
        if process.process.poll() is None:
            process.process.send_signal(signal.SIGCONT)
            process.end()


# --- scaling ---------------------------------------------------------------------------------------------------------


def test_a_live_run_gets_more_workers_and_fewer(started: Callable[..., Process]) -> None:
    run = started()
    more = run.scale(rollouts=3)
    assert (more.state, more.message.partition(",")[0]) == ("done", "rollouts 1 -> 3")
    assert until(lambda: run.serving() == 3)
    fewer = run.scale(rollouts=1)
    assert fewer.message.startswith("rollouts 3 -> 1, after ")
    assert until(lambda: run.serving() == 1)
    asked = [line for line in run.said if line.startswith("held:")]
    assert len(asked) == 1, "a cluster that grows by itself is asked for less after a run has shrunk"
    assert "'rollout actor': 1" in asked[0]


def test_pools_are_scaled_by_name_and_alone_without_one(started: Callable[..., Process]) -> None:
    run = started()
    message = run.scale(rewards__math=2, tools=1, rollouts=2).message
    assert message.startswith("rewards.math 1 -> 2, tools.python 2 -> 1, rollouts 1 -> 2, after ")
    assert until(lambda: {pool["name"]: pool["actors"] for pool in (read_status(run.folder) or {})["pools"]}) == {
        "rewards.math": 2,
        "tools.python": 1,
    }


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ({"rollouts": 1}, {"min": 2, "count": 2}, r"--rollouts 1 is below actors.min \(2\); the run goes on as it was"),
        ({"rollouts": 5}, {"max": 4}, r"--rollouts 5 is above actors.max \(4\); the run goes on as it was"),
        (
            {"rollouts": 9},
            {"cpus": 6},
            r"no room for more: the run asks for 8 CPU \[8 rollout actor x \(1 CPU\)\] but 1 CPU are there; the run "
            r"goes on as it was \(rollouts 1\)",
        ),
        (
            {"rollouts": 2},
            {"stage": "sft"},
            r"the stage sft has no rollout actors \(yet\); the run's stages are sft, rl",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    started: Callable[..., Process], counts: dict[str, int], settings: dict[str, Any], message: str
) -> None:
    run = started(**settings)
    with pytest.raises(ConfigError, match=message):
        scale(run.folder, counts, timeout=SECONDS, wait=True)
    assert run.keeps(0 if "stage" in settings else settings.get("count", 1))


def test_a_name_that_has_no_actors_of_its_own_is_refused_and_changes_nothing(started: Callable[..., Process]) -> None:
    run = started()
    for name in ("rewards.style", "rewards.length", "tools.search"):
        kind, _, rest = name.partition(".")
        there = {"rewards": "math", "tools": "python"}[kind]
        with pytest.raises(ConfigError, match=f"--{kind} {rest}: no such one of the {kind} has .* that have: {there} "):
            scale(run.folder, {"rollouts": 2, name: 2}, timeout=SECONDS, wait=True)
    assert run.keeps(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollouts", "0"], "--rollouts: 0 is too few; a run keeps at least 1 of each"),
        (["--rollouts", "-1"], "--rollouts: -1 is too few"),
        (["--rollouts", "many"], "--rollouts: 'many' is not a whole number"),
        (["--rollouts", "1.5"], "--rollouts: '1.5' is not a whole number"),
        (["--rewards", "math=x"], "--rewards math=x: 'x' is not a whole number"),
        (["--tools", "python=0"], "--tools python=0: 0 is too few"),
        ([], "nothing to change; say --rollouts N, --rewards NAME=N or --tools NAME=N"),
        (["--rollouts", "2"], "there is no run at 'nowhere'"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_options(options: list[str], message: str) -> None:
    outcome = CliRunner().invoke(app, ["scale", "nowhere", *options])
    assert isinstance(outcome.exception, ConfigError)
    assert message in str(outcome.exception)


def test_counts_are_read_off_the_options() -> None:
    assert counts_of("3", ["2"], ["python=4", "a=b=1"]) == {
        "rollouts": 3,
        "rewards": 2,
        "tools.python": 4,
        "tools.a=b": 1,
    }


def test_a_run_is_found_by_its_path_or_its_name_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no run under runs either"):
        find_run("mine")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    assert find_run("mine") == Path("runs/mine")
    assert find_run(str(tmp_path / "runs" / "mine")) == tmp_path / "runs" / "mine"
    with pytest.raises(ConfigError, match="under runs there are: mine"):
        find_run("yours")


def test_the_command_prints_what_was_what_is_and_how_long_it_took(started: Callable[..., Process]) -> None:
    run = started()
    outcome = CliRunner().invoke(app, ["scale", str(run.folder), "--rollouts", "2"])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.startswith("rollouts 1 -> 2, after ")
    outcome = CliRunner().invoke(app, ["scale", str(run.folder), "--rollouts", "1", "--no-wait"])
    assert outcome.output.startswith(("accepted: rollouts 2 -> 1", "rollouts 2 -> 1: ", "rollouts 2 -> 1, after"))
    assert until(lambda: run.serving() == 1)


def test_without_waiting_the_answer_is_there_before_the_workers(started: Callable[..., Process]) -> None:
    run = started(start_seconds=2.0)
    answer = run.scale(rollouts=2, wait=False)
    assert answer.state == "accepted"
    assert until(lambda: run.serving() == 1)
    assert until(lambda: run.serving() == 2)


def test_a_later_request_goes_before_the_one_that_is_under_way(started: Callable[..., Process]) -> None:
    run = started(start_seconds=4.0)
    failures: list[ResourceError] = []

    def ask() -> None:
        try:
            run.scale(rollouts=3)
        except ResourceError as error:
            failures.append(error)

    first = threading.Thread(target=ask)
    first.start()
    assert until(lambda: any("scale: rollouts 1 -> 3" in line for line in run.said))
    assert run.scale(rollouts=1).state == "done"
    first.join(SECONDS)
    assert "a later request asked for 1 rollout workers" in str(failures[0])


def test_workers_that_cannot_start_are_told_of_and_the_run_keeps_those_it_has(started: Callable[..., Process]) -> None:
    run = started(fail_from=2, cpus=20)
    with pytest.raises(ResourceError, match=r"5 rollout workers were asked for.* goes on with 2; .*no such engine"):
        run.scale(rollouts=5)
    assert until(lambda: run.keeps(2))


def test_a_driver_that_does_not_answer_is_not_waited_for_and_the_request_is_taken_back(
    started: Callable[..., Process],
) -> None:
    run = started(stuck=1)
    with pytest.raises(ResourceError, match="has not answered within 1 s, and the request was taken back"):
        run.scale(rollouts=2, timeout=1)
    assert list((run.folder / CONTROL).iterdir()) == []


def test_a_run_that_ends_while_it_is_asked_says_so(started: Callable[..., Process]) -> None:
    run = started(start_seconds=5.0)
    threading.Timer(1.0, run.end).start()
    with pytest.raises(ConfigError, match=r"is not running: its driver, process .* is dead"):
        run.scale(rollouts=2)


def test_a_run_that_stops_leaves_an_answer_to_what_was_under_way(started: Callable[..., Process]) -> None:
    run = started(start_seconds=5.0)
    threading.Timer(1.0, run.process.send_signal, [signal.SIGTERM]).start()
    with pytest.raises(ResourceError, match="the run ended before this was done"):
        run.scale(rollouts=2)


def test_a_run_that_has_ended_is_not_asked(started: Callable[..., Process]) -> None:
    run = started()
    run.end(signal.SIGTERM)
    with pytest.raises(ConfigError, match=r"is not running: it was stopped \(.*\): step 3; go on with `rlsys train"):
        run.scale(rollouts=2)
    write_whole(run.folder / "status.json", {**(read_status(run.folder) or {}), "state": "finished"})
    with pytest.raises(ConfigError, match="is not running: it has finished"):
        run.scale(rollouts=2)
    (run.folder / "status.json").unlink()
    with pytest.raises(ConfigError, match="it has no driver and no status"):
        run.scale(rollouts=2)


def test_requests_to_an_earlier_driver_and_files_that_are_none_do_no_harm(started: Callable[..., Process]) -> None:
    run = started()
    stale = Request(counts={"rollouts": 2}, driver="another")
    write_whole(run.folder / CONTROL / "old.request.json", asdict(stale))
    (run.folder / CONTROL / "bad.request.json").write_text("{not json")
    mine = Driver.of(run.folder)
    assert mine is not None
    write_whole(run.folder / CONTROL / "zero.request.json", {"counts": {"rollouts": 0}, "driver": mine.token})
    assert until(lambda: not list((run.folder / CONTROL).glob("*.request.json")))
    assert run.keeps(1)
    answers = {path.name: json.loads(path.read_text()) for path in (run.folder / CONTROL).glob("*.answer.json")}
    assert {name: answer["state"] for name, answer in answers.items()} == {
        "bad.answer.json": "refused",
        "zero.answer.json": "refused",
    }
    assert "counts are whole numbers above 0" in answers["zero.answer.json"]["message"]
    assert run.scale(rollouts=2).state == "done"


def token_in(folder: Path) -> str | None:
    driver = Driver.of(folder)
    return None if driver is None else driver.token


# --- one driver ------------------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_with_the_name_of_the_first_and_how_to_stop_it(
    started: Callable[..., Process],
) -> None:
    run = started()
    expected = f"process {run.process.pid} on .* last heard of .* ago. Stop it with `kill {run.process.pid}` on"
    with pytest.raises(ConfigError, match=expected):
        DriverLock.take(run.folder, tell=print)
    second = Process(run.folder)
    assert second.process.wait(SECONDS) == 1
    assert run.scale(rollouts=2).state == "done", "the first one goes on"


def test_a_frozen_driver_is_alive(started: Callable[..., Process]) -> None:
    run = started()
    run.process.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match="has a driver already"):
        DriverLock.take(run.folder, tell=print)


def test_the_lock_of_a_killed_driver_is_taken_over_and_that_is_said(started: Callable[..., Process]) -> None:
    run = started()
    run.end()
    said: list[str] = []
    with DriverLock.take(run.folder, tell=said.append) as lock:
        assert token_in(run.folder) == lock.driver.token
    assert len(said) == 1
    assert f"its driver, process {run.process.pid} on" in said[0]
    assert "is dead; this process takes over" in said[0]
    assert Driver.of(run.folder) is None


def test_a_driver_that_ends_leaves_no_lock_and_one_that_did_nothing_no_folder(tmp_path: Path) -> None:
    with DriverLock.take(tmp_path / "run", tell=print):
        assert (tmp_path / "run" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_has_by_now_is_no_driver(tmp_path: Path) -> None:
    me = Driver.this_process()
    assert me.alive
    assert not replace(me, born="1").alive
    (tmp_path / LOCK).write_text(json.dumps(asdict(replace(me, born="1"))))
    DriverLock.take(tmp_path, tell=print).release()


def test_a_driver_on_another_host_is_judged_by_its_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(driver_module, "SILENT_SECONDS", 2.0)
    far = replace(Driver.this_process(job="raysubmit_1"), machine="another", host="far", heartbeat=0.0)
    (tmp_path / LOCK).write_text(json.dumps(asdict(far)))
    beating = threading.Event()

    def beat() -> None:
        for beats in range(1, 1000):
            if beating.wait(0.1):
                return
            write_whole(tmp_path / LOCK, asdict(replace(far, beats=beats)))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ConfigError, match=r"on far since .* Stop it with `ray job stop raysubmit_1`"):
        DriverLock.take(tmp_path, tell=print)
    beating.set()
    thread.join()
    said: list[str] = []
    DriverLock.take(tmp_path, tell=said.append).release()
    assert "on far since" in said[0]


def test_a_driver_whose_lock_was_taken_over_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "BEAT_SECONDS", 0.1)
    heard: list[Driver] = []
    lock = DriverLock.take(tmp_path, tell=print, lost=heard.append)
    other = replace(Driver.this_process(), pid=1)
    write_whole(tmp_path / LOCK, asdict(other))
    assert until(lambda: heard) == [other]
    lock.release()
    assert Driver.of(tmp_path) == other, "it is not this one's to remove"


def test_the_beats_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "BEAT_SECONDS", 0.1)
    with DriverLock.take(tmp_path / "run", tell=print) as lock:
        first = until(lambda: Driver.of(lock.folder))
        assert until(lambda: (Driver.of(lock.folder) or first).beats > first.beats + 2)
        assert (Driver.of(lock.folder) or first).heartbeat > first.heartbeat


def test_a_file_that_is_no_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("[]")
    with pytest.raises(ConfigError, match=r"driver\.json names no driver .*; remove it if none is alive"):
        DriverLock.take(tmp_path, tell=print)


def config_in(folder: Path) -> Config:
    text = live_driver.YAML.format(folder=folder, count=1, min=1, max="null")
    (folder.parent / "live.yaml").write_text(text)
    return load_config(folder.parent / "live.yaml")


def test_the_lock_stays_with_a_driver_that_begins_anew(tmp_path: Path) -> None:
    config = config_in(tmp_path / "run")
    with DriverLock.take(tmp_path / "run", tell=print) as lock:
        RunDirectory.open(config, resume=False, fresh=False)
        RunDirectory.open(config, resume=False, fresh=True)
        assert token_in(tmp_path / "run") == lock.driver.token
        assert token_in(tmp_path / "run.1") is None
        assert (tmp_path / "run.1" / "config.yaml").exists()
    assert os.listdir(tmp_path / "run").count(LOCK) == 0
