"""The Python tool's side of its zygote, and the canaries that try it out. Every size and wait is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

ZYGOTE = Path(__file__).resolve().with_name("python_zygote.py")
END_SECONDS = 10.0
READ_BYTES = 1 << 16
OVERCOMMIT = 8  # sessions seldom use all of their `memory_mb`
_USER_MAP = "0 0 1\n1000 1000000 60000\n"


def default_max_sessions(memory_mb: int) -> int:
    """How many sessions of this size the machine's memory allows at once."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(16, OVERCOMMIT * (total >> 20) // memory_mb)


class ZygoteProcess:
    """A running `python_zygote.py`. Belongs to the event loop in which `start` was awaited."""

    def __init__(self, settings: Mapping[str, Any], *, python: str | None) -> None:
        self._settings = settings
        self._python = python or sys.executable
        self._pending: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._number = 0
        self.ended = True

    async def start(self) -> None:
        """Start it and wait until it is ready; RuntimeError with the reason where it cannot be."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < min(hard, 1 << 16):  # a session takes four descriptors
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._place = tempfile.mkdtemp(prefix="rlsys-python-")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # large pages: quicker to fork
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            settings = json.dumps({**self._settings, "place": self._place})
            self._process = subprocess.Popen(
                [self._python, "-s", "-P", "-B", str(ZYGOTE), str(theirs.fileno()), settings],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        self.ended = False
        self._loop.add_reader(self._control, self._receive)
        await self._ready
        if self._settings["tier"] == "T2":
            os.rmdir(self._place)  # the zygote has moved away from it

    def usable(self) -> bool:
        """Whether it lives and can be used from the running event loop."""
        return not self.ended and self._process.poll() is None and self._loop is asyncio.get_running_loop()

    async def request(
        self, kind: str, number: int, fds: tuple[int, ...] = (), **extra: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """Send one message and wait for its answer and descriptors; RuntimeError where there is none."""
        answer = self._loop.create_future()
        self._pending[number] = answer
        try:
            async with asyncio.timeout(END_SECONDS):
                while True:
                    try:
                        socket.send_fds(self._control, [json.dumps({kind: number, **extra}).encode()], fds)
                        break
                    except BlockingIOError:  # it has many messages waiting
                        await asyncio.sleep(0.001)
                message, received = await answer
        except (OSError, TimeoutError) as error:  # OSError covers the sockets of one that has died
            raise RuntimeError(f"the Python tool's zygote does not answer ({error})") from error
        finally:
            self._pending.pop(number, None)
        if "error" in message:
            raise RuntimeError(message["error"])
        return message, received

    def next_number(self) -> int:
        """A number for a session, used once."""
        self._number += 1
        return self._number

    def _receive(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, READ_BYTES, 4)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._lose()
            return
        message = json.loads(data)
        if "map" in message:
            mapped = _map_users(message["map"])
            self._control.send(json.dumps({"mapped": mapped}).encode())
        elif "ready" in message:
            if message["missing"]:
                log.info("the Python tool's interpreter lacks %s", ", ".join(message["missing"]))
            self._ready.set_result(None)
        elif "id" not in message:
            self._ready.set_exception(RuntimeError(message["error"]))
        elif (waiting := self._pending.get(message["id"])) is not None and not waiting.done():
            waiting.set_result((message, fds))
        else:  # whoever asked has gone
            for fd in fds:
                os.close(fd)

    def _lose(self) -> None:
        self.ended = True
        self._loop.remove_reader(self._control)
        everyone: list[asyncio.Future[Any]] = [*self._pending.values(), self._ready]
        for waiting in everyone:
            if not waiting.done():
                waiting.set_exception(RuntimeError("the Python tool's zygote has ended; its error output says why"))

    async def close(self) -> None:
        """End it with all its sessions and leave nothing behind."""
        if not hasattr(self, "_process"):
            return
        if self._loop is asyncio.get_running_loop():
            self._loop.remove_reader(self._control)
        self.ended = True
        self._control.close()
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        try:
            self._process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the Python tool's zygote (pid %d) did not end by itself and was killed", self._process.pid)
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._place, ignore_errors=True)  # in T2 it has gone already


def _map_users(pid: int) -> bool:
    """Give the zygote's user namespace a range of users, which only root may; False where that is not allowed."""
    if os.geteuid() != 0:
        return False
    try:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(_USER_MAP)
    except OSError:
        return False
    return True


_CANARIES = """
import json, os, socket
found = []
def tried(name, action):
    try:
        action()
    except BaseException:
        return
    found.append(name)
def abstract():
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(chr(0) + {abstract!r})
def fork():
    if os.fork() == 0:
        os._exit(0)
tried("a TCP connection to this machine", lambda: socket.create_connection(("127.0.0.1", {port}), timeout=1))
tried("a connection to an abstract socket", abstract)
tried("reading a file of the host", lambda: open({secret!r}).read())
tried("writing into the host's folder for temporary files", lambda: open({written!r}, "w").write("x"))
tried("a signal to the tool's process", lambda: os.kill({pid}, 0))
tried("a fork", fork)
tried("running a program", lambda: os.execv("/bin/true", ["true"]))
print(json.dumps(found))
"""


@contextlib.contextmanager
def probe() -> Iterator[tuple[str, Callable[[str], list[str]]]]:
    """Code that tries what must be denied, and a function that lists what succeeded from the text that it printed.

    A success is also noticed from outside, whatever the text says.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlsys-canary-"))
        secret, written = Path(folder, "secret"), Path(folder, "written")
        secret.write_text("the canary's secret")
        Path(folder).chmod(0o777)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        hidden = stack.enter_context(socket.socket(socket.AF_UNIX))
        name = f"rlsys-canary-{os.urandom(8).hex()}"
        hidden.bind(f"\0{name}")
        hidden.listen()
        code = _CANARIES.format(
            abstract=name, port=listener.getsockname()[1], secret=str(secret), written=str(written), pid=os.getpid()
        )

        def succeeded(text: str) -> list[str]:
            found = [str(entry) for entry in json.loads(text)]
            reached = select.select([listener, hidden], [], [], 0)[0]
            return found + ["a connection from the session"] * bool(reached) + ["a file"] * written.exists()

        yield code, succeeded
