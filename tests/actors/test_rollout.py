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
from rlsys.errors import ToolError
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
