"""Supervised fine-tuning as a stage: what is learned from, what is only measured, how long, and what is too long."""

import asyncio
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.console import Console
from rlsys.demonstrations import Demonstration
from rlsys.errors import ConfigError, DataError
from rlsys.records import RunDirectory
from rlsys.scratch import ScratchModel, build_scratch_model
from rlsys.stages import Interrupted, Run
from rlsys.stages.sft import sft
from rlsys.stages.sft_data import hold_out
from rlsys.types import Problem, TrainBatch
from tests.rlsys.learner_here import FakeLearners, LearnerHere
from tests.rlsys.sampling_stage import problem

YAML = """
name: sft
trackers: []
stages: [sft]
model: {path: MODEL}
data:
  train: {use: "tests.rlsys.sampling_stage:numbered", options: {size: 20}}
  held_out: {use: "tests.rlsys.sampling_stage:numbered", options: {size: 1}}
actors: {max_model_tokens: 64}
learners: {count: 1, max_tokens_per_micro_batch: 256}
rewards: [{use: "tests.rlsys.sampling_stage:no_reward"}]
sft:
  demonstrations: {use: "tests.rlsys.test_sft:answers"}
  demonstrations_per_step: 4
"""


def answers(problems: list[Problem], *, long: int = 0, each: int = 1) -> list[Demonstration]:
    """`each` answers to every problem; the first `long` of them say it 40 times."""
    found = [(number, one) for number, one in enumerate(problems) for _ in range(each)]
    return [
        Demonstration(problem=one, segments=((f"It is {one.answer}. " * (40 if number < long else 1), True),))
        for number, one in found
    ]


