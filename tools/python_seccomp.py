"""The list of system calls that the policy's code may make, as a seccomp filter.

Loaded by `python_confine.py`, never by rlsys. Sources: seccomp(2), seccomp_unotify(2), the kernel's tables of system
calls for x86_64 and (generic) aarch64.
"""

import ctypes
import errno
import os
import platform
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant

INSTRUCTION = struct.Struct("=HBBI")
MACHINES = ("x86_64", "aarch64")
machine = platform.machine()
_column = MACHINES.index(machine) if machine in MACHINES else None

# Names with their numbers on x86_64 and aarch64. What is not here answers EPERM: it is what Python, numpy and sympy
# need, with files and threads; notably no socket, fork, exec, mount, ptrace, memfd or io_uring.
_TABLE = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
close 3 57, close_range 436 436, lseek 8 62, open 2 -, openat 257 56, creat 85 -, stat 4 -, lstat 6 -, fstat 5 80,
newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439,
getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, readlink 89 -, readlinkat 267 78, rename 82 -,
renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, link 86 -,
linkat 265 37, symlink 88 -, symlinkat 266 36, chmod 90 -, fchmod 91 52, fchmodat 268 53, umask 95 166, truncate 76 45,
ftruncate 77 46, fallocate 285 47, flock 73 32, fsync 74 82, fdatasync 75 83, fadvise64 221 223, sendfile 40 71,
copy_file_range 326 285, getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12,
flistxattr 196 13, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, eventfd2 290 19, select 23 -,
pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
epoll_pwait2 441 441, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216, madvise 28 233,
msync 26 227, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128, pause 34 -, alarm 37 -,
getitimer 36 102, setitimer 38 103, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113,
clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165, getrlimit 97 163,
sysinfo 99 179, uname 63 160, getcpu 309 168, getrandom 318 278, getpid 39 172, getppid 110 173, gettid 186 178,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148,
getresgid 120 150, getpgrp 111 -, getpgid 121 155, getsid 124 156, sched_yield 24 124, sched_getaffinity 204 123,
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
futex 202 98, set_robust_list 273 99, get_robust_list 274 100, rseq 334 293, set_tid_address 218 96,
membarrier 324 283, wait4 61 260, waitid 247 95, exit 60 93, exit_group 231 94, shutdown 48 210, getsockopt 55 209,
getsockname 51 204
"""
CALLS = {
    name: tuple(None if number == "-" else int(number) for number in numbers)
    for name, *numbers in (entry.split() for entry in _TABLE.split(","))
}
_CHECKED = {  # allowed for some arguments only
    "clone": (56, 220),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prctl": (157, 167),
    "ioctl": (16, 29),
    "prlimit64": (302, 261),
    "socketpair": (53, 199),
    "sendto": (44, 206),
    "clone3": (435, 435),
    "fcntl": (72, 25),
    "sendmsg": (46, 211),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "utimensat": (280, 88),
}
_OPENING = ("open", "openat", "creat")
_RIGHTS = ("chmod", "fchmodat")  # of files by name: Landlock does not know them
_CHANGING = (
    *("rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "link", "linkat"),
    *("symlink", "symlinkat", "truncate", "chdir", "fchdir"),
)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, locks of both kinds, F_DUPFD_CLOEXEC, sizes of pipes; no F_SETOWN, with
# which the kernel signals others, and no notices of others' changes.
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032)
_MSG_OOB = 1
_STREAMS = (1, 1 | 0x800, 1 | 0x80000, 1 | 0x80800)  # SOCK_STREAM, perhaps not blocking, closed on exec
_PRCTL_NAMES = (15, 16)  # of threads: PR_SET_NAME, PR_GET_NAME
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
CLONE_THREAD, NEW_NAMESPACES = 0x10000, 0x7E020080
FORK_FLAGS = 0x01200011  # what the C library's fork() gives clone()

_ALLOW, _DENY, _NO_CALL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_KILL, _ASK = 0x80000000, 0x7FC00000
_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def _argument(index: float) -> "Instruction":
    """Load the low half of an argument of the system call; the high half of argument 4 is 4.5."""
    return (_LOAD, 0, 0, int(16 + 8 * index))


def _if_argument_in(index: float, values: "Iterable[int]") -> "list[Instruction]":
    body = [_argument(index)]
    for value in values:
        body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*body, (_RETURN, 0, 0, _DENY)]


def _without_bit(index: float, bit: int) -> "list[Instruction]":
    return [_argument(index), (_ANY_BIT, 0, 1, bit), (_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _ALLOW)]


def program(*, own_pid: int, opening: bool, own_root: bool, asks_to_fork: bool) -> bytes:
    """The filter, as classic BPF: `CALLS` are allowed, `_CHECKED` for some arguments, all else answers EPERM.

    `asks_to_fork` leaves fork() to whoever holds the filter's listener; without it fork() is denied like the rest.
    """
    if _column is None:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}; there is one for {', '.join(MACHINES)}")
    audit_architecture = (0xC000003E, 0xC00000B7)[_column]
    found = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit_architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    found += [(_GREATER_EQUAL, 0, 1, 0x40000000), (_RETURN, 0, 0, _DENY)]  # x32's numbers
    bodies = {
        "clone": [  # threads, not in new namespaces
            _argument(0),
            (_ANY_BIT, 0, 1, NEW_NAMESPACES),
            (_RETURN, 0, 0, _DENY),
            (_ANY_BIT, 0, 1, CLONE_THREAD),
            (_RETURN, 0, 0, _ALLOW),
            (_EQUAL, 0, 1, FORK_FLAGS),
            (_RETURN, 0, 0, _ASK if asks_to_fork else _DENY),
            (_RETURN, 0, 0, _DENY),
        ],
        "kill": _if_argument_in(0, [own_pid]),
        "tgkill": _if_argument_in(0, [own_pid]),
        "prctl": _if_argument_in(0, _PRCTL_NAMES),
        "ioctl": _if_argument_in(1, _IOCTLS),
        "prlimit64": _if_argument_in(0, [0]),
        # Streams of AF_UNIX: others could be sent to an address. The address of sendto must be none, in both halves.
        "socketpair": [_argument(0), (_EQUAL, 1, 0, 1), (_RETURN, 0, 0, _DENY), *_if_argument_in(1, _STREAMS)],
        # No urgent data either: a corner of AF_UNIX that has had faults, and that nobody needs.
        "sendto": [
            *(_argument(3), (_ANY_BIT, 0, 1, _MSG_OOB), (_RETURN, 0, 0, _DENY)),
            *(_argument(4), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _DENY), *_if_argument_in(4.5, [0])),
        ],
        "sendmsg": _without_bit(2, _MSG_OOB),
        "recvmsg": _without_bit(2, _MSG_OOB),
        "recvfrom": _without_bit(3, _MSG_OOB),
        "fcntl": _if_argument_in(1, _FCNTLS),
        "utimensat": [(_RETURN, 0, 0, _ALLOW)]  # of an open file only, where the host's files can be named
        if own_root
        else [_argument(1), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _DENY), *_if_argument_in(1.5, [0])],
        "clone3": [(_RETURN, 0, 0, _NO_CALL)],  # its flags are out of a filter's sight; the C library tries clone()
    }
    for name, numbers in _CHECKED.items():
        found += [(_EQUAL, 0, len(bodies[name]), numbers[_column]), *bodies[name]]
    denied = () if own_root else _RIGHTS if opening else (*_RIGHTS, *_CHANGING, *_OPENING)
    allowed = {pair[_column] for name, pair in CALLS.items() if name not in denied}
    found += [*_allow(sorted(number for number in allowed if number is not None)), (_RETURN, 0, 0, _DENY)]
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in found)


def _allow(numbers: "list[int]") -> "list[Instruction]":
    """Allow these calls, given in ascending order: by runs of them, which the kernel is done with sooner."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        first = runs.pop()[0] if runs and runs[-1][1] == number - 1 else number
        runs.append((first, number))
    found = []
    for first, last in runs:
        found += [(_GREATER_EQUAL, 1, 0, first), (_RETURN, 0, 0, _DENY)]
        found += [(_GREATER_EQUAL, 1, 0, last + 1), (_RETURN, 0, 0, _ALLOW)]
    return found


def install(filter_program: bytes, *, listen: bool) -> "int | None":
    """Install a filter on this process for good; returns its listener where one was wanted."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    arguments = ctypes.byref(Program(len(filter_program) // INSTRUCTION.size, filter_program))
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(317 if machine == "x86_64" else 277)
    new_listener = 1 << 3
    result = libc.syscall(number, ctypes.c_long(1), ctypes.c_long(new_listener if listen else 0), arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"seccomp(): {os.strerror(ctypes.get_errno())}")
    return int(result) if listen else None
