"""Groups that are given up: the first siblings by number decide, and nothing that depends on length does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.actors.rollout import RolloutActor
from rlsys.chat import Chat
from rlsys.config_file import load_config
from rlsys.scratch import byte_tokenizer
from rlsys.types import Completion, Problem, RolloutGroup

CONFIG = """
name: actor
model: {path: nowhere}
data:
  train: {use: "stack_plugins:words_problems", options: {size: 1}}
  held_out: {use: "stack_plugins:words_problems", options: {size: 1}}
rewards: [{name: length, use: "reward_plugins:REWARD"}]
"""
TOKENIZER = byte_tokenizer()


class Engine:
    """Writes the words in the order of the siblings; each takes so many turns of the event loop, or never ends."""

    def __init__(self, *answers: tuple[str, int]) -> None:
        self.answers = list(answers)
        self.begun, self.ended, self.aborted = 0, list[int](), list[int]()

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:  # noqa: ARG002
        number = self.begun
        self.begun += 1
        text, turns = self.answers[number]
        try:
            if turns < 0:
                await asyncio.Event().wait()
            for _ in range(turns):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.aborted.append(number)
            raise
        self.ended.append(number)
        ids = np.array(TOKENIZER.encode(f"{text}<|im_end|>", add_special_tokens=False), dtype=np.int32)
        return Completion(
            tokens=ids,
            logprobs=np.zeros(len(ids), np.float32),
            versions=np.zeros(len(ids), np.int32),
            text="",
            finish_reason="stop",
        )


def act(
    folder: Path, engine: Engine, *, give_up_after: int, seconds: float = 60.0, reward: str = "length"
) -> RolloutGroup:
    """A group with the reward of each sibling being the length of its word; nothing of it is left behind."""
    (folder / "actor.yaml").write_text(CONFIG.replace("REWARD", reward))
    config = load_config(folder / "actor.yaml")

    async def main() -> RolloutGroup:
        actor = RolloutActor(config=config, model_path="nowhere", index=0)
        actor._engine = engine
        actor._chat = Chat(TOKENIZER, [], tool_format="template")
        problem = Problem(id="p", prompt=({"role": "user", "content": "?"},))
        size, sampling = len(engine.answers), config.rl.sampling
        try:
            async with asyncio.timeout(seconds):
                return await actor.act(problem, size=size, sampling=sampling, group_id="g", give_up_after=give_up_after)
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}

    return asyncio.run(main())


def test_where_the_first_siblings_are_rewarded_alike_the_others_are_ended_and_their_requests_aborted(
    tmp_path: Path,
) -> None:
    engine = Engine(("one", 3), ("two", 0), ("three", -1), ("four", -1))
    group = act(tmp_path, engine, give_up_after=2)
    assert group.rewards.tolist() == [3.0, 3.0]
    assert group.dropped == {"given_up": 2}
    assert sorted(engine.aborted) == [2, 3]


def test_a_group_whose_first_siblings_differ_is_untouched(tmp_path: Path) -> None:
    engine = Engine(("one", 3), ("four", 0), ("two", 50), ("six", 9))
    group = act(tmp_path, engine, give_up_after=2)
    assert group.rewards.tolist() == [3.0, 4.0, 3.0, 3.0]
    assert (group.dropped, engine.aborted) == ({}, [])


@pytest.mark.parametrize("turns", [(0, 0, 90, 90), (90, 90, 0, 0), (90, 0, 0, 90)])
@pytest.mark.parametrize("words", [("one", "two", "three", "four"), ("one", "three", "two", "six")])
def test_neither_lengths_nor_the_order_in_which_siblings_end_decide(
    tmp_path: Path, words: tuple[str, ...], turns: tuple[int, ...]
) -> None:
    group = act(tmp_path, Engine(*zip(words, turns, strict=True)), give_up_after=2)
    given_up = len(words[0]) == len(words[1])
    assert group.dropped == ({"given_up": 2} if given_up else {})
    assert len(group.rollouts) == (2 if given_up else 4)


def test_siblings_that_end_early_and_alike_do_not_decide_for_those_before_them(tmp_path: Path) -> None:
    group = act(tmp_path, Engine(("three", 60), ("one", 60), ("two", 0), ("six", 0)), give_up_after=2)
    assert group.rewards.tolist() == [5.0, 3.0, 3.0, 3.0]


def test_a_first_sibling_that_could_not_be_graded_gives_nothing_up(tmp_path: Path) -> None:
    answers = (("1", 0), ("raise dice", 0), ("1", 5), ("1", 5))
    group = act(tmp_path, Engine(*answers), give_up_after=2, reward="Obedient")
    assert group.rewards.tolist() == [1.0, 1.0, 1.0]
    assert group.dropped == {"reward_error: reward 'length' raised ValueError: dice": 1}


def test_by_default_no_group_is_given_up(tmp_path: Path) -> None:
    group = act(tmp_path, Engine(*[("one", 0)] * 4), give_up_after=0)
    assert (group.rewards.tolist(), group.dropped) == ([3.0] * 4, {})


def test_an_act_that_is_cancelled_ends_all_siblings(tmp_path: Path) -> None:
    for give_up_after in (0, 2):
        engine = Engine(*[("one", -1)] * 4)
        with pytest.raises(TimeoutError):
            act(tmp_path, engine, give_up_after=give_up_after, seconds=0.2)
        assert sorted(engine.aborted) == [0, 1, 2, 3]
