"""A real MCP server for the tests: over its standard streams, or over HTTP with `python mcp_server.py http PORT`."""

import asyncio
import os
import sys
import threading
import time

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import EmbeddedResource, TextContent, TextResourceContents

server = MCPServer("tests", log_level="WARNING")
total = 0


@server.tool()
def add(number: int, factor: int = 1) -> str:
    """Adds a number to the total and returns it."""
    global total
    total += number * factor
    return str(total)


@server.tool()
def process() -> str:
    """The id of this process."""
    return str(os.getpid())


@server.tool()
def fail() -> str:
    """Fails."""
    raise ToolError("this always fails")


@server.tool()
async def sleep(seconds: float) -> str:
    """Sleeps."""
    await asyncio.sleep(seconds)
    return "awake"


@server.tool()
def die() -> str:
    """Ends the server."""
    print("the last words", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def block() -> str:
    """Never returns and does not let anything else run."""
    while True:
        time.sleep(1)


@server.tool()
def repeat(text: str, times: int) -> str:
    """Repeats a text."""
    return text * times


@server.tool()
def mixed() -> list[TextContent | Image | EmbeddedResource]:
    """Texts, an image and a resource."""
    resource = TextResourceContents(uri="memory://note", text="a note")
    return [
        TextContent(text="first"),
        Image(data=b"\x89PNG", format="png"),
        EmbeddedResource(resource=resource),
        TextContent(text="last"),
    ]


def end_with_standard_input() -> None:
    """Do not outlive the test, however that ends."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["http"]:
        threading.Thread(target=end_with_standard_input, daemon=True).start()
        server.run("streamable-http", port=int(sys.argv[2]))
    else:
        server.run("stdio")
