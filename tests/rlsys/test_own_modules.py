"""A user's own sampler, pair builder and judge, in a module of theirs, named in the configuration: a whole run."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlsys.run
from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.conversation import untaught
from rlsys.errors import ConfigError
from rlsys.run_chat import run_chat
from rlsys.run_rewards import RunRewards
from rlsys.samples import read_samples
from rlsys.types import Rollout
from tests.rlsys.test_chain import NoRay
from tests.rlsys.tpo_stage import TOKENIZER, World, faked, numbered, write_model

MODULE = '''
from rlsys.demonstrations import Demonstration
from rlsys.errors import ConfigError
from rlsys.pairs import PreferencePair
from rlsys.run_rewards import RunRewards
from rlsys.samples import Sample, read_samples


class Drafts:
    """Answers every problem with texts of growing length."""

    uses_rollout_actors = False

    def __init__(self, *, word: str) -> None:
        self.word = word

    def check_config(self, config, *, place):
        if config.tools:
            raise ConfigError(f"{place}: drafts call no tools")

    async def start(self, context):
        self.provenance = {**context.provenance, "sampler": "drafts"}

    async def sample(self, problem, *, size):
        return [
            Sample(
                demonstration=Demonstration(problem=problem, segments=((f"{self.word} " * (index + 1), True),)),
                num_tokens=index + 1,
                provenance=self.provenance,
            )
            for index in range(size)
        ]

    async def close(self):
        return None


def longest_first(problems, *, path: str, least: int = 1) -> list[PreferencePair]:
    """The longest draft over the shortest, for each problem of the run."""
    drafts = {}
    for sample in read_samples(path):
        drafts.setdefault(sample.problem.id, []).append(sample)
    pairs = []
    for problem in problems:
        short, *_, long = sorted(drafts.get(problem.id, []), key=lambda sample: sample.num_tokens)
        if long.num_tokens - short.num_tokens >= least:
            sides = long.demonstration.segments, short.demonstration.segments
            pairs.append(PreferencePair(problem=problem, chosen=sides[0], rejected=sides[1]))
    return pairs


class ShortestWins:
    """A judge that compares siblings."""

    seen = []

    def score_group(self, group):
        self.seen += [text for rollout in group.rollouts for text in (rollout.response, rollout.transcript)]
        shortest = min(len(rollout.response) for rollout in group.rollouts)
        return [float(len(rollout.response) == shortest) for rollout in group.rollouts]
'''

YAML = """
name: own
trackers: []
stages: [drafts, preference]
model: {path: MODEL}
data:
  train: {use: "tests.rlsys.tpo_stage:numbered", options: {size: 12}}
  held_out: {use: "tests.rlsys.tpo_stage:numbered", options: {size: 2, first: 100}}
rewards: [{name: judge, use: "my_thinking:ShortestWins"}]
samples:
  drafts: {sampler: {use: "my_thinking:Drafts", options: {word: hm}}, samples_per_problem: 3}
preference:
  pairs: {use: "my_thinking:longest_first", options: {path: "${run_dir}/drafts/samples.parquet"}}
  epochs: 1
  pairs_per_step: 4
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Fake learners; `my_thinking` lies in a folder of the user, which Python looks into."""

    async def there(*_: Any, **__: Any) -> None:
        return None

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "my_thinking.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "theirs")
    monkeypatch.setattr("rlsys.run.cluster.require", there)
    monkeypatch.setattr(rlsys.run, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(rlsys.run, "plot_curves", lambda _: None)
    with faked() as found:
        yield found
    sys.modules.pop("my_thinking", None)


def configured(folder: Path, *overrides: str) -> Config:
    (folder / "own.yaml").write_text(YAML.replace("MODEL", str(write_model(folder / "seed", 0.5))))
    return load_config(folder / "own.yaml", [f"run_dir={folder / 'run'}", *overrides])


def test_their_sampler_makes_the_data_of_which_their_pairs_are_made_that_are_learned(
    tmp_path: Path, world: World
) -> None:
    rlsys.run.train(configured(tmp_path), session=NoRay())
    samples = read_samples(tmp_path / "run" / "drafts" / "samples.parquet")
    assert [sample.text for sample in samples] == ["hm ", "hm hm ", "hm hm hm "] * 12
    assert {sample.provenance["sampler"] for sample in samples} == {"drafts"}
    assert len(world.trained) == 3
    learned = [text for batch in world.trained for text in batch]
    assert len(learned) == 24
    assert sum("hm hm hm " in text for text in learned) == 12
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["drafts_samples"], summary["drafts_response_tokens"]) == (36, 2.0)
    assert "drafts_correct" not in summary, "nothing graded them"


def test_their_judge_compares_responses_and_never_sees_a_thought(tmp_path: Path, world: World) -> None:
    assert not world.trained
    thought = "chat.thought={prompt: '{message} T: R:', thought_mark: 'T:', response_mark: 'R:'}"
    config = configured(tmp_path, thought)
    rlsys.run.check(config)
    (problem,) = numbered(size=1)

    async def graded() -> list[float]:
        chat, rewards = await run_chat(config, str(config.model.path)), RunRewards(config)
        await rewards.start()
        texts = ["T: SECRET R: long enough", "T: SECRET, and a lot of it R: short", "SECRET"]
        group = await rewards.grade(problem, [chat.hide_thought(rollout(chat, problem, text)) for text in texts])
        await rewards.close()
        return [one.reward for one in group.rollouts]

    assert asyncio.run(graded()) == [0.0, 1.0, 0.0]
    seen = importlib.import_module("my_thinking").ShortestWins.seen
    assert "short" in seen
    assert "SECRET" not in "".join(seen)


def rollout(chat: Any, problem: Any, text: str) -> Rollout:
    prompt, written = chat.render(problem), [*chat.encode(text), TOKENIZER.eos_token_id]
    tokens = np.array([*prompt, *written], np.int32)
    made = untaught(tokens, np.arange(len(tokens)) >= len(prompt))
    return replace(made, response=text, transcript=TOKENIZER.decode(tokens.tolist()))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "samples.drafts.sampler.use=my_thinking:Draft",
            r"samples\.drafts\.sampler.*did you mean `my_thinking:Drafts`",
        ),
        ("samples.drafts.sampler.options={wrod: hm}", r"samples\.drafts\.sampler.*'wrod'; did you mean `word`"),
        ("preference.pairs.use=my_thinking:longest", r"preference\.pairs.*did you mean `my_thinking:longest_first`"),
        ("preference.pairs.options.lest=2", r"preference\.pairs.*'lest'; did you mean `least`"),
        ("rewards=[{use: 'my_thinking:ShortestWin'}]", r"rewards\.0.*did you mean `my_thinking:ShortestWins`"),
        ("tools=[{use: 'rlsys.tools.python:PythonTool'}]", r"^samples\.drafts\.sampler: drafts call no tools$"),
        ("rewards=[{use: 'our_thinking:Judge'}]", r"rewards\.0.*cannot import 'our_thinking'"),
    ],
)
def test_a_mistake_in_a_name_or_an_option_of_theirs_is_one_message_before_anything_starts(
    tmp_path: Path, world: World, override: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        rlsys.run.train(configured(tmp_path, override), session=NoRay())
    assert not (tmp_path / "run").exists()
    assert not world.calls
