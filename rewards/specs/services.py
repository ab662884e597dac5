"""What graders work with: a process for slow libraries, the sandbox for code, engines for judges."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError
from rlsys.plugins import check_options, resolve, run_hook
from rlsys.rewards.pool import WorkerPool
from rlsys.rewards.specs.values import GradingError
from rlsys.tools.python import PythonTool

_PROGRAM = Path(__file__).resolve().with_name("worker.py")


class Services:
    """Everything is started when first needed and shared by the graders of one reward.

    `timeout_seconds` bounds one request to a worker and one call of the sandbox; `python` are further options of
    `PythonTool`.
    """

    def __init__(self, *, timeout_seconds: float, num_workers: int, python: Mapping[str, Any]) -> None:
        self.timeout_seconds = timeout_seconds
        self._pool = WorkerPool(_PROGRAM, num_workers=num_workers, timeout_seconds=timeout_seconds)
        options = {"timeout_seconds": timeout_seconds, "max_output_characters": 10_000, **python}
        check_options(PythonTool, options, place="GraderReward.python")
        try:
            self.python = PythonTool(**options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"GraderReward.python: {error}") from error
        self._engines: dict[str, Any] = {}
        self._engine_turn = asyncio.Lock()

    async def ask(self, request: Mapping[str, str]) -> str:
        """The worker's answer; GradingError where it is late, dies or says that it cannot."""
        try:
            answer = await self._pool.ask(request)
        except TimeoutError:
            message = f"not graded within {self.timeout_seconds:g} s"
            raise GradingError(message, status="timeout") from None
        if answer in ("", "error"):
            raise GradingError("the grading process could not grade it")
        return answer

    async def engine(self, reference: str, options: Mapping[str, Any], model: str, *, place: str) -> Any:
        """The engine that the reference names, started; the same one for the same options.

        The model's name is passed as the engine's option `model` or `path`, where it has one that is not set.
        """
        key = json.dumps([reference, model, options], sort_keys=True, default=repr)
        async with self._engine_turn:
            if key not in self._engines:
                target = resolve(reference, place=f"{place}.use")
                known = inspect.signature(target).parameters
                taken = next((name for name in ("model", "path") if name in known), None)
                given = {taken: model, **options} if taken else dict(options)
                check_options(target, given, place=place)
                engine = target(**given)
                if not callable(getattr(engine, "generate", None)):
                    raise ConfigError(f"{place}.use: {reference!r} has no `async generate(messages, sampling) -> str`")
                await run_hook(engine, "start")
                self._engines[key] = engine
            return self._engines[key]

    async def close(self) -> None:
        """End whatever was started."""
        self._pool.close()
        await self.python.close()
        engines, self._engines = self._engines, {}
        for engine in engines.values():
            await run_hook(engine, "close")
