"""The program of one grading worker: reads pairs of answers, writes whether they mean the same.

A file of its own, run by path, because it must be killable at any moment (SymPy can be sent into hours of C code by
one line of LaTeX) and must not import rlsys again. One JSON object a line in, `{"gold", "answer"}`; one word a line
out: "ready" once, then "correct", "wrong" or "error" for each pair.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1
MAX_MEMORY_BYTES = 4 << 30


def grade(gold: str, answer: str) -> str:
    """Compare by Math-Verify, without its own time limits (`signal.alarm`): the pool keeps the time."""
    from math_verify import parse, verify

    parsed_gold = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not parsed_gold:
        return "error"
    parsed_answer = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return "correct" if verify(parsed_gold, parsed_answer, timeout_seconds=None) else "wrong"


def main() -> None:
    """Serve until the pool closes the pipe or dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not pass for a verdict
    logging.disable()
    try:
        grade("\\frac{1}{2}", "0.5")  # imports and warms the parser, so that no deadline pays for it
    except ImportError as error:
        os.write(replies, f"{error}; install it with `pip install math-verify`\n".encode())
        return
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verdict = grade(request["gold"], request["answer"])
        except Exception:  # untrusted input: whatever it made SymPy do is the verdict "error"
            verdict = "error"
        os.write(replies, verdict.encode() + b"\n")


if __name__ == "__main__":
    main()
