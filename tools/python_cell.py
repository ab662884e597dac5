"""The interpreter of one Python session: confines its own process, then runs the policy's code cell by cell.

Loaded by `python_child.py`, never by rlsys. It shares its process with code that may do anything, so nothing outside
trusts it: what it sends is checked, and it is ended from outside. Imports are few, because each one delays every
session's start (`json`, `signal`, `socket` and `traceback` cost 5 to 10 ms each).
"""

import _signal  # type: ignore[import-not-found]  # the C half of `signal`, without its enums
import builtins
import ctypes
import errno
import os
import resource
import sys

TYPE_CHECKING = False  # `typing` costs 5 ms as well
if TYPE_CHECKING:
    from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
MAX_PROCESSES = 64
MAX_CPU_SECONDS = 600  # of one session, all its calls together
MAX_FILE_BYTES = 64 << 20
MAX_OPEN_FILES = 256
READY = b"ready"

libc = ctypes.CDLL(None, use_errno=True)


def read_exactly(fd: int, size: int) -> bytes:
    """Read `size` bytes, or fewer where the other side has closed."""
    data = bytearray()
    while len(data) < size and (chunk := os.read(fd, min(size - len(data), 1 << 16))):
        data += chunk
    return bytes(data)


def write_all(fd: int, data: bytes) -> None:
    """Write everything, however small the pipe's steps."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def confine(memory_mb: int, namespaces: bool) -> None:
    """Set the interpreter's limits and give up every capability; none of it can be taken back."""
    limits = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: MAX_CPU_SECONDS,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
    }
    if namespaces:  # elsewhere the kernel would count all processes of the user, not the session's
        limits[resource.RLIMIT_NPROC] = MAX_PROCESSES
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (most, most))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS) failed")
    header, no_capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, no_capabilities) != 0:
        raise OSError(ctypes.get_errno(), "capset() failed")
    libc.prctl(PR_SET_PDEATHSIG, _signal.SIGKILL, 0, 0, 0)  # last: a change of rights would clear it


def prove_network_denied() -> None:
    """Try to reach another host and this one; a route to either is an error. Nothing is sent."""
    import _socket

    for address in ("192.0.2.1", "127.0.0.1"):
        probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        try:
            probe.connect((address, 9))
        except OSError as error:
            if error.errno == errno.ENETUNREACH:
                continue
            raise
        finally:
            probe.close()
        raise PermissionError(f"the Python tool's network namespace still has a route to {address}")


class Interpreter:
    """Runs one cell after the other in one namespace, and shows the value of a last expression as a notebook does."""

    def __init__(self, requests: int, replies: int, output: int, nothing: int) -> None:
        self.requests, self.replies, self.output, self.nothing = requests, replies, output, nothing
        self.sources: dict[str, str] = {}
        self.running = False
        self.pid = os.getpid()
        self.main = type(sys)("__main__")
        self.main.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = self.main
        sys.argv = [""]

    def serve(self) -> None:
        """Answer requests until the keeper closes the pipe."""
        while len(header := read_exactly(self.requests, 20)) == 20:
            code = read_exactly(self.requests, int.from_bytes(header[16:], "big")).decode("utf-8", "replace")
            ok = self.run(code)
            write_all(self.replies, header[:16] + (b"+" if ok else b"-"))

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
                if os.getpid() != self.pid:
                    raise
                ok = self.show_error(error)
            sys.stdout.flush()
        except BaseException:  # showing it failed too: a closed stream, no memory left, the interrupt
            ok = False
            if os.getpid() == self.pid:
                self.restore()
                os.write(self.output, b"[not everything could be shown]\n")
        finally:
            self.running = False
        if os.getpid() != self.pid:  # a fork() of the cell must not answer in its parent's place
            os._exit(0)
        return ok

    def restore(self) -> None:
        """Undo what an earlier cell may have done to the standard streams and to Ctrl-C."""
        for fd, source in enumerate((self.nothing, self.output, self.output)):
            os.dup2(source, fd)
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for fd, mode in enumerate("rww")
        )
        _signal.signal(_signal.SIGINT, self.interrupt)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())

    def interrupt(self, *_: object) -> None:
        """Turn SIGINT into KeyboardInterrupt, but only inside a cell."""
        if self.running:
            raise KeyboardInterrupt

    def execute(self, code: str, name: str) -> None:
        """Run the cell's statements, then show its last expression; errors go through."""
        import _ast

        tree: Any = compile(code, name, "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), self.main.__dict__)
        if last is not None:
            value = eval(compile(_ast.Expression(last.value), name, "eval", dont_inherit=True), self.main.__dict__)
            if value is not None:
                self.main.__dict__["_"] = value
                print(repr(value))

    def show_error(self, error: BaseException) -> bool:
        """Print the traceback, the cells' own frames only; True where it is a plain `exit()`."""
        if isinstance(error, SystemExit):
            if error.code not in (None, 0):
                print(f"SystemExit: {error.code}", file=sys.stderr)
            return error.code in (None, 0)
        import linecache
        import traceback

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


def become_interpreter(pipes: tuple[int, int, int], memory_mb: int, namespaces: bool, offline: bool) -> "NoReturn":
    """Confine this process, say that it is ready (or why not) and serve; never returns."""
    replies = pipes[1]
    try:
        os.setpgid(0, 0)
        _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)
        sources = (*pipes, os.open(os.devnull, os.O_RDONLY))
        kept = [os.dup2(fd, 100 + place, inheritable=False) for place, fd in enumerate(sources)]
        replies = kept[1]
        os.closerange(3, kept[0])
        os.closerange(kept[-1] + 1, 1 << 16)
        confine(memory_mb, namespaces)
        if offline:
            prove_network_denied()
        write_all(replies, READY)
    except BaseException as error:
        write_all(replies, str(error).encode())
        os._exit(1)
    try:
        Interpreter(*kept).serve()
    finally:
        os._exit(0)
