"""A driver without Ray and without training: the lock, the status and the scaling of a run around a fleet of fakes.

    python live_driver.py RUN [name=value ...]

Options are fields of `Setting`. It says "ready" once workers serve, and ends as a run does at SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.cluster import Demand, shortage
from rlsys.config_file import load_config
from rlsys.console import Console
from rlsys.driver import DriverLock
from rlsys.errors import ActorError
from rlsys.fleet import RolloutFleet
from rlsys.ledger import Ledger
from rlsys.records import RunDirectory
from rlsys.scaling import Scaling
from rlsys.status import Live, Status

YAML = """
name: live
run_dir: {folder}
stages: [sft, rl]
model: {{path: nowhere}}
data: {{train: {{use: "rlsys.data:none"}}, held_out: {{use: "rlsys.data:none"}}}}
rewards:
  - {{name: math, use: "rlsys.rewards.math:MathReward", actors: {{count: 1}}}}
  - {{name: length, use: "rlsys.rewards.math:MathReward"}}
tools: [{{use: "rlsys.tools.python:PythonTool", actors: {{count: 2}}}}]
sft: {{demonstrations: {{use: "rlsys.demonstrations:arithmetic_demonstrations"}}}}
actors: {{count: {count}, min: {min}, max: {max}, watch_seconds: 0.1, drain_seconds: 2}}
cluster: {{wait_seconds: 0.5}}
"""


class Stopped(Exception):
    """As `Interrupted` of a run."""


@dataclass(kw_only=True)
class Setting:
    """What the fake is like."""

    stage: str = "rl"
    count: int = 1
    min: int = 1
    max: str = "null"
    cpus: int = 8
    """Of the cluster; every actor takes one."""
    start_seconds: float = 0.2
    """So long an engine takes to start that is not among the first."""
    fail_from: int = 1000
    """The number of the first worker that cannot start."""
    stuck: int = 0
    """1: the driver answers nothing."""


class FakeWorker:
    """Starts, writes ten tokens a look, and serves for ever."""

    def __init__(self, index: int, setting: Setting) -> None:
        self.name, self.index, self.setting, self.tokens = f"rollout actor {index}", index, setting, 0

    async def call(self, method: str, *_: Any, **__: Any) -> Any:
        if method == "start":
            await asyncio.sleep(self.setting.start_seconds if self.index >= self.setting.count else 0.0)
            if self.index >= self.setting.fail_from:
                raise ActorError(f"{self.name}.start raised OSError: no such engine")
            return "fake"
        if method == "pulse":
            self.tokens += 10
            return {"tokens": self.tokens, "running": 1}
        return None

    def kill(self) -> None:
        """Nothing is alive here."""


class FakePool:
    def __init__(self, count: int) -> None:
        self.actors: Sequence[int] = list(range(count))

    async def resize(self, count: int) -> None:
        await asyncio.sleep(0.05)
        self.actors = list(range(count))

    async def close(self) -> None:
        self.actors = []


def demands(setting: Setting) -> list[Demand]:
    whats = {"rollout actor": setting.count, "rewards.0 actor": 1, "tools.0 actor": 2, "learner rank": 1}
    return [Demand(what=what, count=count, cpus=1) for what, count in whats.items()]


async def main(folder: Path, setting: Setting) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = YAML.format(folder=folder, count=setting.count, min=setting.min, max=setting.max)
    (folder / "config.yaml").write_text(text)
    config, live, stop = load_config(folder / "config.yaml"), Live(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    fleet = RolloutFleet(config.actors, lambda index: FakeWorker(index, setting))  # type: ignore[arg-type,return-value]
    fleet.pools = {"rewards.0": FakePool(1), "tools.0": FakePool(2)}  # type: ignore[dict-item]

    async def no_room(more: Sequence[Demand], *, beside: Sequence[Demand], **_: float) -> str | None:
        there = {"CPU": setting.cpus - float(sum(demand.count for demand in beside))}
        return shortage(more, there, [{"CPU": float(setting.cpus)}])

    with DriverLock.take(folder, tell=print) as lock:
        directory = RunDirectory(folder, trackers=())
        console = Console()
        status = Status(config, directory, console, live, driver=lock.driver)
        scaling = Scaling(
            config,
            folder,
            live,
            driver=lock.driver.token,
            demands=lambda _: demands(setting),
            no_room=no_room,
            ask_for=lambda asked: print("held:", {demand.what: demand.count for demand in asked}, flush=True),
            tell=print,
        )
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(status.shown(stopped=Stopped))
            if not setting.stuck:
                await stack.enter_async_context(scaling.watched())
            live.enter(setting.stage)
            if setting.stage == "rl":
                await fleet.started()
                live.fleet, live.ledger = fleet, Ledger()
                directory.log("rl", 1, {"reward": 0.5, "seconds/step": 2.0, "seconds/learn": 0.5})
                stack.push_async_callback(fleet.close)
            print("ready", flush=True)
            await stop.wait()
            raise Stopped("step 3")


if __name__ == "__main__":
    pairs = dict(text.split("=") for text in sys.argv[2:])
    with contextlib.suppress(Stopped):
        asyncio.run(
            main(
                Path(sys.argv[1]),
                Setting(**{name: type(getattr(Setting(), name))(value) for name, value in pairs.items()}),
            )
        )
