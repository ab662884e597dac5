"""Worker processes that are killed at their deadline: a time limit that holds inside C code and in any thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

START_SECONDS = 120.0
RENEW_SECONDS = 5.0
MAX_REPLY_BYTES = 4096
_WORKER = Path(__file__).resolve().with_name("worker.py")


class WorkerError(RuntimeError):
    """A worker that cannot start; the message says why."""


class WorkerPool:
    """Runs a grading program in `num_workers` processes, started when first needed and used again and again.

    `program` is a file with `warm()` and `grade(request) -> str` (`worker.py` runs it). A process that is killed at its
    deadline has a successor in milliseconds, forked from a template that is warm. Only the work counts against
    `timeout_seconds`, neither a worker's start nor the wait for a free one. Works from any thread and event loop. No
    worker survives `close`, the collection of the pool or the end of this process.
    """

    def __init__(self, program: Path, *, num_workers: int, timeout_seconds: float) -> None:
        self._program = program
        self._timeout_seconds = timeout_seconds
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # the last used is warm; None is not started
        for _ in range(num_workers):
            self._idle.put(None)
        self._living: set[_Worker] = set()
        # One thread for each worker: it waits for the reply, and a queue of requests forms in front of the threads.
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix=program.stem)
        self._closed = False
        self._finalizer = weakref.finalize(self, _end_all, self._living, self._idle, self._threads)

    async def ask(self, request: Mapping[str, str]) -> str:
        """The worker's line for `request`, empty where it died of it.

        Raises TimeoutError past the deadline and WorkerError where no worker can start.
        """
        if self._closed:
            raise WorkerError("the worker pool is closed")
        text = json.dumps(dict(request))
        return await asyncio.wrap_future(self._threads.submit(self._ask, text))

    def _ask(self, request: str) -> str:
        worker = self._idle.get()
        replacement: _Worker | None = None
        try:
            worker = self._ready(worker)
            reply = worker.ask(request, self._timeout_seconds)
            replacement = worker if reply or worker.is_ready else None
        except TimeoutError:
            if worker is not None and worker.renew():
                replacement = worker
            raise
        finally:
            if worker is not None and replacement is not worker:
                self._end(worker)
            self._idle.put(replacement)
        return reply

    def _ready(self, worker: _Worker | None) -> _Worker:
        """This worker, or where it is not well another one, once it can be asked."""
        if worker is not None:
            if worker.wait_until_ready():
                return worker
            self._end(worker)
        worker = self._start()
        if not worker.wait_until_ready():
            self._end(worker)
            raise WorkerError(f"a grading worker did not start within {START_SECONDS:g} s")
        return worker

    def _end(self, worker: _Worker) -> None:
        self._living.discard(worker)
        worker.kill()
        worker.release()

    def _start(self) -> _Worker:
        if self._closed:
            raise WorkerError("the worker pool is closed")
        worker = _Worker(self._program)
        self._living.add(worker)
        if self._closed:  # `close` may have passed between the two lines above
            worker.kill()
        return worker

    def close(self) -> None:
        """End every worker; what is being worked on fails."""
        self._closed = True
        self._finalizer()


def _end_all(living: set[_Worker], idle: queue.LifoQueue[_Worker | None], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in list(living):
        worker.kill()
    while not idle.empty():
        if (worker_or_none := idle.get_nowait()) is not None:
            worker_or_none.release()


class _Worker:
    """One process of the program, with a pipe to it and one from it."""

    def __init__(self, program: Path) -> None:
        self._pid: int | None = None  # of the fork that serves, once it does
        self._renewed = False  # whether the last one was killed
        self._asked = 0
        self._unread = b""
        self._process = subprocess.Popen(
            # -P: the program's folder may hold files named like modules of the standard library.
            [sys.executable, "-P", str(_WORKER), str(os.getpid()), str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def wait_until_ready(self) -> bool:
        """Wait for the program's imports, the first time, or for the next fork; False where that takes too long.

        Raises WorkerError where the program cannot start.
        """
        if self._pid is not None:
            return True
        try:
            while not self._note_ready(answer := self._read_line(RENEW_SECONDS if self._renewed else START_SECONDS)):
                if not answer and self._renewed:
                    return False
                if not self._renewed:
                    reason = answer or "it died; its error output says why"
                    raise WorkerError(f"a grading worker cannot start: {reason}")
        except TimeoutError:
            return False
        return True

    @property
    def is_ready(self) -> bool:
        """Whether a fork serves."""
        return self._pid is not None

    def _note_ready(self, line: str) -> bool:
        """Whether the line says that a fork serves. Others, once there was one, are replies that came too late."""
        word, _, pid = line.partition(" ")
        if word != "ready":
            return False
        self._pid, self._renewed = int(pid), False
        return True

    def ask(self, request: str, timeout_seconds: float) -> str:
        """The reply to one request; empty where the fork, or the whole worker, died of it.

        A fork that died before it read the request leaves that to its successor, whose reply comes after all: only the
        number tells it from the reply to the next one.
        """
        assert self._process.stdin is not None
        self._asked += 1
        deadline = time.monotonic() + timeout_seconds
        try:
            self._process.stdin.write(f"{self._asked} {request}\n".encode())
        except BrokenPipeError:
            self._pid = None
            return ""
        while line := self._read_line(deadline - time.monotonic()):
            number, _, reply = line.partition(" ")
            if number == str(self._asked):
                return reply
            if self._note_ready(line):
                break
        return ""

    def renew(self) -> bool:
        """Kill the fork that serves; whether its template, which makes the next one, is alive."""
        pid, self._pid, self._renewed = self._pid, None, True
        if pid is None or self._process.poll() is not None:
            return False
        with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
            os.kill(pid, signal.SIGKILL)
        return True

    def _read_line(self, timeout_seconds: float) -> str:
        assert self._process.stdout is not None
        fd, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_seconds
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while b"\n" not in self._unread:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            chunk = os.read(fd, MAX_REPLY_BYTES)
            if not chunk:  # all of the worker has ended
                self._pid = None
                return ""
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode("utf-8", "replace").strip()

    def kill(self) -> None:
        """End the process, wherever it is; the fork that serves ends with it."""
        self._process.kill()
        self._process.wait()

    def release(self) -> None:
        """Close the pipes; only for whoever took the worker from the idle ones, as another may be reading."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
