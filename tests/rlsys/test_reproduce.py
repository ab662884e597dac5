"""Papers in miniature: experiments are read and checked, run with a fake `train`, and their numbers judged by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import rlsys.reproduce.report
import rlsys.reproduce.runner
import rlsys.run
from rlsys.cli import app
from rlsys.config import Config
from rlsys.demonstrations import CLOSING, arithmetic_demonstrations
from rlsys.errors import ConfigError, DataError, TrainingStalledError
from rlsys.records import RunDirectory
from rlsys.reproduce.demonstrations import CHECKS, checked_demonstrations
from rlsys.reproduce.experiment import find_experiments, load_experiment
from rlsys.reproduce.report import plot, to_markdown
from rlsys.reproduce.results import EVALUATION, Results, check_measure, measured
from rlsys.reproduce.runner import jobs_of, reproduce
from rlsys.reproduce.statistics import Estimate, estimate, student_t, verdict
from rlsys.rollout import mean_metrics
from rlsys.stages import Interrupted
from rlsys.types import Problem, Rollout

BASE = """
name: base
stages: [rl]
model: {scratch: {hidden_size: 32, num_heads: 1, num_kv_heads: 1, seed: "${seed}"}}
data:
  train: {use: "rlsys.data:reasoning_gym_problems", options: {tasks: {chain_sum: {}}, size: 8, seed: "${seed}"}}
  held_out: {use: "rlsys.data:reasoning_gym_problems", options: {tasks: {chain_sum: {}}, size: 8, seed: "${seed}"}}
rewards: [{name: math, use: "rlsys.rewards.math:MathReward"}]
sft:
  demonstrations: {use: "rlsys.demonstrations:arithmetic_demonstrations", options: {size: 8, seed: "${seed}"}}
rl: {steps: 5, sampling: {temperature: 0.7}}
trackers: []
"""

EXPERIMENT = """
name: small
claim: Two is better than one.
paper: ["A paper: 2 > 1."]
config: base.yaml
settings: {rl: {groups_per_step: 4}}
seeds: [0, 1, 2]
shared: [sft]
variants:
  two: {stages: [rl], rl: {steps: 2}}
  one: {stages: [rl, eval], rl: {steps: 1, sampling: {max_response_tokens: 99}}}
