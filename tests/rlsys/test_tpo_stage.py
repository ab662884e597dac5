"""Iterations of thought preference optimization, with fakes in the place of engines and learners."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.actors.rollout import RolloutActor
from rlsys.config import Config, TpoConfig
from rlsys.errors import ActorError, ConfigError, DataError, TrainingStalledError
from rlsys.records import RunDirectory
from rlsys.reproduce.results import check_measure, measured
from rlsys.samples import read_samples
from rlsys.stage_config import PreferenceConfig, SamplingConfig
from rlsys.stages import Interrupted, Run
from rlsys.stages.tpo import divide
from rlsys.tpo_report import plot_iterations
from rlsys.types import Rollout, RolloutGroup
from tests.rlsys.tpo_stage import Killed, World, configured, faked, lines, numbered, run_stage, skill_of


@dataclass
class Finished:
    """A run of three iterations that was never stopped: what the fakes saw, its settings, and what it left."""

    world: World
    config: Config
    left: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """For all who only look at it."""
    with faked() as world:
        config = configured(tmp_path_factory.mktemp("finished"))
        return Finished(world=world, config=config, left=run_stage(config))


@pytest.fixture
def world() -> Iterator[World]:
    """For a run of one's own."""
    with faked() as found:
        yield found


def problems_of(world: World, name: str) -> list[str]:
    """The problems whose answers an iteration learned from, once for each time they were asked for."""
    return [group.removeprefix(f"{name}-") for group in world.acted if group.startswith(f"{name}-p")]


def after(count: int, then: Any) -> Any:
    """Do something the `count`-th time this is called."""
    seen = [0]

    def called(_: Any) -> None:
        seen[0] += 1
        if seen[0] == count:
            then()

    return called


def die() -> None:
    raise Killed("killed")


# --- what an iteration is --------------------------------------------------------------------------------------------


def test_iterations_make_a_policy_better_and_the_last_best_model_is_left(finished: Finished) -> None:
    config, left = finished.config, finished.left
    found = lines(config, "tpo")
    assert [line["step"] for line in found] == [0, 1, 2, 3]
    scores = [line["validation_score"] for line in found]
    assert scores[0] < 0.6
    assert max(scores) > 0.8
    best = scores.index(max(scores))
    assert left == Path(config.run_dir) / f"tpo_{best}" / "model"
    assert skill_of(left) > 0.3
    summary = json.loads((Path(config.run_dir) / "summary.json").read_text())
    assert summary["tpo_best_iteration"] == best
    assert [line["step"] for line in lines(config, "tpo/eval")] == [0, 1, 2, 3]


def test_the_iterations_are_drawn(finished: Finished) -> None:
    directory = RunDirectory(Path(finished.config.run_dir), trackers=())
    plot_iterations(directory)
    assert (directory.folder / "tpo" / "iterations.png").stat().st_size > 10_000


def test_an_experiment_can_measure_one_iteration(finished: Finished) -> None:
    directory = RunDirectory(Path(finished.config.run_dir), trackers=())
    for line in directory.metrics("tpo/eval"):
        check_measure(measure := f"tpo/eval:accuracy:{line['step']}")
        assert measured(directory, measure) == line["accuracy"]
    with pytest.raises(DataError, match="no line of the stage 'tpo/eval' and step 9"):
        measured(directory, "tpo/eval:accuracy:9")


def test_engines_live_through_all_iterations_and_each_has_learners_of_its_own(finished: Finished) -> None:
    calls = finished.world.calls
    assert (calls["fleets"], calls["fleets closed"]) == (1, 1)
    assert (calls["learners"], calls["learners closed"], calls["served"]) == (3, 3, 3)


def test_every_iteration_has_fresh_problems_and_validation_ones_are_never_learned_from(finished: Finished) -> None:
    world = finished.world
    asked = [problems_of(world, f"tpo_{number}") for number in (1, 2, 3)]
    assert [len(some) for some in asked] == [8, 8, 8]
    validation = {group.rpartition("-")[2] for group in world.acted if "validation" in group}
    assert len({*asked[0], *asked[1], *asked[2]}) == 24
    assert len(validation) == 8
    assert not validation & {*asked[0], *asked[1], *asked[2]}
    held_out = {group.rpartition("-")[2] for group in world.acted if group.startswith("eval-tpo")}
    assert held_out == {f"p{number}" for number in range(1000, 1006)}


