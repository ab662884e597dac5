"""The chat of a model as a run's rollouts have it, for those who render outside of a rollout actor."""

from __future__ import annotations

from rlsys.chat import Chat
from rlsys.config import Config
from rlsys.function_tool import build_tool
from rlsys.plugins import run_hook


async def run_chat(config: Config, model: str) -> Chat:
    """The chat of this model; where its template renders the tools, with the run's.

    A tool that has no description yet learns it from its server: it is started and closed again.
    """
    if config.chat.tool_format == "fenced":
        return Chat.load(model, [], config.chat)
    tools = [build_tool(tool, place=f"tools.{index}") for index, tool in enumerate(config.tools)]
    for tool in tools:
        if not tool.description:
            try:
                await run_hook(tool, "start")
            finally:
                await run_hook(tool, "close")
    return Chat.load(model, tools, config.chat)
