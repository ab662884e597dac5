"""The keeper of one Python session: starts the interpreter, keeps its time, cuts its output and ends it.

A program of its own, run by path with `python -I`, because untrusted code must start from a clean and small process:
it imports nothing of rlsys. `python_cell.py` next to it is what it forks.

    tool  <-- control socket -->  keeper  <-- request, reply and output pipes -->  interpreter  -->  its children

The keeper is trusted and out of the interpreter's reach. Frames on the control socket are one kind byte, a length in
4 bytes (big-endian) and UTF-8 text. A reply of the interpreter is the request's random id and one flag byte, nothing
else; all that it has to show comes through the output pipe.
"""

import _signal  # type: ignore[import-not-found]  # the C half of `signal`, without its enums
import ctypes
import os
import select
import sys
import time

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # last and only for this line: nothing can be shadowed
import python_cell as cell  # type: ignore[import-not-found]

del sys.path[-1]

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
PR_SET_DUMPABLE = 4
NOBODY = 65534
GRACE_SECONDS = 1.0  # from the interrupt to the kill


def send_frame(control: int, kind: bytes, text: str) -> None:
    """Send one frame to the tool."""
    data = text.encode("utf-8", "replace")
    cell.write_all(control, kind + len(data).to_bytes(4, "big") + data)


def drop_root(directory: str) -> None:
    """Leave root, which the kernel exempts from RLIMIT_NPROC.

    Where another user cannot read this Python installation (one below /root, say), only the *real* user changes:
    that binds the limit, while files are still opened as root, without root's capabilities.
    """
    if os.getuid() != 0:
        return
    installation = [path for path in sys.path if os.path.exists(path)]
    try:
        os.chown(directory, NOBODY, NOBODY)
        os.chmod(directory, 0o770)  # the group, so that both kinds of user below can write into it
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, 0)
    except OSError:  # a container without that user: everything but the limit on processes still holds
        return
    readable = all(os.access(path, os.R_OK, effective_ids=True) for path in installation)
    os.setresuid(NOBODY, NOBODY if readable else 0, NOBODY if readable else 0)


def enter_namespaces(allow_network: bool) -> bool:
    """Give what is forked next its own processes and no network; False where neither is to be had."""
    wanted = CLONE_NEWUSER | CLONE_NEWPID | (0 if allow_network else CLONE_NEWNET)
    if cell.libc.unshare(wanted) == 0:
        return True
    if allow_network:
        return False
    raise PermissionError(
        f"this host does not let the Python tool cut off the network: unshare(): {os.strerror(ctypes.get_errno())}. "
        "Allow user namespaces (sysctl user.max_user_namespaces and kernel.apparmor_restrict_unprivileged_userns=0; "
        "in Docker a seccomp profile that permits unshare), or accept code with network access: `allow_network: true`"
    )


class Output:
    """What the interpreter wrote, cut in the middle while it is read: a head and a tail of bounded size."""

    def __init__(self, max_characters: int) -> None:
        self.max_characters = max_characters
        self.max_bytes = 4 * max_characters  # a character has at most 4 bytes in UTF-8
        self.head, self.tail, self.dropped = bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        """Keep the first and the last `max_bytes` and count the characters between them."""
        space = self.max_bytes - len(self.head)
        self.head += data[:space]
        self.tail += data[space:]
        if len(self.tail) > 2 * self.max_bytes + (1 << 16):
            self.dropped += len(self.tail[: -self.max_bytes].translate(None, bytes(range(0x80, 0xC0))))
            del self.tail[: -self.max_bytes]

    def text(self) -> str:
        """At most `max_characters` of it, with a note that says how many are missing."""
        if not self.dropped:
            head, tail = (self.head + self.tail).decode("utf-8", "replace"), ""
        else:
            head, tail = self.head.decode("utf-8", "replace"), self.tail.decode("utf-8", "replace")
        total = len(head) + self.dropped + len(tail)
        if total <= self.max_characters:
            return head
        first = self.max_characters // 2
        last = self.max_characters - first
        cut = total - self.max_characters
        return f"{head[:first]}\n[... {cut} characters cut ...]\n{(tail or head)[-last:]}"


