"""The Python interpreter that the policy may call: variables live as long as the rollout."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rlsys.errors import ToolError
from rlsys.interfaces import ToolResult
from rlsys.tools.output import Output
from rlsys.tools.python_clone import Clone
from rlsys.tools.python_host import ZygoteProcess, default_max_sessions, probe

log = logging.getLogger(__name__)

Tier = Literal["T2", "T1", "T0"]
MAX_CODE_CHARACTERS = 200_000
PRELOADED = ("numpy", "numpy.random", "numpy.linalg", "numpy.fft", "numpy.polynomial", "sympy")  # numpy is lazy
START_SECONDS = 60.0
GRACE_SECONDS = 1.0  # from the interrupt to the kill
WAIT_SECONDS = 600.0  # for a place among `max_sessions`
FRESH = "[a fresh interpreter: variables of earlier calls are gone]\n"


class PythonTool:
    """Runs the policy's Python code, one interpreter for each rollout, with numpy and sympy loaded already.

    The value of a last expression is shown as in a notebook; printed text, errors and time-outs come back as text of at
    most `max_output_characters`, cut in the middle. A call longer than `timeout_seconds` is interrupted (variables are
    kept) and, where it does not stop within a second, killed (variables are lost, and the text says so).

    Isolation comes in tiers; `start` takes the best one that this host can make and tries it out before any code runs:

    - T2: own users, processes, network, and file system (the Python installation, read-only, and a folder of
      `disk_mb` and `max_files` that goes with the session), Landlock, and a list of allowed system calls.
    - T1: Landlock and the list of system calls, no namespaces: the size of the folder is not limited. Accepted with a
      warning.
    - T0: the list of system calls alone, with opening files denied. Refused unless `tier="T0"` asks for it by name.

    In all of them code cannot connect to anything, start programs or fork, and `memory_mb` of address space and
    `max_threads` bound it. All of them share the host's kernel: they hold a reward-seeking policy, not a determined
    attacker. `docs/sandbox.md` has the table of attacks.

    `max_sessions` bounds the interpreters that live at once (by default what the memory allows); a call beyond waits.
    `forkable` lets `PythonSession.fork` copy a live interpreter (T2 only). `preload` names modules to load besides
    numpy and sympy, `python` another interpreter.
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
        disk_mb: int = 64,
        max_files: int = 2048,
        max_threads: int = 32,
        max_sessions: int | None = None,
        tier: Literal["auto", "T2", "T1", "T0"] = "auto",
        forkable: bool = False,
        preload: tuple[str, ...] = (),
        python: str | None = None,
    ) -> None:
        least = {"memory_mb": 256, "max_output_characters": 100, "disk_mb": 1, "max_files": 16, "max_threads": 1}
        for name, minimum in least.items():
            if not (value := locals()[name]) >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        if max_sessions is not None and max_sessions < 1:
            raise ValueError(f"max_sessions must be at least 1, got {max_sessions}")
        if tier not in ("auto", "T2", "T1", "T0"):
            raise ValueError(f"tier must be auto, T2, T1 or T0, got {tier!r}")
        self.timeout_seconds = timeout_seconds
        self.max_output_characters = max_output_characters
        self.forkable = forkable
        self.tier: Tier | None = None
        """The tier that sessions have; None before `start`."""
        self._tiers: tuple[Tier, ...] = ("T2", "T1") if tier == "auto" else (tier,)
        self._python = python
        self._settings = {
            "memory_mb": memory_mb,
            "disk_mb": disk_mb,
            "max_files": max_files,
            "max_threads": max_threads,
            "forkable": forkable,
            "preload": [*PRELOADED, *preload],
        }
        self._places = asyncio.Semaphore(max_sessions or default_max_sessions(memory_mb))
        self._zygote: ZygoteProcess | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Start the process that sessions are cloned from, and prove that it denies what it must.

        Raises:
            RuntimeError: no tier that is accepted can be made on this host; says why and what would help.
        """
        await self._ready_zygote()

    async def _ready_zygote(self) -> ZygoteProcess:
        """The running zygote; a new one where there is none, it has died or belongs to another event loop."""
        async with self._starting:
            if self._zygote is not None and self._zygote.usable():
                return self._zygote
            again = self.tier
            await self.close()
            problems = []
            for tier in (again,) if again else self._tiers:
                zygote = ZygoteProcess({**self._settings, "tier": tier}, python=self._python)
                try:
                    async with asyncio.timeout(START_SECONDS):
                        await zygote.start()
                        if again is None:
                            await self._try_out(zygote)
                except (OSError, RuntimeError, TimeoutError) as error:
                    await zygote.close()
                    problems.append(f"{tier}: {error or f'no answer within {START_SECONDS:g} s'}")
                    continue
                self._zygote, self.tier = zygote, tier
                if problems:
                    log.warning("the Python tool runs in the weaker tier %s (%s)", tier, "; ".join(problems))
                return zygote
            raise RuntimeError(
                f"the Python tool cannot be isolated on this host ({'; '.join(problems)}). Allow user namespaces "
                "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0; in a container a "
                "seccomp profile that permits unshare and mount) or a kernel with Landlock; `rlsys doctor` shows what "
                "is missing. As a last resort accept the weakest isolation by name: `tier: T0`"
            )

    async def _try_out(self, zygote: ZygoteProcess) -> None:
        """Canaries: in a session of this zygote, everything that must be denied is tried once."""
        session = PythonSession(self, "canary", lambda: _answer(zygote))
        with probe() as (code, succeeded):
            try:
                result = await session.call({"code": code})
            finally:
                await session.close()
            if not result.ok or (found := succeeded(result.text)):
                raise RuntimeError(f"a canary got through: {result.text if not result.ok else ', '.join(found)}")

    async def open(self, rollout_id: str) -> PythonSession:
        """Begin a rollout's session; no process is started before its first call."""
        return PythonSession(self, rollout_id, self._ready_zygote)

    async def close(self) -> None:
        """End the zygote and with it every session."""
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            await zygote.close()


