"""The README's code blocks are run, and what it names exists."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.algorithms import algorithms
from rlsys.config import PlugIn, PoolConfig, RewardConfig
from rlsys.config_file import load_config
from rlsys.function_tool import build_tool
from rlsys.interfaces import ToolResult
from rlsys.plugins import resolve
from rlsys.reward_terms import RewardTerm, check_reward
from rlsys.types import Problem, Rollout

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def module_of(label: str) -> tuple[ModuleType, str]:
    """The README's Python block with this label, as a module."""
    match = re.search(rf"```python {label}\n(.*?)```", README, re.DOTALL)
    assert match is not None
    module = ModuleType(label)
    exec(compile(match[1], f"README.md ({label})", "exec"), module.__dict__)
    return module, match[1]


def lines_of_code(text: str) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())


def graded_by_the_readme(reward: Any, response: str) -> float:
    problem = Problem(id="p", prompt=({"role": "user", "content": "2+3"},), answer="5")
    none: Any = np.zeros(0)
    arrays = {"tokens": none, "loss_mask": none, "logprobs": none, "versions": none}
    term = RewardTerm(name="readme", reward=reward)
    return asyncio.run(term.grade(problem, Rollout(**arrays, response=response))).score


def test_the_reward_class_of_the_readme_grades_a_rollout_in_at_most_12_lines() -> None:
    module, text = module_of("reward")
    assert lines_of_code(text) <= 12
    concise = module.__dict__["Concise"](target=10)
    assert graded_by_the_readme(concise, "." * 10) == 0.0
    assert graded_by_the_readme(concise, "." * 30) == pytest.approx(-0.02)


def test_the_reward_function_of_the_readme_grades_a_rollout_in_at_most_12_lines() -> None:
    module, text = module_of("reward-function")
    assert lines_of_code(text) <= 12
    assert graded_by_the_readme(module.__dict__["boxed"], r"so \boxed{5}") == 1.0
    assert graded_by_the_readme(module.__dict__["boxed"], r"\boxed{6}") == 0.0


def test_the_rewards_of_the_readme_pass_the_check_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = module_of("reward")
    module.__dict__.update(module_of("reward-function")[0].__dict__)
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    (section,) = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "my_rewards" in block]
    for index, options in enumerate(yaml.safe_load(section)["rewards"]):
        check_reward(RewardConfig(**options), place=f"rewards.{index}")
        check_reward(RewardConfig(**options, actors=PoolConfig(count=4, cpus=1)), place=f"rewards.{index}")


def test_the_function_of_the_readme_is_a_tool_in_at_most_12_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    module, text = module_of("function")
    assert lines_of_code(text) <= 12
    monkeypatch.setitem(sys.modules, "my_tools", module)
    tool = build_tool(PlugIn(use="my_tools:convert"), place="tools.0")

    async def call(arguments: dict[str, Any]) -> ToolResult:
        session = await tool.open("r")
        return await session.call(arguments)

    assert tool.parameters["required"] == ["amount"]
    assert asyncio.run(call({"amount": 2})).text == "2000.0"
    assert "amount" in asyncio.run(call({"amount": "far"})).text


def test_the_tool_of_the_readme_answers_in_at_most_12_lines() -> None:
    module, text = module_of("tool")
    assert lines_of_code(text) <= 12
    tool = module.__dict__["Dictionary"]()

    async def use() -> ToolResult:
        session = await tool.open("rollout-0")
        result: ToolResult = await session.call({"word": "ray"})
        await session.close()
        return result

    assert asyncio.run(use()).text == "a half-line"
    assert tool.parameters["required"] == ["word"]


def test_every_yaml_block_is_a_section_of_the_configuration() -> None:
    from rlsys.config import Config

    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        assert set(yaml.safe_load(block)) <= set(Config.__dataclass_fields__)


def test_every_file_that_the_readme_links_to_exists() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert len(targets) > 8
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


def test_the_make_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^\$ make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_every_algorithm_of_the_readme_is_a_valid_configuration() -> None:
    found = algorithms()
    assert len(found) == README.partition("## Algorithms")[2].partition("## ")[0].count("\n|") - 2
    for settings in found.values():
        config = load_config(ROOT / "configs" / "quickstart.yaml", settings)
        for reference in (config.rl.advantage, config.rl.loss):
            assert callable(resolve(reference, place="rl"))
