"""An interactive prompt for a tool that runs code: people see what the policy would read."""

from __future__ import annotations

import asyncio
import code
from typing import Any

from rlsys.errors import RlsysError
from rlsys.interfaces import Session


def converse(tool: Any) -> None:
    """Read blocks of code from the terminal and print what the tool answers, until the end of input.

    Raises:
        RlsysError: the tool cannot run on this host.
    """
    with asyncio.Runner() as runner:
        try:
            session = runner.run(_open(tool))
        except RuntimeError as error:
            raise RlsysError(str(error)) from error
        tier = getattr(tool, "tier", None)
        print(f"{tool.name}: {tool.description}" + (f" Isolation: {tier}." if tier else ""))
        try:
            while (block := _read_block()) is not None:
                if not block.strip():
                    continue
                result = runner.run(session.call({"code": block}))
                if result.text:
                    print(result.text)
        finally:
            runner.run(session.close())
            if (close := getattr(tool, "close", None)) is not None:
                runner.run(close())


async def _open(tool: Any) -> Session:
    if (start := getattr(tool, "start", None)) is not None:
        await start()
    session: Session = await tool.open("prompt")
    return session


def _read_block() -> str | None:
    """Lines up to a complete statement, or an empty line within a block; None at the end of input."""
    try:
        import readline  # noqa: F401 - gives input() a history and editing keys
    except ImportError:
        print("(no line editing: this Python has no readline)")
    lines: list[str] = []
    try:
        while True:
            lines.append(input("... " if lines else ">>> "))
            text = "\n".join(lines)
            if _complete(text):
                return text
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _complete(text: str) -> bool:
    try:
        return code.compile_command(text, "<prompt>", "exec") is not None
    except (SyntaxError, ValueError, OverflowError):  # the tool will say what is wrong
        return True
