"""Attacks on the fence itself: privileges, namespaces, mounts, and the kernel's less tried corners."""

from functools import partial

from tests.tools.attacks.attack import LOST, TRIED, attack

kernel = partial(attack, "kernel")

KERNEL = (
    kernel(
        "unshare",
        """
        for flags in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000, 0x80,
                      0x10020000, 0x7E020000):
            attempt(f"unshare {flags:#x}", lambda: system("unshare", flags))
            attempt(f"unshare {flags:#x} with high bits", lambda: system("unshare", 1 << 32 | flags))
        """,
    ),
    kernel(
        "setns",
        """
        for pid in (1, os.getppid(), W["test_pid"], W["witness_pid"]):
            for name in ("user", "mnt", "net", "pid", "ipc", "uts"):
                path = f"/proc/{pid}/ns/{name}"
                attempt(f"setns {pid} {name}", lambda: system("setns", os.open(path, os.O_RDONLY), 0))
            attempt(f"setns by pidfd {pid}", lambda: system("setns", system("pidfd_open", pid, 0), 0x20000))
        attempt("setns of any descriptor", lambda: system("setns", 1, 0))
        """,
    ),
    kernel(
        "mounts",
        """
        here = os.getcwd().encode() + b"\\0"
        attempt("tmpfs", lambda: system("mount", b"none\\0", here, b"tmpfs\\0", 0, 0))
        attempt("proc", lambda: system("mount", b"none\\0", here, b"proc\\0", 0, 0))
        attempt("bind", lambda: system("mount", here, here, 0, 4096, 0))  # on itself: no other folder may show up here
        attempt("remount for writing", lambda: system("mount", b"none\\0", here, 0, 32 | 4096, 0))
        attempt("umount", lambda: system("umount2", here, 2))
        attempt("pivot_root", lambda: system("pivot_root", b".\\0", b".\\0"))
        """,
    ),
    kernel(
        "the new mount interface",
        """
        attempt("fsopen", lambda: system("fsopen", b"tmpfs\\0", 0))
        attempt("open_tree", lambda: system("open_tree", -100, b"/\\0", 1))
        attempt("open_tree without clone", lambda: os.listdir(system("open_tree", -100, b"/tmp\\0", 0)))
        attempt("move_mount", lambda: system("move_mount", -100, b"/\\0", -100, b".\\0", 0))
        attributes = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
        attempt("mount_setattr", lambda: system("mount_setattr", -100, b"/\\0", 0, attributes, 32))
        """,
        ran=TRIED,
    ),
    kernel(
        "chroot with an open directory",
        """
        def out():
            outside = os.open("/", os.O_RDONLY)
            os.mkdir("jail")
            system("chroot", b"jail\\0")
            os.fchdir(outside)
            for _ in range(40):
                os.chdir("..")
            system("chroot", b".\\0")
            print(read(W["answers"]))
        attempt("escape", out)
        attempt("chroot", lambda: system("chroot", b"/\\0"))
        """,
    ),
    kernel(
        "io_uring",
        """
        parameters = ctypes.create_string_buffer(120)
        for entries in (1, 8):
            attempt("io_uring_setup", lambda: system("io_uring_setup", entries, parameters))
        attempt("io_uring_register", lambda: system("io_uring_register", -1, 0, 0, 0))
        """,
    ),
    kernel(
        "bpf and perf",
        """
        attributes = (ctypes.c_uint32 * 32)(2, 4, 4, 1)
        for command in (0, 5, 18):
            attempt(f"bpf {command}", lambda: system("bpf", command, attributes, 72))
        event = (ctypes.c_uint32 * 32)(1, 112)
        attempt("perf_event_open", lambda: system("perf_event_open", event, 0, -1, -1, 0))
        attempt("perf of a host process", lambda: system("perf_event_open", event, W["witness_pid"], -1, -1, 0))
        """,
    ),
    kernel(
        "userfaultfd",
        """
        for flags in (0, 1, 0o2000000):
            attempt("userfaultfd", lambda: system("userfaultfd", flags))
        attempt("/dev/userfaultfd", lambda: os.open("/dev/userfaultfd", os.O_RDWR))
        """,
    ),
    kernel(
        "keys",
        """
        attempt("add_key", lambda: system("add_key", b"user\\0", b"rlsys\\0", b"x\\0", 1, -3))
        attempt("request_key", lambda: system("request_key", b"user\\0", b"rlsys\\0", 0, -3))
        for command in (0, 1, 6, 11):
            attempt(f"keyctl {command}", lambda: system("keyctl", command, -3, 0, 0, 0))
        """,
    ),
    kernel(
        "urgent data on a socket pair",
        """
        def urgent():
            left, right = socket.socketpair()
            return left.send(b"x", socket.MSG_OOB), right.recv(1, socket.MSG_OOB)
        attempt("send and receive", urgent)
        def by_message():
            left, right = socket.socketpair()
            return left.sendmsg([b"x"], [], socket.MSG_OOB), right.recvmsg(1, 0, socket.MSG_OOB)
        attempt("sendmsg and recvmsg", by_message)
        """,
        imports="socket",
    ),
    kernel(
        "personality",
        """
        for flags in (0x0400000, 0x0040000, 0x0100000, 0x8):
            attempt(f"personality {flags:#x}", lambda: system("personality", flags))
        """,
    ),
    kernel(
        "kernels and modules",
        """
        privileged("kexec_load", lambda: system("kexec_load", 0, 0, 0, 0xFF))
        privileged("kexec_file_load", lambda: system("kexec_file_load", -1, -1, 0, 0, 0xFF00))
        privileged("init_module", lambda: system("init_module", 0, 0, b"\\0"))
        privileged("finit_module", lambda: system("finit_module", 0, b"\\0", 0))
        """,
    ),
    kernel(
        "the machine's switches",
        """
        privileged("reboot with a wrong word", lambda: system("reboot", 1, 2, 3, 0))
        privileged("swapon", lambda: system("swapon", b"nothing\\0", 0))
        name = W["host_name"].encode()
        attempt("sethostname", lambda: system("sethostname", name, len(name)))
        attempt("setdomainname", lambda: system("setdomainname", b"", 0))
        attempt("settimeofday", lambda: system("settimeofday", 0, 0))
        attempt("clock_settime", lambda: time.clock_settime(0, time.time()))
        privileged("acct", lambda: system("acct", b"nothing\\0"))
        privileged("quotactl", lambda: system("quotactl", 0x80000100, 0, 0, 0))
        privileged("iopl", lambda: system("iopl", 3))
        privileged("ioperm", lambda: system("ioperm", 0, 1, 1))
        """,
    ),
    kernel(
        "becoming root",
        """
        def became(value):
            return os.getuid() != before[0] or os.geteuid() != before[1]
        before = os.getuid(), os.geteuid()
        attempt("setuid", lambda: system("setuid", 0), bad=became)
        attempt("setresuid", lambda: system("setresuid", 0, 0, 0), bad=became)
        attempt("setgid", lambda: system("setgid", 0), bad=lambda _: before[0] != 0)
        attempt("setresgid", lambda: system("setresgid", 0, 0, 0), bad=lambda _: before[0] != 0)
        groups = (ctypes.c_uint32 * 2)(0, 4)
        attempt("setgroups", lambda: system("setgroups", 2, groups))
        attempt("the C library's setuid", lambda: checked(libc.setuid(0)), bad=became)
        """,
    ),
    kernel(
        "capabilities",
        """
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        everything = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
        attempt("capset", lambda: system("capset", header, everything))
        for capability in (21, 12, 1):
            attempt("inherit one", lambda: checked(libc.prctl(47, 2, capability, 0, 0)))
        attempt("securebits", lambda: checked(libc.prctl(28, 0, 0, 0, 0)))
        attempt("keep capabilities", lambda: checked(libc.prctl(8, 1, 0, 0, 0)), bad=lambda _: False)
        status = (ctypes.c_uint32 * 6)()
        def held():
            checked(libc.capget(header, status))
            return status[0] | status[3], status[1] | status[4]
        attempt("what is held", held, bad=any)
        """,
    ),
    kernel(
        "undoing the fence by prctl",
        """
        attempt("no_new_privs", lambda: checked(libc.prctl(38, 0, 0, 0, 0)))
        attempt("seccomp off", lambda: checked(libc.prctl(22, 0, 0, 0, 0)))
        attempt("no_new_privs is set", lambda: libc.prctl(39, 0, 0, 0, 0), bad=lambda value: value not in (1, -1))
        attempt("seccomp is set", lambda: libc.prctl(21, 0, 0, 0, 0), bad=lambda value: value not in (2, -1))
        attempt("a tracer", lambda: checked(libc.prctl(0x59616D61, W["witness_pid"], 0, 0, 0)), bad=lambda _: False)
        attempt("dumpable", lambda: checked(libc.prctl(4, 1, 0, 0, 0)), bad=lambda _: False)
        attempt("the program's file", lambda: checked(libc.prctl(35, 13, 0, 0, 0)))
        attempt("a subreaper", lambda: checked(libc.prctl(36, 1, 0, 0, 0)), bad=lambda _: False)
        attempt("fork after all", lambda: os.fork() or os._exit(0))
        attempt("a socket after all", lambda: system("socket", 2, 1, 0))
        """,
    ),
    kernel(
        "a filter of one's own",
        """
        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
        allow = (ctypes.c_uint64 * 1)(0x06 | 0x7FFF0000 << 32)
        program = Program(1, ctypes.addressof(allow))
        attempt("allow everything", lambda: system("seccomp", 1, 0, ctypes.byref(program)), bad=lambda _: False)
        attempt("a listener", lambda: system("seccomp", 1, 8, ctypes.byref(program)))
        attempt("fork after all", lambda: os.fork() or os._exit(0))
        attempt("a socket after all", lambda: system("socket", 2, 1, 0))
        """,
        ran=rf"{TRIED}|{LOST}",
    ),
    kernel(
        "input for a terminal",
        """
        letter = ctypes.create_string_buffer(b"x")
        for descriptor in range(0, 32):
            for request in (0x5412, 1 << 32 | 0x5412, 0x541C, 0x540E):
                try:
                    system("ioctl", descriptor, request, letter)
                except OSError as error:
                    last = error
                else:
                    print(f"SUCCEEDED ioctl {request:#x} on {descriptor}")
        print(f"denied the rest: {last}")
        attempt("the terminal", lambda: os.open("/dev/tty", os.O_RDWR))
        attempt("a new terminal", lambda: os.openpty())
        """,
    ),
    kernel(
        "pages of others",
        """
        pages = (ctypes.c_uint64 * 1)(W["witness_address"] & ~4095)
        answer = (ctypes.c_int * 1)()
        attempt("move_pages", lambda: system("move_pages", W["witness_pid"], 1, pages, 0, answer, 0))
        attempt("migrate_pages", lambda: system("migrate_pages", W["witness_pid"], 64, pages, pages))
        def witness():
            return system("pidfd_open", W["witness_pid"], 0)
        attempt("process_madvise", lambda: system("process_madvise", witness(), pages, 1, 4, 0))
        attempt("process_mrelease", lambda: system("process_mrelease", witness(), 0))
        """,
    ),
    kernel(
        "old corners of the kernel",
        """
        if "modify_ldt" in NR:
            attempt("modify_ldt", lambda: system("modify_ldt", 1, ctypes.create_string_buffer(16), 16))
        for number, name in ((134, "uselib"), (136, "ustat"), (139, "sysfs"), (156, "_sysctl"),
                             (212, "lookup_dcookie"), (236, "vserver")) if os.uname().machine == "x86_64" else ():
            attempt(name, lambda: raw(number, 0, 0, 0, 0, 0))
        for number in (*range(470, 600), 0x7FFFFFFF, -1, 1 << 31):
            try:
                raw(number, 0, 0, 0, 0, 0)
            except OSError:
                continue
            print(f"SUCCEEDED unknown call {number}")
        """,
        ran=rf"{TRIED}|{LOST}",
    ),
)
