"""The process around a grading program: `python -P worker.py PARENT_PID PROGRAM.py`.

The program has `warm()`, which imports what it needs, and `grade(request) -> str`. This process warms it once and then
only forks: the fork answers, one line of JSON in, one line of text out, and is killed by the pool at its deadline. Its
successor is there in milliseconds. A file of its own, run by path, because it must not import rlsys.

Lines in: "NUMBER JSON". Lines out: "ready PID" from every fork, then "NUMBER REPLY" for each request that it reads,
which may be one that its predecessor did not live to read; anything else is why the program cannot start.
"""

import ctypes
import importlib.util
import json
import logging
import os
import resource
import signal
import sys
import time
from typing import Any

PR_SET_PDEATHSIG = 1
MAX_MEMORY_BYTES = 4 << 30
SHORTEST_LIFE = 0.1
"""Seconds; a fork that ends sooner, and not by the pool, would be followed by one that does the same."""


def die_with(parent: int) -> None:
    """End when this parent does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def load(path: str) -> Any:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(program: Any, replies: int) -> None:
    """Answer until the pool closes the pipe."""
    os.write(replies, f"ready {os.getpid()}\n".encode())
    for line in sys.stdin:
        number, _, request = line.partition(" ")
        try:
            answer = str(program.grade(json.loads(request)))
        except Exception:  # untrusted input: whatever it made a library do is the answer "error"
            answer = "error"
        os.write(replies, f"{number} {answer}\n".encode())


def main() -> None:
    """Warm the program, then keep one fork of this process serving."""
    die_with(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not pass for an answer
    logging.disable()
    try:
        program = load(sys.argv[2])
        program.warm()
    except ImportError as error:
        os.write(replies, f"{error}\n".encode())
        return
    while True:
        template, started = os.getpid(), time.monotonic()
        pid = os.fork()
        if pid == 0:
            die_with(template)
            serve(program, replies)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if ended == 0 or (ended != -signal.SIGKILL and time.monotonic() - started < SHORTEST_LIFE):
            return


if __name__ == "__main__":
    main()
