"""Where attacks are tried: one tool of one tier, a host to defend, and a judge who trusts nothing from inside.

An attack has *succeeded* where the world shows it (a listener was reached, a file changed, a secret turned up in
an answer, a process stayed behind, memory or time went beyond its bound, a later call was answered falsely)
or where its own code reports that a refused thing worked. It is *survived* where another session goes on undisturbed
and a new one of the same tool works as ever.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlsys.interfaces import ToolResult
from rlsys.tools.python import PythonTool
from tests.tools.attacks.attack import Attack, prelude
from tests.tools.attacks.world import World, descendants, marked_processes, resident_mb

LIMITS: dict[str, Any] = {
    "timeout_seconds": 0.75,
    "memory_mb": 512,
    "disk_mb": 16,
    "max_files": 256,
    "max_threads": 32,
}
MAX_OUTPUT_CHARACTERS = 6000
GRACE_SECONDS = 1.0  # what the tool gives an interrupted cell
SLACK_SECONDS = 5.0  # what a loaded machine may need on top of every bound
HANG_SECONDS = 30.0
MOST_SIDE_BY_SIDE = 6
HOST_GROWTH_MB = 64
CLONES_MB = 400  # two more sessions and the tool's own processes, whose pages are partly counted twice
WATCHED = {"memory", "output", "disk"}
MISTAKES = re.compile(r"(?m)^(NameError|SyntaxError|AttributeError|TypeError|ModuleNotFoundError).*")

BYSTANDER = """
import ctypes, os, signal
secret = ctypes.create_string_buffer(SECRET.encode())
mine, hits = 41, []
signal.signal(signal.SIGURG, lambda *_: hits.append(1))
try:
    with open("secret.txt", "w") as file:
        file.write(SECRET)
except OSError:
    pass
print(os.getpid(), ctypes.addressof(secret), os.getcwd())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one attack: proofs that it succeeded, what it broke for others, and all answers."""

    evidence: tuple[str, ...]
    broken: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def succeeded(self) -> bool:
        return bool(self.evidence)


class Arena:
    """Tries attacks against one tool. Everything runs in one event loop, whose thread is the main one."""

    def __init__(self, tool: PythonTool, world: World) -> None:
        self.tool = tool
        self.world = world
        self.count = 0
        self.waited: dict[str, Verdict] = {}
        """What `fight_side_by_side` found, for whoever asks for one attack at a time."""

    @classmethod
    async def open(cls, tier: Literal["T2", "T1", "T0"], world: World) -> Arena:
        """An arena with a tool of this tier; RuntimeError where this host cannot make it."""
        tool = PythonTool(tier=tier, max_output_characters=MAX_OUTPUT_CHARACTERS, **LIMITS)
        await tool.start()
        return cls(tool, world)

    async def fight(self, attack: Attack) -> Verdict:
        """One attack in a session of its own, beside a session that must not notice it."""
        return await _Fight(self, attack).run()

    async def fight_side_by_side(self, attacks: Iterable[Attack]) -> dict[str, Verdict]:
        """Attacks that only use up their time, some at once. What stays behind is held against all of them."""
        limit = asyncio.Semaphore(MOST_SIDE_BY_SIDE)

        async def one(attack: Attack) -> tuple[str, Verdict]:
            async with limit:
                return attack.name, await self.fight(attack)

        before = set(descendants(os.getpid()))
        verdicts = dict(await asyncio.gather(*map(one, attacks)))
        found = tuple(self.world.evidence()) + tuple(await self.leftovers(before))
        return {name: replace(verdict, evidence=verdict.evidence + found) for name, verdict in verdicts.items()}

    async def leftovers(self, before: set[int]) -> list[str]:
        """Processes that were not there before, or that carry an attack's mark."""
        name, own = f"x{self.world.token}", before | {self.world.witness.process.pid}
        found = []
        if not await soon(lambda: not set(descendants(os.getpid())) - own):
            found.append(f"processes stayed: {set(descendants(os.getpid())) - own}")
        if not await soon(lambda: not marked_processes(name)):
            found.append(f"processes stayed outside of the tool's reach: {marked_processes(name)}")
        return found


