"""The interpreter of one Python session: runs the policy's code cell by cell.

Loaded by `python_zygote.py`, never by rlsys. It shares its process with code that may do anything, so nothing outside
trusts it: what it sends is checked, and it is ended from outside.

A request is one kind byte, a random key of 16 characters, a length in 4 bytes (big-endian) and text. An answer is the
key and one flag byte, nothing else; all that a cell has to show comes through the output pipe.
"""

import ast
import builtins
import linecache
import os
import shutil
import signal
import socket
import sys
import traceback
from typing import Any

CONTROL, OUTPUT, NOTHING = 100, 101, 102  # where the session's descriptors are
READY = b"ready"
RUN, FORK = b"R", b"F"
HEADER = 21  # bytes
_repr, _write = repr, os.write  # as they were: a cell may have replaced the names


class Interpreter:
    """Runs one cell after the other in one namespace, and shows the value of a last expression as a notebook does."""

    def __init__(self) -> None:
        self.control = socket.socket(fileno=CONTROL)
        self.sources: dict[str, str] = {}
        self.running = False
        self.main = type(sys)("__main__")
        self.main.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = self.main
        sys.argv = [""]

    def serve(self) -> None:
        """Answer requests until the tool closes the socket."""
        self.control.sendall(READY)
        while True:
            header, passed = self.receive_header()
            if len(header) < HEADER:
                return
            text = self.receive(int.from_bytes(header[17:], "big")).decode("utf-8", "replace")
            key = header[1:17]
            if header[:1] == FORK:
                answer = self.fork(text, passed) or key + b"+"
            else:
                answer = key + (b"+" if self.run(text) else b"-")
            self.control.sendall(answer)

    def receive_header(self) -> tuple[bytes, list[int]]:
        """The next request's header and the descriptors that came with it."""
        header, passed = b"", []
        while len(header) < HEADER:
            part, ancillary, _, _ = self.control.recvmsg(HEADER - len(header), socket.CMSG_SPACE(2 * 4))
            if not part:
                break
            header += part
            for _, _, data in ancillary:
                passed += [int.from_bytes(data[at : at + 4], sys.byteorder) for at in range(0, len(data) - 3, 4)]
        return header, passed

    def receive(self, size: int) -> bytes:
        """Exactly so many bytes, or fewer where the tool has gone away."""
        data = bytearray()
        while len(data) < size and (part := self.control.recv(min(size - len(data), 1 << 16))):
            data += part
        return bytes(data)

    def fork(self, folder: str, passed: list[int]) -> bytes | None:
        """Make a copy of this interpreter that answers on other descriptors; READY in the copy, None here.

        The copy has copies of the files of the working folder. Of several threads only this one lives on in it.
        """
        control, output = passed
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel clears up after copies that ended
        if os.fork():
            os.close(control)
            os.close(output)
            return None
        try:
            for source, target in ((control, CONTROL), (output, OUTPUT)):
                os.dup2(source, target, inheritable=False)
                os.close(source)
            shutil.copytree(os.getcwd(), folder, symlinks=True)
            os.chdir(folder)
            self.restore()
        except BaseException:
            os._exit(1)
        return READY

    def run(self, code: str) -> bool:
        """Run one cell and write what it shows; True where it ended without an error."""
        name = f"<cell {len(self.sources) + 1}>"
        self.sources[name] = code
        self.restore()
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
            self.restore()
            os.write(OUTPUT, b"[not everything could be shown]\n")
        finally:
            self.running = False
        return ok

    def restore(self) -> None:
        """Undo what an earlier cell may have done to the standard streams and to Ctrl-C."""
        for fd, source in enumerate((NOTHING, OUTPUT, OUTPUT)):
            os.dup2(source, fd)
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for fd, mode in enumerate("rww")
        )
        signal.signal(signal.SIGINT, self.interrupt)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def interrupt(self, *_: object) -> None:
        """Turn SIGINT into KeyboardInterrupt, but only inside a cell."""
        if self.running:
            raise KeyboardInterrupt

    def execute(self, code: str, name: str) -> None:
        """Run the cell's statements, then show its last expression; errors go through."""
        tree: Any = compile(code, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), self.main.__dict__)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), self.main.__dict__)
            if value is not None:
                self.main.__dict__["_"] = value
                shown = memoryview(f"{_repr(value)}\n".encode("utf-8", "backslashreplace"))
                sys.stdout.flush()
                while shown:  # past the standard stream, which a thread of the cell may point elsewhere just now
                    shown = shown[_write(OUTPUT, shown) :]

    def show_error(self, error: BaseException) -> bool:
        """Print the traceback, the cells' own frames only; True where it is a plain `exit()`."""
        if isinstance(error, SystemExit):
            if error.code not in (None, 0):
                print(f"SystemExit: {error.code}", file=sys.stderr)
            return error.code in (None, 0)
        for name, code in self.sources.items():
            linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        shown: BaseException | None = error
        for _ in range(10):  # the error, what it was raised from, and so on
            if shown is not None:
                self.trim(shown)
                shown = shown.__cause__ or shown.__context__
        traceback.print_exception(error)
        return False

    def trim(self, error: BaseException) -> None:
        """Leave only the cells' own frames in the traceback, and of many only the first and the last 20."""
        frames, frame = [], error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename in self.sources:
                frames.append(frame)
            frame = frame.tb_next
        frames[20:-20] = []
        error.__traceback__ = None
        for frame in reversed(frames):
            frame.tb_next, error.__traceback__ = error.__traceback__, frame
