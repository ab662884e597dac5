"""Faults that a test orders and a process brings upon itself, at a named point of what it does.

A test writes them into a folder, also while the processes run; each process looks there whenever it passes a point. A
fault strikes so often as it says in all processes together, so one that was replaced is not struck again.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

Action = Literal["kill", "stop", "raise", "hang", "slow", "no_space", "engine_dies", "nan", "truncate"]
FOR_EVER = 3600.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to whom and where."""

    point: str
    action: Action
    who: str = ""
    """The name it goes by, such as "worker 1" or "learner 0"; anybody without."""
    spared: int = 0
    """So many passes, counted in each process, come to nothing first."""
    times: int = 1
    seconds: float = 2.0
    """How slow "slow" is."""
    what: str = ""
    """Only where this is what the process is at, such as the id of a problem."""


class Faults:
    """The test's side: orders faults in `folder`, and asks afterwards what came of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        for name in ("ordered", "struck", "processes"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def order(self, *faults: Fault) -> None:
        """From now on."""
        for fault in faults:
            draft = self.folder / f"{self._count:04d}.partial"
            draft.write_text(json.dumps(asdict(fault)))
            os.replace(draft, self.folder / "ordered" / f"{self._count:04d}.json")
            self._count += 1

    def order_any(self, seed: int, count: int, *, points: Sequence[str], actions: Sequence[Action]) -> None:
        """`count` faults that strike anybody and depend on the seed alone."""
        draw = random.Random(seed)
        for _ in range(count):
            self.order(Fault(point=draw.choice(points), action=draw.choice(actions), spared=draw.randrange(20)))

    def withdraw(self) -> None:
        """No fault any more."""
        for order in (self.folder / "ordered").iterdir():
            order.unlink()

    @property
    def struck(self) -> list[str]:
        """Who was struck, in the order in which it happened."""
        files = sorted((self.folder / "struck").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return [path.read_text() for path in files]

    def processes(self, who: str = "") -> list[psutil.Process]:
        """Those that ever passed a point, or were made, by this name, and live."""
        found = []
        for file in sorted((self.folder / "processes").iterdir(), key=lambda path: path.stat().st_mtime_ns):
            record = json.loads(file.read_text())
            try:
                process = psutil.Process(record["pid"])
                if record["who"].startswith(who) and process.create_time() == record["created"]:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


class Injector:
    """The process's side: it goes by the name `who`."""

    def __init__(self, folder: str | Path, who: str) -> None:
        self._folder, self._who = Path(folder), who
        self._passes: Counter[str] = Counter()
        record = {"who": who, "pid": os.getpid(), "created": psutil.Process().create_time()}
        (self._folder / "processes" / f"{who} {os.getpid()}".replace(" ", "-")).write_text(json.dumps(record))

    def pass_by(self, point: str, what: str = "") -> str:
        """What is ordered here happens, or is returned where the caller has to bring it about; else ""."""
        fault = self._next(point, what)
        if fault is None:
            return ""
        if fault.action == "slow":
            time.sleep(fault.seconds)
        elif fault.action == "hang":
            time.sleep(FOR_EVER)
        return self._done(fault)

    async def pass_by_waiting(self, point: str, what: str = "") -> str:
        """The same in a coroutine: what hangs or is slow lets others go on."""
        fault = self._next(point, what)
        if fault is None:
            return ""
        if fault.action in ("slow", "hang"):
            await asyncio.sleep(fault.seconds if fault.action == "slow" else FOR_EVER)
        return self._done(fault)

    def _done(self, fault: Fault) -> str:
        match fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                raise RuntimeError(f"ordered at {fault.point}")
            case "no_space":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "ordered")
        return fault.action

    def _next(self, point: str, what: str) -> Fault | None:
        self._passes[point] += 1
        for name, fault in self._ordered():
            if fault.point != point or fault.who not in ("", self._who) or fault.what not in ("", what):
                continue
            if self._passes[point] > fault.spared and self._claimed(name, fault):
                return fault
        return None

    def _ordered(self) -> Iterable[tuple[str, Fault]]:
        for order in sorted((self._folder / "ordered").iterdir()):
            try:
                yield order.stem, Fault(**json.loads(order.read_text()))
            except FileNotFoundError:  # withdrawn just now
                continue

    def _claimed(self, name: str, fault: Fault) -> bool:
        """Whether it is this process's turn to be struck: the file of each time can be made only once."""
        for time_of_it in range(fault.times):
            try:
                with (self._folder / "struck" / f"{name}-{time_of_it}").open("x") as file:
                    file.write(f"{self._who}: {fault.action} at {fault.point}")
                return True
            except FileExistsError:
                continue
        return False
