"""Tools made of plain functions: the schema from the signature, checked arguments, an answer to everything."""

from __future__ import annotations

import asyncio
import enum
import functools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import Field

from rlsys import function_tool
from rlsys.chat import Chat
from rlsys.config import PlugIn
from rlsys.errors import ConfigError, ToolError
from rlsys.function_tool import FunctionTool, build_tool, check_tool
from rlsys.interfaces import ToolResult
from rlsys.scratch import byte_tokenizer


class Unit(enum.Enum):
    METRE = "m"
    MILE = "mi"


@dataclass
class Point:
    x: float
    y: float = 0.0


def multiply(a: int, b: int = 2) -> int:
    """Multiplies two
    whole numbers.

    Exact, however large they are.

    Args:
        a: The first number,
            of any size.
        b (int): The second one.

    Returns:
        Their product.
    """
    return a * b


def everything(
    count: int,
    share: float,
    text: str,
    flag: bool,
    numbers: list[int],
    table: dict[str, float],
    mode: Literal["fast", "exact"],
    unit: Unit,
    point: Point,
    maybe: Optional[int] = None,  # noqa: UP045  # both spellings
    either: int | str | None = None,
    bounded: Annotated[int, Field(ge=0, description="at least 0")] = 0,
) -> str:
    """Takes everything."""
    return repr((count, share, text, flag, numbers, table, mode, unit, point, maybe, either, bounded))


def call(function: Callable[..., Any], arguments: Any, **options: Any) -> ToolResult:
    async def main() -> ToolResult:
        session = await FunctionTool(function, **options).open("rollout")
        try:
            return await session.call(arguments)
        finally:
            await session.close()

    return asyncio.run(main())


# --- the schema ------------------------------------------------------------------------------------------------------


def test_name_description_and_schema_come_from_the_function() -> None:
    tool = FunctionTool(multiply)
    assert tool.name == "multiply"
    assert tool.description == "Multiplies two whole numbers."
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "The first number, of any size."},
            "b": {"type": "integer", "description": "The second one.", "default": 2},
        },
        "required": ["a"],
        "additionalProperties": False,
    }


def test_every_type_has_its_schema() -> None:
    schema = FunctionTool(everything).parameters
    found = schema["properties"]
    assert [found[name]["type"] for name in ("count", "share", "text", "flag")] == [
        "integer",
        "number",
        "string",
        "boolean",
    ]
    assert found["numbers"] == {"type": "array", "items": {"type": "integer"}}
    assert found["table"] == {"type": "object", "additionalProperties": {"type": "number"}}
    assert found["mode"] == {"type": "string", "enum": ["fast", "exact"]}
    assert schema["$defs"]["Unit"]["enum"] == ["m", "mi"]
    assert schema["$defs"]["Point"]["required"] == ["x"]
    assert found["maybe"] == {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    assert found["bounded"] == {"type": "integer", "minimum": 0, "default": 0, "description": "at least 0"}
    assert schema["required"] == ["count", "share", "text", "flag", "numbers", "table", "mode", "unit", "point"]


def test_parameters_may_have_any_name() -> None:
    def odd(copy: int, model_config: int, _private: int, schema: str = "s") -> list[Any]:
        """Has names that libraries use as well."""
        return [copy, model_config, _private, schema]

    assert list(FunctionTool(odd).parameters["properties"]) == ["copy", "model_config", "_private", "schema"]
    assert call(odd, {"copy": 1, "model_config": 2, "_private": 3}).text == '[1,2,3,"s"]'


def test_a_function_without_parameters_takes_none() -> None:
    def now() -> str:
        """Says the time."""
        return "noon"

    assert FunctionTool(now).parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert call(now, {}).text == "noon"
    wrong = call(now, {"zone": "UTC"})
    assert not wrong.ok
    assert "zone" in wrong.text
    assert "takes no arguments" in wrong.text


def bare(a: int) -> int:
    return a


def untyped(a: int, b) -> int:  # type: ignore[no-untyped-def]
    """Has no type."""
    return a * int(b)


def starred(*numbers: int) -> int:
    """Takes any number."""
    return sum(numbers)


def keywords(**numbers: int) -> int:
    """Takes any name."""
    return sum(numbers.values())


def positional(a: int, /) -> int:
    """Takes it by place."""
    return a


def unknown(a: NoSuchType) -> int:  # type: ignore[name-defined]  # noqa: F821
    """Has a type that is not there."""
    return int(a)


def opaque(a: int, lock: threading.Lock) -> int:
    """Takes what no JSON can be."""
    return a + lock.locked()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (bare, "'bare' has no docstring"),
        (untyped, r"'untyped': parameter 'b' has no type hint; write one, such as `b: int`"),
        (starred, r"'starred' takes `\*numbers`"),
        (keywords, r"'keywords' takes `\*\*numbers`"),
        (positional, "'positional' takes `a`"),
        (unknown, "'unknown' has a type hint that cannot be read: .*NoSuchType"),
        (opaque, "'opaque': the type of 'lock' cannot be a tool's argument"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused_with_the_reason(function: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FunctionTool(function)


# --- calls -----------------------------------------------------------------------------------------------------------


def test_arguments_arrive_as_the_function_declares_them() -> None:
    arguments = {
        "count": 3,
        "share": 1,
        "text": "t",
        "flag": True,
        "numbers": [1, 2],
        "table": {"a": 0.5},
        "mode": "exact",
        "unit": "mi",
        "point": {"x": 1},
    }
    result = call(everything, arguments)
    assert result.ok
    assert result.text == (
        "(3, 1.0, 't', True, [1, 2], {'a': 0.5}, 'exact', <Unit.MILE: 'mi'>, Point(x=1.0, y=0.0), None, None, 0)"
    )
    assert result.seconds > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "a: Field required"),
        ({"a": "many"}, "a: Input should be a valid integer"),
        ({"a": 1.5}, "a: Input should be a valid integer"),
        ({"a": 1, "c": 2}, "c: Extra inputs are not permitted"),
        ({"a": None}, "a: Input should be a valid integer"),
        ([1, 2], "Input should be a valid dictionary"),
        (None, "Input should be a valid dictionary"),
    ],
)
def test_wrong_arguments_are_named_with_what_is_expected(arguments: Any, says: str) -> None:
    result = call(multiply, arguments)
    assert not result.ok
    assert result.text.startswith("Wrong arguments for 'multiply': ")
    assert says in result.text
    assert result.text.endswith("Expected: a (integer), b (integer, optional).")


