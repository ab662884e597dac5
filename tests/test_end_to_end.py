"""The whole command on the real stack: killed in the middle of RL, resumed, measured, loadable; and early mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "rlsys", "train", str(ROOT / "configs" / "quickstart.yaml")]
SMALL = [
    "sft.steps=3",
    "rl.steps=5",
    "rl.checkpoint_every=2",
    "rl.groups_per_step=2",
    "rl.sampling.max_response_tokens=32",
    "eval.max_problems=8",
    "eval.sampling.max_response_tokens=32",
    "data.train.options.size=64",
    "actors.count=1",
    "learners.count=1",
    "stages=[sft,rl]",
]


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")] if path.exists() else []


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


def left_over(run: Path) -> list[psutil.Process]:
    """Processes that still carry this run's mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RLSYS_TEST_RUN") == str(run):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def start(run: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *SMALL, f"run_dir={run}", *arguments],
        env={**os.environ, "RLSYS_TEST_RUN": str(run)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.timeout(600)
def test_a_killed_run_resumes_from_its_checkpoint_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_until(lambda: any(line["stage"] == "rl" and line["step"] >= 3 for line in lines(run)), process, 300)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    trained_before = [line["step"] for line in lines(run) if line["stage"] == "rl"]

    resumed = start(run, "--resume")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert "sft: finished before, not run again" in output
    assert "rl: going on from step 2" in output or "rl: going on from step 4" in output
    steps = [line["step"] for line in lines(run) if line["stage"] == "rl"]
    assert steps == [1, 2, 3, 4, 5]
    assert max(trained_before) >= 3
    assert [line["step"] for line in lines(run) if line["stage"] == "sft"] == [1, 2, 3]
    assert all(line["learner/logprob_gap"] < 1e-5 for line in lines(run) if line["stage"] == "rl")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["isolation_python"] in ("T2", "T1")
    assert {"accuracy_before", "accuracy_after", "tool_rate_before", "tool_rate_after"} <= set(summary)
    assert (run / "curves.png").stat().st_size > 10_000
    check_model_and_rollouts(run)

    again = start(run, "--resume")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 1
    assert "is finished" in output


def check_model_and_rollouts(run: Path) -> None:
    """The model folder loads; the Parquet files hold what was trained on."""
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.config.vocab_size >= len(tokenizer)
    rows = pq.read_table(run / "rollouts" / "rl-step-000005.parquet").to_pylist()
    assert len(rows) == 16
    for row in rows:
        assert len(row["tokens"]) == len(row["loss_mask"]) == len(row["logprobs"]) == len(row["versions"])
        assert tokenizer.decode(row["tokens"]) == row["transcript"]
        assert {version for version, own in zip(row["versions"], row["loss_mask"], strict=True) if own} == {4}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ctrl_c_saves_and_leaves_no_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "rl.steps=500", "rl.checkpoint_every=400")
    wait_until(lambda: any(line["stage"] == "rl" and line["step"] >= 1 for line in lines(run)), process, 300)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "go on with --resume" in output
    saved = [path for path in (run / "rl" / "checkpoints").iterdir() if (path / "manifest.json").exists()]
    assert len(saved) == 1
    deadline = time.monotonic() + 30
    while left_over(run) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left_over(run)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param(["learners.cpus=500"], "no node has 500 CPU for one of the learner rank", marks=pytest.mark.slow),
        pytest.param(["actors.count=400"], "the run asks for", marks=pytest.mark.slow),
        pytest.param(["actors.gpus=1"], "no node has", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_asks_for_more_than_there_is_says_so(tmp_path: Path, overrides: list[str], expected: str) -> None:
    process = start(tmp_path / "run", "cluster.wait_seconds=5", *overrides)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 1
    assert expected in " ".join(output.split())
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rl.stepz=3"], "Did you mean: 'steps'"),
        pytest.param(["rl.steps=many"], "rl.steps", marks=pytest.mark.slow),
        (["data.train.use=rlsys.data:reasoning_jim_problems"], "did you mean `rlsys.data:reasoning_gym_problems`"),
        (["model.scratch=null", "model.path=/nowhere/at/all"], "no tokenizer in '/nowhere/at/all'"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_message(tmp_path: Path, overrides: list[str], expected: str) -> None:
    process = start(tmp_path / "run", *overrides)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert expected in " ".join(output.split())
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) <= 4
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_preference_and_a_reward_model_are_stages_that_leave_what_they_say(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pairs = "{use: 'rlsys.pair_data:arithmetic_pairs', options: {size: 48, seed: 1}}"
    stages = ("preference", "reward_model")
    process = start(
        run,
        "stages=[preference,reward_model]",
        *(f"{stage}.{setting}" for stage in stages for setting in ("steps=6", "optimizer.lr=1e-3", f"pairs={pairs}")),
    )
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    for stage in stages:
        found = [line for line in lines(run) if line["stage"] == stage]
        assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
        assert found[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
        assert found[-1]["accuracy"] > 0.9
    policy, scorer = (json.loads((run / stage / "model" / "config.json").read_text()) for stage in stages)
    assert policy["architectures"] == ["Qwen2ForCausalLM"]
    assert scorer["architectures"] == ["Qwen2ForSequenceClassification"]
    assert (run / "model").resolve() == (run / "preference" / "model").resolve()
