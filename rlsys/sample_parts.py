"""What a sampling stage has answered, on disk: parts, each whole or not there, and what they were made with."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlsys.config import Config
from rlsys.errors import DataError
from rlsys.samplers import Answers
from rlsys.samples import Sample, read_about, read_samples, write_samples
from rlsys.types import Problem

_PLAN = "plan.json"


class SampleParts:
    """The parts of one stage in a folder.

    A part holds the answers to any `size` problems, in the order in which they were answered, so that none waits for a
    slow one. `done` are the places of the problems that are in parts.
    """

    def __init__(self, folder: Path, problems: Sequence[Problem], *, size: int) -> None:
        self._folder, self._problems, self._size = folder, problems, size
        self._waiting: list[tuple[int, Answers]] = []
        self._saved_at = time.monotonic()
        self._writes: list[asyncio.Task[None]] = []
        self._next = self._num_answered = 0
        self.done: set[int] = set()
        self.dropped: Counter[str] = Counter()
        """Answers that could not be had, by kind."""
        self.messages: dict[str, str] = {}
        """The first message of each kind."""
        self.seconds = 0.0
        """Spent on sampling, by all attempts."""

    @classmethod
    def open(
        cls, folder: Path, problems: Sequence[Problem], plan: Mapping[str, Any], *, size: int, place: str
    ) -> SampleParts:
        """The parts of this folder, which may be new.

        Raises:
            DataError: what is there was made with another plan, or of other problems, or is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _check_plan(folder / _PLAN, plan, place)
        parts = cls(folder, problems, size=size)
        for path in sorted(folder.glob("*.parquet")):
            parts._take_in(path, place)
        return parts

    def _take_in(self, path: Path, place: str) -> None:
        try:
            about = read_about(path)
        except DataError as error:
            raise DataError(f"{error}; delete it, and its problems are answered again") from error
        for position, digest, _ in about["problems"]:
            if position < len(self._problems) and digest != _digest(self._problems[position]):
                raise DataError(
                    f"{path}: the problem at place {position} is another one now ({self._problems[position].id!r}); "
                    f"give {place} the problems that it began with, or begin anew with --fresh"
                )
            self.done.add(position)
        self._num_answered = len(self.done)
        self.dropped.update(about["dropped"])
        self.messages = {**about["messages"], **self.messages}
        self.seconds += about["seconds"]
        self._next = max(self._next, int(path.stem.rpartition("-")[2]) + 1)

    @property
    def told(self) -> str:
        """How far it is, in words."""
        return f"{self._num_answered} of {len(self._problems)} problems"

    async def add(self, position: int, answers: Answers) -> None:
        """Take in the answers to a problem, and save a part where enough have come together."""
        self._waiting.append((position, answers))
        self._num_answered += 1
        if len(self._waiting) >= self._size:
            await self.save()

    async def save(self) -> None:
        """Write what is not written yet, and wait for all parts that are being written."""
        if self._waiting:
            part, self._waiting = self._waiting, []
            path = self._folder / f"part-{self._next:06d}.parquet"
            self._next += 1
            self._writes.append(asyncio.create_task(self._write(path, part)))
        # A worker that is cancelled meanwhile leaves no part half written.
        await asyncio.shield(asyncio.gather(*self._writes))
        self._writes = [write for write in self._writes if not write.done()]

    async def _write(self, path: Path, part: Sequence[tuple[int, Answers]]) -> None:
        dropped: Counter[str] = Counter()
        for _, answers in part:
            self.note(answers.dropped, dropped)
        now = time.monotonic()
        seconds, self._saved_at = now - self._saved_at, now
        self.seconds += seconds
        about = {
            "problems": [(at, _digest(self._problems[at]), len(answers.samples)) for at, answers in part],
            "dropped": dropped,
            "messages": {kind: self.messages[kind] for kind in dropped},
            "seconds": seconds,
        }
        samples = [sample for _, answers in part for sample in answers.samples]
        try:
            await asyncio.to_thread(write_samples, path, samples, about=about)
        except OSError as error:
            raise DataError(
                f"cannot write {path}: {error}; make room, then go on with --resume: all parts before are kept"
            ) from error
        self.done.update(at for at, _ in part)

    def begin(self) -> None:
        """From now on, time counts as sampling."""
        self._saved_at = time.monotonic()

    def note(self, reasons: Mapping[str, int], also: Counter[str] | None = None) -> None:
        """Count answers that could not be had by the word before the colon, and keep each word's first message."""
        for reason, count in reasons.items():
            kind, _, message = reason.partition(": ")
            self.messages.setdefault(kind, message)
            for counts in (self.dropped, *([] if also is None else [also])):
                counts[kind] += count

    def samples(self) -> list[Sample]:
        """All samples of the problems, in the order of these."""
        found: list[tuple[int, Sample]] = []
        for path in sorted(self._folder.glob("*.parquet")):
            places = [at for at, _, count in read_about(path)["problems"] for _ in range(count)]
            found += zip(places, read_samples(path), strict=True)
        found.sort(key=lambda pair: pair[0])
        return [sample for at, sample in found if at < len(self._problems)]


def plan_of(config: Config, stage: str, model: Path) -> dict[str, Any]:
    """All that decides what a stage's answers are, besides the problems: flat, by dotted key."""
    settings = config.samples[stage]
    engine = {name: getattr(config.actors, name) for name in ("max_model_tokens", "dtype", "engine_options")}
    whole = {
        "model": _within(model, Path(config.run_dir)),
        "seed": config.seed,
        "chat": asdict(config.chat),
        "tools": [asdict(tool) for tool in config.tools],
        "rewards": [asdict(reward) for reward in config.rewards],
        "actors": engine,
        f"samples.{stage}": {
            "sampler": asdict(settings.sampler),
            "sampling": asdict(settings.sampling),
            "samples_per_problem": settings.samples_per_problem,
        },
    }
    flat: dict[str, Any] = json.loads(json.dumps(_flat(whole), default=str))
    return flat


def _within(model: Path, folder: Path) -> str:
    """A model of this run by its place in the folder of the run, which may be named in several ways."""
    inside = model.resolve().is_relative_to(folder.resolve())
    return str(model.resolve().relative_to(folder.resolve())) if inside else str(model)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        parts = value.items()
    elif isinstance(value, list | tuple) and value:
        parts = {str(index): item for index, item in enumerate(value)}.items()
    else:
        return {prefix: value}
    return {
        key: leaf
        for name, part in parts
        for key, leaf in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _check_plan(path: Path, plan: Mapping[str, Any], place: str) -> None:
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plan, indent=1) + "\n")
        os.replace(partial, path)
        return
    before = json.loads(path.read_text())
    changed = sorted(key for key in {*before, *plan} if before.get(key, _ABSENT) != plan.get(key, _ABSENT))
    if changed:
        told = "; ".join(f"{key} was {before.get(key)!r}, is {plan.get(key)!r}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise DataError(
            f"{place}: the answers in {path.parent} were made with other settings ({told}{more}); put them back, or "
            "begin anew with --fresh"
        )


_ABSENT = object()


def _digest(problem: Problem) -> str:
    text = json.dumps([problem.id, [dict(message) for message in problem.prompt], problem.answer], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