async def _answer(zygote: ZygoteProcess) -> ZygoteProcess:
    return zygote


def wrong_code(arguments: Any) -> str | None:
    """What the policy reads where its arguments are not code of a sensible size; None where they are."""
    code = arguments.get("code") if isinstance(arguments, Mapping) else None
    if not isinstance(code, str):
        return 'error: the arguments must be an object with one string, {"code": "..."}'
    if len(code) > MAX_CODE_CHARACTERS:
        return f"error: the code has {len(code)} characters; the limit is {MAX_CODE_CHARACTERS}"
    return None


class PythonSession:
    """One rollout's interpreter. Calls run one after the other; `close` ends it with all that it holds."""

    def __init__(self, tool: PythonTool, rollout_id: str, zygote: Callable[[], Any]) -> None:
        self.tool = tool
        self.rollout_id = rollout_id
        self._zygote = zygote
        self._turn = asyncio.Lock()
        self._clone: Clone | None = None
        self._state_lost = False
        self._closed = False

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Run `arguments["code"]`. What the policy did wrong is text with `ok=False`.

        Raises RuntimeError where the host cannot run the tool (the message names the fix) or after `close`, and
        ToolError where the interpreter was lost by no fault of its code.
        """
        start = time.monotonic()
        async with self._turn:
            if self._closed:
                raise RuntimeError(f"the Python session of rollout {self.rollout_id!r} is closed")
            problem = wrong_code(arguments)
            text, ok = (problem, False) if problem else await self._run(arguments["code"])
        return ToolResult(text=text, ok=ok, seconds=time.monotonic() - start)

    async def _run(self, code: str) -> tuple[str, bool]:
        prefix = FRESH if self._state_lost else ""
        if self._clone is None:
            await self._begin()
            self._state_lost = False
        assert self._clone is not None
        output = Output(self.tool.max_output_characters)
        try:
            verdict, note = await self._clone.run(code, output, self.tool.timeout_seconds, GRACE_SECONDS)
        except BaseException:  # cancelled in the middle: this interpreter is not used again
            await self._drop()
            raise
        if verdict is None:
            innocent = not self._clone.zygote.usable() or self._clone.lost_with_its_original
            status = await self._drop()
            if innocent:
                raise ToolError(f"the Python interpreter of rollout {self.rollout_id!r} ended with its parent")
            how = "" if status is None else f" with exit status {status}" if status >= 0 else f" (signal {-status})"
            note = f"[{note}{how}; its variables are lost]"
        shown = "\n".join(filter(None, (output.text().removesuffix("\n"), note)))
        return prefix + shown, bool(verdict)

    async def _take_place(self) -> None:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self.tool._places.acquire()
        except TimeoutError:
            raise ToolError(f"no place for another Python session within {WAIT_SECONDS:g} s") from None

    async def _begin(self) -> None:
        """Take a place and start an interpreter."""
        await self._take_place()
        try:
            zygote = await self._zygote()
            seed = hashlib.sha256(self.rollout_id.encode("utf-8", "replace")).hexdigest()
            self._clone = await Clone.open(zygote, seed)
        except BaseException:
            self.tool._places.release()
            raise

    async def _drop(self) -> int | None:
        clone, self._clone = self._clone, None
        if clone is None:
            return None
        self._state_lost = True
        try:
            return await asyncio.shield(clone.end())
        finally:
            self.tool._places.release()

    async def fork(self) -> PythonSession:
        """A copy of this session with its variables and copies of its files; the two go separate ways.

        Needs `PythonTool(forkable=True)` and tier T2; where no call was made yet, the copy is simply another session.
        Closing either leaves the other as it is. Threads of the original are not copied.
        """
        async with self._turn:
            copy = PythonSession(self.tool, self.rollout_id, self._zygote)
            copy._state_lost = self._state_lost
            if self._closed:
                raise RuntimeError(f"the Python session of rollout {self.rollout_id!r} is closed")
            if not self.tool.forkable or self.tool.tier not in ("T2", None):
                raise RuntimeError("this Python tool cannot fork its sessions: it needs `forkable: true` and tier T2")
            if self._clone is not None:
                await self._take_place()
                try:
                    copy._clone = await self._clone.fork(self.tool.timeout_seconds)
                except BaseException:
                    self.tool._places.release()
                    raise
            return copy

    async def close(self) -> None:
        """End the interpreter. May be called twice, and while a call is under way, which returns at once."""
        self._closed = True
        if self._clone is not None:
            self._clone.hang_up()
        async with self._turn:
            await self._drop()
