"""Between messages and tokens: a problem is rendered once; after that a rollout is token ids, only ever appended to.

Two ways of calling a tool are understood. *fenced*: a ```python block inside the answer, its output pasted behind it
(STILL-3, arXiv 2503.04548). *template*: `<tool_call>` JSON at the end of a turn, tools and results rendered by the
model's own chat template; OpenAI's forms of it are understood as well. A call that cannot be understood, or whose
arguments do not fit the tool's schema, is answered with a text that says so; it never raises.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.arguments import ArgumentChecker
from rlsys.config import ChatConfig
from rlsys.errors import ConfigError
from rlsys.interfaces import Tool, ToolResult
from rlsys.thoughts import Thoughts
from rlsys.types import Problem, Rollout

_FENCE_CLOSE = "\n```\n"
_FENCED_CODE = re.compile(r"```python\n(?P<code>(?:(?!```).)*)\n```\n?\Z", re.DOTALL)
_TEMPLATE_CALL = re.compile(r"<tool_call>(?P<body>.*?)</tool_call>", re.DOTALL)
_OPEN_CALL, _CLOSE_CALL = "<tool_call>", "</tool_call>"
_SHAPE = '{"name": ..., "arguments": {...}}'
_TURN_MARK, _RESULT_MARK = "ASSISTANT-TURN-MARK", "TOOL-RESULT-MARK"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """What the policy asked for; `error` says why it cannot be done, to be read by the policy."""

    name: str
    arguments: Mapping[str, Any]
    error: str | None = None


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or hub name.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"no tokenizer in {path!r} ({first}); save one there with tokenizer.save_pretrained"
        ) from error


class Chat:
    """The chat of one model: its tokenizer, its template, and the tools that it may call."""

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[Tool],
        *,
        tool_format: str = "fenced",
        template_options: Mapping[str, Any] | None = None,
        thoughts: Thoughts | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; add one to tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.thoughts = thoughts
        self.tools = {tool.name: tool for tool in tools}
        if len(self.tools) < len(tools):
            raise ConfigError(f"tools: the names {[tool.name for tool in tools]} must differ")
        self._checkers = {tool.name: ArgumentChecker(tool.name, tool.parameters) for tool in tools}
        self._fenced = tool_format == "fenced"
        if self._fenced and tools and list(self.tools) != ["python"]:
            raise ConfigError(
                f"chat.tool_format=fenced calls one tool, `python`, but tools has {', '.join(self.tools)}; "
                "use chat.tool_format=template"
            )
        self._template_options = dict(template_options or {})
        if tools and not self._fenced and _RESULT_MARK not in self._text_after_turn([_RESULT_MARK]):
            raise ConfigError(
                "the chat template does not render tool results; use chat.tool_format=fenced or another template"
            )

    @classmethod
    def load(cls, model_path: str, tools: Sequence[Tool], config: ChatConfig) -> Chat:
        """The chat of the model in this folder."""
        return cls(
            load_tokenizer(model_path),
            tools,
            tool_format=config.tool_format,
            template_options=config.template_options,
            thoughts=None if config.thought is None else Thoughts(config.thought),
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Same for two chats where the same text becomes the same tokens: of tokenizer, template, its options, tools
        and the thought prompt."""
        parts: list[Any] = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template]
        parts += [self._template_options, self._schemas]
        if self.thoughts is not None:
            parts.append(self.thoughts.prompt)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()[:16]

    @property
    def stop_strings(self) -> list[str]:
        """Texts at which the engine must stop for a tool."""
        return [_FENCE_CLOSE] if self._fenced and self.tools else []

    def render(self, problem: Problem) -> list[int]:
        """The prompt as token ids, up to where the assistant begins; where thoughts are hidden, it asks for them.

        Raises:
            DataError: there is no message that the thought prompt could go to.
        """
        return self.encode(self._render(self.messages(problem)))

    def messages(self, problem: Problem) -> list[dict[str, Any]]:
        """The messages that the prompt is made of; raises as `render` does."""
        if self.thoughts is not None:
            return self.thoughts.instruct(problem)
        return [dict(message) for message in problem.prompt]

    def hide_thought(self, rollout: Rollout) -> Rollout:
        """The rollout with its thought hidden from rewards, if there is one to hide (see `Thoughts.hide`)."""
        return rollout if self.thoughts is None else self.thoughts.hide(rollout, self.decode)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, without the end-of-turn mark."""
        end_of_turn = self.tokenizer.eos_token_id  # looked up by name each time: slow
        kept = [token for token in tokens if token != end_of_turn]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    def parse_calls(self, text: str, *, turn_ended: bool) -> list[ToolCall]:
        """The tool calls at the end of what the policy wrote in this turn; none where it did not call."""
        if not self.tools:
            return []
        if self._fenced:
            match = None if turn_ended else _FENCED_CODE.search(text)
            return [] if match is None else [self._checked("python", {"code": match["code"]})]
        if not turn_ended:
            return []
        # Only up to the last end of a call: behind it the pattern would look for one from every beginning again.
        closed, end, rest = text.rpartition(_CLOSE_CALL)
        calls = [self._parse_json(match["body"]) for match in _TEMPLATE_CALL.finditer(closed + end)]
        if _OPEN_CALL in rest:
            error = f"The tool call is not closed. Write {_OPEN_CALL}{_SHAPE}{_CLOSE_CALL}."
            calls.append(ToolCall(name="", arguments={}, error=error))
        return calls

    def render_results(self, results: Sequence[ToolResult]) -> list[int]:
        """Token ids to append after a call, so that the policy reads the results and goes on."""
        texts = [self._harmless(result.text) for result in results]
        if self._fenced:
            # A fence inside the output would end the block early and could pose as the policy's own call.
            return self.encode("".join("```output\n" + text.replace("```", "'''") + _FENCE_CLOSE for text in texts))
        return self.encode(self._text_after_turn(texts))

    def _harmless(self, text: str) -> str:
        """Tool output as nothing but text: a mark such as end-of-turn is broken up, half characters are replaced."""
        for mark in self.tokenizer.all_special_tokens:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        return text.encode("utf-8", "replace").decode()

    def _checked(self, name: str, arguments: Mapping[str, Any]) -> ToolCall:
        if name not in self.tools:
            known = ", ".join(self.tools)
            return ToolCall(name=name, arguments=arguments, error=f"There is no tool {name!r}. Tools: {known}.")
        return ToolCall(name=name, arguments=arguments, error=self._checkers[name].complaint(arguments))

    def _parse_json(self, body: str) -> ToolCall:
        try:
            call = json.loads(body)
        except (ValueError, RecursionError) as error:
            return ToolCall(name="", arguments={}, error=f"The tool call is not valid JSON ({error}). Write {_SHAPE}.")
        if isinstance(call, dict) and isinstance(call.get("function"), dict):  # wrapped, as OpenAI's interface does it
            call = call["function"]
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return ToolCall(name="", arguments={}, error=f"The tool call has no name. Write {_SHAPE}.")
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):  # JSON within JSON, as OpenAI's interface does it
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            return ToolCall(name=call["name"], arguments={}, error=f"`arguments` must be an object. Write {_SHAPE}.")
        return self._checked(call["name"], arguments)

    def transcribe(self, messages: Sequence[Mapping[str, Any]], *, opens_turn: bool) -> str:
        """The messages as the template writes them; with `opens_turn`, up to where the assistant begins to write."""
        return self._render([dict(message) for message in messages], opens_turn=opens_turn)

    @property
    def _schemas(self) -> list[dict[str, Any]]:
        """The tools that the template renders, in OpenAI's shape."""
        if self._fenced:
            return []
        return [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
            }
            for t in self.tools.values()
        ]

    def _render(self, messages: list[dict[str, Any]], *, opens_turn: bool = True) -> str:
        options = dict(self._template_options)
        if schemas := self._schemas:
            options["tools"] = schemas
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_turn, **options)
        return str(text)

    def _text_after_turn(self, results: Sequence[str]) -> str:
        """What the template writes behind a turn that called tools: these results and the start of the next turn."""
        name = next(iter(self.tools))
        call = {"type": "function", "function": {"name": name, "arguments": {}}}
        text = self._render(
            [
                {"role": "user", "content": "question"},
                {"role": "assistant", "content": _TURN_MARK, "tool_calls": [call] * len(results)},
                *({"role": "tool", "name": name, "content": result} for result in results),
            ]
        )
        _, _, behind_mark = text.partition(_TURN_MARK)
        _, _, behind_turn = behind_mark.partition(self.tokenizer.eos_token)
        return behind_turn
