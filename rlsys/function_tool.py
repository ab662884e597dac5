"""Tools from a configuration: a class of the shape of `Tool`, or a plain typed function, which is wrapped into one."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import textwrap
import threading
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import SchemaError, to_json

from rlsys.arguments import wrong_arguments
from rlsys.config import PlugIn
from rlsys.errors import ConfigError, ToolError
from rlsys.interfaces import Tool, ToolResult
from rlsys.plugins import build, check_options, resolve

MAX_LATE_THREADS = 64

_Outcome = tuple[BaseException | None, Any]


def build_tool(plug_in: PlugIn, *, place: str) -> Tool:
    """Make a tool of what a configuration names: an instance of a class, or a function as `FunctionTool`.

    Raises:
        ConfigError: it cannot be a tool; names what is missing.
    """
    target = resolve(plug_in.use, place=f"{place}.use")
    if inspect.isroutine(target):
        check_options(FunctionTool, plug_in.options, place=place, given=1)
        try:
            return FunctionTool(target, **plug_in.options)
        except ConfigError as error:
            raise ConfigError(f"{place}: {plug_in.use!r} cannot be a tool: {error}") from error
    tool = build(plug_in.use, plug_in.options, place=place)
    wrong = [
        *(name for name in ("name", "description") if not isinstance(getattr(tool, name, None), str)),
        *(["parameters"] if not isinstance(getattr(tool, "parameters", None), Mapping) else []),
        *(["open"] if not callable(getattr(tool, "open", None)) else []),
    ]
    if wrong:
        raise ConfigError(
            f"{place}.use: {plug_in.use!r} is no tool, it lacks {', '.join(wrong)}: a tool has a `name`, a "
            "`description`, `parameters` (a JSON schema of its arguments) and `async open(rollout_id)`; a plain typed "
            "function will do as well"
        )
    return tool  # type: ignore[no-any-return]  # just checked, as far as can be seen from outside


def check_tool(plug_in: PlugIn, *, place: str) -> None:
    """Find what is wrong with a tool's reference and options; makes no tool of a class, which might need its host.

    Raises:
        ConfigError: names the place and the fix.
    """
    target = resolve(plug_in.use, place=f"{place}.use")
    if inspect.isroutine(target):
        build_tool(plug_in, place=place)
    elif inspect.isclass(target):
        check_options(target, plug_in.options, place=place)


class FunctionTool:
    """A plain function as a tool, sync or async.

    Its name is the tool's; the first paragraph of its docstring is the description; its parameters with their type
    hints and defaults make the JSON schema, described by an `Args:` section in Google's style. What pydantic
    understands is understood: numbers, text, lists, dicts, `Literal`, `Optional`, enums, dataclasses, `Annotated`.

    A text that it returns is shown as it is, None as nothing, anything else as JSON; it may also return a `ToolResult`.
    Arguments that do not fit, an exception and a call longer than `timeout_seconds` become a text with `ok=False`; a
    `ToolError` is raised on and ends the rollout, for what is not the policy's doing, such as a database that is gone.
    A sync function runs in a thread of its own; one that is too late cannot be ended and runs on unheeded, and when 64
    of them do, calls raise `ToolError`. There is one function for all rollouts: state that must not be shared wants a
    class with `open`.
    """

    def __init__(self, function: Callable[..., Any], *, timeout_seconds: float = 30.0) -> None:
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds must be positive, got {timeout_seconds}")
        self.function = function
        self.timeout_seconds = timeout_seconds
        self.name = str(function.__name__)
        self.description, described = _read_docstring(function)
        self._arguments = _arguments_model(function, described)
        self.parameters: Mapping[str, Any] = _schema(self._arguments)
        self._late: list[threading.Thread] = []

    async def open(self, rollout_id: str) -> FunctionTool:  # noqa: ARG002  # all rollouts share it
        """Begin a rollout's session: the tool itself, because there is no state."""
        return self

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Call the function. What the policy or the function did wrong is text with `ok=False`."""
        started = time.monotonic()
        result = await self._call(arguments)
        return replace(result, seconds=time.monotonic() - started)

    async def close(self) -> None:
        """End the session; there is nothing to end."""

    async def _call(self, arguments: Mapping[str, Any]) -> ToolResult:
        try:
            checked = self._arguments.model_validate(dict(arguments) if isinstance(arguments, Mapping) else arguments)
        except ValidationError as error:
            found = [_complaint(item) for item in error.errors(include_url=False)]
            return ToolResult(text=wrong_arguments(self.name, found, self.parameters), ok=False)
        keywords = {
            field.alias or name: getattr(checked, name)
            for name, field in type(checked).model_fields.items()
            if name in checked.model_fields_set  # the rest are the function's own defaults
        }
        task = asyncio.ensure_future(self._outcome(keywords))
        try:
            done, _ = await asyncio.wait({task}, timeout=self.timeout_seconds)
        finally:
            task.cancel()  # late, or the rollout was given up; nothing where it is done
        if not done:
            return ToolResult(text=f"{self.name} did not return within {self.timeout_seconds:g} s", ok=False)
        raised, value = task.result()
        if isinstance(raised, ToolError):
            raise raised
        if raised is not None:
            return ToolResult(text=f"{type(raised).__name__}: {raised}", ok=False)
        return value if isinstance(value, ToolResult) else ToolResult(text=_as_text(value))

    async def _outcome(self, keywords: Mapping[str, Any]) -> _Outcome:
        """What the function raised and what it returned."""
        try:
            if inspect.iscoroutinefunction(self.function):
                return None, await self.function(**keywords)
            raised, value = await self._in_thread(keywords)
            return raised, await value if inspect.isawaitable(value) else value
        except Exception as error:  # anything may come out of a user's function
            return error, None

    async def _in_thread(self, keywords: Mapping[str, Any]) -> _Outcome:
        """Run the function in a thread of its own: those of a pool would all be taken once enough of them hang."""
        self._late = [thread for thread in self._late if thread.is_alive()]
        if len(self._late) >= MAX_LATE_THREADS:
            raise ToolError(f"{len(self._late)} calls of the tool {self.name!r} hang; see why it does not return")
        loop = asyncio.get_running_loop()
        returned: asyncio.Future[_Outcome] = loop.create_future()

        def deliver(outcome: _Outcome) -> None:
            if not returned.done():  # else it is late
                returned.set_result(outcome)

        def run() -> None:
            try:
                outcome: _Outcome = None, self.function(**keywords)
            except BaseException as error:  # `exit()` as well, which would end the thread without a word
                outcome = error, None
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(deliver, outcome)

        thread = threading.Thread(target=run, name=f"tool {self.name}", daemon=True)
        thread.start()
        try:
            return await returned
        except asyncio.CancelledError:
            self._late.append(thread)
            raise


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    try:
        return to_json(value, fallback=str).decode()
    except ValueError:  # it refers to itself, or holds bytes that are no text
        return str(value)


def _read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The first paragraph in one line, and what the `Args:` section says of each parameter."""
    docstring = inspect.getdoc(function)
    if not docstring:
        raise ConfigError(
            f"the function {function.__name__!r} has no docstring; its first paragraph tells the policy what "
            "the tool does"
        )
    first = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    described: dict[str, str] = {}
    section = re.search(r"^Args:[ \t]*\n(?P<lines>(?:[ \t]+.*(?:\n|\Z)|[ \t]*\n)+)", docstring, re.MULTILINE)
    current = ""
    for line in textwrap.dedent(section["lines"]).splitlines() if section else ():
        entry = re.match(r"(?P<name>\w+)(?:\s*\([^)]*\))?:\s*(?P<text>.*)", line)
        if entry:
            current = entry["name"]
            described[current] = entry["text"].strip()
        elif line.strip() and current:
            described[current] = f"{described[current]} {line.strip()}".strip()
    return " ".join(first.split()), described


