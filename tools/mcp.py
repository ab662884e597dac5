"""Any tool of a server that speaks the Model Context Protocol (MCP), as a tool of the policy."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rlsys.errors import ToolError
from rlsys.interfaces import ToolResult
from rlsys.tools.output import Output

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

log = logging.getLogger(__name__)

T = TypeVar("T")

SLACK_SECONDS = 10.0  # what the protocol's library gets on top of its own deadlines before it is given up as hung
MAX_REASON_CHARACTERS = 300


class McpTool:
    """One tool of an MCP server. Needs the extra `mcp`.

    `command` is the program of a server that speaks over its standard streams, with its arguments; `url` is the address
    of one that speaks streamable HTTP. `tool` is the tool's name there and `name`, where given, what the policy calls
    it. Description and schema are the server's, asked for by `start`. `environment` is added to the few variables that
    a `command` gets (HOME, PATH and the like); `max_output_characters` cuts what it answers in the middle.

    A rollout has a connection of its own, made at its first call and closed with it, because a server may keep state
    for each connection: with `command` that is a process for each rollout that calls, with `url` a session of the one
    server. A server over HTTP that keeps its state for all alike mixes the rollouts, and nothing here can prevent that.

    The server's complaints and a call longer than `timeout_seconds` are text with `ok=False`. A server that does not
    start or connect within `start_seconds`, dies, or breaks the protocol raises `ToolError`, which ends the rollout.
    """

    def __init__(
        self,
        *,
        tool: str,
        command: Sequence[str] | None = None,
        url: str | None = None,
        name: str | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float = 30.0,
        start_seconds: float = 60.0,
        max_output_characters: int = 2000,
    ) -> None:
        if (command is None) == (url is None):
            raise ValueError("give either `command` (a program and its arguments, a list) or `url`, not both or none")
        if command is not None and (isinstance(command, str) or not command):
            raise ValueError(f"command must be a list of the program and its arguments, got {command!r}")
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        if not start_seconds > 0:
            raise ValueError(f"start_seconds must be positive, got {start_seconds}")
        if max_output_characters < 100:
            raise ValueError(f"max_output_characters must be at least 100, got {max_output_characters}")
        _require_library()
        self.tool = tool
        self.command = None if command is None else list(map(str, command))
        self.url = url
        self.environment = {key: str(value) for key, value in (environment or {}).items()}
        self.timeout_seconds = timeout_seconds
        self.start_seconds = start_seconds
        self.max_output_characters = max_output_characters
        self.name = name or tool
        self.description = ""  # until `start`
        self.parameters: Mapping[str, Any] = {"type": "object"}

    @property
    def server(self) -> str:
        """The server as it is named in messages."""
        return f"the MCP server {self.url or ' '.join(self.command or ())!r}"

    async def start(self) -> None:
        """Ask the server for the tool's description and schema; ToolError where it has no such tool."""
        connection = _Connection(self)
        try:
            client = await connection.opened()
            known, cursor = {}, None
            async with asyncio.timeout(self.start_seconds):
                while True:
                    page = await client.list_tools(cursor=cursor)
                    known.update({found.name: found for found in page.tools})
                    cursor = page.next_cursor
                    if not cursor:
                        break
        except TimeoutError:
            raise ToolError(f"{self.server} does not list its tools within {self.start_seconds:g} s") from None
        finally:
            await connection.close()
        if self.tool not in known:
            raise ToolError(f"{self.server} has no tool {self.tool!r}; it has {', '.join(sorted(known)) or 'none'}")
        self.description = known[self.tool].description or ""
        self.parameters = known[self.tool].input_schema

    async def open(self, rollout_id: str) -> McpSession:
        """Begin a rollout's session; it connects at its first call."""
        return McpSession(self, rollout_id)


class McpSession:
    """One rollout's connection to the server."""

    def __init__(self, tool: McpTool, rollout_id: str) -> None:
        self.tool = tool
        self.rollout_id = rollout_id
        self._connection: _Connection | None = None
        self._closed = False

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Call the server's tool. What the policy did wrong is text with `ok=False`.

        Raises ToolError where the server cannot be used, RuntimeError after `close`.
        """
        start = time.monotonic()
        if self._closed:
            raise RuntimeError(f"the session of rollout {self.rollout_id!r} with {self.tool.server} is closed")
        if not isinstance(arguments, Mapping):
            return ToolResult(text="error: the arguments must be an object", ok=False)
        if self._connection is None:
            self._connection = _Connection(self.tool)
        text, ok = await self._connection.call(dict(arguments))
        output = Output(self.tool.max_output_characters)
        output.add(text.encode("utf-8", "replace"))
        return ToolResult(text=output.text(), ok=ok, seconds=time.monotonic() - start)

    async def close(self) -> None:
        """End the connection and, where it has one, the server's process. May be called twice."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


