"""The Python interpreter that the policy may call: variables live as long as the rollout."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsys.interfaces import ToolResult

log = logging.getLogger(__name__)

CHILD = Path(__file__).resolve().with_name("python_child.py")
MAX_CODE_CHARACTERS = 200_000
MAX_START_SECONDS = 60.0
SLACK_SECONDS = 10.0  # what the keeper gets on top of its own limits before it is given up as hung
FRESH = "[a fresh interpreter: variables of earlier calls are gone]\n"


class PythonTool:
    """Runs the policy's Python code, one interpreter for each rollout, started at the rollout's first call.

    The value of a last expression is shown as in a notebook; printed text, errors and time-outs come back as text of at
    most `max_output_characters`, cut in the middle. A call longer than `timeout_seconds` is interrupted (variables are
    kept) and, where it does not stop within a second, killed (variables are lost, and the text says so). `memory_mb`
    bounds the address space of each process. `python` names another interpreter (None: this one).

    Isolated from the code: the network (own namespace without a route, tried out before any code runs), other processes
    (own process namespace; everything in it dies with the session, however that ends), this process's environment,
    descriptors and memory, and every capability. Bounded: time, memory and file size per process, the number of
    processes, output. A host without user namespaces is refused with an error unless `allow_network` is true.

    Not isolated yet: the file system. The code reads and writes what its user may, other sessions' directories, /proc
    and Unix sockets with a path included; its user is `nobody` where the tool runs as root and everybody may read this
    Python installation, and else it has this process's file rights. Its directory is not limited in size, and the
    kernel is the host's own. With `allow_network` on a host without namespaces it can also signal processes of its user
    and start processes that outlive the session. It keeps a reward-seeking policy out of trouble; it does not hold an
    attacker.
    """

    name: str = "python"
    description: str = (
        "Runs Python code and returns what it prints and the value of its last expression. "
        "Variables are kept from one call to the next. There is no network."
    )
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "Python source code"}},
        "required": ["code"],
    }

    def __init__(
        self,
        *,
        timeout_seconds: float = 5.0,
        memory_mb: int = 1024,
        max_output_characters: int = 2000,
        allow_network: bool = False,
        python: str | None = None,
    ) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        if memory_mb < 64:
            raise ValueError(f"memory_mb must be at least 64 for Python to start, got {memory_mb}")
        if max_output_characters < 100:
            raise ValueError(f"max_output_characters must be at least 100, got {max_output_characters}")
        self.timeout_seconds = timeout_seconds
        self.memory_mb = memory_mb
        self.max_output_characters = max_output_characters
        self.allow_network = allow_network
        self.python = python or sys.executable

    async def start(self) -> None:
        """Try one interpreter; RuntimeError where the host cannot run it, with the fix."""
        session = await self.open("start")
        try:
            await session.call({"code": "1"})
        finally:
            await session.close()

    async def open(self, rollout_id: str) -> PythonSession:
        """Begin a rollout's session; no process is started before its first call."""
        return PythonSession(self, rollout_id)


class PythonSession:
    """One rollout's interpreter. Calls run one after the other; `close` ends every process that they started."""

    def __init__(self, tool: PythonTool, rollout_id: str) -> None:
        self.tool = tool
        self.rollout_id = rollout_id
        self._turn = asyncio.Lock()
        self._keeper: _Keeper | None = None
        self._state_lost = False
        self._closed = False

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Run `arguments["code"]`. What the policy did wrong is text with `ok=False`.

        Raises RuntimeError where the host cannot run the tool (the message names the fix) or after `close`.
        """
        start = time.monotonic()
        async with self._turn:
            if self._closed:
                raise RuntimeError(f"the Python session of rollout {self.rollout_id!r} is closed")
            code = arguments.get("code") if isinstance(arguments, Mapping) else None
            if not isinstance(code, str):
                text, ok = 'error: the arguments must be an object with one string, {"code": "..."}', False
            elif len(code) > MAX_CODE_CHARACTERS:
                text, ok = f"error: the code has {len(code)} characters; the limit is {MAX_CODE_CHARACTERS}", False
            else:
                text, ok = await self._run(code)
        return ToolResult(text=text, ok=ok, seconds=time.monotonic() - start)

    async def _run(self, code: str) -> tuple[str, bool]:
        prefix = FRESH if self._state_lost else ""
        try:
            if self._keeper is None:
                self._keeper = _Keeper(self.tool)
                await self._keeper.started()
                self._state_lost = False
            kind, text = await self._keeper.run(code)
        except BaseException:  # cancelled in the middle, or no answer to be trusted: this interpreter is not used again
            await self._drop()
            raise
        if kind == b"!":
            await self._drop()
        return prefix + text, kind == b"+"

    async def _drop(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            self._state_lost = True
            keeper.control.close()
            await asyncio.shield(asyncio.to_thread(keeper.end))

    async def close(self) -> None:
        """End the interpreter with all its processes and remove its directory. May be called twice."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.hang_up()  # a call that is under way returns at once
        async with self._turn:
            await self._drop()


