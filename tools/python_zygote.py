"""The zygote of the Python tool: one warm process from which every session's interpreter is cloned in milliseconds.

A program of its own, run by path, because untrusted code must start from a clean and small process: it imports nothing
of rlsys and inherits neither environment nor descriptors. `python_confine.py` and `python_cell.py` next to it hold the
layers and the interpreter.

    tool  <-- control socket: JSON, one message each -->  zygote  -- clone -->  session (process 1 of its namespace)
    tool  <-- the session's own socket and output pipe ------------------------------->  session

Messages to it are {"open": n, "seed": text} with two descriptors and {"end": n}; its answers are {"id": n, "pid": pid}
with a pidfd, {"id": n, "status": exit status, negative for a signal} and {"id": n, "error": text}. When the tool goes
away, however it ends, the zygote ends, and with it every session.
"""

import dataclasses
import fcntl
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import sysconfig
from typing import Any, NoReturn

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # last and only for this line: nothing can be shadowed
import python_cell as cell  # type: ignore[import-not-found]
import python_confine as confine  # type: ignore[import-not-found]
import python_seccomp as seccomp  # type: ignore[import-not-found]

del sys.path[-1]

STANDARD = """
    array bisect cmath collections copy csv ctypes dataclasses datetime decimal enum fractions functools heapq
    itertools json math operator queue random re statistics string struct tempfile textwrap threading time typing
    unicodedata uuid zlib encodings.ascii encodings.latin_1 encodings.idna
"""
WARM_UP = """
import numpy, sympy
x, y = sympy.symbols("x y")
for made in (
    sympy.expand((x + 1) ** 3), sympy.factor(x**2 - 1), sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2),
    sympy.solve(x**2 - 2 * x - 3, x), sympy.solve([x + y - 3, x - y - 1], [x, y]), sympy.diff(x**3 * sympy.exp(x), x),
    sympy.integrate(x**2 + 1, x), sympy.limit(sympy.sin(x) / x, x, 0), sympy.series(sympy.exp(x), x, 0, 3),
    sympy.Rational(1, 3) + sympy.sqrt(8), sympy.factorint(360360), sympy.isprime(97), sympy.N(sympy.pi, 20),
    sympy.Matrix([[1, 2], [3, 4]]).det(), sympy.sympify("x + 1/2"), sympy.summation(x, (x, 1, 10)),
    numpy.arange(4), numpy.linalg.inv(numpy.eye(2)), numpy.array([0.5, 1e-9]).mean(), numpy.random.rand(2),
):
    repr(made)
"""  # what is loaded or computed late, once for all sessions
MAX_CPU_SECONDS = 600  # of one session, all its calls together
MAX_FILE_BYTES = 64 << 20
MAX_OPEN_FILES = 256
FIRST_USER = 1000  # of the sessions, inside
NUM_USERS = 60_000
FIRST_HOST_USER = 1_000_000
LOOK_FOR_PARENT_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the tool asks for; `place` is an empty folder of its own."""

    tier: str
    place: str
    memory_mb: int
    disk_mb: int
    max_files: int
    max_threads: int
    forkable: bool
    preload: list[str]


class Zygote:
    """Prepares itself, then clones a session for each message until the tool has gone."""

    def __init__(self, control: socket.socket, settings: Settings) -> None:
        self.control, self.settings = control, settings
        self.parent = os.getppid()
        self.sessions: dict[int, tuple[int, int]] = {}  # number: process id, pidfd
        self.ending: set[int] = set()
        self.users = 1  # how many there are for sessions; with 1 they keep the zygote's own
        self.poll = select.poll()
        self.alive, self._keeps_alive = os.pipe()
        self.readable: list[str] = []
        self.files = -1
        self.filter = b""

    def prepare(self) -> list[str]:
        """Leave the host as far as the tier says, and load what sessions start with; returns what is missing."""
        namespaces = self.settings.tier == "T2"
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # the kernel takes sessions first
        if namespaces:
            confine.enter_namespaces()
            self.map_users()
        elif os.geteuid() == 0 and (self.settings.tier == "T0" or readable_by_all(installation(), inside="/")):
            self.users = NUM_USERS
        missing = []
        for name in (*STANDARD.split(), *self.settings.preload):
            try:
                importlib.import_module(name)
            except ImportError:
                missing.append(name)
        if not {"numpy", "sympy"} & set(missing):
            exec(WARM_UP, {})
        self.readable = installation()
        if namespaces:
            confine.build_root(self.settings.place, self.readable)
            # What is the same for all sessions is made once: each of these costs half a millisecond.
            self.files = confine.file_rules(["/"], ["/policy"])
            self.filter = seccomp.program(own_pid=1, opening=True, own_root=True, asks_to_fork=self.settings.forkable)
        os.environ.clear()
        os.environ.update({"LANG": "C.UTF-8", "PATH": "/nowhere"})
        self.set_home(f"{confine.WORK}/0")
        gc.collect()
        gc.freeze()  # so that collections in sessions copy no shared pages
        return missing

    def map_users(self) -> None:
        """Let the tool, which may have the right, give this namespace many users; else it has the tool's own only."""
        user, group = os.geteuid(), os.getegid()
        if all(readable_by_all([path], inside=path) for path in installation()):
            self.send({"map": os.getpid()})
            answer, _ = self.receive()
            if answer["mapped"]:
                self.users = NUM_USERS
                return
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)

    def set_home(self, folder: str) -> None:
        """Where programs put their files."""
        os.environ.update(dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), folder))

    def serve(self) -> None:
        """Answer the tool until it closes the control socket."""
        self.poll.register(self.control, select.POLLIN)
        while os.getppid() == self.parent:
            ready = dict(self.poll.poll(LOOK_FOR_PARENT_SECONDS * 1000))
            for number, (_, pidfd) in list(self.sessions.items()):
                if pidfd in ready:  # before the message, which may open another session at the same descriptor
                    self.poll.unregister(pidfd)
                    if number in self.ending:
                        self.bury(number)
            if self.control.fileno() in ready:
                message, passed = self.receive()
                if not message:
                    return
                if "open" in message:
                    self.open(message["open"], message["seed"], passed)
                else:
                    self.end(message["end"])

    def open(self, number: int, seed: str, passed: list[int]) -> None:
        """Clone a session."""
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed(int(seed[:8], 16))  # the module-wide generator of older code
        try:
            pid, pidfd = self.clone()
        except OSError as error:
            self.send({"id": number, "error": str(error)})
        else:
            if pid == 0:
                self.become_session(number, seed, passed)
            self.sessions[number] = (pid, pidfd)
            self.poll.register(pidfd, select.POLLIN)
            self.send({"id": number, "pid": pid}, pidfd)
        finally:
            for fd in passed:
                os.close(fd)

    def clone(self) -> tuple[int, int]:
        """A process of its own, in namespaces of its own where the tier has them."""
        if self.settings.tier == "T2":
            pid, pidfd = confine.clone(confine.CLONE_NEWPID | confine.CLONE_NEWNS)
            return pid, pidfd
        pid = os.fork()
        return pid, os.pidfd_open(pid) if pid else -1

    def end(self, number: int) -> None:
        """Kill a session; what it leaves is cleared up when it has ended."""
        if number not in self.sessions:
            self.send({"id": number, "status": 0})
            return
        _, pidfd = self.sessions[number]
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self.ending.add(number)
        self.poll.register(pidfd, select.POLLIN)  # again: it may have ended by itself before

    def bury(self, number: int) -> None:
        """Take the exit status of a session that has ended, remove its folder, tell the tool."""
        pid, pidfd = self.sessions.pop(number)
        self.ending.discard(number)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(pidfd)
        if self.settings.tier == "T1":
            self.remove_folder(self.folder_of(number))
        self.send({"id": number, "status": status})

    def folder_of(self, number: int) -> str:
        """Where the session's files are: on a file system of its own in T2, on the host's else."""
        return confine.WORK if self.settings.tier == "T2" else f"{self.settings.place}/{number}"

    def remove_folder(self, folder: str) -> None:
        """Remove a session's folder from the host's file system, however deep it is."""
        if self.settings.tier != "T2":
            subprocess.run(["/bin/rm", "-rf", "--", folder], check=False, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """End every session and remove what is left of it on the host."""
        for _, pidfd in self.sessions.values():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pid, _ in self.sessions.values():
            os.waitpid(pid, 0)
        self.remove_folder(self.settings.place)

    def become_session(self, number: int, seed: str, passed: list[int]) -> "NoReturn":
        """Confine this clone for good and run cells in it."""
        control = passed[0]
        try:
            os.setpgid(0, 0)  # not setsid: a session of its own would be scheduled apart, and niceness mean nothing
            sources = [*passed, os.open(os.devnull, os.O_RDWR), self.alive, self.files]
            places = (cell.CONTROL, cell.OUTPUT, cell.NOTHING, alive := cell.NOTHING + 1, files := cell.NOTHING + 2)
            # First out of the way: with many sessions some of them stand at these places already.
            apart = [fcntl.fcntl(fd, fcntl.F_DUPFD, files + 1) if fd >= 0 else fd for fd in sources]
            for source, place in zip(apart, places, strict=True):
                if source >= 0:
                    os.dup2(source, place, inheritable=False)
            control = cell.CONTROL
            for fd in range(3):
                os.dup2(cell.NOTHING, fd)
            os.closerange(3, cell.CONTROL)
            os.closerange(files + 1, 1 << 16)
            if self.files >= 0:
                self.files = files
            listener = self.confine(number, alive)
            os.close(alive)
            if listener is not None:
                connection = socket.socket(fileno=cell.CONTROL)
                socket.send_fds(connection, [b"L"], [listener])
                connection.detach()
                os.close(listener)
            random.seed(seed)
            interpreter = cell.Interpreter()
        except BaseException as error:
            os.write(control, b"E" + f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        try:
            interpreter.serve()
        finally:
            os._exit(0)

    def confine(self, number: int, alive: int) -> int | None:
        """Every layer of the tier, in the order in which they are possible; returns the listener for forks."""
        settings, folder = self.settings, self.folder_of(number)
        user = None
        if self.users > 1:
            user = number % NUM_USERS + (FIRST_USER if settings.tier == "T2" else FIRST_HOST_USER)
        if settings.tier == "T2":
            owner = f"uid={user or 0},gid={user or 0},mode=700"
            size = f"size={settings.disk_mb}m,nr_inodes={settings.max_files}"
            flags = confine.MS_NOSUID | confine.MS_NODEV | confine.MS_NOEXEC
            confine.mount("tmpfs", folder, "tmpfs", flags, f"{size},{owner}")
        elif settings.tier == "T1":
            os.mkdir(folder, 0o700)
            if user is not None:
                os.chown(folder, user, user)
        processes = settings.max_threads * (1 if self.users > 1 else 64)  # elsewhere all sessions count as one user
        confine.set_limits(
            {
                resource.RLIMIT_AS: settings.memory_mb << 20,
                resource.RLIMIT_CPU: MAX_CPU_SECONDS,
                resource.RLIMIT_FSIZE: min(MAX_FILE_BYTES, settings.disk_mb << 20),
                resource.RLIMIT_CORE: 0,
                resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
                resource.RLIMIT_NPROC: processes * (16 if settings.forkable else 1),
                resource.RLIMIT_MEMLOCK: 0,
                resource.RLIMIT_MSGQUEUE: 0,
                resource.RLIMIT_SIGPENDING: 64,
            }
        )
        confine.become(user)
        if settings.tier != "T0":
            os.mkdir(f"{folder}/0")
            os.chdir(f"{folder}/0")
        if settings.tier == "T1":
            self.set_home(f"{folder}/0")
            self.files = confine.file_rules(self.readable, [folder])
        if settings.tier != "T0":
            confine.restrict_files(self.files)
        confine.libc.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # cleared by a change of user
        if select.select([alive], [], [], 0)[0]:
            os._exit(1)  # the zygote has ended before that
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if settings.tier != "T2":
            opening = settings.tier == "T1"
            self.filter = seccomp.program(own_pid=os.getpid(), opening=opening, own_root=False, asks_to_fork=False)
        listener = seccomp.install(self.filter, listen=settings.forkable and settings.tier == "T2")
        return int(listener) if listener is not None else None

    def send(self, message: dict[str, object], *fds: int) -> None:
        """Send one message to the tool."""
        socket.send_fds(self.control, [json.dumps(message).encode()], fds)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next message and the descriptors that came with it; empty where the tool has gone."""
        data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 4)
        return json.loads(data) if data else {}, fds


def installation() -> list[str]:
    """What Python needs to read: its libraries and the system's, but no folder that merely stands on `sys.path`."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    libraries = {os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64")}
    libraries |= {path for path in sysconfig.get_paths().values() if os.path.isdir(path)}
    inside = tuple(f"{os.path.realpath(library)}/" for library in libraries)
    libraries |= {path for path in sys.path if os.path.realpath(path).startswith(inside)}
    everything = {os.path.abspath(path) for path in (*libraries, *confine.SYSTEM_FILES)}
    everything |= {os.path.realpath(path) for path in everything}
    found = sorted(path for path in everything if os.path.exists(path))
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]


def readable_by_all(paths: list[str], *, inside: str) -> bool:
    """Whether any user can read these paths and the modules in them, as seen from the folder `inside`."""
    files = [path for path in (os.__file__, sys.modules["json"].__file__ or "") if path.startswith(tuple(paths))]
    for path in (*paths, *files):
        while path.startswith(inside):
            if not os.stat(path).st_mode & (0o001 if os.path.isdir(path) else 0o004):
                return False
            if path == inside:
                break
            path = os.path.dirname(path)
    return True


def main() -> None:
    """Serve the tool at the other end of the descriptor in argv[1]; argv[2] holds the settings."""
    control = socket.socket(fileno=int(sys.argv[1]))
    zygote = Zygote(control, Settings(**json.loads(sys.argv[2])))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # inherited: Ray blocks SIGINT in the threads of its actors
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        try:
            missing = zygote.prepare()
        except OSError as error:
            zygote.send({"error": str(error)})
            return
        zygote.send({"ready": True, "missing": missing, "users": zygote.users})
        zygote.serve()
    except (BrokenPipeError, ConnectionResetError):  # the tool has gone away while this process was about to answer
        return
    finally:
        zygote.close()


if __name__ == "__main__":
    main()
