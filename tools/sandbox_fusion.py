"""The Python tool on a SandboxFusion server: the same contract as `rlsys.tools.python`, the code runs elsewhere."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from rlsys.errors import ToolError
from rlsys.interfaces import ToolResult
from rlsys.tools.python import PythonTool, wrong_code

PROGRAM = "\n\n".join(
    Path(__file__).resolve().with_name(name).read_text() for name in ("output.py", "sandbox_fusion_cell.py")
)
SLACK_SECONDS = 5.0  # on the server, for starting Python and for the kill of a cell that ignores its interrupt
MAX_REASON_CHARACTERS = 300


class SandboxFusionTool:
    """Runs the policy's Python code on a server that speaks SandboxFusion's `POST /run_code`.

    `url` is the server's root, such as `http://sandbox:8080`. `timeout_seconds`, `max_output_characters` and the texts
    are those of `PythonTool`. `memory_mb` is passed on (None: the server's own limit). `server_seconds` is what the
    server gets for queueing and starting, on top of the code's own time. A request that fails for the server's reasons
    (no connection, no answer in time, 429, 5xx, status `SandboxError`) is sent up to `max_attempts` times in all, first
    after `retry_seconds`, then after twice as long each time; then the call raises `ToolError`, which ends the rollout.

    State. The server forgets everything between requests, so a session keeps the code of its earlier calls and each
    call runs them all again, unseen, before the new one. What follows from that:

    * Calls that ended by themselves run again, well or with an error, as both may have set variables. One that was
      interrupted or that ended its interpreter does not; its text says that what it had set is lost.
    * The time of a rollout's calls grows with the square of their number, and what a call does to the outside world
      (files left on the server, say) is done again.
    * The `random` module is seeded by the rollout's id and the order of sets is fixed, so that both are the same each
      time. Other sources of chance, time and addresses are not: where an earlier call shows something else than before,
      the policy is told; where it ends otherwise (an error where there was none), all variables are lost and the policy
      is told that.

    How well the code is isolated, and whether it has a network, is the server's business.
    """

    name: str = "python"
    description: str = (
        "Runs Python code and returns what it prints and the value of its last expression. "
        "Variables are kept from one call to the next."
    )
    parameters: Mapping[str, Any] = PythonTool.parameters

    def __init__(
        self,
        *,
        url: str,
        timeout_seconds: float = 5.0,
        memory_mb: int | None = None,
        max_output_characters: int = 2000,
        server_seconds: float = 60.0,
        max_attempts: int = 3,
        retry_seconds: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        if max_output_characters < 100:
            raise ValueError(f"max_output_characters must be at least 100, got {max_output_characters}")
        if not server_seconds > 0:
            raise ValueError(f"server_seconds must be positive, got {server_seconds}")
        if max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {max_attempts}")
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.memory_mb = memory_mb
        self.max_output_characters = max_output_characters
        self.server_seconds = server_seconds
        self.max_attempts = max_attempts
        self.retry_seconds = retry_seconds

    async def start(self) -> None:
        """Try the server; ToolError where it does not run Python."""
        session = await self.open("start")
        try:
            result = await session.call({"code": "1 + 1"})
        finally:
            await session.close()
        if result.text != "2":
            raise ToolError(f"the sandbox at {self.url} answers `1 + 1` with {result.text[:MAX_REASON_CHARACTERS]!r}")

    async def open(self, rollout_id: str) -> SandboxFusionSession:
        """Begin a rollout's session; nothing is sent before its first call."""
        return SandboxFusionSession(self, rollout_id)


class SandboxFusionSession:
    """One rollout's calls. They run one after the other; `earlier` are those that run again before the next one."""

    def __init__(self, tool: SandboxFusionTool, rollout_id: str) -> None:
        self.tool = tool
        self.rollout_id = rollout_id
        self.earlier: list[dict[str, Any]] = []
        self._count = 0
        self._turn = asyncio.Lock()
        self._http: aiohttp.ClientSession | None = None
        self._closed = False

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Run `arguments["code"]`. What the policy did wrong is text with `ok=False`.

        Raises ToolError where the server cannot be used, RuntimeError after `close`.
        """
        start = time.monotonic()
        async with self._turn:
            if self._closed:
                raise RuntimeError(f"the Python session of rollout {self.rollout_id!r} is closed")
            problem = wrong_code(arguments)
            text, ok = (problem, False) if problem else await self._run(arguments["code"])
        return ToolResult(text=text, ok=ok, seconds=time.monotonic() - start)

    async def _run(self, code: str) -> tuple[str, bool]:
        self._count += 1
        new = {"number": self._count, "code": code}
        tool = self.tool
        request = {
            "earlier": self.earlier,
            "new": new,
            "seed": self.rollout_id,
            "timeout_seconds": tool.timeout_seconds,
            "max_characters": tool.max_output_characters,
        }
        seconds = (
            tool.timeout_seconds * (len(self.earlier) + 1) + SLACK_SECONDS
        )  # no call may take longer than at first
        body = {
            "code": f"{PROGRAM}\n\nmain({request!a})\n",  # ASCII, whatever encoding the server writes files in
            "language": "python",
            "compile_timeout": seconds,
            "run_timeout": seconds,
            "memory_limit_MB": -1 if tool.memory_mb is None else tool.memory_mb,
            "files": {},
            "fetch_files": [],
        }
        run_result = await self._post(body, tool.server_seconds + seconds)
        answer = _answer(run_result)
        if answer is None:
            return _unanswered(run_result, seconds), False
        if answer["state_lost"]:
            self.earlier = []
        elif answer["again"]:
            self.earlier.append({**new, "ok": answer["ok"], "digest": answer["digest"]})
        return str(answer["text"]), bool(answer["ok"])

    async def _post(self, body: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
        """Send the request until the server has run it; returns the `run_result`."""
        url = f"{self.tool.url}/run_code"
        if self._http is None:
            self._http = aiohttp.ClientSession()
        reason = ""
        for attempt in range(self.tool.max_attempts):
            if attempt:
                await asyncio.sleep(self.tool.retry_seconds * 2 ** (attempt - 1))
            try:
                async with self._http.post(url, json=body, timeout=aiohttp.ClientTimeout(total=seconds)) as response:
                    status, text = response.status, await response.text(errors="replace")
            except TimeoutError:
                reason = f"no answer within {seconds:g} s"
            except (aiohttp.ClientError, OSError) as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if status == 200 and (run_result := _run_result(text)) is not None:
                    return run_result
                reason = f"HTTP {status}: {text[:MAX_REASON_CHARACTERS]}"
                if 400 <= status < 500 and status != 429:
                    raise ToolError(f"{url} refuses the request, is it SandboxFusion's root? {reason}")
        raise ToolError(
            f"{url} failed {self.tool.max_attempts} times, see that the sandbox server runs; last: {reason}"
        )

    async def close(self) -> None:
        """End the session; a call that is under way ends first. May be called twice."""
        self._closed = True
        async with self._turn:
            http, self._http = self._http, None
            if http is not None:
                await http.close()


def _run_result(text: str) -> Mapping[str, Any] | None:
    """The result of the run in a server's reply; None where the server could not run it (status `SandboxError`)."""
    try:
        reply = json.loads(text)
    except ValueError:
        return None
    if not isinstance(reply, dict) or reply.get("status") not in ("Success", "Failed"):
        return None
    run_result = reply.get("run_result")
    return run_result if isinstance(run_result, dict) else None


def _answer(run_result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The line that `sandbox_fusion_cell.py` printed; None where it was ended before."""
    try:
        answer = json.loads(run_result.get("stdout") or "")
    except ValueError:
        return None
    expected = {"text", "ok", "again", "digest", "state_lost"}
    return answer if isinstance(answer, dict) and expected <= answer.keys() else None


def _unanswered(run_result: Mapping[str, Any], seconds: float) -> str:
    """What the policy is told where the server ended everything: out of time, out of memory."""
    if run_result.get("status") == "TimeLimitExceeded":
        how = f"no answer within {seconds:g} s: the sandbox was ended"
    else:
        how = f"the sandbox ended with exit status {run_result.get('return_code')}"
    stderr = str(run_result.get("stderr") or "").strip()[-MAX_REASON_CHARACTERS:]
    note = f"[{how}; what this call set is lost, variables of earlier calls are kept]"
    return f"{stderr}\n{note}" if stderr else note
