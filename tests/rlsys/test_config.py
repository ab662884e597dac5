"""The configuration: what overrides what, and what a mistake is told."""

from pathlib import Path

import pytest

from rlsys.config import Config, PlugIn, RlConfig
from rlsys.config_file import flatten, load_config, origins, read_tree, structure, to_yaml
from rlsys.errors import ConfigError
from rlsys.scratch import ScratchModel

BASE = """\
name: demo
model:
  scratch: {hidden_size: 32, num_heads: 2, num_kv_heads: 1}
data:
  train: {use: "rlsys.data:jsonl_problems", options: {path: train.jsonl}}
  held_out: {use: "rlsys.data:jsonl_problems", options: {path: held_out.jsonl}}
rewards:
  - use: rlsys.rewards.math:MathReward
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def load(file: Path, more: str = "", *overrides: str, base: str = BASE) -> Config:
    file.write_text(base + more)
    return load_config(file, overrides)


def test_overrides_beat_the_file_and_the_file_beats_the_default(file: Path) -> None:
    config = load(file, "rl: {group_size: 6, groups_per_step: 4}\n", "rl.group_size=3", "rl.optimizer.lr=1e-4")
    assert (config.rl.group_size, config.rl.groups_per_step, config.rl.updates_per_step) == (3, 4, 1)
    assert (config.rl.optimizer.lr, config.rl.optimizer.betas) == (1e-4, (0.9, 0.95))


def test_sections_are_plain_dataclasses(file: Path) -> None:
    config = load(file)
    assert type(config) is Config
    assert config.model.scratch == ScratchModel(hidden_size=32, num_heads=2, num_kv_heads=1)
    assert type(config.data.train.options) is dict
    assert type(config.stages) is list


def test_defaults_of_a_stage_are_not_those_of_another(file: Path) -> None:
    config = load(file)
    assert (config.sft.optimizer.lr, config.rl.optimizer.lr) == (1e-5, 1e-6)


def test_the_run_dir_follows_the_name(file: Path) -> None:
    assert load(file).run_dir == "runs/demo"
    assert load(file, "", "name=other").run_dir == "runs/other"
    assert load(file, "run_dir: /data/${name}-${seed}\n", "seed=4").run_dir == "/data/demo-4"


@pytest.mark.parametrize(
    ("more", "overrides", "nearest"),
    [
        ("rl: {grup_size: 4}\n", [], "group_size"),
        ("rll: {}\n", [], "rl"),
        ("", ["rl.optimizer.learning_rat=1"], None),
        ("", ["rl.optimizer.warmup_step=1"], "warmup_steps"),
        ("tools: [{use: 'a:b', optoins: {}}]\n", [], "options"),
    ],
)
def test_a_misspelt_key_names_the_file_and_the_nearest_key(
    file: Path, more: str, overrides: list[str], nearest: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, more, *overrides)
    message = str(caught.value)
    assert message.startswith(f"{file}: Key ")
    assert nearest is None or f"'{nearest}'" in message.partition("Did you mean")[2]
    assert "\n" not in message


@pytest.mark.parametrize(
    ("more", "override", "key"),
    [
        ("rl: {group_size: many}\n", "seed=1", "rl.group_size"),
        ("rl: {group_size: 1.5}\n", "seed=1", "rl.group_size"),
        ("seed: true\n", "rl.group_size=4", "seed"),
        ("", "rl.optimizer.lr=fast", "rl.optimizer.lr"),
        ("", "chat.tool_format=xml", "chat.tool_format"),
        ("", "rl.loss=null", "rl.loss"),
        ("rl:\n", "seed=1", "rl"),
    ],
)
def test_a_value_of_the_wrong_type_names_the_file_and_the_key(file: Path, more: str, override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, more, override)
    assert str(caught.value).startswith(f"{file}: ")
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("more", "overrides", "says"),
    [
        ("", ["model.path=some/model"], "either `path`"),
        ("", ["model.scratch=null"], "either `path`"),
        ("", ["rl.group_size=1"], "rl.group_size must be at least 2"),
        ("", ["rl.max_staleness=-1"], "0 is synchronous"),
        ("", ["rl.sampling.top_p=0.9"], "rl.sampling.top_p=1.0"),
        ("", ["rl.sampling.temperature=0"], "temperature above 0"),
        ("", ["rl.updates_per_step=65"], "more than the rollouts of one step"),
        ("", ["rl.sampling.max_response_tokens=512"], "leaves no room for a prompt in actors.max_model_tokens"),
        ("", ["eval.sampling.max_response_tokens=600"], "eval.sampling.max_response_tokens"),
        ("", ["stages=[rl,tune]"], "unknown stage 'tune'; known: sft, preference, reward_model, tpo, rl, eval"),
        ("", ["stages=[]"], "stages is empty"),
        ("", ["stages=[rl,rl]"], "names a stage twice"),
        ("", ["stages=[sft]"], "sft.demonstrations is not set"),
        ("", ["rewards=[]"], "rewards is empty"),
        ("", ["rewards=[{use: 'a:b'},{use: 'a:c'}]"], "must differ; set `name`"),
        ("", ["actors.count=0"], "actors.count is 0"),
        ("", ["actors.gpus=0.5"], "whole GPUs"),
        ("", ["learners.count=0"], "learners.count is 0"),
        ("", ["learners.gpus=2"], "no GPU or one"),
        ("", ["model.scratch.hidden_size=30"], "hidden_size 30 must be a multiple"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_the_fix(
    file: Path, more: str, overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, more, *overrides)
    assert says in str(caught.value)


def test_a_missing_name_is_asked_for(file: Path) -> None:
    with pytest.raises(ConfigError, match="name"):
        load(file, base=BASE.replace("name: demo\n", ""))


def test_a_plug_in_without_a_reference_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="use"):
        load(file, "tools: [{options: {seconds: 3}}]\n")


def test_lists_of_plug_ins_keep_their_order_and_options(file: Path) -> None:
    tools = "tools:\n  - use: a.b:C\n    options: {seconds: 2.5, nested: {deep: [1, two]}}\n  - use: d.e:F\n"
    config = load(file, tools, base=BASE + "  - {use: my.reward:length, name: length, weight: -0.5}\n")
    assert [reward.name for reward in config.rewards] == ["reward", "length"]
    assert (config.rewards[1].use, config.rewards[1].weight) == ("my.reward:length", -0.5)
    assert [tool.use for tool in config.tools] == ["a.b:C", "d.e:F"]
    assert config.tools[0].options == {"seconds": 2.5, "nested": {"deep": [1, "two"]}}
    assert config.tools[1].options == {}


def test_a_list_can_be_replaced_on_the_command_line(file: Path) -> None:
    config = load(file, "", "tools=[{use: 'x.y:Z', options: {a: 1}}]", "stages=[rl,eval]")
    assert (config.tools[0].use, config.tools[0].options, config.stages) == ("x.y:Z", {"a": 1}, ["rl", "eval"])


def test_an_override_without_a_value_is_told_the_form(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"'rl.group_size' is not of the form section\.key=value"):
        load(file, "", "rl.group_size")


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration at .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["a: [", "- one\n- two\n", "", "just words", "run_dir: '${oops'\n"])
def test_a_file_that_is_no_configuration_is_named(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_an_interpolation_of_an_unknown_key_is_an_error(file: Path) -> None:
    with pytest.raises(ConfigError, match="'nam' not found"):
        load(file, "run_dir: runs/${nam}\n")


def test_origins_give_the_file_and_line_or_the_command_line(file: Path) -> None:
    more = "tools:\n  - use: a:b\n  - use: c:d\n    options:\n      seconds: 2\nrl: {group_size: 4}\nstages: [rl]\n"
    overrides = ["rl.group_size=6", "seed=3"]
    load(file, more, *overrides)
    found = origins(file, overrides)
    assert found["name"] == f"{file}:1"
    assert found["model.scratch.num_kv_heads"] == f"{file}:3"
    assert found["data.held_out.options.path"] == f"{file}:6"
    assert found["rewards.0.use"] == f"{file}:8"
    assert found["tools.1.use"] == f"{file}:11"
    assert found["tools.1.options.seconds"] == f"{file}:13"
    assert found["stages"] == f"{file}:15"
    assert found["rl.group_size"] == found["seed"] == "command line"
    assert "rl.groups_per_step" not in found


def test_the_keys_of_a_mapping_given_on_the_command_line_come_from_there(file: Path) -> None:
    load(file, "")
    found = origins(file, ["rl.response_tokens={1: 64, 20: 96}", "tools=[{use: 'a:b'}]", "trackers=[]", "run_dir="])
    for key in ("rl.response_tokens.1", "rl.response_tokens.20", "tools.0.use", "trackers", "run_dir"):
        assert found[key] == "command line"


def test_another_plug_in_does_not_inherit_the_options_of_the_one_before_it(file: Path) -> None:
    load(file, "")
    trees = [
        read_tree(file),
        {"rl": {"steps": 3}, "sft": {"demonstrations": {"use": "a:b", "options": {"old": 1, "kept": {"x": 1}}}}},
        {"sft": {"demonstrations": {"use": "a:b", "options": {"kept": {"y": 2}}}}},
    ]
    same = structure(Config, trees, place="here")
    assert same.sft.demonstrations is not None
    assert same.sft.demonstrations.options == {"old": 1, "kept": {"x": 1, "y": 2}}
    another = {"sft": {"demonstrations": {"use": "c:d", "options": {"new": 2}}}}
    other = structure(Config, [*trees, another], place="here")
    assert other.sft.demonstrations == PlugIn(use="c:d", options={"new": 2})
    assert other.rl.steps == 3


def test_origins_use_the_keys_of_flatten(file: Path) -> None:
    config = load(file, "tools: [{use: 'a:b', options: {seconds: 2}}]\n", "rl.group_size=4")
    assert set(origins(file, ["rl.group_size=4"])) <= set(flatten(config))


def test_flatten_has_every_leaf_under_its_dotted_key(file: Path) -> None:
    leaves = flatten(load(file, "tools: [{use: 'a:b', options: {seconds: 2}}]\n"))
    assert leaves["rl.optimizer.max_grad_norm"] == 1.0
    assert leaves["tools.0.options.seconds"] == 2
    assert leaves["rewards.0.options"] == {}
    assert leaves["stages"] == ["rl"]
    assert leaves["run_dir"] == "runs/demo"


def test_the_configuration_written_as_yaml_is_read_back_the_same(file: Path, tmp_path: Path) -> None:
    more = (
        'tools: [{use: "a:b", options: {seconds: 2.5, text: "x: y \\n\'#"}}]\n'
        "chat: {template_options: {enable_thinking: true}}\n"
        "actors: {resources: {rollout: 1}}\n"
        "sft: {demonstrations: {use: 'a:b'}}\n"
        "stages: [sft, rl]\n"
    )
    config = load(file, more, "rl.optimizer.betas=[0.8,0.99]", "rl.optimizer.lr=3e-7")
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config
    assert load_config(again, ["name=renamed"]).run_dir == "runs/demo", "what is written is resolved"


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nrl:\n  steps: 1\nactors: {count: 1}\nrl:\n  group_size: 4\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml: `rl` stands twice, in line 2 and in line 5"):
        load_config(file)


def test_a_key_of_an_anchor_may_be_set_again_beside_it() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    assert (config.data.train.options["size"], config.data.held_out.options["size"]) == (8000, 256)


def test_at_least_one_checkpoint_is_kept() -> None:
    with pytest.raises(ConfigError, match=r"rl\.keep_checkpoints is 0"):
        RlConfig(keep_checkpoints=0)
