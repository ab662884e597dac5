"""The host as an attack sees it: listeners, secrets, files and a process, all watched from outside the sandbox.

Everything is planted as open as it can be (files for everybody, a process that lets anybody trace it), so that what
protects it is the sandbox and not the rights of its user.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ROOT / "tools"
ENVIRONMENT_NAME = "RLSYS_WORLD_SECRET"
RECORDED = (signal.SIGURG, signal.SIGUSR1)

WITNESS = """
import _signal, ctypes, os, sys
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_long(-1), 0, 0, 0)  # where Yama is: anybody may trace it
secret = ctypes.create_string_buffer(sys.stdin.readline().strip().encode())
numbers = set(_signal.valid_signals()) - {_signal.SIGKILL, _signal.SIGSTOP, _signal.SIGCHLD}
_signal.pthread_sigmask(_signal.SIG_BLOCK, numbers)
print(ctypes.addressof(secret), flush=True)
while True:
    received = _signal.sigwaitinfo(numbers)
    print(f"signal {received.si_signo} from {received.si_pid}", flush=True)
"""


class Witness:
    """A process of the host with a secret in its memory. It tells which signals it got."""

    def __init__(self, secret: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WITNESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(secret + "\n")
        self.process.stdin.flush()
        self.address = int(self.process.stdout.readline())
        os.set_blocking(self.process.stdout.fileno(), False)

    def evidence(self) -> list[str]:
        """What happened to it since the last time."""
        assert self.process.stdout is not None
        if state_of(self.process.pid) in "Tt":
            return ["a host process was stopped"]
        last = f"signal {signal.SIGRTMAX} from {os.getpid()}\n"  # comes after all that waits for it
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGRTMAX)
        text, end = "", time.monotonic() + 5.0
        while self.process.poll() is None and not text.endswith(last) and time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                text += os.read(self.process.stdout.fileno(), 4096).decode()
            time.sleep(0.001)
        found = [f"a host process received {line}" for line in text.removesuffix(last).splitlines()]
        if self.process.poll() is not None:
            found.append(f"a host process was ended ({self.process.returncode})")
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Canaries:
    """Listeners of every kind that a process of this host may have, Ray's among them. All on this host alone."""

    def __init__(self, folder: Path, token: str) -> None:
        self.sockets: dict[str, socket.socket] = {}
        self.addresses: dict[str, Any] = {}
        inet, inet6, unix = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
        stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
        self.listen("tcp", inet, stream, ("127.0.0.1", 0))
        self.listen("udp", inet, datagram, ("127.0.0.1", 0))
        if socket.has_ipv6:
            with contextlib.suppress(OSError):  # a host without IPv6
                self.listen("tcp6", inet6, stream, ("::1", 0))
        self.listen("unix", unix, stream, str(folder / "stream.sock"))
        self.listen("unix_datagram", unix, datagram, str(folder / "datagram.sock"))
        self.listen("abstract", unix, stream, f"\0rlsys-{token}-stream")
        self.listen("abstract_datagram", unix, datagram, f"\0rlsys-{token}-datagram")

    def listen(self, name: str, family: socket.AddressFamily, kind: socket.SocketKind, address: Any) -> None:
        listener = socket.socket(family, kind)
        listener.setblocking(False)
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen(64)
        if family == socket.AF_UNIX and address[0] != "\0":
            os.chmod(address, 0o777)
        self.sockets[name] = listener
        bound = listener.getsockname()
        self.addresses[name] = bound[1] if family != socket.AF_UNIX else address

    def evidence(self) -> list[str]:
        """Who connected or sent something since the last time."""
        found = []
        for name, listener in self.sockets.items():
            with contextlib.suppress(BlockingIOError):
                while True:
                    if listener.type == socket.SOCK_STREAM:
                        listener.accept()[0].close()
                    else:
                        listener.recv(4096)
                    found.append(f"the host's listener ({name}) was reached")
        return found

    def close(self) -> None:
        for listener in self.sockets.values():
            listener.close()


