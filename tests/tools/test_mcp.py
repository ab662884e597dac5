"""The MCP adapter against a real server: schema, state, errors, deadlines, and a server that dies."""

from __future__ import annotations

import asyncio
import builtins
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlsys.errors import ToolError
from rlsys.interfaces import ToolResult
from rlsys.tools.mcp import McpTool

SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]


def tool(named: str, **options: Any) -> McpTool:
    return McpTool(**({"command": SERVER, "tool": named} | options))


class Rollout:
    """A rollout's session whose calls name the server's tool: a server takes a second to start, so tests share one.

    Each step runs in a task of its own, as an actor's calls may.
    """

    def __init__(self, runner: asyncio.Runner, made: McpTool) -> None:
        self.runner, self.made = runner, made
        self.session = runner.run(made.open("rollout"))

    def call(self, named: str, arguments: Any = None, **limits: Any) -> ToolResult:
        """Call one of the server's tools; `limits` are options of the tool, for this call."""
        usual = {limit: getattr(self.made, limit) for limit in limits}
        vars(self.made).update(limits, tool=named)
        try:
            return self.runner.run(self.session.call({} if arguments is None else arguments))
        finally:
            vars(self.made).update(usual)

    def close(self) -> None:
        self.runner.run(self.session.close())


@pytest.fixture
def rollout() -> Iterator[Rollout]:
    """A session with a server of its own."""
    with asyncio.Runner() as runner:
        opened = Rollout(runner, tool("add"))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Rollout]:
    """A session for the tests that leave the server as it is."""
    with asyncio.Runner() as runner:
        opened = Rollout(runner, tool("add"))
        yield opened
        opened.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_listening(port: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nobody listens on port {port}")


def test_description_and_schema_are_the_servers() -> None:
    made = tool("add", name="accumulate")
    asyncio.run(made.start())
    assert made.name == "accumulate"
    assert made.description == "Adds a number to the total and returns it."
    assert made.parameters["required"] == ["number"]
    assert made.parameters["properties"]["number"]["type"] == "integer"


def test_a_tool_that_the_server_does_not_have_is_named_with_those_it_has() -> None:
    with pytest.raises(ToolError, match=r"mcp_server\.py' has no tool 'subtract'; it has add, block, die"):
        asyncio.run(tool("subtract").start())


def test_state_lives_from_call_to_call(shared: Rollout) -> None:
    results = [
        shared.call("add", arguments) for arguments in ({"number": 1}, {"number": 2}, {"number": 3, "factor": 10})
    ]
    assert [(result.text, result.ok) for result in results] == [("1", True), ("3", True), ("33", True)]
    assert all(result.seconds > 0 for result in results)


def test_rollouts_side_by_side_do_not_mix_and_leave_no_process() -> None:
    async def one(number: int) -> tuple[int, list[str]]:
        made = tool("add")
        session = await made.open(f"rollout-{number}")
        texts = [(await session.call({"number": number})).text for _ in range(2)]
        made.tool = "process"
        pid = int((await session.call({})).text)
        await session.close()
        await session.close()
        with pytest.raises(
            RuntimeError, match=f"session of rollout 'rollout-{number}' with the MCP server .* is closed"
        ):
            await session.call({})
        return pid, texts

    async def main() -> list[tuple[int, list[str]]]:
        return await asyncio.gather(one(1), one(2))

    (first, texts), (second, other_texts) = asyncio.run(main())
    assert (texts, other_texts) == (["1", "2"], ["2", "4"])
    assert first != second
    assert not is_alive(first)
    assert not is_alive(second)


def test_a_session_without_a_call_starts_no_server() -> None:
    async def main() -> None:
        session = await tool("add", command=["/no/such/program"]).open("rollout")
        await session.close()

    asyncio.run(main())


def test_the_servers_complaints_are_text(shared: Rollout) -> None:
    failed = shared.call("fail")
    assert (failed.text, failed.ok) == ("Error executing tool fail: this always fails", False)
    for arguments in ({"number": "many"}, {}):
        wrong = shared.call("add", arguments)
        assert not wrong.ok
        assert "number" in wrong.text
    unknown = shared.call("no_such_tool")
    assert not unknown.ok
    assert "no_such_tool" in unknown.text


@pytest.mark.parametrize("arguments", [[], 3, "1"])
def test_arguments_that_are_no_object_are_answered_with_text(shared: Rollout, arguments: Any) -> None:
    result = shared.call("add", arguments)
    assert not result.ok
    assert "must be an object" in result.text


def test_texts_are_joined_and_what_is_no_text_is_named(shared: Rollout) -> None:
    assert shared.call("mixed").text == "first\n[image, image/png: not shown]\na note\nlast"


def test_a_long_answer_is_cut_in_the_middle(shared: Rollout) -> None:
    result = shared.call("repeat", {"text": "é", "times": 100_000}, max_output_characters=100)
    assert result.text == "é" * 50 + "\n[... 99900 characters cut ...]\n" + "é" * 50


def test_a_call_that_takes_too_long_is_text_and_the_next_one_works(shared: Rollout) -> None:
    late = shared.call("sleep", {"seconds": 60}, timeout_seconds=0.3)
    assert (late.text, late.ok) == ("error: no answer within 0.3 s", False)
    after = shared.call("sleep", {"seconds": 0})
    assert (after.text, after.ok) == ("awake", True)


def test_a_server_that_dies_in_a_call_raises_and_says_its_last_words(rollout: Rollout) -> None:
    with pytest.raises(ToolError, match=r"mcp_server\.py' ended during a call; it wrote: the last words"):
        rollout.call("die")
    with pytest.raises(ToolError, match=r"mcp_server\.py'"):
        rollout.call("add", {"number": 1})


def test_a_server_that_is_killed_between_two_calls_raises(rollout: Rollout) -> None:
    os.kill(int(rollout.call("process").text), signal.SIGKILL)
    with pytest.raises(ToolError, match=r"mcp_server\.py'"):
        rollout.call("add", {"number": 1})


def test_a_server_that_hangs_is_text_and_killed_with_its_session(rollout: Rollout) -> None:
    pid = int(rollout.call("process").text)
    assert rollout.call("block", timeout_seconds=0.2).text == "error: no answer within 0.2 s"
    assert is_alive(pid)
    rollout.close()
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["/no/such/program"], "FileNotFoundError|No such file"),
        ([sys.executable, "-c", "import sys; sys.exit('cannot start')"], "it wrote: cannot start"),
        ([sys.executable, "-c", "print('no protocol')"], "is gone"),
    ],
)
def test_a_server_that_does_not_start_is_named_with_the_reason(command: list[str], says: str) -> None:
    with pytest.raises(ToolError, match=says) as caught:
        asyncio.run(tool("add", command=command).start())
    assert command[0] in str(caught.value)


