"""The run directory: what is written, what is kept when a run goes on or begins anew."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlsys.config import Config, DataConfig, ModelConfig, PlugIn, RewardConfig
from rlsys.config_file import load_config
from rlsys.errors import CheckpointError, ConfigError
from rlsys.records import RunDirectory
from rlsys.types import Problem, Rollout, RolloutGroup

SOURCE = PlugIn(use="rlsys.data:jsonl_problems")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_in(tmp_path / "run")


def config_in(folder: Path, trackers: tuple[str, ...] = ()) -> Config:
    return Config(
        name="demo",
        run_dir=str(folder),
        model=ModelConfig(path="some/model"),
        data=DataConfig(train=SOURCE, held_out=SOURCE),
        rewards=[RewardConfig(use="rlsys.rewards.math:MathReward")],
        trackers=list(trackers),
    )


@pytest.fixture
def run(config: Config) -> RunDirectory:
    return RunDirectory.open(config, resume=False, fresh=False)


def lines(run: RunDirectory, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_new_run_holds_its_configuration_and_its_environment(run: RunDirectory, config: Config) -> None:
    assert load_config(run.folder / "config.yaml") == config
    environment = json.loads((run.folder / "run.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["python"].startswith("3.")


def test_a_run_that_is_there_is_not_overwritten_and_both_ways_on_are_named(run: RunDirectory, config: Config) -> None:
    run.log("rl", 1, {"reward": 1.0})
    with pytest.raises(ConfigError, match=r"holds a run already; continue it with --resume, begin anew with --fresh"):
        RunDirectory.open(config, resume=False, fresh=False)
    assert len(lines(run)) == 1


def test_resume_opens_the_run_as_it_is(run: RunDirectory, config: Config) -> None:
    run.log("rl", 1, {"reward": 1.0})
    before = (run.folder / "run.json").read_text()
    again = RunDirectory.open(config, resume=True, fresh=False)
    assert again.metrics("rl")[0]["reward"] == 1.0
    assert (again.folder / "run.json").read_text() == before


def test_resume_without_a_run_is_an_error_that_makes_nothing(config: Config) -> None:
    with pytest.raises(CheckpointError, match=r"nothing to resume in .*run; start without --resume"):
        RunDirectory.open(config, resume=True, fresh=False)
    assert not Path(config.run_dir).exists()


def test_fresh_keeps_every_old_run_beside_the_new_one(config: Config) -> None:
    for number in range(3):
        RunDirectory.open(config, resume=False, fresh=True).log("rl", number, {})
    folder = Path(config.run_dir)
    found = {path.name: json.loads((path / "metrics.jsonl").read_text())["step"] for path in folder.parent.iterdir()}
    assert found == {"run.1": 0, "run.2": 1, "run": 2}


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trackers: unknown 'wandbb'; known: tensorboard"):
        RunDirectory.open(config_in(tmp_path / "run", trackers=("wandbb",)), resume=False, fresh=False)
    assert not (tmp_path / "run").exists()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_every_log_is_one_line_with_stage_step_and_time(run: RunDirectory) -> None:
    run.log("sft", 1, {"loss": 2.5})
    run.log("rl", 1, {"reward": 0.25, "learner/entropy": 1.0})
    first, second = lines(run)
    assert (first["stage"], first["step"], first["loss"]) == ("sft", 1, 2.5)
    assert second["learner/entropy"] == 1.0
    assert first["time"] <= second["time"]
    assert [line["step"] for line in run.metrics("rl")] == [1]
    assert run.metrics("eval") == []


def test_a_run_without_metrics_has_none(run: RunDirectory) -> None:
    assert run.metrics("rl") == []
    run.forget_after("rl", 0)
    assert not (run.folder / "metrics.superseded.jsonl").exists()


def test_lines_of_later_steps_are_set_aside_and_not_lost(run: RunDirectory) -> None:
    run.log("sft", 9, {"loss": 1.0})
    for step in (1, 2, 3, 4):
        run.log("rl", step, {"reward": float(step)})
        run.log("rl/eval", step, {"accuracy": float(step)})
    run.forget_after("rl", 2)
    assert [line["step"] for line in run.metrics("rl")] == [1, 2]
    assert [line["step"] for line in run.metrics("rl/eval")] == [1, 2], "evaluations will be made again as well"
    assert [line["step"] for line in run.metrics("sft")] == [9]
    aside = lines(run, "metrics.superseded.jsonl")
    assert [(line["stage"], line["step"]) for line in aside] == [("rl", 3), ("rl/eval", 3), ("rl", 4), ("rl/eval", 4)]


def test_what_was_set_aside_twice_is_there_twice(run: RunDirectory) -> None:
    for _ in range(2):
        run.log("rl", 1, {})
        run.forget_after("rl", 0)
    assert run.metrics("rl") == []
    assert len(lines(run, "metrics.superseded.jsonl")) == 2


def test_a_last_line_that_was_cut_off_does_not_stop_a_resumed_run(run: RunDirectory) -> None:
    run.log("rl", 1, {"reward": 1.0})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')
    run.forget_after("rl", 1)
    run.log("rl", 2, {"reward": 1.0})
    assert [line["step"] for line in run.metrics("rl")] == [1, 2]


def test_tensorboard_gets_a_copy(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDirectory.open(config_in(tmp_path / "run", trackers=("tensorboard",)), resume=False, fresh=False)
    run.log("rl", 3, {"reward": 0.5})
    run.close()
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("rl/reward")] == [(3, 0.5)]


# --- rollouts, stages, summary ---------------------------------------------------------------------------------------


def group(number: int) -> RolloutGroup:
    problem = Problem(id=f"p{number}", prompt=({"role": "user", "content": "?"},), answer="2", source="sums")
    rollouts = tuple(
        Rollout(
            tokens=np.arange(length, dtype=np.int32) + number,
            loss_mask=np.arange(length) > 0,
            logprobs=np.linspace(-1, 0, length, dtype=np.float32),
            versions=np.full(length, number, dtype=np.int32),
            response="\u221a2 \U0001f600\n```",
            reward=float(length),
            reward_terms={"right": 1.0},
            metrics={"tool_calls": 2.0},
            finish_reason="turns",
        )
        for length in (1, 4)
    )
    return RolloutGroup(problem=problem, rollouts=rollouts)


def test_rollouts_are_read_back_from_parquet_with_their_arrays(run: RunDirectory) -> None:
    groups = [group(0), group(7)]
    run.write_rollouts("rl-step-000001", groups, advantages=[0.5, -0.5, 1.0, -1.0])
    rows = pq.read_table(run.folder / "rollouts" / "rl-step-000001.parquet").to_pylist()
    assert [row["problem_id"] for row in rows] == ["p0", "p0", "p7", "p7"]
    assert [row["advantage"] for row in rows] == [0.5, -0.5, 1.0, -1.0]
    for row, rollout in zip(rows, [rollout for one in groups for rollout in one.rollouts], strict=True):
        for name in ("tokens", "loss_mask", "logprobs", "versions"):
            array = getattr(rollout, name)
            assert np.array_equal(np.array(row[name], dtype=array.dtype), array)
        assert (row["response"], row["reward"], row["finish_reason"]) == (rollout.response, rollout.reward, "turns")
        assert json.loads(row["reward_terms"]) == {"right": 1.0}
        assert (row["source"], row["answer"]) == ("sums", "2")
    assert [path.name for path in (run.folder / "rollouts").iterdir()] == ["rl-step-000001.parquet"]


def test_rollouts_without_advantages_and_groups_without_rollouts_can_be_written(run: RunDirectory) -> None:
    empty = RolloutGroup(problem=group(0).problem, rollouts=(), dropped={"prompt_too_long": 2})
    run.write_rollouts("eval", [empty, group(1)])
    rows = pq.read_table(run.folder / "rollouts" / "eval.parquet").to_pylist()
    assert [row["advantage"] for row in rows] == [None, None]
    run.write_rollouts("nothing", [empty])
    assert not (run.folder / "rollouts" / "nothing.parquet").exists()


def test_a_finished_stage_names_its_model(run: RunDirectory) -> None:
    assert run.finished_model("sft") is None
    run.finish("sft", Path("/models/one"))
    assert run.finished_model("sft") == Path("/models/one")
    assert run.finished_model("rl") is None


def test_the_summary_merges_values_and_adds_up_the_time(run: RunDirectory, config: Config) -> None:
    assert run.summary() == {}
    run.update_summary(accuracy_before=0.25, steps=1)
    first = run.update_summary(steps=2)
    assert (first["accuracy_before"], first["steps"]) == (0.25, 2)
    (run.folder / "summary.json").write_text(json.dumps({**first, "wall_seconds": 1000.0}))
    again = RunDirectory.open(config, resume=True, fresh=False).update_summary()
    assert again["wall_seconds"] >= 1000.0