def test_the_pairs_keep_thought_and_thought_prompt_and_a_good_response_is_chosen(finished: Finished) -> None:
    world, config = finished.world, finished.config
    assert world.trained
    for batch in world.trained:
        for chosen, rejected in zip(batch[0::2], batch[1::2], strict=True):
            assert chosen.count(" T: R:") == rejected.count(" T: R:") == 1, "the thought prompt"
            assert "assistant\nT: hm" in chosen
            assert "R:good" in chosen
            assert "R:good" not in rejected.rpartition("assistant")[2]
    rows = read_samples(Path(config.run_dir) / "tpo_1" / "pairs.parquet")
    assert [row.provenance["side"] for row in rows] == ["chosen", "rejected"] * (len(rows) // 2)
    assert len(rows) == 2 * lines(config, "tpo")[1]["pairs"]


def test_the_line_of_an_iteration_says_what_its_answers_and_pairs_were(finished: Finished) -> None:
    config = finished.config
    line = lines(config, "tpo")[1]
    samples = [
        sample
        for part in sorted((Path(config.run_dir) / "tpo_1" / "parts").glob("*.parquet"))
        for sample in read_samples(part)
    ]
    assert line["answers"] == len(samples) == 32
    failures = [sample for sample in samples if sample.metrics["thought_parse_failure"]]
    assert line["thought_parse_failure"] == pytest.approx(len(failures) / 32)
    assert line["score"] == pytest.approx(
        sum(sample.reward for sample in samples if sample not in failures) / (32 - len(failures))
    )
    assert line["thought_tokens"] + line["shown_tokens"] == pytest.approx(line["answer_tokens"])
    assert line["pairs"] + sum(count for name, count in line.items() if name.startswith("dropped_pairs/")) == 8
    assert line["chosen_length"] <= line["rejected_length"] or line["length_weight"] == 0.5
    assert 0 <= line["length_weight"] <= 0.5
    assert line["chosen_score"] == 1
    assert line["best_step"] >= 1


def test_without_thoughts_it_is_the_direct_baseline(world: World, tmp_path: Path) -> None:
    config = configured(tmp_path, "chat.thought=null")
    run_stage(config)
    assert "T:" not in str(world.trained)
    line = lines(config, "tpo")[3]
    assert "thought_tokens" not in line
    assert line["pairs_with_parse_failure"] == 0


def test_the_best_weights_of_an_iteration_are_kept_not_the_last(world: World, tmp_path: Path) -> None:
    config = configured(tmp_path, "tpo.iterations=1", "tpo.validate_every=1", "tpo.preference.epochs=3")
    world.before_step = lambda step: setattr(world, "lr", 0.3 if step < 2 else -0.4)
    left = run_stage(config)
    (line,) = lines(config, "tpo")[1:]
    assert line["best_step"] == 2
    assert skill_of(left) == pytest.approx(0.9)
    assert world.skill == pytest.approx(0.9), "the engines hold them as well"
    steps = [step["validation_score"] for step in lines(config, "tpo_1")]
    assert line["validation_score"] == max(steps)


def test_a_judge_that_compares_is_shown_each_answer_beside_one_of_the_first_model(world: World, tmp_path: Path) -> None:
    judge = "rewards=[{use: 'tests.rlsys.tpo_stage:Comparing'}]"
    config = configured(tmp_path, judge, "tpo.iterations=2")
    run_stage(config)
    assert {len(group.rollouts) for group in world.compared} == {2}
    validation = divide(Run(config=config, directory=None, console=None, stop=None))[0]  # type: ignore[arg-type]
    first = {group.problem.id: group.rollouts[1].response for group in world.compared[:8]}
    assert sorted(first) == sorted(problem.id for problem in validation)
    for group in world.compared:
        assert group.rollouts[1].response == first[group.problem.id]
        assert group.rollouts[1].num_hidden > 0
    scores = [line["validation_score"] for line in lines(config, "tpo")]
    assert max(scores[1:]) > scores[0]


def test_a_comparison_in_the_rollout_actor_counts_what_compares_and_nothing_else(tmp_path: Path) -> None:
    rewards = "rewards=[{name: a, use: 'tests.rlsys.tpo_stage:good'}, {name: b, use: 'tests.rlsys.tpo_stage:Longest'}]"
    actor = RolloutActor(config=configured(tmp_path, rewards), model_path="", index=0)
    empty = np.zeros(0, np.int32)
    arrays: dict[str, Any] = {"tokens": empty, "loss_mask": empty > 0, "logprobs": empty.astype(np.float32)}
    siblings = [
        Rollout(**arrays, versions=empty, response=text, reward=7.0, reward_terms={"a": 7.0}) for text in ("good", "a")
    ]
    group = RolloutGroup(problem=numbered(size=1)[0], rollouts=tuple(siblings))
    assert asyncio.run(actor.compare(group)).rewards.tolist() == [1, 0]


def test_a_seed_that_stays_the_best_is_what_is_left(world: World, tmp_path: Path) -> None:
    world.lr = -0.3
    config = configured(tmp_path, "tpo.iterations=1", skill=0.6)
    assert run_stage(config) == tmp_path / "seed"


# --- interruptions ---------------------------------------------------------------------------------------------------


PHASES = {
    "the first measurement": ("before_act", 4),
    "sampling of the first iteration": ("before_act", 8 + 6 + 5),
    "the first step": ("before_step", 1),
    "the second step of an epoch": ("before_step", 3),
    "validation in the first iteration": ("before_act", 8 + 6 + 8 + 3),
    "held-out problems in the first iteration": ("before_act", 8 + 6 + 8 + 16 + 3),
    "sampling of the second iteration": ("before_act", 8 + 6 + 8 + 16 + 6 + 5),
    "the steps of the second iteration": ("before_step", 6),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_goes_on_where_it_was_and_ends_like_one_that_was_not(
    world: World, finished: Finished, tmp_path: Path, phase: str
) -> None:
    config, whole = configured(tmp_path), finished.config
    hook, count = PHASES[phase]
    setattr(world, hook, after(count, die))
    with pytest.raises(Killed):
        run_stage(config)
    begun = list(world.acted)
    world.before_act = world.before_step = lambda _: None
    world.acted.clear()
    left = run_stage(config, resume=True)
    assert left.parts[-2:] == finished.left.parts[-2:]
    assert skill_of(left) == pytest.approx(skill_of(finished.left))
    for stage in ("tpo", "tpo/eval", *(f"tpo_{number}{kind}" for number in (1, 2, 3) for kind in ("", "/validation"))):
        assert _plain(lines(config, stage)) == _plain(lines(whole, stage)), stage
    again = {group for group in world.acted if group in begun and re.match(r"tpo_\d-p", group)}
    assert len(again) <= 3, "only what was not in a finished part"


def _plain(found: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


@pytest.mark.parametrize(
    ("hook", "count"), [("before_act", 17), ("before_step", 2), ("before_act", 40), ("before_step", 6)]
)
def test_a_stop_is_clean_and_can_be_gone_on_from(world: World, tmp_path: Path, hook: str, count: int) -> None:
    config = configured(tmp_path, "tpo.iterations=2")
    runs: list[Run] = []
    setattr(world, hook, after(count, lambda: runs[0].stop.set()))
    with pytest.raises(Interrupted):
        run_stage(config, with_run=runs.append)
    assert world.calls["fleets"] == world.calls["fleets closed"]
    assert world.calls["learners"] == world.calls["learners closed"]
    world.before_act = world.before_step = lambda _: None
    run_stage(config, resume=True)
    assert [line["step"] for line in lines(config, "tpo")] == [0, 1, 2]
    assert [line["step"] for line in lines(config, "tpo_1")] == list(range(1, len(lines(config, "tpo_1")) + 1))


def test_finished_iterations_are_not_run_again(world: World, tmp_path: Path) -> None:
    config = configured(tmp_path)
    world.before_step = after(5, die)
    with pytest.raises(Killed):
        run_stage(config)
    world.acted.clear()
    world.before_step = lambda _: None
    run_stage(config, resume=True)
    assert not problems_of(world, "tpo_1")
    world.acted.clear()
    run_stage(config, resume=True)
    assert world.acted == []


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_judge_that_fails_too_often_stops_the_stage_and_says_what_it_said(world: World, tmp_path: Path) -> None:
    world.failing = 0.6
    with pytest.raises(TrainingStalledError, match="the judge spoke Latin"):
        run_stage(configured(tmp_path))


def test_an_engine_that_fails_once_is_asked_again(world: World, tmp_path: Path) -> None:
    def fail() -> None:
        raise ActorError("the engine is away")

    world.before_act = after(17, fail)
    config = configured(tmp_path, "tpo.iterations=1")
    run_stage(config)
    assert lines(config, "tpo")[1]["answers"] == 32


def test_answers_that_the_judge_could_not_grade_are_counted(world: World, tmp_path: Path) -> None:
    world.failing = 0.15
    config = configured(tmp_path, "max_failed_rewards=1", "tpo.iterations=1")
    run_stage(config)
    line = lines(config, "tpo")[1]
    missing = 32 - line["answers"]
    assert missing > 0
    assert line["dropped/reward_error"] == missing
    assert line["dropped_pairs/too_few_answers"] == missing / 4


def test_a_policy_whose_answers_are_all_alike_gives_no_pair_and_that_is_said(world: World, tmp_path: Path) -> None:
    with pytest.raises(TrainingStalledError, match=r"tpo_1: none of 8 problems gave a pair .*same_score"):
        run_stage(configured(tmp_path, "chat.thought=null", skill=1.0))
    assert world.calls["fleets closed"] == 1


def test_too_few_problems_are_told_before_anything_starts(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tpo needs 32 different problems \(3 iterations x 8.*but data.train has 31"):
        run_stage(configured(tmp_path, "data.train.options.size=31"))
    assert not world.calls


def test_problems_that_stand_twice_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.rlsys import tpo_stage

    config = configured(tmp_path)
    once = tpo_stage.numbered(size=40)
    monkeypatch.setattr(tpo_stage.STAGE_MODULE, "load_problems", lambda *_: [*once, *once])
    run = Run(config=config, directory=None, console=None, stop=None)  # type: ignore[arg-type]
    validation, fresh = divide(run)
    ids = [problem.id for some in (validation, *fresh) for problem in some]
    assert len(ids) == len(set(ids)) == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "tpo.iterations is 0"),
        ({"samples_per_problem": 1}, "a pair needs at least 2"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "all answers to a problem would be the same"),
        ({"length_weight_step": 0.0}, "tpo.length_weight_step"),
        ({"validate_every": -1}, "0 is once an epoch"),
        ({"preference": PreferenceConfig(loss="rlsys.preference:kto")}, "kto takes no pairs"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TpoConfig(**settings)


def test_ten_epochs_are_the_default_and_steps_or_epochs_replace_them() -> None:
    assert TpoConfig().learning.epochs == 10
    assert TpoConfig(preference=PreferenceConfig(steps=5)).learning.epochs is None
    assert TpoConfig(preference=PreferenceConfig(epochs=2)).learning.epochs == 2


# --- on the real stack -----------------------------------------------------------------------------------------------

REAL = """
name: real
stages: [tpo]
trackers: []
model:
  scratch: {hidden_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 1, intermediate_size: 128, max_length: 256}
data:
  train: {use: "stack_plugins:words_problems", options: {size: 64}}
  held_out: {use: "stack_plugins:words_problems", options: {size: 8}}
rewards: [{name: digits, use: "stack_plugins:share_of_digits"}]
actors: {count: 1, cpus: 0.5, max_model_tokens: 256}
learners: {count: 1, cpus: 0.5}
tpo:
  iterations: 2
  problems_per_iteration: 12
  validation_problems: 16
  problems_per_part: 4
  max_problems_in_flight: 4
  validate_every: 4
  sampling: {temperature: 1.0, max_response_tokens: 24}
  preference: {steps: 8, pairs_per_step: 4, checkpoint_every: 2, optimizer: {lr: 1.0e-3}}
eval: {sampling: {max_response_tokens: 24}}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_real_engines_and_learners_a_killed_run_goes_on_and_the_policy_becomes_better(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text(REAL)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rlsys", "train", str(tmp_path / "real.yaml"), f"run_dir={run}"]

    def found(stage: str) -> list[dict[str, Any]]:
        path = run / "metrics.jsonl"
        texts = path.read_text().splitlines() if path.exists() else []
        every = [json.loads(text) for text in texts if text.endswith("}")]
        return [line for line in every if line["stage"] == stage]

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(found("tpo_1")) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    process.wait()
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "tpo_1: 12 of 12 problems were answered before" in resumed.stdout
    assert re.search(r"tpo_1: going on from step [246]", resumed.stdout), resumed.stdout
    for number in (1, 2):
        assert [line["step"] for line in found(f"tpo_{number}")] == list(range(1, 9))
        assert found(f"tpo_{number}")[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the reference is where it began"
    lines_of_stage = found("tpo")
    assert [line["step"] for line in lines_of_stage] == [0, 1, 2]
    assert lines_of_stage[2]["held_out_score"] > lines_of_stage[0]["held_out_score"]
    assert (run / "model" / "config.json").exists()