class Keeper:
    """Starts the interpreter, gives it cells, keeps the time and ends it."""

    def __init__(self, control: int, timeout_seconds: float, max_characters: int) -> None:
        self.control, self.timeout_seconds, self.max_characters = control, timeout_seconds, max_characters
        self.pid = 0

    def start(self, memory_mb: int, namespaces: bool, offline: bool) -> None:
        """Fork the interpreter and wait until it has confined itself."""
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        self.output, output = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            cell.become_interpreter((requests, replies, output), memory_mb, namespaces, offline)
        for fd in (requests, replies, output):
            os.close(fd)
        answer = os.read(self.replies, 1 << 12)
        if answer != cell.READY:
            raise RuntimeError(answer.decode("utf-8", "replace") or "the Python tool's interpreter died at its start")
        for fd in (self.requests, self.output):
            os.set_blocking(fd, False)
        self.exit_fd = os.pidfd_open(self.pid)

    def signal(self, number: int) -> None:
        """Send a signal to the interpreter's process group and, where it left that group, to itself."""
        for send in (os.killpg, os.kill) if number == _signal.SIGKILL else (os.killpg,):
            try:
                send(self.pid, number)
            except ProcessLookupError:
                continue

    def serve(self) -> None:
        """Run the tool's cells until it closes the socket or the interpreter is lost."""
        alive = True
        while alive and len(header := cell.read_exactly(self.control, 5)) == 5:
            code = cell.read_exactly(self.control, int.from_bytes(header[1:], "big"))
            output = Output(self.max_characters)
            verdict, note = self.run(code, output)
            self.drain(output)
            alive = verdict in (b"+", b"-")
            shown = (output.text().removesuffix("\n"), note)
            send_frame(self.control, verdict, "\n".join(filter(None, shown)))

    def run(self, code: bytes, output: Output) -> tuple[bytes, str]:
        """Run one cell; returns `+` (ended well), `-` (failed) or `!` (interpreter lost), and a note for the policy."""
        key = os.urandom(8).hex().encode()
        pending = memoryview(key + len(code).to_bytes(4, "big") + code)
        poll = select.poll()
        for fd in (self.control, self.replies, self.output, self.exit_fd):
            poll.register(fd, select.POLLIN)
        poll.register(self.requests, select.POLLOUT)
        deadline, interrupted = time.monotonic() + self.timeout_seconds, False
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0 and interrupted:
                return self.lose(f"no answer within {self.timeout_seconds:g} s: the interpreter was killed")
            if remaining <= 0:
                self.signal(_signal.SIGINT)
                deadline, interrupted, remaining = time.monotonic() + GRACE_SECONDS, True, GRACE_SECONDS
            ready = dict(poll.poll(remaining * 1000))
            if self.control in ready:  # nothing is due from the tool: it has gone away
                raise SystemExit
            if self.output in ready and not self.take_output(output):
                poll.unregister(self.output)
            if self.requests in ready:
                pending = self.feed(pending)
                if not pending:
                    poll.unregister(self.requests)
            if self.replies in ready:
                reply = os.read(self.replies, 64)
                if reply in (key + b"+", key + b"-"):
                    note = f"[interrupted after {self.timeout_seconds:g} s; variables are kept]" if interrupted else ""
                    return (b"-" if interrupted else reply[-1:]), note
                if reply:
                    return self.lose("the interpreter broke the tool's protocol and was killed")
                poll.unregister(self.replies)
            if self.exit_fd in ready:
                return self.lose("the interpreter ended")

    def take_output(self, output: Output) -> bool:
        """Read what is there; False where the interpreter has closed its side."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return True
        output.add(data)
        return bool(data)

    def drain(self, output: Output) -> None:
        """Read what the cell wrote before it answered; bounded, because a thread of it may go on writing."""
        poll = select.poll()
        poll.register(self.output, select.POLLIN)
        for _ in range(32):
            if not poll.poll(0) or not self.take_output(output):
                return

    def feed(self, pending: memoryview) -> memoryview:
        """Write as much of the request as the pipe takes; returns the rest."""
        try:
            return pending[os.write(self.requests, pending[: 1 << 16]) :]
        except BlockingIOError:
            return pending
        except BrokenPipeError:  # the interpreter is about to end, which `run` is told separately
            return pending[:0]

    def lose(self, reason: str) -> tuple[bytes, str]:
        """End the interpreter; returns the verdict and the note that says why its variables are gone."""
        status = self.end()
        how = f" with exit status {status}" if status >= 0 else f" (signal {-status})"
        return b"!", f"[{reason}{how}; its variables are lost]"

    def end(self) -> int:
        """Kill the interpreter and everything below it; returns its exit status, negative for a signal."""
        if not self.pid:
            return 0
        self.signal(_signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return status


def remove(directory: str) -> None:
    """Remove the session's directory with all that the code left in it."""
    os.chdir("/")
    try:
        os.rmdir(directory)
    except OSError:
        import shutil

        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """Serve one session: argv holds the socket, the tool's process id and the limits."""
    control, parent = int(sys.argv[1]), int(sys.argv[2])
    timeout_seconds, memory_mb, max_characters = float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    allow_network, directory = sys.argv[6] == "True", os.getcwd()
    keeper = Keeper(control, timeout_seconds, max_characters)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())  # inherited: Ray blocks SIGINT in the threads of its actors
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    _signal.signal(_signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        try:
            if open_session(keeper, parent, memory_mb, allow_network, directory):
                keeper.serve()
        except BrokenPipeError:  # the tool has gone away while this process was about to answer
            return
        finally:  # inside the other one: the last signal may come right here, and the directory must go all the same
            _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
    finally:
        keeper.end()
        remove(directory)


def open_session(keeper: Keeper, parent: int, memory_mb: int, allow_network: bool, directory: str) -> bool:
    """Isolate, start the interpreter and tell the tool how that went; False where there is nothing to serve."""
    try:
        drop_root(directory)
        namespaces = enter_namespaces(allow_network)
        cell.libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        cell.libc.prctl(cell.PR_SET_PDEATHSIG, _signal.SIGTERM, 0, 0, 0)  # cleared by a change of user: set last
        if os.getppid() != parent:
            return False
        keeper.start(memory_mb, namespaces, offline=not allow_network)
    except Exception as error:
        send_frame(keeper.control, b"E", str(error))
        return False
    send_frame(keeper.control, b"R", "")
    return True


if __name__ == "__main__":
    main()