class _Connection:
    """A connection that lives in a task of its own: the library wants it closed by the task that opened it."""

    def __init__(self, tool: McpTool) -> None:
        self.tool = tool
        self.errors = tempfile.TemporaryFile("w")  # noqa: SIM115  # closed with the connection
        self._client: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._ending = asyncio.Event()
        self._task = asyncio.ensure_future(self._live())

    async def _live(self) -> None:
        from mcp import Client, StdioServerParameters, stdio_client

        tool = self.tool
        if tool.command is None:
            server: Any = tool.url
        else:
            parameters = StdioServerParameters(
                command=tool.command[0], args=tool.command[1:], env=tool.environment, encoding_error_handler="replace"
            )
            server = stdio_client(parameters, errlog=self.errors)
        # A third, because connecting asks up to twice: a server of an older protocol may leave the first unanswered.
        async with Client(server, read_timeout_seconds=tool.start_seconds / 3) as client:
            self._client.set_result(client)
            await self._ending.wait()

    async def opened(self) -> Client:
        """Wait until it is connected."""
        await self._wait(asyncio.wait({self._client}), self.tool.start_seconds, "connect")
        return self._client.result()

    async def call(self, arguments: dict[str, Any]) -> tuple[str, bool]:
        """Call the tool; returns the text for the policy and whether it went well."""
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED, REQUEST_TIMEOUT

        client, seconds = await self.opened(), self.tool.timeout_seconds
        calling = client.call_tool(self.tool.tool, arguments, read_timeout_seconds=seconds)
        try:
            result = await self._wait(calling, seconds + SLACK_SECONDS, "answer")
        except MCPError as error:
            if error.code == REQUEST_TIMEOUT:
                return f"error: no answer within {seconds:g} s", False
            if error.code == CONNECTION_CLOSED:
                raise ToolError(f"{self.tool.server} ended during a call{self._last_words()}") from error
            return f"error: {error}", False
        return _as_text(result), not result.is_error

    async def _wait(self, what: Awaitable[T], seconds: float, verb: str) -> T:
        """Wait for it, but no longer than `seconds` and than the connection lives."""
        waiting = asyncio.ensure_future(what)
        try:
            await asyncio.wait({waiting, self._task}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
        finally:
            waiting.cancel()
        if not self._task.done():
            raise ToolError(f"{self.tool.server} did not {verb} within {seconds:g} s{self._last_words()}")
        error = self._task.exception()
        raise ToolError(f"{self.tool.server} is gone: {_first_cause(error)}{self._last_words()}") from error

    def _last_words(self) -> str:
        """The end of what the server wrote to its standard error."""
        fd = self.errors.fileno()
        start = max(0, os.fstat(fd).st_size - MAX_REASON_CHARACTERS)
        text = os.pread(fd, MAX_REASON_CHARACTERS, start).decode("utf-8", "replace").strip()
        return f"; it wrote: {text}" if text else ""

    async def close(self) -> None:
        """Close the connection; where that does not come to an end, it is cancelled and a warning logged."""
        self._ending.set()
        if not self._client.done():  # still about to connect
            self._task.cancel()
        done, _ = await asyncio.wait({self._task}, timeout=SLACK_SECONDS)
        if not done:
            self._task.cancel()
            done, _ = await asyncio.wait({self._task}, timeout=SLACK_SECONDS)
            log.warning("%s did not close within %g s", self.tool.server, SLACK_SECONDS)
        if done and not self._task.cancelled() and (error := self._task.exception()) is not None:
            log.debug("%s closed with an error: %s", self.tool.server, error)
        self.errors.close()


def _require_library() -> None:
    try:
        from mcp import Client  # noqa: F401
    except ImportError as error:
        raise ToolError(
            f'an MCP tool needs the package `mcp`, version 2: pip install "rlsys[mcp]" ({error})'
        ) from error


def _first_cause(error: BaseException | None) -> str:
    """What went wrong inside the library's task groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return "the connection was closed" if error is None else f"{type(error).__name__}: {error}"


def _as_text(result: CallToolResult) -> str:
    """The texts of an answer one below the other; what is no text is named."""
    parts = []
    for content in result.content:
        if content.type == "text":
            parts.append(content.text)
        elif content.type == "resource":
            text = getattr(content.resource, "text", None)
            parts.append(f"[resource {content.resource.uri}]" if text is None else text)
        elif content.type == "resource_link":
            parts.append(f"[resource {content.uri}]")
        else:
            parts.append(f"[{content.type}, {content.mime_type}: not shown]")
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)
