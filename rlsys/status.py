"""What a run is doing right now: looked at by the driver and written to `RUN/status.json` about once a second."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config import Config
from rlsys.console import Console
from rlsys.driver import Driver
from rlsys.errors import RlsysError
from rlsys.plugins import resolve
from rlsys.records import RunDirectory, write_json

if TYPE_CHECKING:
    from rlsys.fleet import RolloutFleet
    from rlsys.ledger import Ledger
    from rlsys.pool import ActorPool

log = logging.getLogger(__name__)

STATUS = "status.json"
_EVERY_SECONDS = 1.0
_NUM_EVENTS = 50
_NUM_STEPS = 10
"""Steps whose seconds are averaged."""
_WITHIN_OTHERS = ("step", "publish_pause")
"""Seconds that are not a part of a step beside the others."""


@dataclass(slots=True, kw_only=True)
class Live:
    """The parts of a run that exist at the moment, for those who look on or scale it."""

    stage: str = ""
    fleet: RolloutFleet | None = None
    ledger: Ledger | None = None

    def enter(self, stage: str) -> None:
        """A stage begins; what the one before it had is gone."""
        self.stage, self.fleet, self.ledger = stage, None, None

    def pools(self, config: Config) -> dict[str, ActorPool]:
        """The pools of plug-ins by the names that people know, such as `rewards.math` or `tools.python`."""
        pools = {} if self.fleet is None else self.fleet.pools
        return {pool_name(config, place): pool for place, pool in pools.items()}


def pool_name(config: Config, place: str) -> str:
    """`rewards.1` as `rewards.NAME` and `tools.0` as `tools.NAME`."""
    kind, _, index = place.partition(".")
    if kind == "rewards":
        return f"rewards.{config.rewards[int(index)].name}"
    use = config.tools[int(index)].use
    target = resolve(use, place=f"{place}.use")
    name = getattr(target, "name", None) or getattr(target, "__name__", None)
    return f"tools.{name if isinstance(name, str) else use.rpartition(':')[2]}"


@dataclass(slots=True)
class _Speed:
    """Tokens per second of one worker, from one pulse to the next."""

    since: float
    """When the worker was first seen."""
    pulse: Mapping[str, float] = field(default_factory=dict)
    seen: float = 0.0
    per_second: float = 0.0

    def look(self, pulse: Mapping[str, float]) -> float:
        """The speed as of this pulse, which may be the one that was known."""
        if pulse and pulse is not self.pulse:
            now = time.monotonic()
            if self.pulse:
                self.per_second = max(0.0, pulse["tokens"] - self.pulse["tokens"]) / max(now - self.seen, 1e-6)
            self.pulse, self.seen = pulse, now
        return self.per_second


def read_status(folder: Path) -> dict[str, Any] | None:
    """What the driver of a run directory wrote last; None before it wrote anything."""
    try:
        found: dict[str, Any] = json.loads((folder / STATUS).read_text())
        return found
    except FileNotFoundError:
        return None


class Status:
    """Collects the numbers of a run; `export`, where set, gets each collection too."""

    def __init__(
        self, config: Config, directory: RunDirectory, console: Console, live: Live, *, driver: Driver | None = None
    ) -> None:
        self._config, self._directory, self._console, self._live = config, directory, console, live
        self._driver = driver or Driver.this_process()
        self._speeds: dict[str, _Speed] = {}
        self.export: Callable[[Mapping[str, Any]], None] | None = None

    def collect(self, state: str = "running", message: str = "") -> dict[str, Any]:
        """Everything that `status.json` holds, as plain values; what there is not is null or empty."""
        config, live = self._config, self._live
        stage = next((one for one in self._console.activities if one.is_stage), None)
        doing = self._console.activities[-1] if self._console.activities else None
        lines = [line for line in self._directory.recent if line["stage"] == live.stage]
        last = lines[-1] if lines else {}
        found: dict[str, Any] = _finite(
            {
                "run": config.name,
                "folder": str(self._directory.folder.absolute()),
                "state": state,
                "message": message,
                "heartbeat": time.time(),
                "driver": asdict(self._driver),
                "stages": config.stages,
                "finished": [one for one in config.stages if self._directory.finished_model(one) is not None],
                "stage": live.stage,
                "step": stage.done if stage else last.get("step"),
                "steps": stage.total if stage else None,
                "doing": None
                if doing is None or doing is stage
                else {
                    "what": doing.what,
                    "done": doing.done,
                    "total": doing.total,
                    "seconds": time.monotonic() - doing.since,
                },
                **self._fleet(),
                "queue": dict(live.ledger.counts()) if live.ledger else {},
                "staleness": {
                    "mean": last.get("staleness_mean"),
                    "max": last.get("staleness_max"),
                    "limit": config.rl.max_staleness if live.stage == "rl" else None,
                },
                "last": {
                    name: last[name]
                    for name in ("reward", "accuracy", "response_tokens", "tool_rate", "tokens_per_second", "loss")
                    if name in last
                },
                "seconds": step_seconds(lines[-_NUM_STEPS:]),
                "rollout_seconds": rollout_seconds(lines[-_NUM_STEPS:]),
            }
        )
        return found

    def _fleet(self) -> dict[str, Any]:
        fleet = self._live.fleet
        if fleet is None:
            self._speeds.clear()
            return {"version": None, "fleet": None, "workers": [], "pools": [], "events": []}
        roster = fleet.roster
        now = time.monotonic()
        self._speeds = {name: self._speeds.get(name, _Speed(now)) for name in roster.workers}
        workers = [
            {
                "name": worker.name,
                "state": str(worker.state),
                "version": worker.version if worker.version >= 0 else None,
                "in_flight": worker.in_flight,
                "tokens_per_second": self._speeds[worker.name].look(fleet.pulse_of(worker.name)),
                "seconds": now - self._speeds[worker.name].since,
            }
            for worker in roster.workers.values()
        ]
        return {
            "version": roster.version,
            "fleet": {
                "target": roster.target,
                "min": roster.minimum,
                "max": roster.maximum,
                "states": {str(state): count for state, count in roster.counts.items()},
                "waiting": fleet.dispatch.num_waiting,
                "redispatched": fleet.num_redispatched,
                "tokens_per_second": sum(worker["tokens_per_second"] for worker in workers),
            },
            "workers": workers,
            "pools": [
                {"name": name, "actors": len(pool.actors)} for name, pool in self._live.pools(self._config).items()
            ],
            "events": [
                {"time": when, "worker": worker, "what": what}
                for when, worker, what in list(fleet.events)[-_NUM_EVENTS:]
            ],
        }

    @contextlib.asynccontextmanager
    async def shown(self, *, stopped: type[Exception]) -> AsyncIterator[None]:
        """While inside, the file is written about once a second; at the end it says how that came.

        `stopped` is raised where the user stopped the run; any other exception is a failure.
        """
        self._write(self.collect())
        writing = asyncio.create_task(self._keep_writing())
        writing.add_done_callback(_complain)
        state, message = "finished", ""
        try:
            yield
        except (stopped, KeyboardInterrupt, asyncio.CancelledError) as error:
            state, message = "stopped", str(error)
            raise
        except Exception as error:
            state, message = "failed", str(error) if isinstance(error, RlsysError) else repr(error)
            raise
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            self._write(self.collect(state, message))

    async def _keep_writing(self) -> None:
        while True:
            status = self.collect()
            if self.export is not None:
                self.export(status)
            await asyncio.to_thread(self._write, status)
            await asyncio.sleep(_EVERY_SECONDS)

    def _write(self, status: Mapping[str, Any]) -> None:
        try:
            write_json(self._directory.folder / STATUS, status)
        except OSError as error:  # a full disk must not end a run that trains
            log.warning("the status could not be written: %s", error)


def step_seconds(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Where the time of a step went, the mean over these lines of `metrics.jsonl`.

    `step` is all of it; the other parts add up to it, with what is not accounted for as `other`. `rollout` is the wait
    for rollouts that stand for the step, not the time that engines were at work.
    """
    timed = [line for line in lines if "seconds/step" in line]
    if not timed:
        seconds = [line["seconds"] for line in lines if "seconds" in line]
        return {"step": sum(seconds) / len(seconds), "learn": sum(seconds) / len(seconds)} if seconds else {}
    sums: Counter[str] = Counter()
    for line in timed:
        sums.update(_under("seconds/", line))
    means = {name: total / len(timed) for name, total in sums.items()}
    parts = {name: seconds for name, seconds in means.items() if name not in _WITHIN_OTHERS}
    return {"step": means["step"], **parts, "other": max(0.0, means["step"] - sum(parts.values()))}


def rollout_seconds(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Where the time of one rollout went, the mean over these lines: `total`, and of it `tools` and `rewards`."""
    names = {"total": "rollout_seconds", "tools": "tool_seconds", "rewards": "reward_seconds"}
    timed = [line for line in lines if names["total"] in line]
    return {name: sum(float(line.get(key, 0.0)) for line in timed) / len(timed) for name, key in names.items() if timed}


def _under(prefix: str, line: Mapping[str, Any]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(one) for one in value]
    return value


def _complain(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the status of the run is no longer written", exc_info=error)
