"""The program that a SandboxFusion server runs for one call: the earlier calls again, unseen, and then the new one.

rlsys never imports it. It is sent as text behind that of `output.py`, with a line at the end that calls `main`, and
needs the standard library of Python 3.9 only.

    server <-- one line of JSON on stdout -- keeper <-- turn, reply and output pipes --> interpreter --> its children

The keeper cuts the output where it arises, because a server keeps the first mebibyte only (older ones stall on a fifth
of that), and tells of a cell that hung or ended its interpreter, which a script alone could not.
"""

import os
import sys

# Sets must have the same order each time. Python starts over for that, here, before it loads the rest.
if __name__ == "__main__" and "PYTHONHASHSEED" not in os.environ and os.path.isfile(__file__):
    os.execve(sys.executable, [sys.executable, __file__], {**os.environ, "PYTHONHASHSEED": "0"})

import contextlib
import hashlib
import json
import linecache
import random
import select
import signal
import time
import traceback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from rlsys.tools.output import Output

GRACE_SECONDS = 1.0  # from the interrupt to the kill
POLL_SECONDS = 0.05  # how long the end of an interpreter whose children hold its pipes may go unnoticed


class Interpreter:
    """Runs cells in one namespace; what they show goes to the output pipe, one byte for each to the reply pipe."""

    def __init__(self, turns: int, replies: int, output: int, seed: str) -> None:
        self.turns, self.replies, self.output, self.pid = turns, replies, output, os.getpid()
        self.running = False
        self.names: set[str] = set()
        module = type(sys)("__main__")
        module.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = module
        self.namespace = module.__dict__
        sys.argv = [""]
        random.seed(seed)

    def serve(self, cells: "list[dict[str, Any]]") -> None:
        """Run all cells, each when it is its turn."""
        for cell in cells:
            if not os.read(self.turns, 1):  # the keeper has ended
                return
            ok = self.run(cell["code"], f"<cell {cell['number']}>")
            if os.getpid() != self.pid:  # a fork() of the cell must not go on in its parent's place
                os._exit(0)
            os.write(self.replies, b"+" if ok else b"-")

    def run(self, code: str, name: str) -> bool:
        """Run one cell and write what it shows; True where it ended without an error."""
        self.names.add(name)
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        self.open_streams()
        try:
            self.running = True
            try:
                self.execute(code, name)
                ok = True
            except BaseException as error:
                ok = self.show_error(error)
            sys.stdout.flush()
        except BaseException:  # showing it failed too: a closed stream, no memory left, the interrupt
            ok = False
            os.write(self.output, b"[not everything could be shown]\n")
        finally:
            self.running = False
        return ok

    def open_streams(self) -> None:
        """Undo what an earlier cell may have done to the standard streams and to Ctrl-C."""
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, source in enumerate((nothing, self.output, self.output)):
            os.dup2(source, fd)
        if nothing > 2:
            os.close(nothing)
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for fd, mode in enumerate("rww")
        )
        signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_: object) -> None:
        """Turn the keeper's SIGINT into KeyboardInterrupt, but only inside a cell."""
        if self.running:
            raise KeyboardInterrupt

    def execute(self, code: str, name: str) -> None:
        """Run the cell's statements, then show the value of a last expression; errors go through."""
        import ast

        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), self.namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), self.namespace)
            if value is not None:
                self.namespace["_"] = value
                print(repr(value))

    def show_error(self, error: BaseException) -> bool:
        """Print the traceback, the cells' own frames only; True where it is a plain `exit()`."""
        if isinstance(error, SystemExit):
            if error.code not in (None, 0):
                print(f"SystemExit: {error.code}", file=sys.stderr)
            return error.code in (None, 0)
        shown: BaseException | None = error
        for _ in range(10):  # the error, what it was raised from, and so on
            if shown is None:
                break
            shown.__traceback__ = self.own_frames(shown)
            shown = shown.__cause__ or shown.__context__
        traceback.print_exception(type(error), error, error.__traceback__)
        return False

    def own_frames(self, error: BaseException) -> "Any":
        """The traceback without the frames of this program and of libraries; of many the first and the last 20."""
        found: list[Any] = []
        frame: Any = error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename in self.names:
                found.append(frame)
            frame = frame.tb_next
        del found[20:-20]
        for frame, following in zip(found, [*found[1:], None]):  # noqa: B905  # `strict` is newer than 3.9
            frame.tb_next = following
        return found[0] if found else None


