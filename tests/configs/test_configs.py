"""Every file in `configs/` loads, is valid, and names only things that exist; so does every experiment's every run."""

from pathlib import Path

import pytest
import yaml

import rlsys.run
from rlsys.config import Config
from rlsys.config_file import load_config, to_yaml
from rlsys.errors import ConfigError
from rlsys.reproduce.experiment import load_experiment

FOLDER = Path(__file__).resolve().parents[2] / "configs"
PATHS = sorted(FOLDER.glob("*.yaml"))


def values_to_give(path: Path) -> list[str]:
    """Overrides for what the file leaves to the command line."""

    def missing(prefix: str, node: object) -> list[str]:
        if isinstance(node, dict):
            return [key for name, child in node.items() for key in missing(f"{prefix}.{name}", child)]
        return [prefix.removeprefix(".")] if node == "???" else []

    return [f"{key}=given" for key in missing("", yaml.safe_load(path.read_text()))]


def load(path: Path) -> Config:
    return load_config(path, values_to_give(path))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_loads_and_its_name_is_that_of_the_file(path: Path) -> None:
    assert load(path).name == path.stem


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_references_and_options_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlsys.run, "load_tokenizer", lambda _: None)  # the only part that needs the model
    rlsys.run.check(load(path))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_first_line_says_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_written_out_and_read_back_it_is_the_same(path: Path, tmp_path: Path) -> None:
    config = load(path)
    (tmp_path / "copy.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "copy.yaml") == config


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem.startswith("still3")], ids=lambda path: path.stem)
def test_a_paper_preset_names_its_source_and_where_it_departs(path: Path) -> None:
    comment = path.read_text().partition("\nname:")[0]
    assert "arXiv" in comment
    assert "Departs from it" in comment


def test_what_the_command_line_must_give_is_named_with_the_fix() -> None:
    message = "no value for data.held_out.options.path and data.train.options.path; set each in the file or on the comm"
    with pytest.raises(ConfigError, match=message):
        load_config(FOLDER / "gsm8k.yaml")


def test_the_32b_preset_has_the_numbers_of_the_paper() -> None:
    config = load(FOLDER / "still3_zero_32b.yaml")
    assert (config.rl.groups_per_step, config.rl.group_size, config.rl.optimizer.lr) == (128, 16, 1e-6)
    assert (config.rl.updates_per_step, config.rl.max_staleness, config.rl.kl_coef) == (1, 0, 0.0)
    assert config.actors.max_model_tokens == 8192


def test_the_1_5b_preset_has_the_numbers_of_the_paper() -> None:
    config = load(FOLDER / "still3_1_5b.yaml")
    assert (config.rl.groups_per_step, config.rl.group_size, config.rl.optimizer.lr) == (128, 8, 2e-6)
    assert (config.rl.updates_per_step, config.rl.kl_coef) == (2, 1e-3)
    assert config.rl.reference_every > 0


def test_the_tool_preset_has_the_numbers_of_the_paper() -> None:
    config = load(FOLDER / "still3_tool_32b.yaml")
    sft, optimizer = config.sft, config.sft.optimizer
    assert (sft.epochs, sft.demonstrations_per_step, sft.max_tokens) == (17, 96, 20_000)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup_share, optimizer.schedule) == (
        1e-5,
        0.1,
        0.1,
        "cosine",
    )
    assert config.tools[0].options == {"timeout_seconds": 5, "max_output_characters": 400}
    assert config.samples["blocks"].sampler.options["max_blocks"] == 3
    assert (config.eval.samples_per_problem, config.eval.sampling.temperature, config.eval.sampling.top_p) == (
        8,
        0.6,
        0.95,
    )


def test_the_32b_preset_has_its_second_stage_by_override() -> None:
    overrides = ["actors.max_model_tokens=20480", "rl.sampling.max_response_tokens=19456"]
    config = load_config(FOLDER / "still3_zero_32b.yaml", [*overrides, "eval.sampling.max_response_tokens=19456"])
    assert config.learners.max_tokens_per_micro_batch == 20480


EXPERIMENTS = sorted((FOLDER / "miniature").glob("*.yaml"))
RUNS = [(path, run) for path in EXPERIMENTS for run in load_experiment(path).runs]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_loads_names_its_paper_and_says_where_it_departs(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert experiment.paper
    assert experiment.compare
    comment = path.read_text().partition("\nname:")[0]
    assert comment.startswith("# ")
    assert "arXiv" in comment
    assert "Departs from it" in comment


@pytest.mark.parametrize(("path", "run"), RUNS, ids=lambda value: getattr(value, "stem", value))
def test_each_run_of_an_experiment_is_a_config_whose_references_and_options_exist(
    path: Path, run: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rlsys.run, "load_tokenizer", lambda _: None)
    config = load_experiment(path).config_of(run, 3, tmp_path)
    rlsys.run.check(config)
    (tmp_path / "copy.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "copy.yaml") == config


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_fits_on_two_cores(path: Path, tmp_path: Path) -> None:
    experiment = load_experiment(path)
    for run in experiment.runs:
        config = experiment.config_of(run, 0, tmp_path)
        assert config.actors.count * config.actors.cpus + config.learners.count * config.learners.cpus <= 2
        assert config.actors.gpus == config.learners.gpus == 0