def _arguments_model(function: Callable[..., Any], described: Mapping[str, str]) -> type[BaseModel]:
    """A pydantic model of the function's arguments; its fields are numbered, because their names may be anything."""
    where = f"the function {function.__name__!r}"
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where} has a type hint that cannot be read: {error}") from error
    fields: dict[str, Any] = {}
    for number, parameter in enumerate(inspect.signature(function).parameters.values()):
        name = parameter.name
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
            raise ConfigError(f"{where} takes `{stars}{name}`; each parameter of a tool must be given by its own name")
        if name not in hints:
            raise ConfigError(f"{where}: parameter {name!r} has no type hint; write one, such as `{name}: int`")
        try:
            TypeAdapter(hints[name]).json_schema()
        except (PydanticUserError, SchemaError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{where}: the type of {name!r} cannot be a tool's argument: {reason}") from error
        default = ... if parameter.default is parameter.empty else parameter.default
        about: dict[str, Any] = {"description": described[name]} if described.get(name) else {}
        fields[f"argument_{number}"] = (hints[name], Field(default, alias=name, **about))
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid"), **fields)


class _BriefSchema(GenerateJsonSchema):
    """Without titles, which repeat the names: the policy pays for every token."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(schema_generator=_BriefSchema)
    schema.pop("title", None)
    schema.setdefault("properties", {})
    return schema


def _complaint(item: Mapping[str, Any]) -> str:
    place = ".".join(map(str, item["loc"]))
    return f"{place}: {item['msg']}" if place else str(item["msg"])
