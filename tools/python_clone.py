"""One interpreter of the Python tool, seen from outside: asked, timed, interrupted, copied and ended."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from rlsys.tools.output import Output
from rlsys.tools.python_host import END_SECONDS, READ_BYTES, ZygoteProcess

MAX_READS_BEHIND = 32  # of output, once the answer is there: a thread of the code may go on writing
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags, call, architecture, ip, arguments
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_RECEIVE, _ANSWER, _CONTINUE, _EPERM = 0xC0502100, 0xC0182101, 1, 1
_MAX_DENIED_FORKS = 1000
PATIENCE_SECONDS = 0.05  # of CPU that a call may use before it gives way
NICENESS = 10
READS_AT_ONCE, PAUSE_SECONDS = 16, 0.01  # of output: a megabyte, then a breath


class ForkGate:
    """Says no to every fork that code asks for, and yes to those that the tool has announced."""

    def __init__(self, listener: int) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listener, self._answer)
        self._denied = 0
        self.announced = 0

    def _answer(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        if not any(events & select.POLLIN for _, events in poll.poll(0)):  # nobody is left who could ask
            self.close()
            return
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, buffer)
            yes = self.announced > 0
            self.announced -= yes
            flags, error = (_CONTINUE, 0) if yes else (0, -_EPERM)
            asked = _NOTIFICATION.unpack(buffer)[0]
            fcntl.ioctl(self._listener, _ANSWER, struct.pack("=QqiI", asked, 0, error, flags))
        except OSError:  # the asking thread has ended meanwhile
            return
        self._denied += not yes
        if self._denied > _MAX_DENIED_FORKS:
            self.close()  # from now on the kernel itself says no

    def close(self) -> None:
        """Stop listening; the kernel denies what is asked later."""
        if self._listener >= 0:
            self._loop.remove_reader(self._listener)
            os.close(self._listener)
            self._listener = -1


class Clone:
    """One interpreter: a control socket for requests and answers, a pipe with what it shows, and a pidfd."""

    def __init__(self, zygote: ZygoteProcess, number: int, control: socket.socket, output: int) -> None:
        self.zygote, self._number = zygote, number
        self._control, self._output = control, output
        self._pid, self._pidfd = 0, -1
        self._gate: ForkGate | None = None
        self._original: Clone = self
        self._num_copies = 0
        self._call: _Call | None = None
        self._given_up = self._lost = False
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, zygote: ZygoteProcess, seed: str) -> Clone:
        """A new interpreter; RuntimeError where it cannot confine itself."""
        number = zygote.next_number()
        clone, theirs = cls._with_ends(zygote, number)
        try:
            try:
                answer, (clone._pidfd,) = await zygote.request("open", number, theirs, seed=seed)
                clone._pid = answer["pid"]
            finally:
                for fd in theirs:
                    os.close(fd)
            await clone._ready(descriptors=1)  # the listener; no code has run yet
        except BaseException:
            await clone.end()
            raise
        return clone

    @classmethod
    def _with_ends(cls, zygote: ZygoteProcess, number: int) -> tuple[Clone, tuple[int, int]]:
        """A clone without an interpreter yet, and the two descriptors for it."""
        control, theirs = socket.socketpair()
        output, writing = os.pipe()
        control.setblocking(False)
        control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        os.set_blocking(output, False)
        return cls(zygote, number, control, output), (theirs.detach(), writing)

    async def _ready(self, *, descriptors: int = 0) -> int:
        """Wait until it says that it is confined; returns its process id. So many descriptors are taken from it."""
        data, pid = b"", 0
        async with asyncio.timeout(END_SECONDS):
            while data != b"ready":
                part, ancillary = await self._receive(descriptors)
                data += part
                for _, kind, content in ancillary:
                    if kind == socket.SCM_CREDENTIALS:
                        pid = _CREDENTIALS.unpack(content)[0]
                    elif kind == socket.SCM_RIGHTS:
                        fds = array.array("i", content)
                        self._gate = ForkGate(fds[0])
                        data = data.removeprefix(b"L")
                if not part or len(data) > READ_BYTES:
                    raise RuntimeError(f"an interpreter could not be confined: {data[1:].decode('utf-8', 'replace')}")
        return pid

    async def _receive(self, descriptors: int = 0) -> tuple[bytes, list[Any]]:
        """What is there, with the sender's credentials; the kernel drops descriptors for which there is no space."""
        space = socket.CMSG_SPACE(_CREDENTIALS.size) + descriptors * socket.CMSG_SPACE(4)
        while True:
            try:
                part, ancillary, _, _ = self._control.recvmsg(READ_BYTES, space)
                return part, ancillary
            except BlockingIOError:
                await self._readable(self._control)

    async def run(
        self, code: str, output: Output, timeout_seconds: float, grace_seconds: float
    ) -> tuple[bool | None, str]:
        """Run one cell; returns whether it ended well (None: the interpreter is lost) and a note for the policy."""
        call = self._call = _Call(self._loop, self._pid, self._pidfd, timeout_seconds, grace_seconds)
        key = os.urandom(8).hex().encode()
        data = code.encode("utf-8", "replace")
        self._loop.add_reader(self._control, self._take_answer, call, key)
        flood = _Flood(self._loop, self._output, lambda: self._take_output(output))
        try:
            with contextlib.suppress(OSError):  # its end is noticed by the reader
                await self._loop.sock_sendall(self._control, b"R" + key + len(data).to_bytes(4, "big") + data)
            verdict, note = await call.answer
            self._lost = verdict is None
            return verdict, note
        finally:
            call.cancel()
            self._call = None
            self._loop.remove_reader(self._control)
            flood.stop()
            for _ in range(MAX_READS_BEHIND):
                if not self._take_output(output):
                    break

    def _take_answer(self, call: _Call, key: bytes) -> None:
        try:
            reply = self._control.recv(64)
        except OSError:
            reply = b""
        if reply in (key + b"+", key + b"-"):
            call.finish(reply[-1:] == b"+")
        elif reply:
            call.lose("the interpreter broke the tool's protocol and was killed")
        else:
            call.lose("the interpreter ended")

    def _take_output(self, output: Output) -> bool:
        """Read what is there; False where there is nothing more."""
        try:
            data = os.read(self._output, READ_BYTES)
        except BlockingIOError:
            return False
        output.add(data)
        return bool(data)

    async def fork(self, timeout_seconds: float) -> Clone:
        """A copy of this interpreter; RuntimeError where it does not make one in time."""
        gate = self._original._gate
        if gate is None:
            raise RuntimeError("this interpreter was not made to be forked")
        number = self.zygote.next_number()
        copy, theirs = self._with_ends(self.zygote, number)
        key = os.urandom(8).hex().encode()
        folder = f"/policy/files/{number}".encode()
        gate.announced += 1
        try:
            try:
                socket.send_fds(self._control, [b"F" + key + len(folder).to_bytes(4, "big") + folder], theirs)
            finally:
                for fd in theirs:
                    os.close(fd)
            async with asyncio.timeout(timeout_seconds + END_SECONDS):
                pid = await copy._ready()
                answer, _ = await self._receive()
            if answer != key + b"+":
                raise RuntimeError("the interpreter broke the tool's protocol")
            copy._pid, copy._pidfd = pid, os.pidfd_open(pid)
        except (OSError, TimeoutError, RuntimeError) as error:
            copy._close_ends()
            raise RuntimeError(f"the interpreter could not be copied: {error}") from error
        finally:
            gate.announced = 0
        copy._original = self._original
        self._original._num_copies += 1
        return copy

    @property
    def lost_with_its_original(self) -> bool:
        """Whether this is a copy whose original has ended: a copy lives in its original's namespaces."""
        return self._original is not self and self._original._has_ended()

    def _has_ended(self) -> bool:
        return self._pidfd < 0 or bool(select.select([self._pidfd], [], [], 0)[0])

    def hang_up(self) -> None:
        """Stop a call that is under way."""
        if self._call is not None:
            self._call.stop("the session was closed")

    async def end(self) -> int | None:
        """Kill it and wait until it is gone; returns its exit status where it is known.

        An original that has copies lives on, out of reach, until the last of them ends.
        """
        self._given_up = True
        if self._original is self:
            return None if self._num_copies and not self._lost else await self._end_original()
        await self._end_copy()
        self._original._num_copies -= 1
        if self._original._given_up and not self._original._num_copies:
            await self._original._end_original()
        return None

    async def _end_copy(self) -> None:
        """A copy is no child of the zygote: nobody knows its exit status."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            async with asyncio.timeout(END_SECONDS):
                await self._readable(self._pidfd)
        self._close_ends()

    async def _end_original(self) -> int | None:
        self._close_ends()
        if self._gate is not None:
            self._gate.close()
        if not self.zygote.usable():
            return None
        try:
            message, _ = await self.zygote.request("end", self._number)
        except RuntimeError:  # the zygote has died, and the interpreter with it
            return None
        return int(message["status"])

    def _close_ends(self) -> None:
        self._control.close()
        for fd in (self._output, self._pidfd):
            if fd >= 0:
                os.close(fd)
        self._output = self._pidfd = -1

    async def _readable(self, source: socket.socket | int) -> None:
        readable: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(source, lambda: None if readable.done() else readable.set_result(None))
        try:
            await readable
        finally:
            self._loop.remove_reader(source)


class _Flood:
    """Reads what a call shows, at once at first, then in measured steps: a flood must not take this event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, source: int, take: Callable[[], bool]) -> None:
        self._loop, self._source, self._take = loop, source, take
        self._num_reads = 0
        self._pause: asyncio.TimerHandle | None = None
        loop.add_reader(source, self._read)

    def _read(self) -> None:
        self._num_reads += 1
        if not self._take():  # the code has closed its side
            self._loop.remove_reader(self._source)
        elif self._num_reads >= READS_AT_ONCE:
            self._num_reads = 0
            self._loop.remove_reader(self._source)
            self._pause = self._loop.call_later(PAUSE_SECONDS, self._loop.add_reader, self._source, self._read)

    def stop(self) -> None:
        """Read no more."""
        self._loop.remove_reader(self._source)
        if self._pause is not None:
            self._pause.cancel()


