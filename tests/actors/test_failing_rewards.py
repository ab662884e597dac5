"""The whole command with a reward in a pool that kills its process, hangs and raises: nothing is lost or made up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from reward_plugins import Moody

ROOT = Path(__file__).parents[2]
GROUP_SIZE = 8
SMALL = [
    "stages=[rl]",
    "rl.steps=5",
    "rl.groups_per_step=2",
    f"rl.group_size={GROUP_SIZE}",
    "rl.sampling.max_response_tokens=24",
    "eval.max_problems=8",
    "eval.sampling.max_response_tokens=24",
    "data.train.options.size=64",
    "actors.count=1",
    "learners.count=1",
    "max_failed_rewards=1.0",
]
POOL = "{count: 2, cpus: 0.1, max_sessions: 1, call_seconds: 2, watch_seconds: 0.5, wait_seconds: 120}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_reaches_its_end_with_a_reward_that_kills_and_hangs_its_actors_and_every_count_is_right(
    tmp_path: Path,
) -> None:
    import pyarrow.parquet as pq

    run, moods = tmp_path / "run", tmp_path / "moods"
    moods.mkdir()
    settings = f"options: {{folder: {moods}}}, timeout_seconds: 2, actors: {POOL}"
    moody = f'{{name: moody, use: "reward_plugins:Moody", {settings}}}'
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlsys", "train", str(ROOT / "configs" / "quickstart.yaml"), *SMALL),
            f"run_dir={run}",
            f"rewards=[{moody}]",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert json.loads((run / "summary.json").read_text())["steps"] == 5

    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "rl"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    did = Counter(file.name.partition("-")[0] for file in moods.iterdir())
    assert min(did["die"], did["hang"], did["raise"], did["score"]) > 0, did

    def total(name: str) -> float:
        return sum(line.get(name, 0.0) for line in lines)

    # One grading in an actor at a time, so nobody is taken along: what was late is what hung, and no more.
    assert total("dropped/reward_timeout") == did["hang"] + did["burn"]
    assert total("dropped/reward_error") == did["raise"]
    for line in steps:
        rows = pq.read_table(run / "rollouts" / f"rl-step-{line['step']:06d}.parquet").to_pylist()
        missing = sum(value for name, value in line.items() if name.startswith("dropped/"))
        groups = 2 + sum(value for name, value in line.items() if name.startswith("dropped_groups/"))
        assert len(rows) + missing == GROUP_SIZE * groups
        for row in rows:
            kind, key = Moody.mood(np.array(row["tokens"], np.int32), np.array(row["logprobs"], np.float32))
            assert kind in ("score", "die")
            assert json.loads(row["reward_terms"])["moody"] == row["reward"] == 1.0 + key % 7
