"""Worker processes that are killed at their deadline: a time limit that holds inside C code and in any thread."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MAX_START_SECONDS = 120.0
MAX_REPLY_BYTES = 4096


class WorkerError(RuntimeError):
    """A worker that cannot start; the message says why."""


class WorkerPool:
    """Runs a worker program in `num_workers` processes, started when first needed and used again and again.

    The program gets its parent's process id as argument, writes "ready" once and then one line for each line of JSON.
    Only the work counts against `timeout_seconds`, neither a worker's start nor the wait for a free one. Works from any
    thread and event loop. No worker survives `close`, the collection of the pool or the end of this process.
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
        line = json.dumps(dict(request)).encode() + b"\n"
        return await asyncio.wrap_future(self._threads.submit(self._ask, line))

    def _ask(self, line: bytes) -> str:
        worker = self._idle.get()
        replacement: _Worker | None = None
        try:
            worker = worker or self._start()
            worker.wait_until_ready()
            reply = worker.ask(line, self._timeout_seconds)
            replacement = worker if reply else None
        except TimeoutError:
            replacement = None if self._closed else self._start()  # warms up while other work goes on
            raise
        finally:
            if worker is not None and replacement is not worker:
                self._living.discard(worker)
                worker.kill()
                worker.release()
            self._idle.put(replacement)
        return reply

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
        self._ready = False
        self._process = subprocess.Popen(
            # -P: the program's folder may hold files named like modules of the standard library.
            [sys.executable, "-P", str(program), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        """Wait for the program's imports, the first time only."""
        if self._ready:
            return
        try:
            answer = self._read_line(MAX_START_SECONDS)
        except TimeoutError:
            raise WorkerError(f"a grading worker did not start within {MAX_START_SECONDS:g} s") from None
        if answer != "ready":
            raise WorkerError(f"a grading worker cannot start: {answer or 'it died; its error output says why'}")
        self._ready = True

    def ask(self, line: bytes, timeout_seconds: float) -> str:
        """The reply to one request; empty where the worker died of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
        except BrokenPipeError:
            return ""
        return self._read_line(timeout_seconds)

    def _read_line(self, timeout_seconds: float) -> str:
        assert self._process.stdout is not None
        fd, deadline, data = self._process.stdout.fileno(), time.monotonic() + timeout_seconds, b""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not data.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            chunk = os.read(fd, MAX_REPLY_BYTES)
            if not chunk:
                return ""
            data += chunk
        return data.decode("utf-8", "replace").strip()

    def kill(self) -> None:
        """End the process, wherever it is."""
        self._process.kill()
        self._process.wait()

    def release(self) -> None:
        """Close the pipes; only for whoever took the worker from the idle ones, as another may be reading."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
