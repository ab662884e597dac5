"""A real run that goes from one rollout worker to three and back, and loses one of the three to SIGKILL.

    python -m benchmarks.elastic          # about fifteen minutes; writes results/elastic.json and docs/elastic.png

The quickstart with `rl.max_staleness=1`, twice: undisturbed with one worker, then from the same settings and seeds with
`rlsys scale --rollouts 3` after a quarter of its steps, a SIGKILL of one worker's process while all three have rollouts
in flight, after half, and `rlsys scale --rollouts 1` after three quarters. Its status is recorded every half second.

Checked: both runs finish, every step is trained once, no problem is trained twice, three workers served before the
SIGKILL and after it, and the newcomers wrote rollouts that were trained. On two cores three engines are no faster than
one: this shows that nothing breaks, not what it gains.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pyarrow import parquet

from benchmarks import common
from benchmarks.common import must, say
from rlsys.records import RunDirectory

PICTURE = Path(__file__).parent.parent / "docs" / "elastic.png"
_PAUSE = 0.5
_GROUPS = 8
_COMMAND = (sys.executable, "-m", "rlsys")


class Recording:
    """A run, what its status said, and what was done to it."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self.folder = folder
        self.samples: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._began = time.time()
        self._log = (folder.parent / f"{folder.name}.log").open("w")
        command = [*_COMMAND, "train", "configs/quickstart.yaml", f"run_dir={folder}", f"name={folder.name}", *options]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self._status: dict[str, Any] = {}
        self._looking = asyncio.create_task(self._look())

    async def until(self, there: Callable[[dict[str, Any]], bool], what: str, *, seconds: float = 600.0) -> None:
        """Return once the status says so."""
        deadline = time.monotonic() + seconds
        while not (self._status and there(self._status)):
            must(self._process.poll() is None, f"the run ended before {what}; see {self._log.name}")
            must(time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s")
            await asyncio.sleep(_PAUSE / 5)

    async def ended(self, *, seconds: float = 1200.0) -> None:
        """Return when the run has ended, which it must without an error."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            must(time.monotonic() < deadline, f"the run did not end within {seconds:.0f} s")
            await asyncio.sleep(_PAUSE)
        must(self._process.returncode == 0, f"the run failed; see {self._log.name}")

    def did(self, what: str) -> None:
        """Note down what happens now."""
        self.events.append({"seconds": time.time() - self._began, "step": self._step(), "what": what})
        say(f"  {self.events[-1]['seconds']:6.1f} s  step {self._step()}: {what}")

    async def scale(self, rollouts: int) -> None:
        """`rlsys scale`, in the background of this process."""
        self.did(f"rlsys scale --rollouts {rollouts}")
        command = [*_COMMAND, "scale", str(self.folder), "--rollouts", str(rollouts), "--timeout", "300"]
        scaling = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await scaling.communicate()
        must(scaling.returncode == 0, f"scaling failed: {said.decode()}")
        self.did(" ".join(said.decode().split()))

    def kill_one(self) -> None:
        """SIGKILL to the process of the worker that was there last."""
        found = [one for one in psutil.process_iter(["cmdline", "create_time"]) if _is_worker(one.info["cmdline"])]
        must(len(found) == 3, f"{len(found)} processes of rollout workers were found, not 3")
        victim = max(found, key=lambda one: one.info["create_time"])
        os.kill(victim.pid, signal.SIGKILL)
        self.did("SIGKILL to a worker")

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._looking.cancel()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._log.close()

    async def _look(self) -> None:
        """Read the status again and again."""
        while True:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                self._status = json.loads((self.folder / "status.json").read_text())
            if self._status and self._status["stage"] == "rl" and self._status["workers"]:
                states = Counter(worker["state"] for worker in self._status["workers"])
                sample = {"seconds": time.time() - self._began, "step": self._status["step"] or 0, "states": states}
                self.samples.append(sample)
            await asyncio.sleep(_PAUSE)

    def _step(self) -> int:
        return int(self.samples[-1]["step"]) if self.samples else 0

    def result(self, steps: int) -> dict[str, Any]:
        """What it learned and what was seen of it, after a check that every step and problem was trained once."""
        directory = RunDirectory(self.folder, trackers=())
        lines = directory.metrics("rl")
        must([line["step"] for line in lines] == list(range(1, steps + 1)), "a step is missing, or was taken twice")
        problems: list[str] = []
        for path in sorted((self.folder / "rollouts").glob("rl-step-*.parquet")):
            problems += sorted(set(parquet.read_table(path, columns=["problem_id"])["problem_id"].to_pylist()))
        must(len(problems) == len(set(problems)) == steps * _GROUPS, "a problem was trained twice, or one is missing")
        return {
            "accuracy": directory.metrics("eval/eval")[-1]["accuracy"],
            "train_accuracy": [line["accuracy"] for line in lines],
            "step_seconds": [line["seconds/step"] for line in lines],
            "staleness_max": max(line["staleness_max"] for line in lines),
            "samples": self.samples,
            "events": self.events,
        }


def _is_worker(command: Iterable[str] | None) -> bool:
    return any(part.startswith("ray::RolloutActor") for part in command or ())


def _served_by(status: dict[str, Any]) -> int:
    """How many workers serve."""
    return sum(worker["state"] == "healthy" for worker in status["workers"])


async def undisturbed(folder: Path, steps: int) -> dict[str, Any]:
    """The run with one worker."""
    run = Recording(folder / "undisturbed", _options(steps))
    try:
        await run.ended()
        return run.result(steps)
    finally:
        run.stop()


async def disturbed(folder: Path, steps: int) -> dict[str, Any]:
    """The run that grows, loses a worker, and shrinks."""
    run = Recording(folder / "disturbed", _options(steps))

    def reached(step: int) -> Callable[[dict[str, Any]], bool]:
        return lambda status: status["stage"] == "rl" and (status["step"] or 0) >= step

    def busy(status: dict[str, Any]) -> bool:
        return _served_by(status) == 3 and min(worker["in_flight"] for worker in status["workers"]) > 0

    try:
        await run.until(reached(steps // 4), f"step {steps // 4}")
        await run.scale(3)
        await run.until(reached(steps // 2), f"step {steps // 2}")
        await run.until(busy, "rollouts in flight in all three workers")
        run.kill_one()
        await run.until(lambda status: _served_by(status) == 2, "the death was noticed")
        run.did("its death is noticed, its groups begin again elsewhere")
        await run.until(busy, "a third worker again")
        run.did("another worker serves in its place")
        await run.until(reached(3 * steps // 4), f"step {3 * steps // 4}")
        await run.scale(1)
        await run.ended()
        return run.result(steps)
    finally:
        run.stop()


def _options(steps: int) -> list[str]:
    return [f"rl.steps={steps}", "rl.max_staleness=1", "actors.count=1", "learners.count=1", "actors.watch_seconds=1"]


def draw(calm: dict[str, Any], moved: dict[str, Any]) -> None:
    """Accuracy of both runs, and the workers of the disturbed one, over its steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(10, 6.5), height_ratios=(3, 2), constrained_layout=True, sharex=True
    )
    for run, label, colour in ((calm, "undisturbed, one worker", "tab:gray"), (moved, "disturbed", "tab:blue")):
        values = np.array(run["train_accuracy"])
        steps = np.arange(1, len(values) + 1)
        above.plot(steps, values, alpha=0.25, color=colour)
        smooth = [values[max(0, step - 4) : step + 1].mean() for step in range(len(values))]
        above.plot(steps, smooth, color=colour, label=f"{label}: {run['accuracy']:.3f} on held-out problems at the end")
    above.set(ylabel="accuracy in training (mean of 5 steps)", ylim=(0, 1.02))
    above.legend(loc="lower right")
    above.grid(alpha=0.3)
    ends = np.cumsum(moved["step_seconds"])
    first = next(sample["seconds"] for sample in moved["samples"] if sample["step"] >= 1) - ends[0]

    def at_step(seconds: float) -> float:
        return float(np.interp(seconds - first, [0, *ends], np.arange(len(ends) + 1)))

    places = [at_step(sample["seconds"]) for sample in moved["samples"]]
    kinds = {"healthy": "tab:green", "stale": "tab:olive", "starting": "tab:orange", "draining": "tab:purple"}
    counts = [[sample["states"].get(kind, 0) for sample in moved["samples"]] for kind in kinds]
    below.stackplot(places, counts, labels=list(kinds), colors=list(kinds.values()), step="post", alpha=0.7)
    for event in moved["events"]:
        if event["what"].startswith(("rlsys", "SIGKILL")):
            for axis in (above, below):
                axis.axvline(at_step(event["seconds"]), color="black", linestyle=":", linewidth=1)
            below.text(at_step(event["seconds"]) + 0.2, 3.35, event["what"], fontsize=8)
    below.set(xlabel="policy step", ylabel="rollout workers", ylim=(0, 3.8), yticks=range(4))
    below.legend(loc="center right", fontsize=8)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


async def main() -> None:
    """Both runs, one after the other."""
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=None, help="where the runs go; else they are thrown away")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="elastic_") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        say("undisturbed")
        calm = await undisturbed(folder, options.steps)
        say(f"  accuracy {calm['accuracy']:.3f}")
        say("disturbed")
        moved = await disturbed(folder, options.steps)
        say(f"  accuracy {moved['accuracy']:.3f}, undisturbed {calm['accuracy']:.3f}")
    draw(calm, moved)
    common.write("elastic", options, {"undisturbed": calm, "disturbed": moved})


if __name__ == "__main__":
    asyncio.run(main())
