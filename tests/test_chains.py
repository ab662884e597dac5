"""Whole chains as real processes: killed in every stage and between them, resumed, and nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlsys.samples import read_about, read_samples

ROOT = Path(__file__).parents[1]
MARK = "RLSYS_TEST_CHAIN"

CHAIN = [
    "data.train.options.size=400",
    "data.held_out.options.size=16",
    "sft.steps=6",
    "sft.checkpoint_every=2",
    "samples.long={max_problems: 48, samples_per_problem: 2, problems_per_part: 4, filters: []}",
    "samples.long.sampling={temperature: 1.0, max_response_tokens: 64}",
    "samples.long.max_problems_in_flight=4",
    "samples.short.max_problems=24",
    # Six steps teach no sums: long is what does not come to an end.
    "preference.pairs.options={min_ratio: 1.0, require_correct: false, require_completed: false}",
    "preference.held_out_share=0",
    "preference.pairs_per_step=2",
    "preference.checkpoint_every=2",
    "rl.steps=5",
    "rl.checkpoint_every=2",
    "rl.groups_per_step=2",
    "rl.group_size=4",
    "rl.sampling.max_response_tokens=32",
    "eval.sampling.max_response_tokens=32",
]
TPO = [
    "data.train.options.size=200",
    "data.held_out.options.size=8",
    "sft.steps=80",
    "sft.checkpoint_every=40",
    "rewards=[{name: digits, use: 'stack_plugins:share_of_digits'}]",
    "tpo.iterations=2",
    "tpo.problems_per_iteration=24",
    "tpo.samples_per_problem=4",
    "tpo.problems_per_part=4",
    "tpo.max_problems_in_flight=4",
    "tpo.validation_problems=8",
    "tpo.preference={epochs: 2, pairs_per_step: 4, checkpoint_every: 1}",
]


class Attempts:
    """One run directory, and the processes that work on it one after the other."""

    def __init__(self, config: str, settings: list[str], folder: Path) -> None:
        self.run = folder / "run"
        self._command = [sys.executable, "-m", "rlsys", "train", str(ROOT / "configs" / f"{config}.yaml")]
        self._command += [*settings, f"run_dir={self.run}"]
        self._finished: dict[str, str] = {}
        self._parts: dict[Path, bytes] = {}
        self.num_started = 0

    def start(self) -> subprocess.Popen[str]:
        """A driver that begins, or goes on where there is something already."""
        self.num_started += 1
        return subprocess.Popen(
            [*self._command, *["--resume"] * (self.num_started > 1)],
            env={**os.environ, MARK: str(self.run)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def kill_when(self, what: str, condition: Callable[[], bool]) -> None:
        """Work until this is so, then end the driver without a word, and wait until nothing of it is left."""
        process = self.start()
        deadline = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, f"before {what}: {process.communicate()[0]}"
            assert time.monotonic() < deadline, f"{what} does not come"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        while (left := self._left_over()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, f"killed {what}, and these live on: {left}"
        self.check_what_was_finished()

    def _left_over(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.run):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def to_the_end(self) -> str:
        """Go on until the run is finished; what the last driver said."""
        process = self.start()
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        self.check_what_was_finished()
        return str(output)

    def check_what_was_finished(self) -> None:
        """What an attempt found finished is as it was: stages, their models, parts of answers."""
        for stage, before in self._finished.items():
            assert self._state_of(stage) == before, f"{stage} was finished, and was done again"
        for path, content in self._parts.items():
            assert path.read_bytes() == content, f"{path} was written again"
        self._finished = {stage: self._state_of(stage) for stage in self.finished}
        self._parts = {path: path.read_bytes() for path in self.run.glob("*/parts/*.parquet")}

    def _state_of(self, stage: str) -> str:
        models = [*(self.run / stage).glob("model/*.safetensors"), *(self.run / stage).glob("samples.parquet")]
        return (self.run / stage / "done.json").read_text() + str([path.stat().st_mtime_ns for path in models])

    @property
    def finished(self) -> set[str]:
        return {path.parent.name for path in self.run.glob("*/done.json")}

    def lines(self, stage: str) -> list[Mapping[str, Any]]:
        path = self.run / "metrics.jsonl"
        texts = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(text) for text in texts if text.endswith("}")]
        return [line for line in found if line["stage"] == stage]

    def steps(self, stage: str) -> list[int]:
        return [line["step"] for line in self.lines(stage)]

    def num_parts(self, stage: str) -> int:
        return len([*(self.run / stage / "parts").glob("*.parquet")])

    def answered(self, stage: str) -> Counter[int]:
        """How often each problem stands in the parts of a stage."""
        parts = (self.run / stage / "parts").glob("*.parquet")
        return Counter(place for part in parts for place, _, _ in read_about(part)["problems"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_chain_that_is_killed_in_every_stage_and_between_them_ends_with_everything_done_once(tmp_path: Path) -> None:
    chain = Attempts("chain", CHAIN, tmp_path)
    chain.kill_when("in sft", lambda: len(chain.steps("sft")) >= 3)
    assert chain.finished == set()
    chain.kill_when("between sft and long", lambda: "sft" in chain.finished)
    chain.kill_when("in long", lambda: chain.num_parts("long") >= 2)
    assert chain.finished == {"sft"}
    chain.kill_when("between short and preference", lambda: "short" in chain.finished)
    chain.kill_when("in preference", lambda: len(chain.steps("preference")) >= 3)
    assert chain.finished == {"sft", "long", "short"}
    chain.kill_when("in rl", lambda: len(chain.steps("rl")) >= 3)
    assert chain.finished == {"sft", "long", "short", "preference"}
    chain.kill_when("between rl and eval", lambda: "rl" in chain.finished)
    said = chain.to_the_end()

    stages = ["sft", "long", "short", "preference", "rl", "eval"]
    assert chain.finished == set(stages)
    assert [f"{stage}: finished before, not run again" in said for stage in stages] == [True] * 5 + [False]
    num_pairs = json.loads((chain.run / "preference" / "report.json").read_text())["pairs"]
    assert chain.steps("sft") == [1, 2, 3, 4, 5, 6]
    assert chain.steps("preference") == list(range(1, -(-num_pairs // 2) + 1))
    assert chain.steps("rl") == [1, 2, 3, 4, 5]
    assert [chain.steps(stage) for stage in ("long", "short", "rl/eval", "eval/eval")] == [[0], [0], [0, 5], [0]]
    assert chain.answered("long") == Counter(range(48))
    assert len(read_samples(chain.run / "long" / "samples.parquet")) == 96
    assert (chain.run / "model").resolve() == (chain.run / "rl" / "model").resolve()
    summary = json.loads((chain.run / "summary.json").read_text())
    assert (summary["sft_steps"], summary["steps"], summary["long_samples"]) == (6, 5, 96)
    assert {"long_correct", "preference_accuracy", "accuracy_before", "accuracy_after", "accuracy"} <= set(summary)

    again = chain.start()
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 1
    assert "is finished" in output


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_iterations_of_tpo_that_are_killed_anywhere_end_with_everything_done_once(tmp_path: Path) -> None:
    tpo = Attempts("tpo_small", TPO, tmp_path)
    tpo.kill_when("in the answers of the first iteration", lambda: tpo.num_parts("tpo_1") >= 2)
    assert tpo.finished == {"sft"}
    assert tpo.steps("tpo") == [0]
    tpo.kill_when("in the learning of the first iteration", lambda: len(tpo.steps("tpo_1")) >= 3)
    tpo.kill_when("between the iterations", lambda: "tpo_1" in tpo.finished)
    tpo.kill_when("in the learning of the second iteration", lambda: len(tpo.steps("tpo_2")) >= 2)
    assert tpo.finished == {"sft", "tpo_1"}
    tpo.to_the_end()

    assert tpo.finished == {"sft", "tpo_1", "tpo_2", "tpo"}
    assert tpo.steps("tpo") == [0, 1, 2]
    assert tpo.steps("tpo/eval") == [0, 1, 2]
    for line in tpo.lines("tpo")[1:]:
        name = f"tpo_{line['step']}"
        steps = tpo.steps(name)
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == -(-2 * int(line["pairs"]) // 4)
        looked = tpo.steps(f"{name}/validation")
        assert looked == sorted(set(looked))
        assert tpo.answered(name) == Counter(range(24))
    asked = [{sample.problem.id for sample in read_samples(tpo.run / f"tpo_{n}" / "parts")} for n in (1, 2)]
    assert not asked[0] & asked[1], "no problem is in two iterations"