def test_what_is_expected_is_told_for_every_type() -> None:
    text = call(everything, {"unit": "km"}).text
    assert text.count("Field required") == 5  # and no more: a policy reads every token
    assert text.endswith(
        "Expected: count (integer), share (number), text (string), flag (boolean), numbers (array of integer), "
        "table (object), mode (one of 'fast', 'exact'), unit (one of 'm', 'mi'), point (Point), "
        "maybe (integer or null, optional), either (integer or string or null, optional), "
        "bounded (integer, optional)."
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (None, ""),
        (6, "6"),
        (True, "true"),
        (0.5, "0.5"),
        ({"a": [1, "é"]}, '{"a":[1,"é"]}'),
        (Point(1.0, 2.0), '{"x":1.0,"y":2.0}'),
        (Unit.MILE, '"mi"'),
        (Fraction(1, 3), '"1/3"'),
    ],
)
def test_what_is_returned_is_shown_as_text_or_json(value: Any, text: str) -> None:
    def give() -> Any:
        """Gives."""
        return value

    assert call(give, {}) == ToolResult(text=text, seconds=pytest.approx(0.0, abs=30.0))


def test_a_result_that_refers_to_itself_is_shown_as_python_shows_it() -> None:
    def give() -> list[Any]:
        """Gives."""
        circle: list[Any] = [1]
        circle.append(circle)
        return circle

    assert call(give, {}).text == "[1, [...]]"


def test_a_tool_result_is_passed_on() -> None:
    def refuse() -> ToolResult:
        """Refuses."""
        return ToolResult(text="not today", ok=False)

    result = call(refuse, {})
    assert (result.text, result.ok) == ("not today", False)


def test_an_async_function_is_awaited_on_the_loop_and_a_sync_one_runs_in_a_thread() -> None:
    async def here() -> str:
        """Says its thread."""
        await asyncio.sleep(0)
        return threading.current_thread().name

    def there() -> str:
        """Says its thread."""
        return threading.current_thread().name

    @functools.wraps(here)
    def wrapped() -> Any:
        return here()

    assert call(here, {}).text == threading.current_thread().name
    assert call(there, {}).text == "tool there"
    assert call(wrapped, {}).text == threading.current_thread().name


def fails(how: str) -> None:
    """Fails."""
    if how == "exit":
        raise SystemExit(3)
    if how == "stop":
        raise StopIteration
    raise LookupError(f"no {how}")


async def fails_later(how: str) -> None:
    """Fails, too."""
    await asyncio.sleep(0)
    raise LookupError(f"no {how}")


@pytest.mark.parametrize(
    ("function", "how", "text"),
    [
        (fails, "entry", "LookupError: no entry"),
        (fails_later, "entry", "LookupError: no entry"),
        (fails, "exit", "SystemExit: 3"),
        (fails, "stop", "StopIteration: "),
    ],
)
def test_an_exception_of_the_function_is_text_for_the_policy(function: Any, how: str, text: str) -> None:
    result = call(function, {"how": how})
    assert (result.text, result.ok) == (text, False)


def test_a_tool_error_of_the_function_ends_the_rollout() -> None:
    def look_up(word: str) -> str:
        """Looks a word up."""
        raise ToolError(f"the dictionary is gone, no {word}")

    with pytest.raises(ToolError, match="the dictionary is gone, no x"):
        call(look_up, {"word": "x"})


