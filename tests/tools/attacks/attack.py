"""What an attack is, and the words that its code is written with."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIERS = ("T2", "T1", "T0")
TRIED = r"(denied|harmless|SUCCEEDED) "
LOST = r"variables are (lost|kept)|are gone"
ANYTHING = r"(?s).*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """Cells that one session runs one after the other. The arena decides whether they achieved anything.

    - `imports`: modules for the cells, separated by spaces; one that cannot be imported raises where it is used.
    - `later`: a cell of a session that is opened after this one was closed; it looks for what the attack left.
    - `ran`: a pattern that the answers must match, because an attack that was never tried proves nothing.
    - `fails`: the last cell ends with an error, and must be reported so.
    - `insider`: it speaks with the interpreter's own voice, because it has read the request's key in its frames,
      patched its loop or called `exit` in a later cell. What it says of its own cells is then no success: it could as
      well have caught its errors.
    - `succeeds_in`: the tiers that do not stop it. `depends_in`: those where it depends on the host.
    - `waits`: it uses up its time; such attacks run side by side.
    """

    name: str
    family: str
    cells: tuple[str, ...]
    imports: str = ""
    fails: bool = False
    insider: bool = False
    later: str = ""
    ran: str = TRIED
    succeeds_in: frozenset[str] = frozenset()
    depends_in: frozenset[str] = frozenset()
    waits: bool = False


def attack(family: str, name: str, *cells: str, succeeds_in: str = "", depends_in: str = "", **options: Any) -> Attack:
    """An attack whose cells are written indented; tiers are names separated by spaces."""
    options["later"] = textwrap.dedent(options.get("later", ""))
    return Attack(
        name=name,
        family=family,
        cells=tuple(textwrap.dedent(cell) for cell in cells),
        succeeds_in=frozenset(succeeds_in.split()),
        depends_in=frozenset(depends_in.split()),
        **options,
    )


# fmt: off
SYSTEM_CALLS: dict[str, tuple[int | None, int | None]] = {  # name: (x86_64, aarch64)
    "read": (0, 63), "write": (1, 64), "open": (2, None), "mmap": (9, 222), "ioctl": (16, 29), "shmget": (29, 194),
    "shmat": (30, 196), "socket": (41, 198), "connect": (42, 203), "sendto": (44, 206), "sendmsg": (46, 211),
    "bind": (49, 200), "listen": (50, 201), "socketpair": (53, 199), "clone": (56, 220), "fork": (57, None),
    "vfork": (58, None), "execve": (59, 221), "kill": (62, 129), "semget": (64, 190), "msgget": (68, 186),
    "chmod": (90, None), "ptrace": (101, 117), "syslog": (103, 116), "setuid": (105, 146), "setgid": (106, 144),
    "setgroups": (116, 159), "setresuid": (117, 147), "setresgid": (119, 149), "capset": (126, 91),
    "rt_sigqueueinfo": (129, 138), "mknodat": (259, 33), "personality": (135, 92), "modify_ldt": (154, None),
    "pivot_root": (155, 41), "prctl": (157, 167), "chroot": (161, 51), "acct": (163, 89), "settimeofday": (164, 170),
    "mount": (165, 40), "umount2": (166, 39), "swapon": (167, 224), "reboot": (169, 142), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "init_module": (175, 105),
    "quotactl": (179, 60), "setxattr": (188, 5), "tkill": (200, 130), "clock_settime": (227, 112),
    "tgkill": (234, 131), "mq_open": (240, 180), "kexec_load": (246, 104), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "migrate_pages": (256, 238), "openat": (257, 56),
    "linkat": (265, 37), "symlinkat": (266, 36), "unshare": (272, 97), "move_pages": (279, 239),
    "inotify_init1": (294, 26), "inotify_add_watch": (254, 27), "rt_tgsigqueueinfo": (297, 240),
    "perf_event_open": (298, 241), "fanotify_init": (300, 262), "prlimit64": (302, 261),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "setns": (308, 268),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "finit_module": (313, 273),
    "renameat2": (316, 276), "seccomp": (317, 277), "memfd_create": (319, 279), "kexec_file_load": (320, 294),
    "bpf": (321, 280), "execveat": (322, 281), "userfaultfd": (323, 282), "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425), "io_uring_register": (427, 427), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsmount": (432, 432), "pidfd_open": (434, 434), "clone3": (435, 435),
    "openat2": (437, 437), "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "mount_setattr": (442, 442),
    "memfd_secret": (447, 447), "process_mrelease": (448, 448), "exit": (60, 93),
}
# fmt: on


def system_calls() -> dict[str, int]:
    """The numbers of this machine's architecture, without the calls that it does not have."""
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    return {name: number for name, numbers in SYSTEM_CALLS.items() if (number := numbers[column]) is not None}


