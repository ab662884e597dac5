"""Attacks that want more processes, or power over those of others."""

from functools import partial

from tests.tools.attacks.attack import ANYTHING, LOST, TRIED, attack

processes = partial(attack, "processes")

PROCESSES = (
    processes("fork", """attempt("os.fork", lambda: os.fork() or os._exit(0))"""),
    processes(
        "fork by number",
        """
        attempt("fork", lambda: system("fork") or os._exit(0))
        attempt("the C function", lambda: checked(libc.fork()) or os._exit(0))
        attempt("forkpty", lambda: os.forkpty()[0] or os._exit(0))
        """,
    ),
    processes(
        "vfork in machine code",
        """
        def run(code):
            page = mmap.mmap(-1, 4096, prot=7)
            page.write(bytes.fromhex(code))
            result = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            return result
        if "vfork" in NR:  # vfork(); the child ends at once without touching the stack
            attempt("vfork", lambda: run("b83a000000 0f05 85c0 7509 31ff b83c000000 0f05 c3"))
        else:
            print("harmless: this architecture has no vfork")
        """,
        imports="mmap",
        ran=rf"{TRIED}|{LOST}|harmless",
    ),
    processes(
        "clone with many flags",
        """
        signal, vm, vfork, parent, thread, sighand = 17, 0x100, 0x4000, 0x8000, 0x10000, 0x800
        for flags in (signal, parent | signal, 0x00800000 | signal, 0x01200000 | signal, 0x400 | signal,
                      1 << 32 | signal, 0x2000 | signal, 0x600 | signal, 0x80000000 | signal, 0, 0x1000 | signal):
            attempt(f"clone with {flags:#x}", lambda: system("clone", flags, 0, 0, 0, 0) or os._exit(0))
        stack = ctypes.create_string_buffer(1 << 16)
        def shared(flags):  # the child runs the C function _exit on a stack of its own
            top = ctypes.c_void_p((ctypes.addressof(stack) + len(stack)) & ~15)
            return checked(libc.clone(ctypes.cast(libc._exit, ctypes.c_void_p), top, flags, None))
        for flags in (vm | vfork | signal, vm | signal, vm | sighand | signal, vm | parent | signal):
            attempt(f"a process that shares memory, {flags:#x}", lambda: shared(flags))
        """,
    ),
    processes(
        "clone3",
        """
        def clone3(flags, size=88):
            arguments = (ctypes.c_uint64 * 11)(flags, 0, 0, 0, 17)
            return system("clone3", arguments, size) or os._exit(0)
        for flags in (0, 0x4000, 0x8000, 0x10000000, 0x200000000):
            attempt(f"clone3 with {flags:#x}", lambda: clone3(flags))
        attempt("the older size", lambda: clone3(0, 64))
        """,
    ),
    processes(
        "new namespaces by clone",
        """
        for flags in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000,
                      0x7E020000, 0x80):
            attempt(f"clone with {flags:#x}", lambda: system("clone", flags | 17, 0, 0, 0, 0) or os._exit(0))
        """,
    ),
    processes(
        "system calls of the 32-bit kernel interface",
        """
        def run(code):
            page = mmap.mmap(-1, 4096, prot=7)
            page.write(bytes.fromhex(code))
            return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        if os.uname().machine == "x86_64":
            for number in (57, 56, 41):
                attempt(f"x32 call {number}", lambda: raw(number | 0x40000000, 17, 0, 0, 0, 0) or os._exit(0))
            print("trying int 0x80", flush=True)  # fork is 2 there; the child leaves by exit
            code = "b802000000 cd80 85c0 7509 31db b801000000 cd80 c3"
            attempt("int 0x80", lambda: run(code), bad=lambda value: value > 0)
        else:
            print("harmless: this architecture has no second interface")
        """,
        imports="mmap",
        ran=rf"{TRIED}|harmless|{LOST}",
    ),
    processes(
        "programs",
        """
        attempt("os.system", lambda: os.system("echo SUCCEEDED to run a shell"), bad=lambda status: status == 0)
        attempt("subprocess", lambda: subprocess.run(["/bin/echo", "out"], check=True, timeout=0.3))
        attempt("subprocess with Python", lambda: subprocess.run([sys.executable, "-c", ""], check=True, timeout=0.3))
        attempt("posix_spawn", lambda: os.posix_spawn("/bin/true", ["true"], {}))
        attempt("popen", lambda: os.popen("echo out").read(), bad=bool)
        attempt("the C function", lambda: libc.system(b"true"), bad=lambda status: status == 0)
        """,
        imports="subprocess",
    ),
    processes(
        "becoming another program",
        """
        command = ["sh", "-c", "echo SUCCEEDED to become a shell"]
        for program in ("/bin/sh", "/usr/bin/sh", "/bin/bash", "/bin/busybox"):
            attempt(program, lambda: os.execv(program, command))
        code = "print('SUCCEEDED to become Python')"
        attempt("this Python", lambda: os.execv(sys.executable, [sys.executable, "-c", code]))
        def execveat(directory, name, flags):
            words = [word.encode() for word in command]
            return system("execveat", directory, name, (ctypes.c_char_p * 4)(*words), (ctypes.c_char_p * 1)(), flags)
        attempt("execveat", lambda: execveat(-100, b"/bin/sh\\0", 0))
        attempt("the loader", lambda: os.execv("/lib64/ld-linux-x86-64.so.2", ["ld.so", "/bin/sh", *command[1:]]))
        """,
    ),
    processes(
        "a program from memory",
        """
        script = b"#!/bin/sh\\necho SUCCEEDED to run a file in memory\\n"
        words = (ctypes.c_char_p * 2)(b"memory")
        def memory_file():
            descriptor = system("memfd_create", b"program\\0", 0)
            os.write(descriptor, script)
            return system("execveat", descriptor, b"\\0", words, words, 0x1000)
        attempt("memfd_create and execveat", memory_file)
        def own_file():
            with open("program", "wb") as file:
                file.write(script)
            os.chmod("program", 0o755)
            os.execv("./program", ["program"])
        attempt("a file of one's own", own_file)
        """,
    ),
    processes(
        "multiprocessing",
        """
        for way in ("fork", "spawn", "forkserver"):
            def start():
                process = multiprocessing.get_context(way).Process(target=print, args=("SUCCEEDED in a child",))
                process.start()
                return process.join(0.2)
            attempt(way, start)
        attempt("a pool", lambda: concurrent.futures.ProcessPoolExecutor(1).submit(int).result(timeout=0.2))
        """,
        imports="multiprocessing concurrent.futures",
    ),
    processes(
        "fork bomb",
        """
        def child(number):
            pid = os.fork()
            if pid == 0:
                try:
                    time.sleep(20)
                finally:
                    os._exit(0)
        exhaust("processes", child, allowed=1, times=100)
        """,
        imports="time",
        ran=r"denied|SUCCEEDED",
    ),
    processes(
        "a daemon",
        """
        def daemon():
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(20)
                os._exit(0)
        attempt("a process that nobody waits for", daemon)
        """,
        imports="time",
    ),
    processes(
        "thread bomb",
        """
        _thread.stack_size(1 << 16)
        def start(number):
            _thread.start_new_thread(time.sleep, (20,))
        exhaust("threads", start, allowed=W["max_threads"], times=20)
        """,
        imports="time _thread",
        depends_in="T1 T0",  # no limit on processes binds root, or a user shared with other sessions
        ran=r"denied|SUCCEEDED",
    ),
    processes(
        "signals to everybody",
        """
        urgent = 23  # ignored by whoever does not ask for it
        attempt("kill(-1)", lambda: os.kill(-1, urgent), bad=lambda _: False)
        attempt("kill(0)", lambda: os.kill(0, urgent), bad=lambda _: False)
        attempt("kill(1)", lambda: os.kill(1, urgent), bad=lambda _: False)
        attempt("the group of the host", lambda: os.killpg(os.getpgid(W["test_pid"]), urgent))
        for pid in range(2, 400):
            try:
                os.kill(pid, urgent)
            except OSError:
                continue
            if pid != os.getpid():
                print(f"SUCCEEDED to signal process {pid}")
        """,
    ),
    processes(
        "signals to the host's processes",
        """
        urgent, kill = 23, 9
        witness = W["witness_pid"]
        for pid, number in ((witness, kill), (witness, 19), (witness, 15), (W["test_pid"], urgent)):
            attempt("kill", lambda: os.kill(pid, number))
            attempt("tkill", lambda: system("tkill", pid, number))
            attempt("tgkill", lambda: system("tgkill", pid, pid, number))
            information = (ctypes.c_int * 32)(number, 0, -1)
            attempt("rt_sigqueueinfo", lambda: system("rt_sigqueueinfo", pid, number, information))
            attempt("rt_tgsigqueueinfo", lambda: system("rt_tgsigqueueinfo", pid, pid, number, information))
            attempt("a pidfd", lambda: system("pidfd_send_signal", system("pidfd_open", pid, 0), number, 0, 0))
        """,
    ),
    processes(
        "signals to the tool's own processes",
        """
        others = {os.getppid(), W["other_pid"]}
        if os.getpid() < 50:  # in a process namespace: these are not the host's
            others |= {1, 2, 3}
        for pid in sorted(others - {0, os.getpid(), W["test_pid"]} - ({1} if os.getpid() >= 50 else set())):
            for number in (19, 15, 9):
                attempt(f"signal {number} to {pid}", lambda: os.kill(pid, number), bad=lambda _: False)
        print("harmless: still here")
        """,
    ),
    processes(
        "SIGIO by the kernel's hand",
        """
        def own(pid):
            reader, writer = os.pipe()
            fcntl.fcntl(reader, fcntl.F_SETSIG, 23)
            fcntl.fcntl(reader, fcntl.F_SETOWN, pid)
            fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
            os.write(writer, b"x")
        for pid in (W["witness_pid"], W["test_pid"], W["other_pid"]):
            attempt(f"F_SETOWN {pid}", lambda: own(pid), bad=lambda _: False)
        """,
        imports="fcntl",
    ),
    processes(
        "ptrace",
        """
        for pid in (W["witness_pid"], W["test_pid"], W["other_pid"], os.getppid()):
            attempt(f"attach to {pid}", lambda: system("ptrace", 16, pid, 0, 0))
            attempt(f"seize {pid}", lambda: system("ptrace", 0x4206, pid, 0, 0))
        attempt("be traced", lambda: system("ptrace", 0, 0, 0, 0))
        """,
    ),
    processes(
        "priorities and limits",
        """
        attempt("a real-time class", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
        attempt("nice", lambda: os.nice(-5))
        attempt("priority of a host process", lambda: os.setpriority(os.PRIO_PROCESS, W["witness_pid"], 19))
        infinity = resource.RLIM_INFINITY
        for name in ("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_CPU"):
            kind = getattr(resource, name, 0)
            if resource.getrlimit(kind)[1] != infinity:
                attempt(f"no {name}", lambda: resource.setrlimit(kind, (infinity, infinity)))
        new = (ctypes.c_uint64 * 2)(1, 1)
        for pid in (W["witness_pid"], W["other_pid"]):
            attempt(f"limits of {pid}", lambda: system("prlimit64", pid, 7, 0, new), bad=lambda _: pid != os.getpid())
            attempt(f"processors of {pid}", lambda: os.sched_setaffinity(pid, {0}), bad=lambda _: pid != os.getpid())
        names = "RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE"
        attempt("without limits", lambda: [name for name in names
            if resource.getrlimit(getattr(resource, name))[1] == infinity], bad=bool)
        """,
        imports="resource",
    ),
    processes(
        "leaving the group and the session",
        """
        attempt("setsid", lambda: os.setsid(), bad=lambda _: False)
        attempt("setpgid", lambda: os.setpgid(0, 0), bad=lambda _: False)
        attempt("into the host's group", lambda: os.setpgid(0, os.getpgid(W["test_pid"])))
        attempt("no death signal", lambda: checked(libc.prctl(1, 0, 0, 0, 0)), bad=lambda _: False)
        """,
        "while True:\n    pass",
        ran=ANYTHING,
    ),
)