class _Keeper:
    """This side of a running `python_child.py`: frames over a socket pair, every size and wait bounded."""

    def __init__(self, tool: PythonTool) -> None:
        self.tool = tool
        self.directory = tempfile.mkdtemp(prefix="rlsys-python-")
        self.control, child = socket.socketpair()
        self.control.setblocking(False)
        limits = (tool.timeout_seconds, tool.memory_mb, tool.max_output_characters, tool.allow_network)
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        environment |= dict.fromkeys(("HOME", "TMPDIR"), self.directory)
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # else 64 MB for each core
        try:
            # In the event loop's own thread, because the child is ended when the *thread* that started it ends.
            self.process = subprocess.Popen(
                [self.tool.python, "-I", str(CHILD), *map(str, (child.fileno(), os.getpid(), *limits))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(child.fileno(),),
                cwd=self.directory,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            self.control.close()
            os.rmdir(self.directory)
            raise
        finally:
            child.close()

    async def started(self) -> None:
        """Wait until the interpreter is confined; RuntimeError where it cannot be."""
        try:
            async with asyncio.timeout(MAX_START_SECONDS):
                kind, text = await self._read_frame()
        except TimeoutError:
            raise RuntimeError(f"{self.tool.python} did not start within {MAX_START_SECONDS:g} s") from None
        if kind != b"R":
            raise RuntimeError(text or f"{self.tool.python} ended while it started; its error output says why")

    async def run(self, code: str) -> tuple[bytes, str]:
        """Run one cell; returns `+`, `-` or `!` (interpreter lost) and the text for the policy."""
        data = code.encode("utf-8", "replace")
        try:
            async with asyncio.timeout(self.tool.timeout_seconds + SLACK_SECONDS):
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(self.control, b"C" + len(data).to_bytes(4, "big") + data)
                kind, text = await self._read_frame()
        except (TimeoutError, OSError):
            kind, text = b"!", ""
        return kind, text or ("[the interpreter is gone; its variables are lost]" if kind == b"!" else "")

    async def _read_frame(self) -> tuple[bytes, str]:
        """One frame; `!` without a text where the child has ended or does not keep to the format."""
        header = await self._read_exactly(5)
        size = int.from_bytes(header[1:], "big")
        if len(header) < 5 or size > 4 * self.tool.max_output_characters + 4096:
            return b"!", ""
        return header[:1], (await self._read_exactly(size)).decode("utf-8", "replace")

    async def _read_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = await asyncio.get_running_loop().sock_recv(self.control, size - len(data))
            if not chunk:
                break
            data += chunk
        return data

    def hang_up(self) -> None:
        """Tell the child to end, and wake whoever waits for it."""
        with contextlib.suppress(OSError):  # it may have ended first
            self.control.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Wait for the child, which ends when its socket closes, and make sure of it. Blocks; run it in a thread."""
        try:
            self.process.wait(timeout=SLACK_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("a Python tool's keeper (pid %d) did not end by itself and was killed", self.process.pid)
            self.process.kill()
            self.process.wait()
        try:
            shutil.rmtree(self.directory)
        except FileNotFoundError:
            return  # as it should be: the keeper has removed it
        except (OSError, RecursionError) as error:
            log.warning("could not remove the Python tool's directory %s: %s", self.directory, error)
