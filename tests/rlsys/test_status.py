"""What a run says of itself while it goes on: the status file, its view in a terminal, the metrics and their board."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import live_driver
import pytest
from rich.console import Console as RichConsole
from typer.testing import CliRunner

from rlsys import status as status_module
from rlsys.cli import app
from rlsys.cluster import Exporter
from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.console import Console
from rlsys.control import write_whole
from rlsys.driver import Driver, DriverLock
from rlsys.errors import ConfigError, ResourceError
from rlsys.fleet import RolloutFleet
from rlsys.gauges import METRICS, readings
from rlsys.ledger import Ledger
from rlsys.records import RunDirectory
from rlsys.status import Live, Status, pool_name, read_status, rollout_seconds, step_seconds
from rlsys.status_view import render

BOARD = Path(__file__).resolve().parents[2] / "grafana" / "rlsys.json"
PAGE = BOARD.parents[1] / "docs" / "fleet.md"
NOW = 1_800_000_000.0


class Stopped(Exception):
    pass


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = live_driver.YAML.format(folder=tmp_path / "run", count=2, min=1, max="null")
    (tmp_path / "live.yaml").write_text(text)
    return load_config(tmp_path / "live.yaml")


@pytest.fixture
def directory(config: Config) -> RunDirectory:
    return RunDirectory.open(replace(config, trackers=[]), resume=False, fresh=False)


# --- what is collected -----------------------------------------------------------------------------------------------


def test_a_run_that_has_just_begun_has_a_status(config: Config, directory: RunDirectory) -> None:
    console = Console()
    status = Status(config, directory, console, Live())
    with console.waiting("starting Ray"):
        found = status.collect()
    assert (found["state"], found["stage"], found["step"], found["version"]) == ("running", "", None, None)
    assert (found["workers"], found["pools"], found["queue"], found["seconds"]) == ([], [], {}, {})
    assert found["doing"]["what"] == "starting Ray"
    assert found["driver"]["pid"] == Driver.this_process().pid
    assert list(readings(found)) == []
    shown(found)


def test_steps_and_what_is_done_inside_of_one_are_told_apart(config: Config, directory: RunDirectory) -> None:
    console, live = Console(), Live()
    live.enter("rl")
    status = Status(config, directory, console, live)
    with console.steps("rl", total=40, done=3) as progress:
        progress.advance(4)
        assert (status.collect()["step"], status.collect()["steps"], status.collect()["doing"]) == (4, 40, None)
        with console.counting("evaluating on 8 held-out problems", total=8) as tick:
            tick()
            tick()
            doing = status.collect()["doing"]
            assert (doing["what"], doing["done"], doing["total"]) == ("evaluating on 8 held-out problems", 2, 8)
            assert status.collect()["step"] == 4
    assert console.activities == []


def test_the_workers_their_speed_and_the_ledger_are_in_it(
    config: Config, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> dict[str, Any]:
        setting = live_driver.Setting(start_seconds=0.0)
        fleet = RolloutFleet(
            config.actors,
            lambda index: live_driver.FakeWorker(index, setting),  # type: ignore[arg-type,return-value]
        )
        fleet.pools = {"rewards.0": live_driver.FakePool(1), "tools.0": live_driver.FakePool(2)}  # type: ignore[dict-item]
        await fleet.started()
        live = Live(stage="rl", fleet=fleet, ledger=Ledger())
        ledger = live.ledger
        assert ledger is not None
        for number in (1, 2, 3):
            ledger.issue(number)
        ledger.deliver(1, 1)
        status = Status(config, directory, Console(), live)
        directory.log("rl", 1, {"staleness_mean": 0.5, "staleness_max": 1.0, "reward": float("nan")})
        clock = [100.0]
        monkeypatch.setattr(status_module.time, "monotonic", lambda: clock[0])
        pulses = iter([{"tokens": 100.0}, {"tokens": 300.0}])
        monkeypatch.setattr(fleet, "pulse_of", lambda _: pulse)
        pulse = next(pulses)
        status.collect()
        pulse, clock[0] = next(pulses), 104.0
        found = status.collect()
        clock[0] = 105.0
        again = status.collect()
        assert [one["tokens_per_second"] for one in again["workers"]] == [50.0, 50.0], "no pulse since"
        await fleet.close()
        return found

    found = asyncio.run(run())
    names = [f"rollout actor {index}" for index in (0, 1)]
    assert [(one["name"], one["state"], one["version"]) for one in found["workers"]] == [
        (name, "healthy", 0) for name in names
    ]
    assert [one["tokens_per_second"] for one in found["workers"]] == [50.0, 50.0]
    assert [one["seconds"] for one in found["workers"]] == [4.0, 4.0]
    assert (found["fleet"]["target"], found["fleet"]["min"], found["fleet"]["max"]) == (2, 1, None)
    assert found["fleet"]["states"] == {"healthy": 2}
    assert found["fleet"]["tokens_per_second"] == 100.0
    assert found["pools"] == [{"name": "rewards.math", "actors": 1}, {"name": "tools.python", "actors": 2}]
    assert (found["queue"]["issued"], found["queue"]["in_flight"], found["queue"]["done"]) == (3, 2, 1)
    assert found["staleness"] == {"mean": 0.5, "max": 1.0, "limit": config.rl.max_staleness}
    assert found["last"] == {"reward": None}, "JSON has no number for what is none"
    assert json.dumps(found, allow_nan=False)
    assert [event["what"] for event in found["events"]] == ["has started"] * 2
    shown(found)


def test_the_parts_of_a_step_add_up_to_it() -> None:
    lines = [
        {"seconds/step": 2.0, "seconds/rollout": 1.0, "seconds/learn": 0.5, "seconds/publish": 0.25, "reward": 1.0},
        {
            "seconds/step": 4.0,
            "seconds/rollout": 2.0,
            "seconds/learn": 1.5,
            "seconds/eval": 0.25,
            "seconds/publish_pause": 9,
        },
    ]
    found = step_seconds(lines)
    assert found == {
        "step": 3.0,
        "rollout": 1.5,
        "learn": 1.0,
        "publish": 0.125,
        "eval": 0.125,
        "other": 0.25,
    }
    assert step_seconds([{"seconds": 0.5}, {"seconds": 1.5}]) == {"step": 1.0, "learn": 1.0}
    assert step_seconds([{"accuracy": 1.0}]) == {}


def test_the_parts_of_a_rollout_are_means() -> None:
    lines = [{"rollout_seconds": 2.0, "tool_seconds": 1.0}, {"rollout_seconds": 4.0, "reward_seconds": 1.0}, {}]
    assert rollout_seconds(lines) == {"total": 3.0, "tools": 0.5, "rewards": 0.5}
    assert rollout_seconds([{}]) == {}


def test_pools_have_the_names_that_people_know(config: Config) -> None:
    assert pool_name(config, "rewards.0") == "rewards.math"
    assert pool_name(config, "tools.0") == "tools.python"
    assert pool_name(replace(config, tools=[replace(config.tools[0], use="os.path:join")]), "tools.0") == "tools.join"


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (None, "finished", ""),
        (Stopped("rl step 3"), "stopped", "rl step 3"),
        (KeyboardInterrupt(), "stopped", ""),
        (ResourceError("too little"), "failed", "too little"),
        (ZeroDivisionError("by 0"), "failed", "ZeroDivisionError('by 0')"),
    ],
)
def test_the_file_is_renewed_while_the_run_goes_on_and_says_how_it_ended(
    config: Config,
    directory: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    state: str,
    message: str,
) -> None:
    monkeypatch.setattr(status_module, "_EVERY_SECONDS", 0.01)
    exported: list[Mapping[str, Any]] = []
    status = Status(config, directory, Console(), Live())
    status.export = exported.append

    async def run() -> None:
        async with status.shown(stopped=Stopped):
            first = read_status(directory.folder)
            while (read_status(directory.folder) or {})["heartbeat"] == (first or {})["heartbeat"]:
                await asyncio.sleep(0.01)
            if error is not None:
                raise error

    if error is None:
        asyncio.run(run())
    else:
        with pytest.raises(type(error)):
            asyncio.run(run())
    found = read_status(directory.folder)
    assert found is not None
    assert (found["state"], found["message"]) == (state, message)
    assert exported


def test_a_status_that_cannot_be_written_does_not_end_the_run(
    config: Config, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status_module, "write_json", full)
    monkeypatch.setattr(status_module, "_EVERY_SECONDS", 0.01)

    async def run() -> None:
        async with asyncio.timeout(60), Status(config, directory, Console(), Live()).shown(stopped=Stopped):
            while "No space left" not in caplog.text:
                await asyncio.sleep(0.01)

    with caplog.at_level("WARNING", logger="rlsys.status"):
        asyncio.run(run())


# --- the view --------------------------------------------------------------------------------------------------------


def sample(**more: Any) -> dict[str, Any]:
    """A status in which everything is there."""
    workers = [
        {
            "name": f"rollout actor {index}",
            "state": ("healthy", "stale", "starting", "draining")[index % 4],
            "version": 22 if index % 4 != 2 else None,
            "in_flight": 64 - index,
            "tokens_per_second": 812.3,
            "seconds": 300.0 * index + 7,
        }
        for index in range(20)
    ]
    return {
        "run": "mine",
        "folder": "/runs/mine",
        "state": "running",
        "message": "",
        "heartbeat": NOW - 0.4,
        "driver": {"pid": 4711, "host": "node-17", "started": NOW - 4000, "token": "t"},
        "stages": ["sft", "rl", "eval"],
        "finished": ["sft"],
        "stage": "rl",
        "step": 23,
        "steps": 40,
        "doing": {"what": "evaluating on 256 held-out problems", "done": 37, "total": 256, "seconds": 12.0},
        "version": 22,
        "fleet": {
            "target": 20,
            "min": 1,
            "max": None,
            "states": {"healthy": 5, "stale": 5, "starting": 5, "draining": 5},
            "waiting": 48,
            "redispatched": 2,
            "tokens_per_second": 8123.4,
        },
        "workers": workers,
        "pools": [{"name": "rewards.math", "actors": 2}],
        "queue": {
            "issued": 235,
            "in_flight": 8,
            "done": 3,
            "trained": 184,
            "dropped": 36,
            "discarded": 4,
            "refused": 0,
        },
        "staleness": {"mean": 0.43, "max": 2.0, "limit": 2},
        "last": {
            "reward": 0.828,
            "accuracy": 0.8,
            "response_tokens": 265.2,
            "tool_rate": 0.9,
            "tokens_per_second": 859.2,
        },
        "seconds": {
            "step": 2.0,
            "rollout": 1.1,
            "learn": 0.6,
            "publish": 0.2,
            "publish_pause": 0.1,
            "mine": 0.05,
            "other": 0.05,
        },
        "rollout_seconds": {"total": 1.0, "tools": 0.3, "rewards": 0.01},
        "events": [{"time": NOW - 20, "worker": "rollout actor 1", "what": "is lost: [red] it\ndied " + "x" * 500}],
        **more,
    }


def shown(status: Mapping[str, Any], *, width: int = 80, alive: bool = True) -> str:
    console = RichConsole(width=width, file=io.StringIO(), record=True, highlight=False)
    console.print(render(status, alive=alive, now=NOW))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 140])
def test_everything_of_interest_is_readable(width: int) -> None:
    text = shown(sample(), width=width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for words in (
        "mine ✓ sft ▸ rl eval",
        "running for 1 h 6 min, process 4711 on node-17",
        "23 of 40 steps, 34 s left",
        "evaluating on 256 held-out problems: 37 of 256",
        "reward 0.828, accuracy 0.8, 265 tokens a response",
        "8123 written, 859 trained",
        "0.43 mean, 2 most, limit 2",
        "8 under way, 3 done and untrained",
        "184 trained, 36 dropped, 4 discarded",
        "48 rollouts wait, 2 groups moved to another worker",
        "rewards.math 2",
        "5 healthy, 5 stale, 5 starting, 5 draining; 20 wanted (1 to any number); weights 22",
        "and 4 more",
        "a step takes 2.00 s",
        "55 % 1.10 s",
        "a rollout takes 1.00 s: 30 % in tools, 1 % in rewards",
        "is lost: [red] it died",
    ):
        assert words in " ".join(text.split())
    assert re.search(r"rollout actor 0 +healthy +22 +64 +812 +7 s", text)
    assert re.search(r"rollout actor 2 +starting +- +62 +812 +10 min 7 s", text)
    assert len(text.splitlines()) <= 50


@pytest.mark.parametrize(
    ("more", "alive", "words"),
    [
        ({"heartbeat": NOW - 40}, True, "lives but has not been heard of for 40 s"),
        ({"heartbeat": NOW - 40}, False, "the driver (process 4711 on node-17) is dead; last heard of 40 s ago"),
        ({"state": "finished"}, False, "finished 20"),
        ({"state": "stopped", "message": "rl step 3"}, False, ": rl step 3; go on with rlsys train CONFIG --resume"),
        ({"state": "failed", "message": "no [bold] room"}, False, ": no [bold] room; go on with"),
    ],
)
def test_the_view_says_how_the_run_is_or_how_it_ended(more: dict[str, Any], alive: bool, words: str) -> None:
    assert words in " ".join(shown(sample(**more), alive=alive).split())


def test_the_command_shows_prints_json_and_knows_whether_the_driver_lives(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with DriverLock.take(folder, tell=print) as lock:
        (folder / "config.yaml").touch()
        outcome = CliRunner().invoke(app, ["status", str(folder), "--once"])
        assert isinstance(outcome.exception, ConfigError)
        assert "has no status yet" in str(outcome.exception)
        driver = {"pid": 4711, "host": "node-17", "started": NOW - 4000, "token": lock.driver.token}
        write_whole(folder / "status.json", sample(heartbeat=time.time() - 40, driver=driver))
        outcome = CliRunner().invoke(app, ["status", str(folder), "--once"])
        assert "has not been heard of for 40 s" in " ".join(outcome.output.split())
        assert json.loads(CliRunner().invoke(app, ["status", str(folder), "--json"]).output)["alive"] is True
    outcome = CliRunner().invoke(app, ["status", str(folder)])  # not a terminal: as with --once
    assert "is dead; last heard of" in " ".join(outcome.output.split())
    assert json.loads(CliRunner().invoke(app, ["status", str(folder), "--json"]).output)["alive"] is False


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_every_metric_is_read_off_a_status_and_nothing_else_is() -> None:
    tags = {metric.name: set(metric.tags) for metric in METRICS}
    found = list(readings(sample()))
    assert {reading.name for reading in found} == tags.keys()
    for reading in found:
        assert reading.tags.keys() == tags[reading.name]
    values = {(reading.name, *reading.tags.values()): reading.value for reading in found}
    assert values["rlsys_workers", "healthy"] == 5
    none_stale = {
        (one.name, *one.tags.values()): one.value for one in readings(sample(fleet={"states": {"healthy": 1}}))
    }
    assert none_stale["rlsys_workers", "stale"] == 0, "or the number of before would be repeated for a while"
    assert values["rlsys_worker_rollouts", "rollout actor 3"] == 61
    assert values["rlsys_step_seconds", "learn"] == 0.6
    assert values["rlsys_problems", "discarded"] == 4
    assert ("rlsys_worker_version", "rollout actor 2") not in values
    assert len(values) == len(found), "no reading is given twice"


def test_gauges_are_set_and_counters_follow_also_when_they_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util.metrics

    told: list[tuple[str, str, float, dict[str, str]]] = []

    class Told:
        def __init__(self, name: str, what: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.keys = name, set(tag_keys)
            assert what

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tags.keys() == self.keys
            told.append(("set", self.name, value, tags))

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert tags.keys() == self.keys
            assert value > 0, "Ray refuses anything else"
            told.append(("inc", self.name, value, tags))

    monkeypatch.setattr(ray.util.metrics, "Gauge", Told)
    monkeypatch.setattr(ray.util.metrics, "Counter", Told)
    exporter, common = Exporter(METRICS), {"run": "mine", "stage": "rl"}
    exporter.export(readings(sample()), common)
    assert {name for _, name, _, _ in told} == {metric.name for metric in METRICS}
    told.clear()
    for redispatched in (2, 5, 1):
        readings_now = [one for one in readings(sample(fleet={"redispatched": redispatched})) if "redis" in one.name]
        exporter.export(readings_now, common)
    assert [(kind, value) for kind, _, value, _ in told] == [("inc", 3), ("inc", 1)]


def test_the_board_shows_exactly_the_metrics_that_there_are() -> None:
    board = json.loads(BOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert set(re.findall(r"ray_rlsys_\w+", " ".join(expressions))) == {metric.exported_as for metric in METRICS}
    tags = {metric.exported_as: {"run", "stage", *metric.tags} for metric in METRICS}
    for expression in expressions:
        (name,) = re.findall(r"ray_rlsys_\w+", expression)
        (by,) = re.findall(r"by \(([^)]*)\)", expression)
        assert set(by.split(", ")) <= tags[name], expression
    assert set(re.findall(r"ray_rlsys_\w+", PAGE.read_text())) == tags.keys(), "the page names them all"
    panels = [panel["gridPos"] for panel in board["panels"]]
    cells = [
        (x, y) for at in panels for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)), "panels lie over one another"
    assert max(x for x, _ in cells) < 24