measures: [accuracy, "rl:reward:mean"]
compare: [{better: two, than: one}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    return tmp_path / "small.yaml"


def edited(file: Path, *changes: tuple[str, str]) -> Path:
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


class FakeTrain:
    """Makes a run's files without a cluster; the accuracy is that of the table, by run and seed."""

    def __init__(self, accuracy: Mapping[tuple[str, int], float] = {}) -> None:
        self.accuracy = accuracy
        self.made: list[tuple[str, int, bool]] = []
        self.failing: dict[str, Exception] = {}
        self.configs: list[Config] = []

    def __call__(self, config: Config, *, resume: bool, console: Any, session: Any) -> None:  # noqa: ARG002
        run = Path(config.run_dir).name
        self.made.append((run, config.seed, resume))
        self.configs.append(config)
        directory = RunDirectory.open(config, resume=resume, fresh=False)
        if run in self.failing:
            raise self.failing[run]
        for step, reward in enumerate((0.25, 0.75), 1):
            directory.log("rl", step, {"reward": reward})
        directory.log("rl/eval", 2, {"accuracy": self.accuracy.get((run, config.seed), 0.5)})
        directory.update_summary()
        for stage in config.stages:
            directory.finish(stage, directory.folder / "model")


@pytest.fixture(autouse=True)
def _no_model_to_load_and_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlsys.run, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(rlsys.reproduce.report, "plot", lambda *_: None)


# --- experiments -----------------------------------------------------------------------------------------------------


def test_a_variant_is_merged_over_the_settings_and_these_over_the_base(file: Path, tmp_path: Path) -> None:
    experiment = load_experiment(file)
    config = experiment.config_of("one", 7, tmp_path / "runs")
    assert (config.rl.steps, config.rl.groups_per_step, config.rl.sampling.temperature) == (1, 4, 0.7)
    assert config.rl.sampling.max_response_tokens == 99
    assert (config.stages, config.seed, config.name) == (["rl", "eval"], 7, "small-one-7")
    assert config.run_dir == str(tmp_path / "runs/seed-7/one")


def test_every_seed_of_a_run_follows_the_run(file: Path, tmp_path: Path) -> None:
    config = load_experiment(file).config_of("shared", 7, tmp_path)
    assert config.model.scratch is not None
    assert config.model.scratch.seed == 7
    assert config.data.train.options["seed"] == config.data.held_out.options["seed"] == 7
    assert config.sft.demonstrations is not None
    assert config.sft.demonstrations.options["seed"] == 7


def test_a_seed_that_stays_is_refused_by_its_key(file: Path) -> None:
    edited(file.with_name("base.yaml"), ('size: 8, seed: "${seed}"}}\nrewards', "size: 8, seed: 3}}\nrewards"))
    with pytest.raises(ConfigError, match=r"data\.held_out\.options\.seed is 3 whatever .* write `seed: \$\{seed\}`"):
        load_experiment(file)


def test_all_variants_of_a_seed_have_the_same_held_out_problems_and_begin_with_the_shared_model(
    file: Path, tmp_path: Path
) -> None:
    experiment = load_experiment(file)
    one, two = (experiment.config_of(name, 1, tmp_path) for name in ("one", "two"))
    assert one.data.held_out == two.data.held_out
    assert one.model == two.model
    assert (one.model.path, one.model.scratch) == (str(tmp_path / "seed-1/shared/model"), None)


def test_a_variant_begins_where_it_says(file: Path, tmp_path: Path) -> None:
    more = "\n  next: {after: two, stages: [rl]}\n  anew: {after: null, stages: [sft, rl]}\nmeasures"
    experiment = load_experiment(edited(file, ("\nmeasures", more)))
    assert experiment.config_of("next", 0, tmp_path).model.path == str(tmp_path / "seed-0/two/model")
    anew = experiment.config_of("anew", 0, tmp_path)
    assert (anew.model.path, anew.stages) == (None, ["sft", "rl"])


def test_without_shared_stages_variants_begin_with_the_model_of_the_base(file: Path, tmp_path: Path) -> None:
    experiment = load_experiment(edited(file, ("shared: [sft]\n", "")))
    assert experiment.runs == ["two", "one"]
    assert experiment.config_of("one", 0, tmp_path).model.scratch is not None


BAD = {
    "unknown_variant": (("than: one", "than: onne"), r"compare\.0: unknown variant 'onne' \(did you mean 'one'\?\)"),
    "itself": (("than: one", "than: two"), "'two' is compared with itself"),
    "compare_measure": (("than: one}", "than: one, measure: reward}"), "unknown measure 'reward' .*; known: accuracy,"),
    "no_seeds": (("seeds: [0, 1, 2]", "seeds: []"), "seeds is empty"),
    "seeds_twice": (("[0, 1, 2]", "[0, 1, 1]"), "has one twice"),
    "measure": (("[accuracy,", "[acuracy,"), r"unknown measure 'acuracy' \(did you mean 'accuracy'\?\)"),
    "form_of_measure": (('"rl:reward:mean"', '"rl:reward:max"'), "'rl:reward:max' is not KEY, STAGE:KEY"),
    "shared_stage": (("shared: [sft]", "shared: [stf]"), "small: shared: stages: unknown stage 'stf'; known: sft"),
    "no_variant": ((EXPERIMENT[EXPERIMENT.index("variants") : EXPERIMENT.index("measures")], ""), "variants is empty"),
    "no_stages": (("two: {stages: [rl], rl:", "two: {rl:"), r"variants\.two has no stages"),
    "key_of_a_run": (("rl: {steps: 2}", "rl: {stepz: 2}"), "small: two: .*stepz"),
    "key": (("claim:", "clam: a\nclaim:"), r"clam.*Did you mean: 'claim'"),
    "run_dir": (("rl: {steps: 2}", "run_dir: x"), r"variants\.two\.run_dir is set for each run by its seed"),
    "model": (("rl: {steps: 2}", "model: {path: x}"), r"variants\.two\.model: it begins with the model of 'shared'"),
    "after": (("rl: {steps: 2}", "after: one"), r"variants\.two\.after: unknown variant \(it must stand before"),
    "name": (("name: small", "name: a/b"), "name: 'a/b' must be letters"),
    "called_shared": (("two:", "shared:"), r"variants\.shared: this is the name"),
    "base": (("config: base.yaml", "config: bays.yaml"), "no configuration at .*bays.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_refused_with_the_file_and_the_place(case: str, file: Path) -> None:
    change, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as raised:
        load_experiment(edited(file, change))
    assert str(file) in str(raised.value)


def test_an_experiment_is_found_by_its_name_or_its_file(file: Path) -> None:
    assert [one.name for one in find_experiments(["on_policy", str(file)])] == ["on_policy", "small"]
    assert {"on_policy", "length"} <= {one.name for one in find_experiments()}
    with pytest.raises(ConfigError, match=r"unknown experiment 'on_polcy' \(did you mean 'on_policy'\?\)"):
        find_experiments(["on_polcy"])
    with pytest.raises(ConfigError, match="two experiments are called 'small'"):
        find_experiments([str(file), str(file)])


def test_the_experiment_in_the_document_is_one(file: Path) -> None:
    document = Path(__file__).parents[2] / "docs/miniature.md"
    found = re.search(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL)
    assert found is not None
    file.write_text(
        found[1].replace("../configs/quickstart.yaml", str(document.parents[1] / "configs/quickstart.yaml"))
    )
    assert load_experiment(file).runs == ["shared", "t_1_2", "t_1_0"]


# --- runs ------------------------------------------------------------------------------------------------------------


def run(file: Path, train: FakeTrain, **options: Any) -> Results:
    return reproduce([load_experiment(file)], file.parent / "runs", train=train, **options)[0]


def test_for_each_seed_the_shared_stages_are_run_first_and_once(file: Path) -> None:
    train = FakeTrain()
    run(file, train, seeds=[5, 6])
    assert train.made == [(name, seed, False) for seed in (5, 6) for name in ("shared", "two", "one")]


def test_what_is_finished_is_not_run_again_and_what_was_begun_is_resumed(file: Path) -> None:
    train = FakeTrain()
    train.failing = {"one": Interrupted("step 3")}
    with pytest.raises(Interrupted):
        run(file, train, seeds=[0])
    train.failing, train.made = {}, []
    assert not run(file, train, seeds=[0]).failures
    assert train.made == [("one", 0, True)]
    train.made = []
    run(file, train, seeds=[0])
    assert train.made == []


def test_a_changed_variant_is_made_anew_alone_and_the_old_one_is_kept(file: Path) -> None:
    train = FakeTrain()
    run(file, train, seeds=[0])
    train.made = []
    run(edited(file, ("rl: {steps: 2}", "rl: {steps: 3}")), train, seeds=[0])
    assert train.made == [("two", 0, False)]
    assert (file.parent / "runs/small/seed-0/two.1/config.yaml").exists()


def test_what_began_with_a_changed_model_is_made_anew(file: Path) -> None:
    train = FakeTrain()
    more = "\n  next: {after: two, stages: [rl]}\nmeasures"
    run(edited(file, ("\nmeasures", more)), train, seeds=[0])
    train.made = []
    run(edited(file, ("rl: {steps: 2}", "rl: {steps: 3}")), train, seeds=[0])
    assert train.made == [("two", 0, False), ("next", 0, False)]
    train.made = []
    edited(file, ("settings: {rl:", "settings: {sft: {steps: 9}, rl:"))
    run(file, train, seeds=[0])
    assert train.made == [(name, 0, False) for name in ("shared", "two", "one", "next")]


def test_a_variant_that_fails_is_reported_and_the_rest_goes_on(file: Path) -> None:
    train = FakeTrain({("one", 0): 0.25, ("one", 1): 0.75})
    train.failing = {"two": TrainingStalledError("no finite gradient")}
    found = run(file, train, seeds=[0, 1])
    assert [(one.run, one.seed, one.message) for one in found.failures] == [
        ("two", 0, "no finite gradient"),
        ("two", 1, "no finite gradient"),
    ]
    assert found.values["one"]["accuracy"] == {0: 0.25, 1: 0.75}
    assert found.values["two"]["accuracy"] == {}
    text = (file.parent / "runs/small/table.md").read_text()
    assert "| two | - | - | 0 |" in text
    assert "* two, seed 1: no finite gradient" in text


def test_a_bug_in_a_plug_in_fails_its_variant_only(file: Path) -> None:
    train = FakeTrain()
    train.failing = {"two": ZeroDivisionError("division by zero")}
    found = run(file, train, seeds=[0])
    assert [one.message for one in found.failures] == ["ZeroDivisionError: division by zero"]


def test_where_the_shared_stages_fail_the_variants_of_this_seed_are_not_run(file: Path) -> None:
    train = FakeTrain()
    train.failing = {"shared": DataError("no problem in it")}
    found = run(file, train, seeds=[0])
    assert train.made == [("shared", 0, False)]
    assert [one.message for one in found.failures] == ["no problem in it", *["not run, because shared failed"] * 2]


def test_a_measure_that_a_run_does_not_have_is_a_failure_that_names_the_nearest(file: Path) -> None:
    found = run(edited(file, ("rl:reward:mean", "rl:rewad")), FakeTrain(), seeds=[0])
    assert "no 'rewad' (did you mean 'reward'?)" in found.failures[0].message
    assert found.values["one"]["accuracy"] == {0: 0.5}


def test_references_and_options_of_all_variants_are_checked_before_anything_runs(file: Path) -> None:
    train = FakeTrain()
    with pytest.raises(ConfigError, match=r"small-one-0: rl\.loss: .* has no 'gspoo'; did you mean .*gspo"):
        run(edited(file, ("rl: {steps: 1,", "rl: {loss: 'rlsys.losses:gspoo',")), train)
    assert train.made == []


def test_jobs_lie_in_folders_by_seed_and_variant(file: Path) -> None:
    jobs = jobs_of(load_experiment(file), Path("there"))
    assert [str(job.folder) for job in jobs[:3]] == [f"there/small/seed-0/{name}" for name in ("shared", "two", "one")]
    assert [job.after for job in jobs[:3]] == [None, "shared", "shared"]


def test_the_command_ends_with_an_error_where_a_variant_failed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = FakeTrain()
    real = reproduce
    monkeypatch.setattr(rlsys.reproduce.runner, "reproduce", lambda *given, **more: real(*given, train=train, **more))
    arguments = ["reproduce", "miniature", "--only", str(file), "--seeds", "3,4", "--run-dir", str(file.parent / "r")]
    outcome = CliRunner().invoke(app, arguments)
    assert (outcome.exit_code, {seed for _, seed, _ in train.made}) == (0, {3, 4})
    train.failing = {"one": TrainingStalledError("stalled")}
    outcome = CliRunner().invoke(app, [*arguments[:5], "5", *arguments[6:]])
    assert outcome.exit_code == 1
    assert "failed: one, seed 5: stalled" in outcome.output
    with pytest.raises(ConfigError, match="--seeds '1,x' is not a list of whole numbers"):
        CliRunner().invoke(app, [*arguments[:5], "1,x"], catch_exceptions=False)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_student_t_is_that_of_the_printed_tables(degrees: int, value: float) -> None:
    assert student_t(degrees) == pytest.approx(value, abs=5e-5)


def test_an_interval_by_hand() -> None:
    found = estimate([0.5, 0.6, 0.7])  # s = 0.1, so 4.3027 * 0.1 / sqrt(3) = 0.24842
    assert found is not None
    assert (found.mean, found.count) == (pytest.approx(0.6), 3)
    assert found.half_width == pytest.approx(0.24842, abs=1e-5)
    found = estimate([1.0, 3.0])  # s = sqrt(2), so 12.7062 * sqrt(2) / sqrt(2)
    assert found is not None
    assert found.half_width == pytest.approx(12.7062, abs=1e-4)


def test_one_number_has_no_interval_and_none_has_no_mean() -> None:
    assert estimate([0.5]) == Estimate(mean=0.5, half_width=None, count=1)
    assert estimate([]) is None


@pytest.mark.parametrize(
    ("mean", "half_width", "word"),
    [
        (0.2, 0.1, "as the paper"),
        (-0.2, 0.1, "opposite"),
        (0.2, 0.3, "not decided (interval holds 0)"),
        (-0.2, 0.2, "not decided (interval holds 0)"),
        (0.0, 0.0, "not decided (interval holds 0)"),
        (0.2, None, "not decided (too few seeds)"),
    ],
)
def test_the_verdict_is_about_where_the_interval_lies(mean: float, half_width: float | None, word: str) -> None:
    assert verdict(Estimate(mean=mean, half_width=half_width, count=3)) == word


def test_no_common_seed_decides_nothing() -> None:
    assert verdict(None) == "not decided (too few seeds)"


def test_differences_are_paired_by_seed(file: Path) -> None:
    levels = {0: 0.1, 1: 0.5, 2: 0.9}  # seeds differ by far more than the variants do
    accuracy = {("one", seed): level for seed, level in levels.items()}
    accuracy |= {("two", seed): level + 0.04 + 0.01 * seed for seed, level in levels.items()}
    found = run(file, FakeTrain(accuracy))
    finding = found.findings[0]
    assert finding.differences == pytest.approx({0: 0.04, 1: 0.05, 2: 0.06})
    assert finding.estimate is not None
    assert finding.estimate.half_width == pytest.approx(4.3027 * 0.01 / 3**0.5, abs=1e-5)
    assert finding.verdict == "as the paper"
    whole = found.estimate("one", "accuracy")
    assert whole is not None
    assert whole.half_width == pytest.approx(4.3027 * 0.4 / 3**0.5, abs=1e-4)


def test_the_tables_say_it_all(file: Path) -> None:
    accuracy = {("one", 0): 0.5, ("one", 1): 0.6, ("one", 2): 0.7, ("two", 0): 0.8, ("two", 1): 0.9, ("two", 2): 1.0}
    found = run(file, FakeTrain(accuracy))
    assert to_markdown(found) == (
        "## small\n\nTwo is better than one.\n\n"
        "| variant | accuracy | rl:reward:mean | seeds |\n|---|---|---|---|\n"
        "| two | 0.900 ± 0.248 | 0.500 ± 0.000 | 3 |\n"
        "| one | 0.600 ± 0.248 | 0.500 ± 0.000 | 3 |\n\n"
        "| the paper's claim | difference, paired by seed | came out |\n|---|---|---|\n"
        "| accuracy: two > one | +0.300 [+0.300, +0.300] | as the paper |\n\n"
        "The paper:\n\n* A paper: 2 > 1.\n"
    )
    folder = file.parent / "runs"
    assert (folder / "table.md").read_text() == (folder / "small/table.md").read_text() == to_markdown(found)
    table = json.loads((folder / "small/table.json").read_text())
    assert table["variants"]["one"]["accuracy"]["by_seed"] == {"0": 0.5, "1": 0.6, "2": 0.7}
    assert table["compare"][0]["verdict"] == "as the paper"
    assert set(table["run_seconds"]) == {"shared", "two", "one"}
    assert table["wall_seconds"] >= 0


def test_a_picture_is_drawn_also_of_one_seed_and_of_a_variant_that_failed(file: Path) -> None:
    train = FakeTrain()
    train.failing = {"two": TrainingStalledError("stalled")}
    plot(run(file, train, seeds=[0]), file.with_suffix(".png"))
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def lines(folder: Path, *lines: tuple[str, int, dict[str, float]]) -> RunDirectory:
    directory = RunDirectory(folder, trackers=())
    for stage, step, metrics in lines:
        directory.log(stage, step, metrics)
    return directory


def test_a_measure_is_read_from_the_last_line_or_is_the_mean_over_all(tmp_path: Path) -> None:
    directory = lines(
        tmp_path,
        ("rl/eval", 0, {"accuracy": 0.1, "status/math/wrong": 0.9}),
        ("rl", 1, {"reward": 0.2, "dropped/uninformative": 4.0}),
        ("rl", 2, {"reward": 0.6}),
        ("eval/eval", 0, {"accuracy": 0.8}),
    )
    wanted = {"accuracy": 0.8, "rl/eval:accuracy": 0.1, "rl:reward": 0.6, "rl:reward:mean": 0.4, "rl:reward:1": 0.2}
    wanted |= {"status/math/wrong": 0.0, "rl:dropped/uninformative": 0.0, "rl:dropped/uninformative:mean": 2.0}
    assert {measure: measured(directory, measure) for measure in wanted} == pytest.approx(wanted)


def test_what_cannot_be_read_is_an_error_with_the_file(tmp_path: Path) -> None:
    directory = lines(tmp_path, ("rl", 1, {"reward": float("nan")}))
    for measure, message in (
        ("accuracy", "has no evaluation"),
        ("sft:loss", "has no line of the stage 'sft'"),
        ("rl:reward:7", "has no line of the stage 'rl' and step 7"),
        ("rl:rewards", "did you mean 'reward'"),
        ("rl:reward", "is nan"),
    ):
        with pytest.raises(DataError, match=message):
            measured(directory, measure)


def test_the_known_measures_are_those_that_an_evaluation_writes() -> None:
    none = np.zeros(0)
    empty = Rollout(tokens=none, loss_mask=none, logprobs=none, versions=none)
    written = {name for name in mean_metrics([empty]) if "/" not in name}
    assert written | {"problems", "not_measured", "accuracy_greedy"} == set(EVALUATION)
    for measure in (
        *EVALUATION,
        "reward/math",
        "status/math/right",
        "words/reflection",
        "rl:anything:mean",
        "rl:anything:4",
    ):
        check_measure(measure)


# --- demonstrations that are longer or shorter -----------------------------------------------------------------------

PROBLEMS = [
    Problem(id=text, prompt=({"role": "user", "content": text},), answer=str(i + 1), metadata={"expression": text})
    for i, text in enumerate(f"{i} + 1" for i in range(50))
]


def test_checks_stand_behind_the_result_and_are_as_many_as_the_odds_say() -> None:
    made = checked_demonstrations(PROBLEMS, size=2000, seed=1, again=0.5)
    counts = [sum(one.text.count(check) for check in CHECKS) for one in made]
    shares = [counts.count(count) / len(counts) for count in range(4)]
    assert shares == pytest.approx([0.5, 0.25, 0.125, 0.0625], abs=0.03)
    assert max(counts) <= 8
    for one in made[:50]:
        assert one.text.endswith(f"{CLOSING}</think>\n\\boxed{{{one.problem.answer}}}")


def test_without_checks_they_are_the_plain_demonstrations() -> None:
    plain = arithmetic_demonstrations(PROBLEMS, size=60, seed=4, tool_share=0.5)
    assert checked_demonstrations(PROBLEMS, size=60, seed=4, again=0.0, tool_share=0.5) == plain


def test_odds_that_would_never_end_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"need again in \[0, 1\)"):
        checked_demonstrations(PROBLEMS, size=1, seed=1, again=1.0)
