"""Checkpoints that are whole or not there: written aside, hashed, synced to disk, then renamed."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rlsys.errors import CheckpointError, RlsysError

_MANIFEST = "manifest.json"

_LAST_WAIT_SECONDS = 300.0
"""So long a run that ends with an error waits for the checkpoint under way: what failed may never answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A valid checkpoint: its folder (shards under `learner/`) and the driver's state."""

    folder: Path
    step: int
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one stage, in one folder that all learner ranks can reach."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def draft(self, step: int) -> Path:
        """A fresh folder to write shards into; not a checkpoint until `commit`."""
        draft = self._folder / f"step-{step:06d}.partial"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        return draft

    def commit(self, draft: Path, *, step: int, state: dict[str, Any]) -> Checkpoint:
        """Make the draft a checkpoint: hash and sync every file, write the manifest, rename, delete what is too old."""
        (draft / "state.json").write_text(json.dumps(state))
        files = {str(path.relative_to(draft)): _digest(path) for path in _files(draft)}
        for name in files:
            _sync(draft / name)
        (draft / _MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
        _sync(draft / _MANIFEST)
        _sync(draft)
        final = draft.with_suffix("")
        replaced = final.with_suffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(draft, final)
        _sync(self._folder)
        # One save at a time: any other draft is of a run that was killed.
        for left_behind in [*self._folder.glob("step-*.replaced"), *self._folder.glob("step-*.partial")]:
            shutil.rmtree(left_behind, ignore_errors=True)
        # Damaged checkpoints of later steps may lie here; they must not push out what is valid.
        for old in [folder for folder in self._all() if _step(folder) <= step][: -self._keep]:
            shutil.rmtree(old)
        return Checkpoint(folder=final, step=step, state=state)

    def newest(self, *, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose files are all there and unchanged; says which ones it passes over."""
        self._undo_replacements()
        for folder in reversed(self._all()):
            try:
                return self._read(folder)
            except CheckpointError as error:
                tell(f"passing over {folder}: {error}")
        return None

    @property
    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, valid or not."""
        return [_step(folder) for folder in self._all()]

    def _undo_replacements(self) -> None:
        """Give back its name to a checkpoint that was set aside for another of its step, which never came."""
        for replaced in self._folder.glob("step-*.replaced"):
            if not replaced.with_suffix("").exists():
                os.rename(replaced, replaced.with_suffix(""))

    def _all(self) -> list[Path]:
        folders = (path for path in self._folder.glob("step-*") if path.is_dir() and not path.suffix)
        return sorted(folders, key=_step)

    def _read(self, folder: Path) -> Checkpoint:
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            for name, digest in manifest["files"].items():
                if _digest(folder / name) != digest:
                    raise CheckpointError(f"{name} has changed since it was saved")
            state = json.loads((folder / "state.json").read_text())
            return Checkpoint(folder=folder, step=int(manifest["step"]), state=state)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"not whole ({type(error).__name__}: {error})") from error


class Shards(Protocol):
    """A part of a checkpoint: a learner that copies itself at once and is written in its own time."""

    async def save(self, folder: Path) -> None:
        """Copy everything and begin to write it into `folder`; the learner may go on as soon as this returns."""

    async def saved(self) -> None:
        """Return when what `save` began is written; raises what it failed with."""


class CheckpointWriter:
    """Checkpoints that are written while training goes on, at most one at a time; `parts` by their folders' names.

    What a save fails with is raised by the next one, or by the end of the `async with` block that this is meant for;
    where another error ends the block, that one passes and the failed save is told of.
    """

    def __init__(self, store: CheckpointStore, parts: Mapping[str, Shards], *, tell: Callable[[str], None]) -> None:
        self._store, self._parts, self._tell = store, dict(parts), tell
        self._writing: asyncio.Task[None] | None = None

    async def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin a checkpoint of how things are now; waits for the one before it first."""
        await self.finish()
        with _writing(step):
            draft = await asyncio.to_thread(self._store.draft, step)
        await asyncio.gather(*(part.save(draft / name) for name, part in self._parts.items()))
        self._writing = asyncio.create_task(self._write(draft, step, copy.deepcopy(dict(state))))

    async def finish(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: the last save failed, also for a full disk; the checkpoint before it is still the newest.
        """
        if self._writing is None:
            return
        try:
            await asyncio.shield(self._writing)
        finally:
            if self._writing.done():
                self._writing = None

    async def _write(self, draft: Path, step: int, state: dict[str, Any]) -> None:
        await asyncio.gather(*(part.saved() for part in self._parts.values()))
        with _writing(step):
            await asyncio.to_thread(self._store.commit, draft, step=step, state=state)

    async def __aenter__(self) -> CheckpointWriter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return await self.finish()
        try:
            await asyncio.wait_for(self.finish(), _LAST_WAIT_SECONDS)
        except (RlsysError, OSError, TimeoutError) as failure:  # the error that is on its way out says more
            self._tell(f"the last checkpoint was not written: {type(failure).__name__}: {failure}")


@contextmanager
def _writing(step: int) -> Iterator[None]:
    """What the disk refuses becomes an error that a user can read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written ({error}); the one before it is still there: make "
            "room and go on with --resume"
        ) from error


def check_same_model(folder: str, *, saved: Mapping[str, Sequence[int]], mine: Mapping[str, Sequence[int]]) -> None:
    """Compare the names and shapes of a checkpoint's weights with those of the model that is to get them.

    Raises:
        CheckpointError: they differ; names the first of what is missing, too much or of another shape.
    """
    different = [
        *(f"it has no {name}" for name in mine if name not in saved),
        *(f"the model has no {name}" for name in saved if name not in mine),
        *(
            f"{name} is {list(saved[name])} there and {list(mine[name])} in the model"
            for name in mine
            if name in saved and list(saved[name]) != list(mine[name])
        ),
    ]
    if different:
        raise CheckpointError(
            f"{folder} is of another model ({len(different)} differences, the first: {different[0]}); resume with the "
            "model that the run began with, or begin a new run"
        )


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
