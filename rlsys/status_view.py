"""`rlsys status` in a terminal: what a run does right now, drawn from its status file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rlsys.driver import Driver
from rlsys.errors import ConfigError
from rlsys.status import read_status

_LOOK_SECONDS = 0.5
_OLD_SECONDS = 10.0
"""A status that was not written for so long is worth a warning."""
_MAX_WORKERS, _MAX_EVENTS = 16, 5
_STATES = {"healthy": "green", "stale": "yellow", "starting": "cyan", "draining": "magenta"}
_PARTS = {
    "rollout": ("waiting for rollouts", "cyan"),
    "credit": ("advantages", "magenta"),
    "learn": ("learning", "green"),
    "publish": ("weights to workers", "yellow"),
    "record": ("writing files", "blue"),
    "eval": ("evaluating", "bright_blue"),
    "other": ("other", "bright_black"),
}
_BAR_WIDTH = 24


def watch(folder: Path, console: Console) -> None:
    """Show the status until the run ends or the user stops looking."""
    _required(folder)
    with Live(console=console, refresh_per_second=2, transient=False) as live:
        while True:
            status = _required(folder)
            live.update(render(status, alive=is_alive(folder, status), now=time.time()), refresh=True)
            if status["state"] != "running" or not is_alive(folder, status):
                return
            time.sleep(_LOOK_SECONDS)


def show_once(folder: Path, console: Console) -> None:
    """Show the status as it is now."""
    status = _required(folder)
    console.print(render(status, alive=is_alive(folder, status), now=time.time()))


def status_text(folder: Path) -> str:
    """What the driver wrote, and whether it is alive, as JSON."""
    status = _required(folder)
    return json.dumps({**status, "alive": is_alive(folder, status)}, indent=1)


def _required(folder: Path) -> dict[str, Any]:
    status = read_status(folder)
    if status is None:
        raise ConfigError(f"{folder} has no status yet: no driver has worked on it")
    return status


def is_alive(folder: Path, status: Mapping[str, Any]) -> bool:
    """Whether the driver that wrote this status still holds the run."""
    driver = Driver.of(folder)
    return driver is not None and driver.token == status["driver"]["token"] and driver.alive


def render(status: Mapping[str, Any], *, alive: bool, now: float) -> Group:
    """Everything for a person, from the general to the particular; `now` is seconds since the epoch."""
    parts: list[RenderableType] = [_headline(status), _condition(status, alive, now)]
    if status["steps"] or status["doing"]:
        parts.append(_progress(status))
    parts.append(_numbers(status))
    for title, drawn in (
        ("workers", _workers(status)),
        ("where the time goes", _seconds(status)),
        ("last events", _events(status, now)),
    ):
        if drawn is not None:
            parts += [Rule(title, align="left", style="dim"), drawn]
    return Group(*parts)


def _headline(status: Mapping[str, Any]) -> Text:
    text = Text(status["run"], style="bold")
    for stage in status["stages"]:
        finished, current = stage in status["finished"], stage == status["stage"]
        style = "green" if finished else "bold" if current else "dim"
        text.append("  ", style="not bold").append(
            f"✓ {stage}" if finished else f"▸ {stage}" if current else stage, style=style
        )
    return text


def _condition(status: Mapping[str, Any], alive: bool, now: float) -> Text:
    driver = status["driver"]
    age, who = now - status["heartbeat"], f"process {driver['pid']} on {driver['host']}"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["heartbeat"]))
    if status["state"] == "finished":
        return Text(f"finished {when}", style="green")
    if status["state"] == "stopped":
        return Text(f"stopped {when}{_because(status)}; go on with rlsys train CONFIG --resume", style="yellow")
    if status["state"] == "failed":
        return Text(
            f"ended with an error {when}{_because(status)}; go on with rlsys train CONFIG --resume", style="red"
        )
    if not alive:
        return Text(
            f"the driver ({who}) is dead; last heard of {_duration(age)} ago; go on with rlsys train CONFIG --resume",
            style="bold red",
        )
    if age > _OLD_SECONDS:
        return Text(f"the driver ({who}) lives but has not been heard of for {_duration(age)}", style="bold yellow")
    return Text(f"running for {_duration(now - driver['started'])}, {who}", style="dim")


def _because(status: Mapping[str, Any]) -> str:
    return f": {status['message']}" if status["message"] else ""


def _progress(status: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(no_wrap=False)
    if status["steps"]:
        done, total = status["step"] or 0, status["steps"]
        left = status["seconds"].get("step", 0.0) * (total - done)
        note = f"{done} of {total} steps" + (
            f", {_duration(left)} left" if left and status["state"] == "running" else ""
        )
        table.add_row(status["stage"], ProgressBar(total=total, completed=done, width=_BAR_WIDTH), note)
    doing = status["doing"]
    if doing and status["state"] == "running":
        seconds = _duration(doing["seconds"])
        if doing["total"]:
            bar: RenderableType = ProgressBar(total=doing["total"], completed=doing["done"], width=_BAR_WIDTH)
            table.add_row("now", bar, f"{doing['what']}: {doing['done']} of {doing['total']}, {seconds}")
        else:
            table.add_row("now", "", f"{doing['what']}, {seconds}")
    return table


def _numbers(status: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for row in _named(status):
        table.add_row(*row)
    return table


def _named(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is said in a line each, where there is something to say."""
    last, queue, fleet, staleness = status["last"], status["queue"], status["fleet"], status["staleness"]
    results = [f"{name} {_number(last[name])}" for name in ("reward", "accuracy", "loss") if name in last]
    if "response_tokens" in last:
        results.append(f"{_number(last['response_tokens'])} tokens a response")
    if results:
        yield "last step", ", ".join(results)
    if fleet:
        trained = last.get("tokens_per_second")
        yield "tokens/s", f"{fleet['tokens_per_second']:.0f} written" + (f", {trained:.0f} trained" if trained else "")
    if staleness["mean"] is not None:
        limit = f", limit {staleness['limit']}" if staleness["limit"] is not None else ""
        yield "staleness", f"{staleness['mean']:.2f} mean, {staleness['max']:.0f} most{limit}"
    if queue:
        yield "groups", f"{queue['in_flight']} under way, {queue['done']} done and untrained"
        lost = [f", {queue[name]} {name}" for name in ("discarded", "refused") if queue.get(name)]
        yield "problems", f"{queue['trained']} trained, {queue['dropped']} dropped" + "".join(lost)
    if fleet and (fleet["waiting"] or fleet["redispatched"]):
        yield "queue", f"{fleet['waiting']} rollouts wait, {fleet['redispatched']} groups moved to another worker"
    if status["pools"]:
        yield "pools", ", ".join(f"{pool['name']} {pool['actors']}" for pool in status["pools"])


