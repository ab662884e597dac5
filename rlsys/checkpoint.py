"""Checkpoints that are whole or not there: written aside, hashed, synced to disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.errors import CheckpointError

_MANIFEST = "manifest.json"


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
            os.rename(final, replaced)
        os.rename(draft, final)
        shutil.rmtree(replaced, ignore_errors=True)
        _sync(self._folder)
        # Damaged checkpoints of later steps may lie here; they must not push out what is valid.
        for old in [folder for folder in self._all() if _step(folder) <= step][: -self._keep]:
            shutil.rmtree(old)
        return Checkpoint(folder=final, step=step, state=state)

    def newest(self, *, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose files are all there and unchanged; says which ones it passes over."""
        for folder in reversed(self._all()):
            try:
                return self._read(folder)
            except CheckpointError as error:
                tell(f"passing over {folder}: {error}")
        return None

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
