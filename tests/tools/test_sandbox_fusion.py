"""What is SandboxFusion's own, beside `test_conformance.py`: the wire, the server's failures, and calls run again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from rlsys.errors import ToolError
from rlsys.interfaces import ToolResult
from rlsys.tools import sandbox_fusion
from rlsys.tools.sandbox_fusion import SandboxFusionTool


def run(url: str, *cells: str, rollout_id: str = "rollout", **options: Any) -> list[ToolResult]:
    """The results of some cells in one session on the server that runs code."""

    async def session() -> list[ToolResult]:
        opened = await SandboxFusionTool(url=url, **options).open(rollout_id)
        try:
            return [await opened.call({"code": cell}) for cell in cells]
        finally:
            await opened.close()

    return asyncio.run(session())


def ran(text: str = "2", ok: bool = True) -> dict[str, Any]:
    """A reply of a server that ran the code."""
    stdout = json.dumps({"text": text, "ok": ok, "again": True, "digest": "", "state_lost": False})
    return finished(stdout=stdout)


def finished(*, status: str = "Finished", code: int | None = 0, stdout: str = "", stderr: str = "") -> dict[str, Any]:
    result = {"status": status, "execution_time": 0.1, "return_code": code, "stdout": stdout, "stderr": stderr}
    ok = status == "Finished" and code == 0
    return {
        "status": "Success" if ok else "Failed",
        "message": "",
        "compile_result": None,
        "run_result": result,
        "executor_pod_name": None,
        "files": {},
    }


def with_replies(
    replies: Sequence[Any], use: Callable[[SandboxFusionTool], Any], **options: Any
) -> tuple[Any, list[Any], str]:
    """What `use` makes of a tool whose server gives these replies, one for each request: a status, a body, or both.

    "hang" never answers, "hang up" closes the connection. Returns also the requests and the server's address.
    """
    requests: list[Any] = []

    async def main() -> tuple[Any, list[Any], str]:
        left = list(replies)

        async def run_code(request: web.Request) -> web.Response:
            requests.append(await request.json())
            reply = left.pop(0)
            if reply == "hang":
                await asyncio.sleep(60)
            if reply == "hang up":
                assert request.transport is not None
                request.transport.close()
            if isinstance(reply, int):
                return web.Response(status=reply, text="the reason")
            return web.json_response(reply) if isinstance(reply, dict) else web.Response(text=str(reply))

        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/run_code", run_code)
        async with TestServer(app) as server:
            url = str(server.make_url("/"))
            tool = SandboxFusionTool(url=url, **({"retry_seconds": 0.001} | options))
            return await use(tool), requests, url

    return asyncio.run(main())


async def one_call(tool: SandboxFusionTool) -> ToolResult:
    session = await tool.open("rollout")
    try:
        return await session.call({"code": "1 + 1"})
    finally:
        await session.close()


async def failing_call(tool: SandboxFusionTool) -> str:
    with pytest.raises(ToolError) as caught:
        await one_call(tool)
    return str(caught.value)


# --- the wire --------------------------------------------------------------------------------------------------------


def test_the_request_has_the_servers_shape_and_is_ascii() -> None:
    async def use(tool: SandboxFusionTool) -> ToolResult:
        session = await tool.open("rollout")
        result = await session.call({"code": "'é'"})
        await session.close()
        return result

    result, (request,), _ = with_replies([ran("'é'")], use, timeout_seconds=3.0, memory_mb=512)
    assert result.text == "'é'"
    assert request["language"] == "python"
    assert request["memory_limit_MB"] == 512
    assert request["run_timeout"] > 3.0
    assert request.keys() == {
        "code",
        "language",
        "compile_timeout",
        "run_timeout",
        "memory_limit_MB",
        "files",
        "fetch_files",
    }
    assert request["code"].isascii()
    compile(request["code"], "script.py", "exec")


def test_the_time_that_the_server_may_take_grows_with_the_calls_that_it_runs_again() -> None:
    async def use(tool: SandboxFusionTool) -> None:
        session = await tool.open("rollout")
        for _ in range(3):
            await session.call({"code": "x = 1"})
        await session.close()

    _, requests, _ = with_replies([ran()] * 3, use, timeout_seconds=3.0)
    first, second, third = (request["run_timeout"] for request in requests)
    assert (second - first, third - second) == (3.0, 3.0)


def test_a_server_that_runs_python_passes_the_start_and_others_are_told(sandbox_url: str) -> None:
    asyncio.run(SandboxFusionTool(url=sandbox_url + "/").start())

    async def use(tool: SandboxFusionTool) -> str:
        with pytest.raises(ToolError) as caught:
            await tool.start()
        return str(caught.value)

    missing = finished(code=127, stderr="bash: python: command not found")
    message, _, url = with_replies([missing], use)
    assert url.rstrip("/") in message
    assert "command not found" in message


# --- failures of the server ------------------------------------------------------------------------------------------


SANDBOX_ERROR = {"status": "SandboxError", "message": "no more overlays", "run_result": None}


@pytest.mark.parametrize("failure", [500, 502, 503, 429, "hang up", SANDBOX_ERROR, "<html>", {"status": "Success"}])
def test_what_the_server_fails_at_is_tried_again(failure: Any) -> None:
    result, requests, _ = with_replies([failure, failure, ran("2")], one_call)
    assert (result.text, result.ok) == ("2", True)
    assert len(requests) == 3
    assert requests[0] == requests[1] == requests[2]


@pytest.mark.parametrize(
    ("failure", "says"),
    [(503, "HTTP 503: the reason"), ("hang up", "Disconnected"), (SANDBOX_ERROR, "no more overlays")],
)
def test_a_server_that_goes_on_failing_is_given_up_with_its_address_and_the_reason(failure: Any, says: str) -> None:
    message, requests, url = with_replies([failure] * 2, failing_call, max_attempts=2)
    assert f"{url}run_code failed 2 times" in message
    assert says in message
    assert len(requests) == 2


def test_a_server_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_fusion, "SLACK_SECONDS", 0.05)
    options = {"server_seconds": 0.05, "timeout_seconds": 0.05, "max_attempts": 2}
    message, requests, _ = with_replies(["hang", "hang"], failing_call, **options)
    assert "failed 2 times" in message
    assert "no answer within" in message
    assert len(requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refused_request_is_not_sent_again(status: int) -> None:
    message, requests, url = with_replies([status], failing_call)
    assert f"{url}run_code refuses the request" in message
    assert f"HTTP {status}" in message
    assert len(requests) == 1


def test_a_server_that_is_not_there_is_named() -> None:
    async def main() -> None:
        async with TestServer(web.Application()) as server:
            url = str(server.make_url("/")).rstrip("/")
        with pytest.raises(ToolError, match=f"{url}/run_code failed 2 times.*Connect"):
            await one_call(SandboxFusionTool(url=url, max_attempts=2, retry_seconds=0.001))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (finished(status="TimeLimitExceeded", code=None), "the sandbox was ended"),
        (finished(code=-9, stdout='{"text": "'), "exit status -9"),
        (finished(code=137, stderr="Killed"), "Killed\n[the sandbox ended with exit status 137"),
        (finished(stdout="[]"), "exit status 0"),
        (finished(stdout='{"text": "forged"}'), "exit status 0"),
    ],
)
def test_a_sandbox_that_was_ended_from_outside_is_told_to_the_policy(reply: Any, says: str) -> None:
    result, requests, _ = with_replies([reply], one_call)
    assert not result.ok
    assert says in result.text
    assert "what this call set is lost, variables of earlier calls are kept]" in result.text
    assert len(requests) == 1


def test_code_that_ends_its_keeper_loses_its_own_call_only(sandbox_url: str) -> None:
    _, killed, after = run(sandbox_url, "x = 1", "import os\nos.kill(os.getppid(), 9)\nwhile True: pass", "x")
    assert not killed.ok
    assert "the sandbox ended with exit status -9" in killed.text
    assert after.text == "1"


# --- calls run again -------------------------------------------------------------------------------------------------


def test_chance_and_the_order_of_sets_are_the_same_each_time(sandbox_url: str) -> None:
    cell = "import random\nx = random.random()\nwords = list({'some', 'words', 'in', 'no', 'order', 'at', 'all'})"
    first, second, third = run(sandbox_url, cell, "x, words", "x, words")[0:3]
    assert first.ok
    assert second.text == third.text
    assert second.text.startswith("(0.")
    other = run(sandbox_url, cell, "x, words", rollout_id="another")[1]
    assert other.text != second.text


def test_an_earlier_call_that_shows_something_else_is_told(sandbox_url: str) -> None:
    first, second, third = run(sandbox_url, "import os\nos.urandom(8).hex()", "1", "x = 2;")
    assert len(first.text) == 18
    note = "[call 1 was run again for this one and showed something else: values that depend on chance"
    assert second.text.startswith(f"1\n{note}")
    assert third.text.startswith(note)
    assert second.ok


def test_an_earlier_call_that_ends_otherwise_loses_all_variables_and_says_so(sandbox_url: str, tmp_path: Any) -> None:
    once = f"import os\nos.mkdir({str(tmp_path / 'made')!r})\nx = 1"
    first, second, third, fourth = run(sandbox_url, once, "x", "'x' in globals()", "y = 3; y")
    assert first.ok
    assert not second.ok
    assert second.text == (
        "[call 1 was run again for this one, and it ended otherwise: with an error this time; all variables are lost]"
    )
    assert (third.text, fourth.text) == ("False", "3")


def test_megabytes_of_output_are_counted_right(sandbox_url: str) -> None:
    result = run(sandbox_url, "print('ab' * 2_500_000, end='the end')", max_output_characters=500)[0]
    assert result.text.endswith("the end")
    assert f"[... {5_000_000 + 7 - 500} characters cut ...]" in result.text


def test_processes_that_a_call_leaves_behind_do_not_hold_it_up(sandbox_url: str) -> None:
    fork = "import os, time\nif os.fork() == 0:\n    time.sleep(30)\n'parent'"
    child = "import subprocess\nsubprocess.Popen(['sleep', '30']) and None"
    first, second = run(sandbox_url, fork, child, timeout_seconds=5.0)
    assert (first.text, second.text) == ("'parent'", "")


def test_code_that_closes_its_descriptors_is_answered(sandbox_url: str) -> None:
    closed, after = run(sandbox_url, "import os\nos.closerange(0, 256)", "2")
    assert not closed.ok
    assert "the interpreter ended" in closed.text
    assert after.text == "2"


@pytest.mark.parametrize(
    "options",
    [{"url": "sandbox:8080"}, {"timeout_seconds": 0.0}, {"max_output_characters": 1}, {"max_attempts": 0}],
)
def test_options_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SandboxFusionTool(**({"url": "http://localhost:8080"} | options))