class Keeper:
    """Watches the interpreter: keeps each cell's time and collects what it shows."""

    def __init__(self, request: "dict[str, Any]") -> None:
        self.timeout_seconds: float = request["timeout_seconds"]
        self.max_characters: int = request["max_characters"]
        turns, self.turns = os.pipe()
        self.replies, replies = os.pipe()
        self.output, output = os.pipe()
        # One group for all, so that the server, which ends the script's group, leaves nothing behind.
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.pid = os.fork()
        if self.pid == 0:
            for fd in (self.turns, self.replies, self.output):
                os.close(fd)
            become_interpreter((turns, replies, output), request)
        for fd in (turns, replies, output):
            os.close(fd)
        os.set_blocking(self.output, False)

    def run_next(self) -> "tuple[str, Output, str]":
        """Run the next cell: its outcome (`+`, `-` or why it did not end), what it showed, and a digest of that."""
        output, digest = Output(self.max_characters), hashlib.sha256()
        poll = select.poll()
        for fd in (self.output, self.replies):
            poll.register(fd, select.POLLIN)
        with contextlib.suppress(BrokenPipeError):  # it ended between two cells, which is found below
            os.write(self.turns, b".")
        deadline, interrupted = time.monotonic() + self.timeout_seconds, False
        outcome = ""
        while not outcome:
            remaining = deadline - time.monotonic()
            if remaining <= 0 and interrupted:
                outcome = f"no answer within {self.timeout_seconds:g} s: the interpreter was killed"
                os.kill(self.pid, signal.SIGKILL)
                break
            if remaining <= 0:
                os.killpg(0, signal.SIGINT)
                deadline, interrupted = time.monotonic() + GRACE_SECONDS, True
                continue
            ready = dict(poll.poll(1000 * min(remaining, POLL_SECONDS)))
            if self.output in ready and not self.take(output, digest):
                poll.unregister(self.output)
            if self.replies in ready:
                outcome = os.read(self.replies, 1).decode()
                if not outcome:  # closed by the cell, or ended with the interpreter
                    poll.unregister(self.replies)
            outcome = outcome or self.look_for_end()
        for _ in range(1024):  # what it wrote before it answered; bounded, because a thread of it may go on writing
            if not self.take(output, digest):
                break
        if interrupted and outcome in ("+", "-"):
            outcome = f"interrupted after {self.timeout_seconds:g} s"
        return outcome, output, digest.hexdigest()[:16]

    def take(self, output: "Output", digest: "Any") -> bool:
        """Read a piece of output; False where there is none."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return False
        output.add(data)
        digest.update(data)
        return bool(data)

    def look_for_end(self) -> str:
        """How the interpreter ended; empty while it runs, and its last reply where it had finished its cells."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return ""
        if select.select([self.replies], [], [], 0)[0] and (reply := os.read(self.replies, 1)):
            return reply.decode()
        code = os.waitstatus_to_exitcode(status)
        return "the interpreter ended with " + (f"exit status {code}" if code >= 0 else f"signal {-code}")


def become_interpreter(pipes: "tuple[int, int, int]", request: "dict[str, Any]") -> "NoReturn":
    """Run the cells in the keeper's child, and end it."""
    try:
        Interpreter(*pipes, request["seed"]).serve([*request["earlier"], request["new"]])
    finally:
        os._exit(0)


def answer(request: "dict[str, Any]") -> "dict[str, Any]":
    """Run what is asked for; returns text, ok, whether the cell may run again, its digest, and what became of state."""
    keeper = Keeper(request)
    notes = []
    for cell in request["earlier"]:
        outcome, _, digest = keeper.run_next()
        again = f"[call {cell['number']} was run again for this one"
        if outcome != ("+" if cell["ok"] else "-"):
            how = {"+": "without an error this time", "-": "with an error this time"}.get(outcome, outcome)
            text = f"{again}, and it ended otherwise: {how}; all variables are lost]"
            return {"text": text, "ok": False, "again": False, "digest": "", "state_lost": True}
        if digest != cell["digest"]:
            notes.append(f"{again} and showed something else: values that depend on chance, time or addresses are new]")
    outcome, output, digest = keeper.run_next()
    ended = outcome in ("+", "-")
    if not ended:
        notes.append(f"[{outcome}; what this call set is lost, variables of earlier calls are kept]")
    text = "\n".join(filter(None, (output.text().removesuffix("\n"), *notes)))
    return {"text": text, "ok": outcome == "+", "again": ended, "digest": digest, "state_lost": False}


def main(request: "dict[str, Any]") -> None:
    """Run what is asked for and print the answer."""
    print(json.dumps(answer(request)), flush=True)
