"""What holds the policy's code: namespaces, a private root, limits and Landlock, by system calls alone.

Loaded by `python_zygote.py`, never by rlsys: it imports little, and nothing that is not in the standard library. Every
function either does what it says or raises OSError.

Sources: landlock(7), namespaces(7), mount_setattr(2), pivot_root(2).
"""

import ctypes
import errno
import os
import platform
import resource
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_PIDFD = 0x10000000, 0x20000000, 0x40000000, 0x1000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
AT_RECURSIVE, MNT_DETACH, O_PATH = 0x8000, 2, 0o10000000
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
SYSTEM_FILES = (*SYSTEM_LIBRARIES, "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
WORK = "/policy/files"  # where the session's own files are, in the private root

libc = ctypes.CDLL(None, use_errno=True)
_locked_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: for what must not be interleaved
machine = platform.machine()


def check(result: int, what: str) -> int:
    """Raise OSError for a system call that answered -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def system_call(what: str, number: int, *arguments: "int | bytes | None") -> int:
    """A system call by number; integers are passed as longs."""
    longs = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return int(check(libc.syscall(ctypes.c_long(number), *longs), what))


def enter_namespaces() -> None:
    """Leave the host's users, mounts, network, IPC and names; the root made of nobody's rights is one's own now."""
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    check(libc.unshare(flags), "unshare()")


def mount(source: "str | None", target: str, kind: "str | None", flags: int, options: str = "") -> None:
    """mount(2)."""
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    check(libc.mount(*texts, ctypes.c_ulong(flags), options.encode()), f"mount() of {target}")


def make_read_only(path: str, *, flags: int, recursive: bool) -> None:
    """Add mount flags (whose values are those of MS_*) to a mount, and to those below it."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    system_call(
        "mount_setattr()", 442, -100, path.encode(), AT_RECURSIVE if recursive else 0, attributes, len(attributes)
    )


def build_root(place: str, sources: "Iterable[str]") -> None:
    """Make a file system of `sources` (read-only) and a few devices in the empty folder `place`, and live in it."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", place, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for source in (*sources, *DEVICES):
        target = place + source
        if not os.path.exists(source) or os.path.exists(target):
            continue
        if os.path.isdir(source):
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(source, target, None, MS_BIND | MS_REC)
        nodev = 0 if source in DEVICES else MS_NODEV
        make_read_only(target, flags=MS_RDONLY * bool(nodev) | MS_NOSUID | nodev, recursive=True)
    os.makedirs(place + WORK)
    if not os.path.exists(place + "/tmp"):  # it does where Python itself is installed below it
        os.symlink(WORK.lstrip("/"), place + "/tmp")
    os.chdir(place)
    check(libc.syscall(ctypes.c_long(155 if machine == "x86_64" else 41), b".", b"."), "pivot_root()")
    check(libc.umount2(b".", MNT_DETACH), "umount2()")
    os.chdir("/")
    make_read_only("/", flags=MS_RDONLY | MS_NODEV, recursive=False)


def clone(flags: int) -> tuple[int, int]:
    """Fork with new namespaces; returns (0, -1) in the child, and its process id and pidfd in the parent."""
    pidfd = ctypes.c_int(-1)
    ctypes.pythonapi.PyOS_BeforeFork()
    number = ctypes.c_long(56 if machine == "x86_64" else 220)
    signal_number = 17  # SIGCHLD
    pid = _locked_libc.syscall(
        number, ctypes.c_ulong(flags | CLONE_PIDFD | signal_number), None, ctypes.byref(pidfd), None, None
    )
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    return check(pid, "clone()"), pidfd.value


def set_limits(limits: dict[int, int]) -> None:
    """Set soft and hard resource limits, never above the present ones."""
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (most, most))


def become(user: "int | None") -> None:
    """Take another user where there is one to take, and give up every capability; no_new_privs makes it final."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, none), "capset()")
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


# Rights of Landlock: execute and write, read a file, read a folder, then removing and making, refer, truncate, ioctl.
_READ = 1 << 2 | 1 << 3
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13 | 1 << 14  # no devices, sockets, FIFOs
_FILE_WRITE = 1 << 1 | 1 << 2 | 1 << 14
_HANDLED_BY_ABI = (1 << 13, 1 << 14, 1 << 15, 1 << 15, 1 << 16)  # bits below this are known to versions 1, 2, 3, ...


def landlock_version() -> int:
    """Version of the kernel's Landlock; 0 where there is none."""
    return max(0, int(libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1))))


def file_rules(readable: "Iterable[str]", writable: "Iterable[str]") -> int:
    """A Landlock ruleset: no files but those below these paths, no programs, no TCP, nothing abstract or signalled.

    A file system mounted on a folder of `readable` or `writable` counts as part of the folder above it.
    """
    version = landlock_version()
    if version < 1:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    handled = _HANDLED_BY_ABI[min(version, 5) - 1] - 1
    ruleset = struct.pack("QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    fd = system_call("landlock_create_ruleset()", 444, ruleset[:size], size, 0)
    rules = [(path, _READ) for path in readable] + [(path, _READ | _WRITE) for path in writable]
    for path, rights in rules + [(device, _FILE_WRITE) for device in DEVICES]:
        try:
            opened = os.open(path, O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            rights &= _FILE_WRITE
        system_call("landlock_add_rule()", 445, fd, 1, struct.pack("=Qi", rights & handled, opened), 0)
        os.close(opened)
    return fd


def restrict_files(ruleset: int) -> None:
    """Bind this process to a ruleset for good."""
    system_call("landlock_restrict_self()", 446, ruleset, 0)
    os.close(ruleset)