class _Fight:
    """One attack's course. What shows a success goes to `evidence`, what others suffered to `broken`."""

    def __init__(self, arena: Arena, attack: Attack) -> None:
        self.arena, self.tool, self.world, self.attack = arena, arena.tool, arena.world, attack
        arena.count += 1
        self.name = f"{arena.count}-{attack.name}"
        self.evidence: list[str] = []
        self.broken: list[str] = []
        self.texts: list[str] = []

    async def run(self) -> Verdict:
        before = set(descendants(os.getpid()))
        descriptors = len(os.listdir("/proc/self/fd"))
        async with self.watched(), self.session("bystander") as bystander:
            known = await self.meet(bystander)
            async with self.session("attacker") as attacker:
                if known is not None:
                    await self.attack_with(attacker, known)
            await self.ask_bystander(bystander)
        await self.ask_new_session()
        if not self.attack.waits:  # beside others it could not be said whose doing it was
            self.evidence += self.world.evidence() + await self.arena.leftovers(before)
            if not await soon(lambda: len(os.listdir("/proc/self/fd")) <= descriptors):
                self.evidence.append(f"this process kept {len(os.listdir('/proc/self/fd')) - descriptors} descriptors")
        return Verdict(evidence=tuple(self.evidence), broken=tuple(self.broken), texts=tuple(self.texts))

    @asynccontextmanager
    async def session(self, what: str) -> AsyncIterator[Any]:
        session = await self.tool.open(f"{self.name}-{what}")
        try:
            yield session
        finally:
            start = time.monotonic()
            try:
                await asyncio.wait_for(session.close(), HANG_SECONDS)
            except TimeoutError:
                self.broken.append(f"closing the {what}'s session hung")
            if time.monotonic() - start > GRACE_SECONDS + SLACK_SECONDS:
                self.broken.append(f"closing the {what}'s session took {time.monotonic() - start:.1f} s")

    async def call(self, session: Any, code: str) -> ToolResult:
        """One call within its bounds of time and text; its answer is searched for secrets."""
        try:
            result: ToolResult = await asyncio.wait_for(session.call({"code": code}), HANG_SECONDS)
        except TimeoutError:
            self.evidence.append(f"a call did not return within {HANG_SECONDS:g} s")
            return ToolResult(text="[hung]", ok=False, seconds=HANG_SECONDS)
        bound = LIMITS["timeout_seconds"] + GRACE_SECONDS + SLACK_SECONDS
        if result.seconds > bound:
            self.evidence.append(f"a call took {result.seconds:.1f} s; the bound is {bound:g} s")
        if len(result.text) > MAX_OUTPUT_CHARACTERS + 400:
            self.evidence.append(f"an answer has {len(result.text)} characters")
        if any("\ud800" <= character <= "\udfff" for character in result.text):
            self.evidence.append("an answer cannot be encoded as UTF-8")
        return result

    async def call_patiently(self, session: Any, code: str) -> ToolResult:
        """A harmless call, whose short time may run out on a loaded machine: up to three times."""
        for _ in range(2):
            result = await self.call(session, code)
            if "[interrupted after" not in result.text and "[no answer within" not in result.text:
                return result
        return await self.call(session, code)

    async def meet(self, bystander: Any) -> dict[str, Any] | None:
        """Start the session that is to be left alone; returns all that the attacker may know."""
        secret = self.world.secrets["other"]
        result = await self.call_patiently(bystander, f"SECRET = {secret!r}{BYSTANDER}")
        if not result.ok:
            self.broken.append(f"a session could not be started before the attack: {result.text}")
            return None
        pid, address, directory = result.text.split()
        other = {"other_pid": int(pid), "other_address": int(address), "other_directory": directory}
        return self.world.known() | LIMITS | other

    async def attack_with(self, session: Any, known: dict[str, Any]) -> None:
        result = await self.call_patiently(session, prelude(known, self.attack.imports))
        if not result.ok:
            self.broken.append(f"the attack could not be prepared: {result.text}")
            return
        for cell in self.attack.cells:
            result = await self.call(session, cell)
            self.texts.append(result.text)
        if self.attack.fails and result.ok:
            self.evidence.append(f"the attack's failing call was reported as a good one: {result.text!r:.200}")
        whole = "\n".join(self.texts)
        if not re.search(self.attack.ran, whole):
            self.broken.append(f"the attack was not tried: no {self.attack.ran!r} in {whole!r:.500}")
        if "Error" not in self.attack.ran and (found := MISTAKES.search(whole)):
            self.broken.append(f"the attack has a mistake: {found[0]}")
        self.evidence += [line for line in whole.splitlines() if line.startswith("SUCCEEDED ")]
        for name, secret in self.world.secrets.items():
            if secret in whole:
                self.evidence.append(f"the secret of the {name} was read")
        await self.ask_attacker(session)

    async def ask_attacker(self, session: Any) -> None:
        """The attacked session must go on honestly: right answers, or the word that its variables are lost."""
        failing = await self.call(session, "raise ValueError('an honest error')")
        if failing.ok and not self.attack.insider:
            self.evidence.append(f"a failing call was reported as a good one: {failing.text!r:.200}")
        answer = await self.call(session, "6 * 7")
        if (
            answer.ok and not self.attack.insider and "42" not in answer.text and "characters cut" not in answer.text
        ):  # threads may go on printing
            self.evidence.append(f"a later call was answered falsely: {answer.text!r:.200}")
        self.texts += [failing.text, answer.text]

    async def ask_bystander(self, session: Any) -> None:
        result = await self.call_patiently(session, "mine + 1 + len(hits)")
        if not result.ok or result.text != "42":
            self.broken.append(f"another session was disturbed: {result.text!r:.200}")

    async def ask_new_session(self) -> None:
        async with self.session("later") as session:
            if self.attack.later:
                result = await self.call_patiently(session, self.attack.later)
                self.evidence += [f"later: {line}" for line in result.text.splitlines() if "SUCCEEDED " in line]
                if not re.search(self.attack.ran, result.text):
                    self.broken.append(f"nobody looked for what the attack left: {result.text!r}")
            result = await self.call_patiently(session, "6 * 7")
            if not result.ok or result.text != "42":
                self.broken.append(f"a new session does not work: {result.text!r:.200}")

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Watch the memory of this process and of all below it, where the attack is after memory."""
        if self.attack.family not in WATCHED:
            yield
            return
        first = peak = measured_memory()

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = tuple(map(max, peak, measured_memory()))
                await asyncio.sleep(0.03)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            host, below = (most - least for most, least in zip(peak, first, strict=True))
            if host > HOST_GROWTH_MB:
                self.evidence.append(f"this process grew by {host:.0f} MiB")
            if below > 1.25 * LIMITS["memory_mb"] + CLONES_MB:
                self.evidence.append(f"the sandbox used {below:.0f} MiB of memory")


def measured_memory() -> tuple[float, ...]:
    """Memory of this process and of all processes below it, in MiB."""
    return resident_mb([os.getpid()]), resident_mb(descendants(os.getpid()))


async def soon(condition: Callable[[], bool]) -> bool:
    """Whether it became true within the slack."""
    end = time.monotonic() + SLACK_SECONDS
    while not (met := condition()) and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return met