def test_a_call_that_takes_too_long_is_text_and_does_not_hold_up_others() -> None:
    released = threading.Event()

    def hang(number: int) -> int:
        """Hangs on odd numbers."""
        if number % 2:
            released.wait(60)
        return number

    async def hang_too() -> None:
        """Hangs."""
        await asyncio.sleep(60)

    async def main() -> list[ToolResult]:
        tool = FunctionTool(hang, timeout_seconds=0.2)
        return await asyncio.gather(*(tool.call({"number": number}) for number in range(40)))

    results = asyncio.run(main())
    released.set()
    assert [result.text for result in results[::2]] == [str(number) for number in range(0, 40, 2)]
    assert {(result.text, result.ok) for result in results[1::2]} == {("hang did not return within 0.2 s", False)}
    late = call(hang_too, {}, timeout_seconds=0.05)
    assert (late.text, late.ok) == ("hang_too did not return within 0.05 s", False)


def test_a_function_that_always_hangs_ends_rollouts_instead_of_filling_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(function_tool, "MAX_LATE_THREADS", 2)
    released = threading.Event()

    def hang() -> str:
        """Hangs."""
        released.wait(60)
        return "done"

    async def main() -> ToolResult:
        tool = FunctionTool(hang, timeout_seconds=0.05)
        await tool.call({})
        await tool.call({})
        with pytest.raises(ToolError, match="2 calls of the tool 'hang' hang"):
            await tool.call({})
        released.set()
        end = time.monotonic() + 30
        while any(thread.is_alive() for thread in tool._late) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return await tool.call({})

    assert asyncio.run(main()).text == "done"


# --- in a configuration ----------------------------------------------------------------------------------------------


class Plain:
    """A tool written as a class."""

    name, description = "plain", "does"

    def __init__(self, *, size: int = 1) -> None:
        self.size = size
        self.parameters = {"type": "object"}

    async def open(self, rollout_id: str) -> Any:
        raise NotImplementedError(rollout_id)


class WithoutParameters:
    """A class that lacks something."""

    name, description = "plain", "does"

    async def open(self, rollout_id: str) -> Any:
        raise NotImplementedError(rollout_id)


class Nothing:
    """A class that lacks everything."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `rlsys.function_tool:multiply` name the function above, whatever name this file was imported under."""
    for thing in (multiply, untyped, Plain, WithoutParameters, Nothing):
        monkeypatch.setattr(function_tool, thing.__name__, thing, raising=False)


def plug_in(name: str, **options: Any) -> PlugIn:
    return PlugIn(use=f"rlsys.function_tool:{name}", options=options)


def test_a_function_becomes_a_tool_and_its_options_are_the_wrappers() -> None:
    tool = build_tool(plug_in("multiply", timeout_seconds=3.0), place="tools.0")
    assert isinstance(tool, FunctionTool)
    assert (tool.name, tool.timeout_seconds) == ("multiply", 3.0)


def test_a_class_is_built_as_it_is() -> None:
    tool = build_tool(plug_in("Plain", size=3), place="tools.0")
    assert isinstance(tool, Plain)
    assert tool.size == 3


@pytest.mark.parametrize("check", [build_tool, check_tool])
@pytest.mark.parametrize(
    ("use", "says"),
    [
        (
            plug_in("multiply", timeout=3.0),
            r"tools\.0\.options: unknown option 'timeout'; did you mean `timeout_seconds`",
        ),
        (plug_in("multiply", timeout_seconds=0), r"tools\.0: .*timeout_seconds must be positive"),
        (plug_in("untyped"), r"tools\.0: 'rlsys\.function_tool:untyped' cannot be a tool: .*parameter 'b'"),
        (plug_in("mutliply"), r"tools\.0\.use: .*did you mean `rlsys\.function_tool:multiply`"),
        (plug_in("Plain", sise=3), r"tools\.0\.options: unknown option 'sise'; did you mean `size`"),
        (PlugIn(use="math:gcd"), "cannot be a tool"),
    ],
)
def test_what_is_wrong_is_found_with_its_place(check: Any, use: PlugIn, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(use, place="tools.0")


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("WithoutParameters", "lacks parameters:"), ("Nothing", "lacks name, description, parameters, open:")],
)
def test_a_class_that_is_no_tool_is_told_what_it_lacks(name: str, lacks: str) -> None:
    with pytest.raises(ConfigError, match=rf"tools\.0\.use: .*:{name}' is no tool, it {lacks}.*JSON schema"):
        build_tool(plug_in(name), place="tools.0")


def test_the_chat_shows_and_checks_a_function() -> None:
    tokenizer = byte_tokenizer(max_length=4096)
    chat = Chat(tokenizer, [FunctionTool(multiply)], tool_format="template")
    right, wrong = chat.parse_calls(
        '<tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>'
        '<tool_call>{"name": "multiply", "arguments": {"x": 6}}</tool_call>',
        turn_ended=True,
    )
    assert right.error is None
    assert asyncio.run(chat.tools["multiply"].call(right.arguments)).text == str(math.prod((6, 7)))  # type: ignore[attr-defined]
    assert "'a' is a required property" in str(wrong.error)
    assert "Expected: a (integer), b (integer, optional)." in str(wrong.error)