def _workers(status: Mapping[str, Any]) -> RenderableType | None:
    fleet, workers = status["fleet"], status["workers"]
    if fleet is None or status["state"] != "running":
        return None
    bounds = f"{fleet['min']} to {fleet['max'] if fleet['max'] is not None else 'any number'}"
    states = ", ".join(f"{count} {state}" for state, count in fleet["states"].items()) or "none"
    head = Text(f"{states}; {fleet['target']} wanted ({bounds}); weights {status['version']}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("worker", no_wrap=True, overflow="ellipsis")
    table.add_column("state", no_wrap=True)
    for name in ("weights", "rollouts", "tokens/s", "here for"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in workers[:_MAX_WORKERS]:
        version = worker["version"]
        table.add_row(
            worker["name"],
            Text(worker["state"], style=_STATES.get(worker["state"], "")),
            "-" if version is None else str(version),
            str(worker["in_flight"]),
            f"{worker['tokens_per_second']:.0f}",
            _duration(worker["seconds"]),
        )
    more = [Text(f"and {len(workers) - _MAX_WORKERS} more", style="dim")] if len(workers) > _MAX_WORKERS else []
    return Group(head, *([table] if workers else []), *more)


def _seconds(status: Mapping[str, Any]) -> RenderableType | None:
    seconds, rollout = status["seconds"], status["rollout_seconds"]
    if not seconds.get("step"):
        return None
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    known = [name for name in _PARTS if name in seconds]
    unknown = [name for name in seconds if name not in _PARTS and name not in ("step", "publish_pause")]
    for name in known + unknown:
        label, style = _PARTS.get(name, (name, "white"))
        share = seconds[name] / seconds["step"]
        if share >= 0.005:
            bar = ProgressBar(
                total=1.0, completed=min(1.0, share), width=_BAR_WIDTH, complete_style=style, finished_style=style
            )
            table.add_row(label, bar, f"{100 * share:.0f} %", f"{seconds[name]:.2f} s")
    lines: list[RenderableType] = [Text(f"a step takes {seconds['step']:.2f} s"), table]
    if rollout.get("total"):
        tools, rewards = (100 * rollout[name] / rollout["total"] for name in ("tools", "rewards"))
        lines.append(
            Text(f"a rollout takes {rollout['total']:.2f} s: {tools:.0f} % in tools, {rewards:.0f} % in rewards")
        )
    return Group(*lines)


def _events(status: Mapping[str, Any], now: float) -> RenderableType | None:
    events: Sequence[Mapping[str, Any]] = status["events"][-_MAX_EVENTS:]
    if not events:
        return None
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, justify="right", style="dim")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for event in events:
        table.add_row(f"{_duration(now - event['time'])} ago", event["worker"], Text(_brief(event["what"])))
    return table


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Two units at most: 7 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    left = max(0, round(seconds))
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= size:
            rest = left % size // small
            return f"{left // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"
