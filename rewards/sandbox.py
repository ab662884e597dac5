"""The sandbox as graders use it: a job goes in, the text that it shows comes out, in a session that ends with it."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.errors import ToolError
from rlsys.plugins import check_options
from rlsys.tools.python import PythonTool

MAX_PART_CHARACTERS = 90_000  # of a job in one cell: a quoted text can be twice as long, and a cell has a limit
ATTEMPTS = 2
SEED = "grading"  # sessions of one name draw the same random numbers: grading the same twice gives the same


class SandboxError(RuntimeError):
    """The sandbox failed, by no fault of what it ran; the message says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a job did: all that it showed, whether it ended without an error, whether its time was up.

    The code of the job could have written any `text` and could claim to be `ok`; only `too_slow` is measured outside.
    """

    text: str
    ok: bool
    too_slow: bool = False


@dataclass(slots=True)
class Budget:
    """Seconds that several jobs may run, together; waiting does not count."""

    seconds: float


class Sandbox:
    """Runs jobs, at most `max_parallel` at once (by default one for each CPU), each in a new session of a `PythonTool`.

    `cell` is a file of Python: it must define a list `parts`, which is filled with the text of the job, and `run()`,
    which then has `timeout_seconds`. `options` are further ones of `PythonTool`, such as `tier`.
    Raises ConfigError for an unknown option.
    """

    def __init__(
        self,
        cell: Path,
        *,
        timeout_seconds: float,
        max_parallel: int | None,
        options: Mapping[str, Any],
        place: str,
        **settings: Any,
    ) -> None:
        if max_parallel is not None and max_parallel < 1:
            raise ValueError(f"max_parallel must be at least 1, got {max_parallel}")
        check_options(PythonTool, options, place=place)
        self._tool = PythonTool(**{"timeout_seconds": timeout_seconds, **settings, **options})
        self._cell = cell.read_text(encoding="utf-8")
        self._places = asyncio.Semaphore(max_parallel or os.cpu_count() or 1)

    @property
    def tier(self) -> str | None:
        """How well sessions are isolated; None before `start`."""
        return self._tool.tier

    async def start(self) -> None:
        """Start what sessions are cloned from; RuntimeError where this host cannot isolate them."""
        await self._tool.start()

    async def close(self) -> None:
        """End it with every session."""
        await self._tool.close()

    async def run(self, job: str, budget: Budget | None = None) -> Ran:
        """Run one job, with at most what the budget has left; a session that is lost is tried once more.

        Raises:
            SandboxError: no session could be made, or it was lost again.
        """
        async with self._places:
            problems = []
            for _ in range(ATTEMPTS):
                try:
                    return await self._run_in_a_session(job, budget or Budget(math.inf))
                except (ToolError, RuntimeError, OSError) as error:
                    problems.append(str(error) or type(error).__name__)
            raise SandboxError(f"the sandbox failed: {'; then '.join(problems)}")

    async def _run_in_a_session(self, job: str, budget: Budget) -> Ran:
        if budget.seconds <= 0:
            return Ran(text="", ok=False, too_slow=True)
        session = await self._tool.open(SEED)
        try:
            parts = [job[at : at + MAX_PART_CHARACTERS] for at in range(0, len(job), MAX_PART_CHARACTERS)]
            for code in (self._cell, *(f"parts.append({part!r})" for part in parts)):
                loaded = await session.call({"code": code})  # nothing of the job has run so far
                if not loaded.ok:
                    raise SandboxError(f"a session could not load its job: {loaded.text[-500:]}")
            clock = asyncio.get_running_loop().time
            started = clock()
            try:
                async with asyncio.timeout(budget.seconds) as limit:
                    result = await session.call({"code": "run()"})
            except TimeoutError:
                if not limit.expired():
                    raise
                return Ran(text="", ok=False, too_slow=True)
            finally:
                budget.seconds -= clock() - started
            slow = not result.ok and result.seconds >= self._tool.timeout_seconds
            return Ran(text=result.text, ok=result.ok, too_slow=slow)
        finally:
            await session.close()
