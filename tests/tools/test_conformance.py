"""What every backend of the Python tool must do alike, each test run against all of them.

Where one differs by its nature, `Backend` says so, and the tests that meet the difference ask for it by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from rlsys.interfaces import Tool, ToolResult
from rlsys.tools.python import PythonTool
from rlsys.tools.sandbox_fusion import SandboxFusionTool


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One backend and how it differs from the local interpreter."""

    make: Callable[..., Tool]
    keeps_what_an_interrupted_call_set: bool
    survives_the_end_of_its_interpreter: bool


@pytest.fixture(params=["local", "sandbox_fusion"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "local":
        return Backend(
            make=PythonTool, keeps_what_an_interrupted_call_set=True, survives_the_end_of_its_interpreter=False
        )
    url = request.getfixturevalue("sandbox_url")
    return Backend(
        make=lambda **options: SandboxFusionTool(url=url, **options),
        keeps_what_an_interrupted_call_set=False,
        survives_the_end_of_its_interpreter=True,
    )


def run(backend: Backend, *cells: Any, **options: Any) -> list[ToolResult]:
    """The results of some cells in one session, which is closed afterwards."""

    async def session() -> list[ToolResult]:
        opened = await backend.make(**({"timeout_seconds": 10.0} | options)).open("rollout")
        try:
            return [await opened.call({"code": cell}) for cell in cells]
        finally:
            await opened.close()

    return asyncio.run(session())


def test_it_is_one_tool_to_the_policy(backend: Backend) -> None:
    tool, local = backend.make(), PythonTool()
    assert (tool.name, tool.parameters) == (local.name, local.parameters)
    assert local.description.startswith(tool.description)


def test_variables_definitions_and_modules_live_from_call_to_call(backend: Backend) -> None:
    results = run(backend, "import math\nx = 20", "def f(n):\n    return n + x", "f(1) + math.floor(0.5)")
    assert [(result.text, result.ok) for result in results] == [("", True), ("", True), ("21", True)]
    assert all(result.seconds > 0 for result in results)


def test_the_value_of_a_last_expression_is_shown_and_remembered(backend: Backend) -> None:
    results = run(backend, "1 + 1\n2 + 2", "_ * 10", "'text'", "None", "x = 3", "x;", "")
    assert [result.text for result in results] == ["4", "40", "'text'", "", "", "3", ""]
    assert all(result.ok for result in results)


def test_print_and_standard_error_are_shown_in_order(backend: Backend) -> None:
    code = "import os, sys\nprint(1)\nprint(2, file=sys.stderr)\nos.write(1, b'3\\n') and None\nprint(4)\n5"
    assert run(backend, code)[0].text.split() == ["1", "2", "3", "4", "5"]


def test_earlier_output_is_not_shown_again(backend: Backend) -> None:
    assert [result.text for result in run(backend, "print('once')\n7", "print('twice')")] == ["once\n7", "twice"]


def test_a_traceback_shows_the_cells_own_frames_with_their_lines(backend: Backend) -> None:
    runtime, library, chained = run(
        backend,
        "def f():\n    return 1 / 0\nf()",
        "import json\njson.loads('{')",
        "try:\n    f()\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e",
    )
    assert runtime.text.startswith("Traceback")
    assert '<cell 1>", line 3' in runtime.text
    assert '<cell 1>", line 2, in f' in runtime.text
    assert "return 1 / 0" in runtime.text
    assert runtime.text.endswith("ZeroDivisionError: division by zero")
    assert "JSONDecodeError" in library.text
    assert "decoder.py" not in library.text
    assert "direct cause" in chained.text
    assert chained.text.endswith("KeyError: 'k'")
    assert runtime.text.count("File") == 2
    assert not any(result.ok for result in (runtime, library, chained))


def test_a_syntax_error_is_shown_with_its_place(backend: Backend) -> None:
    result = run(backend, "x = 1\ndef f(:")[0]
    assert not result.ok
    assert '<cell 1>", line 2' in result.text
    assert "SyntaxError: invalid syntax" in result.text
    assert "python_c" not in result.text
    assert "script.py" not in result.text


def test_what_a_failed_call_had_set_is_kept(backend: Backend) -> None:
    failed, after = run(backend, "x = 1\nundefined", "x")
    assert "NameError" in failed.text
    assert (after.text, after.ok) == ("1", True)


def test_errors_that_cannot_be_shown_do_not_break_the_session(backend: Backend) -> None:
    hostile = "class E(Exception):\n    def __str__(self): raise ValueError\n    __repr__ = __str__\nraise E"
    value = "class R:\n    def __repr__(self): raise RuntimeError('no repr')\nR()"
    results = run(backend, hostile, value, "raise BaseException", "x\0y", "7")
    assert [result.ok for result in results] == [False, False, False, False, True]
    assert "no repr" in results[1].text
    assert results[-1].text == "7"


def test_a_loop_is_interrupted_and_earlier_variables_are_kept(backend: Backend) -> None:
    _, loop, earlier, own = run(
        backend, "x = 5", "y = 6\nprint('before')\nwhile True: pass", "x", "y", timeout_seconds=0.5
    )
    assert not loop.ok
    assert loop.text.startswith("before\n")
    assert "[interrupted after 0.5 s; " in loop.text
    assert earlier.text == "5"
    if backend.keeps_what_an_interrupted_call_set:
        assert "variables are kept]" in loop.text
        assert own.text == "6"
    else:
        assert "what this call set is lost, variables of earlier calls are kept]" in loop.text
        assert "NameError" in own.text


def test_a_call_that_ignores_its_interrupt_is_killed_and_the_next_one_works(backend: Backend) -> None:
    stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('before')\nwhile True: pass"
    _, killed, after = run(backend, "x = 1", stubborn, "'x' in globals()", timeout_seconds=0.3)
    assert not killed.ok
    assert "before" in killed.text
    assert "killed" in killed.text
    assert after.ok
    if backend.survives_the_end_of_its_interpreter:
        assert "variables of earlier calls are kept" in killed.text
        assert after.text == "True"
    else:
        assert "variables are lost" in killed.text
        assert after.text.endswith("\nFalse")


def test_exit_ends_the_call_only_and_a_dead_interpreter_is_told(backend: Backend) -> None:
    _, code, plain, kept, dead, after = run(
        backend,
        "x = 1",
        "import sys; sys.exit(3)",
        "exit()",
        "x",
        "print('!')\nimport os; os._exit(7)",
        "'x' in globals()",
    )
    assert (code.text, code.ok) == ("SystemExit: 3", False)
    assert plain.ok
    assert kept.text == "1"
    assert "exit status 7" in dead.text
    assert not dead.ok
    assert after.text.endswith("True" if backend.survives_the_end_of_its_interpreter else "False")


def test_output_is_cut_in_the_middle_with_the_same_note(backend: Backend) -> None:
    short, long, value = run(
        backend,
        "print('a' * 700 + 'é' * 300, end='')",
        "print('a' * 700 + 'é' * 700, end='')",
        "list(range(10**6))",
        max_output_characters=1000,
    )
    assert short.text == "a" * 700 + "é" * 300
    assert long.text == "a" * 500 + "\n[... 400 characters cut ...]\n" + "é" * 500
    assert value.text.startswith("[0, 1,")
    assert value.text.endswith("999999]")
    assert f"[... {len(repr(list(range(10**6)))) + 1 - 1000} characters cut ...]" in value.text
    assert short.ok
    assert long.ok
    assert value.ok


@pytest.mark.parametrize("arguments", [{}, {"code": 3}, {"code": None}, {"source": "1"}, [], None, "1"])
def test_wrong_arguments_are_answered_with_text(backend: Backend, arguments: Any) -> None:
    async def main() -> list[ToolResult]:
        session = await backend.make().open("rollout")
        try:
            return [await session.call(arguments), await session.call({"code": "1 + 1"})]
        finally:
            await session.close()

    wrong, right = asyncio.run(main())
    assert not wrong.ok
    assert '{"code"' in wrong.text
    assert right.text == "2"


def test_code_of_any_size_is_answered(backend: Backend) -> None:
    large, too_large = run(backend, "x = 1  # " + "é" * 190_000, "#" * 200_001)
    assert large.ok
    assert not too_large.ok
    assert "the limit is 200000" in too_large.text


def test_unicode_goes_in_and_comes_out_and_broken_text_is_replaced(backend: Backend) -> None:
    text, broken, half = run(
        backend,
        "größe = 'Ω → 漢字 😀'\nprint(größe)\ngröße[-1]",
        "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe ok')\nprint('\\ud800')",
        "len('a\ud800b')",
    )
    assert text.text == "Ω → 漢字 😀\n'😀'"
    assert "\ufffd\ufffd ok" in broken.text
    assert "\\ud800" in broken.text
    assert isinstance(half.text, str)
    half.text.encode()


def test_reading_input_fails_instead_of_waiting(backend: Backend) -> None:
    result = run(backend, "input()")[0]
    assert not result.ok
    assert "EOFError" in result.text


def test_closing_twice_is_fine_and_a_call_afterwards_raises(backend: Backend) -> None:
    async def main() -> None:
        session = await backend.make().open("rollout")
        assert (await session.call({"code": "1"})).text == "1"
        await session.close()
        await session.close()
        with pytest.raises(RuntimeError, match=r"rollout 'rollout' is closed"):
            await session.call({"code": "1"})

    asyncio.run(main())


def test_many_sessions_at_once_do_not_mix(backend: Backend) -> None:
    async def one(tool: Tool, number: int) -> list[str]:
        session = await tool.open(f"rollout-{number}")
        try:
            return [
                (await session.call({"code": code})).text for code in (f"x = {number}", "x += 100", "x", "'y' in dir()")
            ]
        finally:
            await session.close()

    async def main() -> list[list[str]]:
        tool = backend.make(timeout_seconds=30.0)
        return await asyncio.gather(*(one(tool, number) for number in range(8)))

    assert asyncio.run(main()) == [["", "", str(number + 100), "False"] for number in range(8)]


def test_calls_of_one_session_that_come_at_once_run_one_after_the_other(backend: Backend) -> None:
    async def main() -> list[str]:
        session = await backend.make(timeout_seconds=30.0).open("rollout")
        try:
            await session.call({"code": "n = 0"})
            await asyncio.gather(*(session.call({"code": "m = n; n = m + 1"}) for _ in range(4)))
            return [(await session.call({"code": "n"})).text]
        finally:
            await session.close()

    assert asyncio.run(main()) == ["4"]