def test_a_server_that_never_answers_is_given_up_in_time() -> None:
    silent = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with pytest.raises(ToolError, match=r"within|timed out"):
        asyncio.run(tool("add", command=silent, start_seconds=0.6).start())


def test_an_address_where_nobody_listens_is_named() -> None:
    made = McpTool(tool="add", url="http://127.0.0.1:9/mcp")
    with pytest.raises(ToolError, match=r"MCP server 'http://127\.0\.0\.1:9/mcp' is gone: .*Connect"):
        asyncio.run(made.start())


def test_a_server_over_http_is_called_alike() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([*SERVER, "http", str(port)], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        wait_until_listening(port)
        made = McpTool(tool="add", url=f"http://127.0.0.1:{port}/mcp")
        asyncio.run(made.start())
        assert made.parameters["required"] == ["number"]
        with asyncio.Runner() as runner:
            opened = Rollout(runner, made)
            assert [opened.call("add", {"number": number}).text for number in (1, 2)] == ["1", "3"]
            assert not opened.call("fail").ok
            with pytest.raises(ToolError, match=f"http://127.0.0.1:{port}/mcp"):
                opened.call("die")
            opened.close()
        assert process.wait(timeout=10) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"command": None}, "either `command`"),
        ({"url": "http://localhost/mcp"}, "either `command`"),
        ({"command": "python server.py"}, "must be a list"),
        ({"command": []}, "must be a list"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"start_seconds": -1}, "start_seconds"),
        ({"max_output_characters": 3}, "max_output_characters"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tool("add", **options)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_mcp(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "mcp":
            raise ImportError("No module named 'mcp'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_mcp)
    with pytest.raises(ToolError, match=r'pip install "rlsys\[mcp\]"'):
        tool("add")
