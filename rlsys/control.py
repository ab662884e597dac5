"""Asking a live run for more or fewer workers, by files in `RUN/control`: who asks, and how it is answered.

A request is written under another name and renamed, so that it is whole; the driver claims it by removing it, and
writes an answer that it renews until the matter is settled. `rlsys.scaling` is the driver's end.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlsys.driver import Driver
from rlsys.errors import ConfigError, ResourceError
from rlsys.status import read_status

CONTROL = "control"
REQUEST_ENDING, ANSWER_ENDING = ".request.json", ".answer.json"
ROLLOUTS = "rollouts"
_LOOK_SECONDS = 0.2
_UNSETTLED = ("looking", "accepted")
State = Literal["looking", "accepted", "done", "refused", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """So many workers from now on: by `rollouts`, or the name of a pool such as `rewards.math` or `tools.python`.

    `rewards` or `tools` alone is the one reward, or tool, that has actors.
    """

    counts: Mapping[str, int]
    driver: str
    """Token of the driver that is asked; no other one answers."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request so far."""

    state: State
    """Whether there is room is being looked at; new workers are being started; they serve; it was not done."""
    message: str
    seconds: float = 0.0
    """Since the request was claimed."""


def write_whole(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that others may read at any time."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)


def find_run(name: str) -> Path:
    """The run directory that a person means: a path, or the name of a run under `runs`.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    for folder in (Path(name), Path("runs") / name):
        if (folder / "config.yaml").exists():
            return folder
    there = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    hint = f"; under runs there are: {', '.join(there)}" if there else "; there is no run under runs either"
    raise ConfigError(f"there is no run at {name!r}{hint}")


def living_driver(folder: Path) -> Driver:
    """Whoever trains in a run directory.

    Raises:
        ConfigError: nobody does; says how the run ended, and how to go on with it.
    """
    driver = Driver.of(folder)
    if driver is None:
        raise ConfigError(f"{folder} is not running: {how_it_ended(folder)}")
    if not driver.alive:
        raise ConfigError(
            f"{folder} is not running: its driver, {driver}, is dead, last heard of {driver.silent_seconds:.0f} s ago; "
            "go on with `rlsys train CONFIG --resume`"
        )
    return driver


def how_it_ended(folder: Path) -> str:
    """The end of a run without a driver, for a person."""
    status = read_status(folder)
    if status is None:
        return "it has no driver and no status; start it with `rlsys train CONFIG`"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["heartbeat"]))
    if status["state"] == "finished":
        return f"it has finished ({when})"
    why = f": {status['message']}" if status["message"] else ""
    was = "was stopped" if status["state"] == "stopped" else "ended with an error"
    return f"it {was} ({when}){why}; go on with `rlsys train CONFIG --resume`"


def counts_of(rollouts: str | None, rewards: Sequence[str], tools: Sequence[str]) -> dict[str, int]:
    """What the options of the command ask for: `N` for rollouts, `N` or `NAME=N` for rewards and tools.

    Raises:
        ConfigError: a count is no whole number above 0, or nothing is asked for.
    """
    counts = {} if rollouts is None else {ROLLOUTS: _count(rollouts, "--rollouts")}
    for kind, texts in (("rewards", rewards), ("tools", tools)):
        for text in texts:
            name, equals, number = text.rpartition("=")
            counts[f"{kind}.{name}" if equals else kind] = _count(number, f"--{kind} {text}" if equals else f"--{kind}")
    if not counts:
        raise ConfigError("nothing to change; say --rollouts N, --rewards NAME=N or --tools NAME=N")
    return counts


def _count(text: str, option: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a whole number") from None
    if count < 1:
        raise ConfigError(f"{option}: {count} is too few; a run keeps at least 1 of each (to end it, stop its driver)")
    return count


def scale(
    folder: Path,
    counts: Mapping[str, int],
    *,
    timeout: float,
    wait: bool,
    tell: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Ask the driver of a run, and return its last answer; `tell` hears every new message on the way.

    Without `wait` this is that the request was accepted, else that the workers serve.

    Raises:
        ConfigError: the run is not running, or the request was refused; nothing has changed.
        ResourceError: the request was accepted and then failed, or was not answered within `timeout` seconds.
    """
    request = Request(counts=dict(counts), driver=living_driver(folder).token)
    path = folder / CONTROL / f"{request.id}{REQUEST_ENDING}"
    answer_path = folder / CONTROL / f"{request.id}{ANSWER_ENDING}"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, asdict(request))
    deadline, told = time.monotonic() + timeout, ""
    while True:
        answer = _read_answer(answer_path)
        if answer is not None and answer.message != told:
            tell(told := answer.message)
        if answer is not None and (answer.state not in _UNSETTLED or (answer.state == "accepted" and not wait)):
            break
        if (answer is None or answer.state == "looking") and time.monotonic() > deadline:
            raise ResourceError(_not_answered(folder, path, timeout))
        try:
            living_driver(folder)
        except ConfigError:
            path.unlink(missing_ok=True)
            raise
        time.sleep(_LOOK_SECONDS)
    if answer.state == "refused":
        raise ConfigError(answer.message)
    if answer.state == "failed":
        raise ResourceError(answer.message)
    return answer


def _not_answered(folder: Path, path: Path, timeout: float) -> str:
    """Take the request back if the driver has not claimed it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return (
            f"the driver of {folder} has not decided within {timeout:g} s; it may yet do what was asked: look with "
            f"`rlsys status {folder}`, or wait longer with --timeout"
        )
    return (
        f"the driver of {folder} has not answered within {timeout:g} s, and the request was taken back; see whether it "
        f"is well with `rlsys status {folder}`, or wait longer with --timeout"
    )


def _read_answer(path: Path) -> Answer | None:
    try:
        return Answer(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def read_request(path: Path) -> Request:
    """A request that `scale`, or a program of a user's, has written.

    Raises:
        ConfigError: it is none.
    """
    try:
        request = Request(**json.loads(path.read_text()))
        if not request.counts or any(type(count) is not int or count < 1 for count in request.counts.values()):
            raise ValueError(f"counts are whole numbers above 0, not {request.counts}")
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path.name} is no request to scale: {error}") from error
    return request
