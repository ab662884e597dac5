"""The parent's end of `trl_peer.py`: start it at given settings, let it step, take what it answers."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Sample
from benchmarks.setup_trl import FOLDER

_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What may make TRL faster or slower on a CPU."""

    threads: int
    micro_batch: int
    continuous: bool = False

    def __str__(self) -> str:
        batching = ", continuous batching" if self.continuous else ""
        return f"{self.threads} thread(s), micro-batch {self.micro_batch}{batching}"


class Peer:
    """TRL in a process of its own, stopped between steps."""

    def __init__(self, process: asyncio.subprocess.Process, ready: Sample) -> None:
        self._process = process
        self.versions: dict[str, str] = ready["versions"]

    @classmethod
    async def start(cls, job: dict[str, Any], settings: Settings, *, log: Path) -> Peer:
        """Import, load, be ready for the first step.

        Raises:
            RuntimeError: it ended; the end of its log is in the message.
        """
        python = FOLDER / "bin" / "python"
        if not python.exists():
            raise SystemExit("no benchmarks/.venv-trl; make it with `python benchmarks/setup_trl.py`")
        command = [str(python), "-m", "benchmarks.trl_peer", f"--threads={settings.threads}"]
        command += [f"--micro-batch={settings.micro_batch}"] + ["--continuous"] * settings.continuous
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment = {**os.environ, **offline, "OMP_NUM_THREADS": str(settings.threads)}
        environment["MKL_NUM_THREADS"] = str(settings.threads)
        with log.open("w") as errors:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=_ROOT,
                env=environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
            )
        return cls(process, await _ask(process, json.dumps(job), log))

    async def steps(self, count: int, *, log: Path) -> Sample:
        """Do `count` whole steps."""
        return await _ask(self._process, str(count), log)

    async def close(self) -> None:
        """End the process."""
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 20)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


async def _ask(process: asyncio.subprocess.Process, line: str, log: Path) -> Sample:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line.encode() + b"\n")
    await process.stdin.drain()
    reply = await process.stdout.readline()
    if not reply:
        raise RuntimeError(f"TRL ended: {log.read_text()[-3000:]}")
    result: Sample = json.loads(reply)
    return result