def others(_problems: list[Problem], *, first: int, last: int) -> list[Demonstration]:
    return answers([problem(number) for number in range(first, last)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = ScratchModel(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=64)
    return build_scratch_model(tmp_path_factory.mktemp("sft") / "model", shape)


@pytest.fixture
def learners(monkeypatch: pytest.MonkeyPatch) -> type[FakeLearners]:
    monkeypatch.setattr(import_module("rlsys.stages.offline"), "LearnerGroup", FakeLearners)
    FakeLearners.batches, FakeLearners.measured = [], []
    return FakeLearners


def configured(folder: Path, model: Path, *overrides: str) -> Config:
    (folder / "sft.yaml").write_text(YAML.replace("MODEL", str(model)))
    return load_config(folder / "sft.yaml", [f"run_dir={folder / 'run'}", *overrides])


def in_stage(config: Config, *, resume: bool = False, stop: bool = False) -> list[dict[str, Any]]:
    """Run the stage; the lines of its metrics."""

    async def go() -> list[dict[str, Any]]:
        directory = RunDirectory.open(config, resume=resume, fresh=False)
        run = Run(config=config, directory=directory, console=Console(), stop=asyncio.Event())
        if stop:
            run.stop.set()
        await sft(run, Path(str(config.model.path)))
        return directory.metrics("sft")

    return asyncio.run(go())


def texts_of(batches: list[TrainBatch], model: Path) -> list[str]:
    from rlsys.chat import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    return [tokenizer.decode(rollout.tokens.tolist()) for batch in batches for rollout in batch.rollouts]


def test_so_many_epochs_show_every_demonstration_so_often(
    tmp_path: Path, model: Path, learners: type[FakeLearners]
) -> None:
    lines = in_stage(configured(tmp_path, model, "sft.epochs=3"))
    assert len(lines) == 15
    assert learners.started["total_steps"] == 15
    texts = texts_of(learners.batches, model)
    assert {texts.count(text) for text in texts} == {3}
    assert [line["epoch"] for line in lines[4::5]] == [1, 2, 3]
    assert {"loss", "tokens", "epoch"} <= lines[0].keys()


def test_a_part_of_an_epoch_is_rounded_up_to_a_step(tmp_path: Path, model: Path, learners: type[FakeLearners]) -> None:
    assert len(in_stage(configured(tmp_path, model, "sft.epochs=0.45"))) == 3
    assert learners.started["total_steps"] == 3


def test_steps_and_epochs_exclude_one_another_and_without_either_there_are_100(
    tmp_path: Path, model: Path, learners: type[FakeLearners]
) -> None:
    with pytest.raises(ConfigError, match=r"sft.steps and sft.epochs are both given; leave one out"):
        configured(tmp_path, model, "sft.steps=3", "sft.epochs=1")
    assert len(in_stage(configured(tmp_path, model))) == 100
    assert learners.started["total_steps"] == 100


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.epochs=0", "sft.epochs is 0"),
        ("sft.steps=0", "sft.steps is 0"),
        ("sft.held_out_share=1.0", "sft.held_out_share is 1"),
        ("sft.held_out_every=5", "nothing is held out"),
        ("sft.max_tokens=1", "sft.max_tokens is 1"),
        ("sft.demonstrations_per_step=0", "sft.demonstrations_per_step is 0"),
        ("sft.too_long=shorten", "shorten"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, model: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(tmp_path, model, override)


def test_held_out_prompts_are_measured_every_so_often_and_at_the_end_and_never_learned_from(
    tmp_path: Path, model: Path, learners: type[FakeLearners]
) -> None:
    options = ("sft.held_out_share=0.2", "sft.held_out_every=4", "sft.steps=10", "sft.demonstrations.options.each=2")
    lines = in_stage(configured(tmp_path, model, *options))
    assert {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line} == {
        4: 0.5,
        8: 0.5,
        10: 0.5,
    }
    measured, learned = (set(texts_of(found, model)) for found in (learners.measured, learners.batches))
    assert len(measured) == 4
    assert not measured & learned
    assert all(len(batch.rollouts) == 8 for batch in learners.measured)  # both answers of each of the four prompts
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["sft_held_out"], summary["sft_demonstrations"], summary["sft_held_out_loss"]) == (8, 32, 0.5)


def test_a_source_of_its_own_is_measured_on_and_its_prompts_are_not_learned_from(
    tmp_path: Path, model: Path, learners: type[FakeLearners]
) -> None:
    source = "sft.held_out={use: 'tests.rlsys.test_sft:others', options: {first: 18, last: 23}}"
    lines = in_stage(configured(tmp_path, model, source, "sft.epochs=1"))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [5]  # 18 left, at the end only
    assert len(learners.measured[0].rollouts) == 5
    assert not set(texts_of(learners.measured, model)) & set(texts_of(learners.batches, model))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["sft_not_learned_from_because_held_out"] == 2
    everything = source.replace("18", "0")
    with pytest.raises(DataError, match="the prompt of every demonstration"):
        in_stage(configured(tmp_path, model, everything, f"run_dir={tmp_path / 'other'}"))


def test_a_share_is_held_out_by_prompt_the_same_for_a_seed_and_never_all_or_none() -> None:
    many = answers([problem(number) for number in range(10)], each=3)
    train, held_out = hold_out(many, 0.3, seed=0)
    assert (len(train), len(held_out)) == (21, 9)
    assert hold_out(many, 0.3, seed=0) == (train, held_out)
    assert hold_out(many, 0.3, seed=1)[1] != held_out
    assert [len(part) for part in hold_out(many, 0.001, seed=0)] == [27, 3]
    assert [len(part) for part in hold_out(many, 0.999, seed=0)] == [3, 27]
    with pytest.raises(DataError, match="have one prompt"):
        hold_out(many[:3], 0.3, seed=0)


def test_the_turns_of_one_chat_are_not_parted() -> None:
    opening = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"})
    chats = [
        Demonstration(problem=Problem(id=f"c{turn}", prompt=prompt), segments=(("answer", True),))
        for turn, prompt in enumerate([opening[:1], (*opening, {"role": "user", "content": "more"})])
    ]
    other = answers([problem(1)])
    for seed in range(5):
        train, _ = hold_out([*chats, *other], 0.5, seed=seed)
        assert train in (chats, other)


def test_too_long_is_an_error_that_names_the_longest_and_the_setting(
    tmp_path: Path, model: Path, learners: type[FakeLearners]
) -> None:
    config = configured(tmp_path, model, "sft.demonstrations.options.long=2")
    with pytest.raises(
        DataError,
        match=r"sft.demonstrations: 2 of 20 exceed 64 tokens \(actors.max_model_tokens, as sft.max_tokens is not "
        r"set\); the longest, of problem 'p1', has \d{3}; raise the limit, or set sft.too_long",
    ):
        in_stage(config)
    assert not learners.batches


def test_too_long_ones_are_dropped_or_cut_and_counted(
    tmp_path: Path, model: Path, learners: type[FakeLearners]
) -> None:
    for policy, count, longest in (("drop", 18, None), ("cut", 20, 64)):
        config = configured(
            tmp_path,
            model,
            "sft.demonstrations.options.long=2",
            f"sft.too_long={policy}",
            "sft.epochs=1",
            f"run_dir={tmp_path / policy}",
        )
        in_stage(config)
        summary = json.loads((tmp_path / policy / "summary.json").read_text())
        word = {"drop": "dropped", "cut": "cut"}[policy]
        assert (summary["sft_demonstrations"], summary[f"sft_too_long_and_{word}"]) == (count, 2)
        lengths = [len(rollout) for batch in learners.batches for rollout in batch.rollouts]
        assert max(lengths) <= 64
        assert longest is None or longest in lengths
    with pytest.raises(DataError, match=r"none is left; 20 are too long"):
        in_stage(configured(tmp_path, model, "sft.max_tokens=3", "sft.too_long=cut", f"run_dir={tmp_path / 'all'}"))


def test_the_longest_sequence_may_be_set_apart_from_the_engines_context(
    tmp_path: Path, model: Path, learners: type[FakeLearners]
) -> None:
    config = configured(tmp_path, model, "sft.demonstrations.options.long=1", "sft.max_tokens=500", "sft.epochs=1")
    assert len(in_stage(config)) == 5
    assert max(len(rollout) for batch in learners.batches for rollout in batch.rollouts) > 64


def silent(problems: list[Problem]) -> list[Demonstration]:
    return [Demonstration(problem=one, segments=()) for one in problems[:1]] + answers(problems[1:])


def none(_problems: list[Problem]) -> list[Demonstration]:
    return []


def unspoken(problems: list[Problem]) -> list[Demonstration]:
    turns = ({"role": "user", "content": "more"},)
    return [Demonstration(problem=problems[0], turns=turns)]


@pytest.mark.parametrize(
    ("source", "message"),
    [("none", "sft.demonstrations gave no demonstration"), ("unspoken", "'p0': nothing of its demonstration trains")],
)
def test_nothing_to_learn_is_an_error(
    tmp_path: Path, model: Path, learners: type[FakeLearners], source: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        in_stage(configured(tmp_path, model, f"sft.demonstrations.use=tests.rlsys.test_sft:{source}"))
    assert not learners.batches


def test_a_stopped_stage_goes_on_with_the_same_demonstrations_and_measurements(
    tmp_path: Path, model: Path, learners: type[FakeLearners]
) -> None:
    options = ("sft.held_out_share=0.2", "sft.held_out_every=1", "sft.epochs=2")
    whole = in_stage(configured(tmp_path, model, *options, f"run_dir={tmp_path / 'whole'}"))
    expected = texts_of(learners.batches, model)
    config = configured(tmp_path, model, *options)
    with pytest.raises(Interrupted, match="sft step 1"):
        in_stage(config, stop=True)
    found = texts_of(learners.batches, model)
    lines = in_stage(config, resume=True)
    assert found + texts_of(learners.batches, model) == expected
    assert [line["step"] for line in lines] == [line["step"] for line in whole] == list(range(1, 9))


@pytest.mark.parametrize("lora", ["null", "{rank: 4}"])
def test_all_weights_or_adapters_learn_what_is_demonstrated_and_the_held_out_loss_is_the_models_own(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, lora: str
) -> None:
    monkeypatch.setattr(import_module("rlsys.stages.offline"), "LearnerGroup", LearnerHere)
    config = configured(
        tmp_path,
        model,
        f"learners.lora={lora}",
        "sft.optimizer.lr=1.0e-2",
        "sft.steps=15",
        "sft.held_out_share=0.2",
        "sft.demonstrations_per_step=8",
    )
    lines = in_stage(config)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "sft" / "model")
    from rlsys.run_chat import run_chat
    from rlsys.stages.sft_data import sft_data

    held_out = sft_data(config, asyncio.run(run_chat(config, str(model)))).held_out
    total = 0.0
    for rollout in held_out:
        tokens = torch.from_numpy(rollout.tokens.astype(np.int64))
        with torch.no_grad():
            logprobs = left(tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        total -= float(logprobs[torch.from_numpy(rollout.loss_mask)[1:]].sum())
    expected = total / sum(rollout.num_trained_tokens for rollout in held_out)
    assert lines[-1]["held_out_loss"] == pytest.approx(expected, rel=1e-4)