class World:
    """Everything that attacks are after, what is known of it to them, and what became of it."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(6)
        self.host_name = socket.gethostname()
        self.folder = Path(tempfile.mkdtemp(prefix="rlsys-world-"))
        self.scratch = self.folder / "scratch"
        names = ("project", "key", "answers", "temporary", "environment", "witness", "other", "request")
        self.secrets = {name: f"secret-{name}-{secrets.token_hex(8)}" for name in names}
        self.files = {
            "project": self.folder / "project" / "rlsys.yaml",
            "key": self.folder / "home" / ".ssh" / "id_ed25519",
            "answers": self.folder / "project" / "data" / "answers.jsonl",
            "temporary": Path(tempfile.gettempdir()) / f"rlsys-{self.token}.txt",
        }
        self.canaries = Canaries(self.folder, self.token)
        self.witness = Witness(self.secrets["witness"])
        self.signals: list[int] = []
        self.old_handlers = {number: signal.signal(number, self.record) for number in RECORDED}
        os.environ[ENVIRONMENT_NAME] = self.secrets["environment"]
        self.plant()
        self.planted = self.snapshot()

    def record(self, number: int, _: object) -> None:
        self.signals.append(number)

    def known(self) -> dict[str, Any]:
        """All that an attacker could know of this host, and more; but none of the secrets."""
        return {
            **self.canaries.addresses,
            **{name: str(path) for name, path in self.files.items()},
            "token": self.token,
            "process_name": f"x{self.token}",
            "folder": str(self.folder),
            "scratch": str(self.scratch),
            "site_mode": Path(sysconfig.get_path("purelib")).stat().st_mode & 0o7777,
            "root": str(ROOT),
            # In T2 the way to the libraries is there as empty folders: of an environment in the project, its name.
            "environment": Path(sys.prefix).name,
            "tools": str(TOOLS),
            "site": sysconfig.get_path("purelib"),
            "stdlib": sysconfig.get_path("stdlib"),
            "test_pid": os.getpid(),
            "witness_pid": self.witness.process.pid,
            "witness_address": self.witness.address,
            "secret_length": max(map(len, self.secrets.values())),
            "ipc_key": int(self.token[:7], 16),
            "host_name": self.host_name,
        }

    def plant(self) -> None:
        """Write the host's files as they should be, and nothing else."""
        sockets = set(self.canaries.addresses.values())
        for path in self.folder.iterdir():
            if str(path) not in sockets:
                remove(path)
        self.scratch.mkdir()
        for name, path in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.secrets[name])
            path.chmod(0o666)
        for folder in (self.folder, self.scratch, *(path for path in self.inside() if path.is_dir())):
            folder.chmod(0o777)

    def snapshot(self) -> dict[str, str]:
        """What can be seen of the host's files from outside: names, kinds, rights, links and contents."""
        found = {}
        for path in (*self.inside(), self.files["temporary"]):
            status = path.lstat() if os.path.lexists(path) else None
            if status is None:
                found[str(path)] = "missing"
            else:
                content = path.read_text(errors="replace") if path.is_file() else ""
                found[str(path)] = f"{status.st_mode:o} {status.st_nlink if path.is_file() else ''} {content}"
        guarded = [Path(os.__file__), *TOOLS.glob("*.py"), *python_folders()]
        for path in guarded:
            status = path.stat()
            found[str(path)] = f"{status.st_mode:o} {status.st_uid} {status.st_mtime_ns if path.is_file() else ''}"
        return found | dict.fromkeys(map(str, self.strangers()), "appeared")

    def inside(self) -> Iterator[Path]:
        """What is in the folder, but for `scratch`, where attacks may make what they like."""
        for folder, folders, files in os.walk(self.folder):
            if Path(folder) == self.folder:
                folders.remove("scratch")
            yield from (Path(folder, name) for name in (*folders, *files))

    def strangers(self) -> Iterator[Path]:
        """Files that carry this world's token where none should."""
        places = ("/", ROOT, TOOLS, Path.home(), tempfile.gettempdir(), "/dev/shm", "/dev/mqueue", "/var/tmp")
        named = (Path(place).glob(f"*{self.token}*") for place in {*map(Path, places), *python_folders()})
        found = itertools.chain.from_iterable(named)
        return (path for path in found if path != self.files["temporary"])

    def evidence(self) -> list[str]:
        """What was done to the host since the last time; it is then as it was."""
        found = [*self.canaries.evidence(), *self.witness.evidence()]
        if self.witness.process.returncode is not None or any("stopped" in line for line in found):
            self.witness.close()
            self.witness = Witness(self.secrets["witness"])
        found += [f"this process received signal {number}" for number in self.signals]
        self.signals.clear()
        now = self.snapshot()
        changed = [path for path in self.planted | now if self.planted.get(path) != now.get(path)]
        if changed:
            found += [f"a file of the host changed: {path}" for path in changed]
            for path in list(self.strangers()):
                remove(path)
            self.plant()
            self.planted = self.snapshot()
        elif any(self.scratch.iterdir()):
            remove(self.scratch)
            self.scratch.mkdir()
            self.scratch.chmod(0o777)
        if socket.gethostname() != self.host_name:
            found.append("the host's name changed")
        return found + self.shared_memory()

    def shared_memory(self) -> list[str]:
        """System V shared memory that an attack left on the host; it is removed."""
        libc = ctypes.CDLL(None)
        segment = libc.shmget(int(self.token[:7], 16), 0, 0)
        if segment == -1:
            return []
        libc.shmctl(segment, 0, None)  # 0: IPC_RMID
        return ["shared memory appeared on the host"]

    def close(self) -> None:
        os.environ.pop(ENVIRONMENT_NAME, None)
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.witness.close()
        self.canaries.close()
        remove(self.folder)
        self.files["temporary"].unlink(missing_ok=True)


def python_folders() -> set[Path]:
    """Where this Python is installed."""
    names = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib", "scripts")]
    names += [sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))]
    return {Path(name) for name in names if os.path.isdir(name)}


def remove(path: Path) -> None:
    """Remove a file or a folder, however deep it is and whatever rights it lacks; never across a mount."""
    if path.is_dir() and not path.is_symlink():
        subprocess.run(["chmod", "-R", "u+rwX", "--", str(path)], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", "--one-file-system", "--", str(path)], check=True)
    else:
        path.unlink()


def state_of(pid: int) -> str:
    """The letter of a process's state; `-` where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "-"


def descendants(pid: int) -> list[int]:
    """Ids of the processes below one, zombies too."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def marked_processes(name: str) -> list[int]:
    """Ids of processes with the name that every attack takes (see the prelude), and that its forks inherit."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{entry}/comm") as file:
                if file.read().strip() == name:
                    found.append(int(entry))
    return found


def resident_mb(pids: list[int]) -> float:
    """Memory of some processes that is their own, in MiB."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1])
    return total / 1024