def prelude(known: Mapping[str, Any], imports: str) -> str:
    """The first cell of an attack: what the attacker knows of the host, and helpers that report what was tried."""
    return f"W, NR, IMPORTS = {json.dumps(known)}, {system_calls()!r}, {imports.split()!r}\n{HELPERS}"


HELPERS = '''
import errno, os, sys

class Missing:
    """Stands for a module that this tier does not let one import; every use raises."""
    def __init__(self, error):
        self.__dict__["error"] = error
    def __getattr__(self, name):
        raise self.__dict__["error"]

for module in ["ctypes", *IMPORTS]:
    try:
        globals()[module.partition(".")[0]] = __import__(module)
    except Exception as error:
        globals()[module.partition(".")[0]] = Missing(PermissionError(f"cannot import {module}: {error!r}"))
try:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = libc.mmap.restype = ctypes.c_long
    libc.prctl(15, W["process_name"].encode(), 0, 0, 0)  # the mark by which the host finds what it leaves behind
except Exception as error:
    libc = Missing(error)
try:
    os.close(os.open(W["token"], os.O_CREAT | os.O_WRONLY))  # the same for its directory
except OSError:  # no directory of its own: what names without a path make must not land in a folder of the host
    os.environ["HOME"] = W["scratch"]
    try:
        os.chdir(W["scratch"])
    except OSError as error:
        try:
            os.mkdir(W["scratch"] + "/probe")
        except OSError:
            pass  # a tier without any path: nothing can be made anywhere
        else:
            raise SystemExit(f"unsafe to try: no way into the scratch folder ({error})")

def attempt(what, action, bad=lambda value: True):
    """Report what came of an action; `bad` says whether its result means that the attack achieved something."""
    try:
        value = action()
        word, shown = ("SUCCEEDED" if bad(value) else "harmless"), f"{value!r:.300}"
    except BaseException as error:
        word, shown = "denied", f"{error!r:.200}"
    print(f"{word} {what}: {shown}")

def privileged(what, action):
    """Report a call that asks for a right before it looks at its arguments: an error about those has got through."""
    try:
        value = action()
    except OSError as error:
        word = "denied" if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS) else "SUCCEEDED"
        value = error
    except BaseException as error:
        word, value = "denied", error
    else:
        word = "SUCCEEDED"
    print(f"{word} {what}: {value!r:.200}")

def exhaust(what, step, *, allowed, size=1, times=4):
    """Call `step(number)` until it is refused; more than `allowed`, in units of `size` per step, is a success."""
    count, end = 0, "nothing stopped it"
    try:
        while count * size < allowed * times:
            step(count)
            count += 1
    except BaseException as error:
        end = f"{error!r:.100}"
    word = "SUCCEEDED" if count * size > 1.25 * allowed else "denied"
    os.write(1, f"{word} {what}: {count * size} where {allowed} are allowed, then {end}\\n".encode())

def checked(result):
    """The result of a C function, or OSError with its errno."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def system(name, *arguments):
    """A system call by its number."""
    if name not in NR:
        raise OSError(errno.ENOSYS, f"this architecture has no {name}")
    return raw(NR[name], *arguments)

def raw(number, *arguments):
    ctypes.set_errno(0)
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return checked(libc.syscall(ctypes.c_long(number), *wide))

def read(path):
    """The beginning of a file, opened without Python's io layer."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 4000)
    finally:
        os.close(descriptor)
'''
