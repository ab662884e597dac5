"""The rollout actor without its engine: what becomes of attempts that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys import function_tool
from rlsys.actors.rollout import RolloutActor
from rlsys.chat import Chat
from rlsys.config_file import load_config
from rlsys.demonstrations import Segments
from rlsys.errors import ToolError, TrainingStalledError
from rlsys.scratch import byte_tokenizer
from rlsys.types import Completion, Problem, RolloutGroup

CONFIG = """
name: actor
model: {path: nowhere}
data:
  train: {use: "stack_plugins:words_problems", options: {size: 1}}
  held_out: {use: "stack_plugins:words_problems", options: {size: 1}}
rewards: [{name: digits, use: "stack_plugins:share_of_digits"}]
tools: [{use: "rlsys.function_tool:look_up"}]
chat: {tool_format: template}
"""
TOKENIZER = byte_tokenizer()


def look_up(word: str) -> str:
    """Looks up a word."""
    if word == "gone":
        raise ToolError("the dictionary is gone")
    return f"about {word}"


class Engine:
    """Calls the tool with one word of its list in each first turn, then ends."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:  # noqa: ARG002
        said = "7<|im_end|>"
        if "about" not in TOKENIZER.decode(prompt):
            call = f'{{"name": "look_up", "arguments": {{"word": "{self.words.pop(0)}"}}}}'
            said = f"<tool_call>{call}</tool_call><|im_end|>"
        ids = np.array(TOKENIZER.encode(said, add_special_tokens=False), dtype=np.int32)
        return Completion(
            tokens=ids,
            logprobs=np.zeros(len(ids), dtype=np.float32),
            versions=np.zeros(len(ids), dtype=np.int32),
            text="",
            finish_reason="stop",
        )


def test_a_rollout_whose_tool_cannot_work_is_dropped_and_counted_and_its_siblings_live(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(function_tool, "look_up", look_up, raising=False)
    (tmp_path / "actor.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "actor.yaml")

    async def main() -> RolloutGroup:
        actor = RolloutActor(config=config, model_path="nowhere", index=0)
        actor._engine = Engine("rain", "gone", "snow", "gone")  # type: ignore[assignment]
        actor._chat = Chat(TOKENIZER, actor._tools, tool_format="template")
        problem = Problem(id="p", prompt=({"role": "user", "content": "?"},))
        return await actor.act(problem, size=4, sampling=config.rl.sampling, group_id="group")

    group = asyncio.run(main())
    assert len(group.rollouts) == 2
    assert group.dropped == {"tool_error: the dictionary is gone": 2}


class Silent:
    """Writes one of its words in each rollout; takes part in weight updates."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:  # noqa: ARG002
        ids = np.array(TOKENIZER.encode(f"{self.words.pop(0)}<|im_end|>", add_special_tokens=False), dtype=np.int32)
        nothing = np.zeros(len(ids))
        return Completion(
            tokens=ids,
            logprobs=nothing.astype(np.float32),
            versions=nothing.astype(np.int32),
            text="",
            finish_reason="stop",
        )

    async def resume(self, version: int) -> None:
        """Nothing was frozen."""


def act(rewards: str, folder: Path, *words: str, version: int = 0, prefix: Segments = ()) -> RolloutGroup:
    """A group of rollouts that say these words behind a prefix, after so many policy steps."""
    text = CONFIG.replace('rewards: [{name: digits, use: "stack_plugins:share_of_digits"}]', f"rewards: [{rewards}]")
    (folder / "actor.yaml").write_text(text.replace('tools: [{use: "rlsys.function_tool:look_up"}]', ""))
    config = load_config(folder / "actor.yaml")

    async def main() -> RolloutGroup:
        actor = RolloutActor(config=config, model_path="nowhere", index=0)
        actor._engine = Silent(*words)  # type: ignore[assignment]
        actor._chat = Chat(TOKENIZER, [], tool_format="template")
        await actor.resume(version)
        problem = Problem(id="p", prompt=({"role": "user", "content": "?"},))
        sampling = config.rl.sampling
        return await actor.act(problem, size=len(words), sampling=sampling, group_id="group", prefix=prefix)

    return asyncio.run(main())


LENGTH = '{name: length, use: "reward_plugins:length", weight: 1, final_weight: 0, final_step: 4}'
RANKS = '{name: ranks, use: "reward_plugins:Ranks"}'


@pytest.mark.parametrize(
    # shares of siblings that are shorter: 0, 1/2; lengths 1 and 3 with weight 1, 1/2, 0
    ("version", "expected"),
    [(0, [1.0, 3.5]), (2, [0.5, 2.0]), (4, [0.0, 0.5]), (9, [0.0, 0.5])],
)
def test_a_group_is_compared_after_its_rollouts_were_graded_with_the_weights_of_the_policy_step(
    tmp_path: Path, version: int, expected: list[float]
) -> None:
    group = act(f"{RANKS}, {LENGTH}", tmp_path, "a", "abc", version=version)
    assert group.rewards.tolist() == expected
    assert [rollout.reward_terms["ranks"] for rollout in group.rollouts] == [0.0, 0.5]
    assert all(rollout.metrics["reward_seconds"] >= 0 for rollout in group.rollouts)


def test_all_siblings_go_on_behind_the_prefix_and_are_graded_with_it(tmp_path: Path) -> None:
    group = act(LENGTH, tmp_path, "a", "abc", prefix=(("Wait, ", True), ("read", False), ("so ", True)))
    assert [rollout.response for rollout in group.rollouts] == ["Wait, so a", "Wait, so abc"]
    assert group.rewards.tolist() == [len("Wait, so a"), len("Wait, so abc")]
    assert [rollout.first_version for rollout in group.rollouts] == [-1, -1]


def test_a_prefix_without_room_behind_it_is_counted_as_a_prompt_that_is_too_long(tmp_path: Path) -> None:
    group = act(LENGTH, tmp_path, "a", "b", prefix=(("long " * 200, True),))
    assert (group.rollouts, group.dropped) == ((), {"prompt_too_long": 2})


def test_siblings_that_a_reward_failed_are_dropped_by_status_and_the_rest_is_compared(tmp_path: Path) -> None:
    obedient = '{name: obedient, use: "reward_plugins:Obedient", timeout_seconds: 0.05}'
    group = act(f"{obedient}, {RANKS}", tmp_path, "1", "sleep 60", "raise no", "22")
    assert group.dropped == {
        "reward_timeout: reward 'obedient' did not grade within 0.05 s": 1,
        "reward_error: reward 'obedient' raised ValueError: no": 1,
    }
    assert group.rewards.tolist() == [1.0, 22.5]


def test_a_group_that_cannot_be_compared_is_dropped_with_all_siblings(tmp_path: Path) -> None:
    group = act(f"{LENGTH}, {RANKS}", tmp_path, "a", "fail", "b")
    assert group.rollouts == ()
    assert group.dropped == {
        "reward_error: reward 'ranks' raised ValueError: one of them is not to be compared": 3,
    }


def test_a_reward_whose_failures_end_the_run_ends_it(tmp_path: Path) -> None:
    with pytest.raises(TrainingStalledError, match="raised ValueError: no; the run ends"):
        act('{use: "reward_plugins:Obedient", on_failure: fail}', tmp_path, "1", "raise no")