class _Call:
    """The answer to one request, and the clock that interrupts and then kills."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pid: int, pidfd: int, timeout: float, grace: float) -> None:
        self.answer: asyncio.Future[tuple[bool | None, str]] = loop.create_future()
        self._loop, self._pid, self._pidfd, self._timeout, self._grace = loop, pid, pidfd, timeout, grace
        self._interrupted = self._yields = False
        self._timer = loop.call_later(timeout, self._interrupt)
        self._used_before = self._cpu_seconds()
        self._patience = loop.call_later(PATIENCE_SECONDS, self._yield)

    def _yield(self) -> None:
        """A call that needs much gives way to short ones, and to whatever else runs on this machine."""
        if self._cpu_seconds() - self._used_before >= PATIENCE_SECONDS:
            self._yields = self._set_niceness(NICENESS)
        else:
            self._patience = self._loop.call_later(PATIENCE_SECONDS, self._yield)

    def _cpu_seconds(self) -> float:
        """What the interpreter has used so far; 0 where it has ended."""
        clock = (~self._pid << 3) | 2  # CPUCLOCK_SCHED of that process, as clock_getcpuclockid(3) makes it
        try:
            return time.clock_gettime(clock)
        except OSError:
            return 0.0

    def _set_niceness(self, niceness: int) -> bool:
        try:
            os.setpriority(os.PRIO_PGRP, self._pid, niceness)  # a session is its own process group
        except OSError:  # it has ended; or only root may take niceness back
            return False
        return True

    def _interrupt(self) -> None:
        self._interrupted = True
        self._signal(signal.SIGINT)
        self._timer = self._loop.call_later(self._grace, self._kill)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.lose(f"no answer within {self._timeout:g} s: the interpreter was killed")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def finish(self, ok: bool) -> None:
        """It has answered."""
        note = f"[interrupted after {self._timeout:g} s; variables are kept]" if self._interrupted else ""
        if not self.answer.done():
            self.answer.set_result((ok and not self._interrupted, note))

    def lose(self, reason: str) -> None:
        """There will be no answer."""
        if not self.answer.done():
            self.answer.set_result((None, reason))

    def stop(self, reason: str) -> None:
        """Interrupt it and do not wait for an answer."""
        self._signal(signal.SIGINT)
        self.lose(reason)

    def cancel(self) -> None:
        """Stop the clocks."""
        self._timer.cancel()
        self._patience.cancel()
        if self._yields:
            self._set_niceness(0)
