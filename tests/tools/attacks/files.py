"""Attacks that want to change the host's files, or to leave something for whoever comes next."""

from functools import partial

from tests.tools.attacks.attack import attack

files = partial(attack, "files")

FILES = (
    files(
        "overwriting a host file",
        """
        def write(path, flags):
            return os.write(os.open(path, flags), b"owned")
        for path in (W["project"], W["key"], W["temporary"]):
            attempt("overwrite", lambda: write(path, os.O_WRONLY))
            attempt("append", lambda: write(path, os.O_WRONLY | os.O_APPEND))
            attempt("truncate by opening", lambda: write(path, os.O_WRONLY | os.O_TRUNC))
            attempt("truncate by name", lambda: os.truncate(path, 0))
            attempt("O_RDONLY with O_TRUNC", lambda: os.open(path, os.O_RDONLY | os.O_TRUNC))
        """,
    ),
    files(
        "making a host file",
        """
        def make(path):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o777))
        for place in (W["folder"], os.path.dirname(W["temporary"]), "/dev/shm", "/var/tmp", W["root"], "/dev/mqueue"):
            attempt(f"create in {place}", lambda: make(f"{place}/made-{W['token']}"), bad=lambda _: False)
            attempt(f"mkdir in {place}", lambda: os.mkdir(f"{place}/folder-{W['token']}"), bad=lambda _: False)
        attempt("create in the stand-in's home", lambda: make(os.path.dirname(W["key"]) + "/authorized_keys"))
        def unnamed():
            return os.write(os.open(W["folder"], os.O_TMPFILE | os.O_RDWR), b"x")
        attempt("O_TMPFILE", unnamed)
        """,
    ),
    files(
        "removing and moving host files",
        """
        attempt("unlink", lambda: os.unlink(W["project"]))
        attempt("rename over", lambda: os.rename(W["token"], W["project"]))
        attempt("move away", lambda: os.rename(W["answers"], "mine"))
        attempt("exchange", lambda: system("renameat2", -100, W["token"].encode() + b"\\0", -100,
            W["project"].encode() + b"\\0", 2))
        attempt("rename beside", lambda: os.rename(W["key"], W["key"] + ".old"))
        attempt("rmdir", lambda: os.rmdir(os.path.dirname(W["key"])))
        attempt("hard link outside", lambda: os.link(W["token"], W["folder"] + "/linked"))
        attempt("symbolic link outside", lambda: os.symlink("/", W["folder"] + "/linked"))
        """,
    ),
    files(
        "rights of host files",
        """
        for path in (W["project"], W["folder"]):
            attempt("chmod", lambda: os.chmod(path, 0o700))
            attempt("chmod by number", lambda: system("chmod", path.encode() + b"\\0", 0o400))
            attempt("chown", lambda: os.chown(path, os.getuid(), os.getgid()))
            attempt("utime", lambda: os.utime(path))
            attempt("setxattr", lambda: os.setxattr(path, "user.owned", b"1"))
        def set_uid():
            os.close(os.open("shell", os.O_CREAT | os.O_WRONLY))
            os.chmod("shell", 0o6755)
            return os.stat("shell").st_uid, oct(os.stat("shell").st_mode)
        attempt("a set-uid file of root's", set_uid, bad=lambda value: value[0] == 0 and os.getuid() != 0)
        """,
    ),
    files(
        "writing through links",
        """
        def through(name):
            return os.write(os.open(name, os.O_WRONLY), b"owned")
        def soft():
            os.symlink(W["project"], "soft")
            return through("soft")
        attempt("a symbolic link", soft)
        def hard():
            os.link(W["project"], "hard")
            return through("hard")
        attempt("a hard link", hard)
        def directory():
            os.symlink(W["folder"], "folder")
            return os.open("folder/made", os.O_CREAT | os.O_WRONLY)
        attempt("a link to a directory", directory)
        def reopened():
            return through(f"/proc/self/fd/{os.open(W['project'], os.O_RDONLY)}")
        attempt("a descriptor opened again", reopened)
        """,
    ),
    files(
        "the Python installation",
        """
        places = {W["site"], W["stdlib"], sys.prefix, *sys.path}
        places |= {os.path.dirname(path) for path in (os.__file__, sys.executable)}
        for place in sorted(filter(None, places)):
            for name in (f"rlsys_{W['token']}.pth", f"{W['token']}.py"):
                attempt(f"create {place}/{name}", lambda: os.open(f"{place}/{name}", os.O_CREAT | os.O_WRONLY))
        attempt("the standard library", lambda: os.open(os.__file__, os.O_WRONLY))
        attempt("its compiled copy", lambda: os.open(os.__cached__, os.O_WRONLY))
        attempt("the program", lambda: os.open(sys.executable, os.O_WRONLY))
        attempt("libc", lambda: os.open("/lib/x86_64-linux-gnu/libc.so.6", os.O_WRONLY))
        attempt("chmod", lambda: os.chmod(W["site"], W["site_mode"]))  # to what it is
        """,
    ),
    files(
        "the tool's own sources",
        """
        for name in ("python.py", "python_cell.py", "python_child.py", "__init__.py"):
            attempt(name, lambda: os.open(f"{W['tools']}/{name}", os.O_WRONLY))
        attempt("a new one", lambda: os.open(f"{W['tools']}/{W['token']}.py", os.O_CREAT | os.O_WRONLY))
        """,
    ),
    files(
        "modules for the next session",
        """
        import_me = "poisoned = True\\nimport builtins\\nbuiltins.poisoned = True\\n"
        def plant(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "w") as file:
                file.write(import_me)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        home = os.path.expanduser("~")
        for path in ("numpy.py", "json.py", "sitecustomize.py",
                     f"{home}/.local/lib/{version}/site-packages/usercustomize.py", f"/tmp/{W['token']}.py",
                     f"{W['site']}/{W['token']}.py"):
            attempt(path, lambda: plant(path), bad=lambda _: False)
        sys.path.insert(0, os.getcwd())
        """,
        later="""
        import builtins, os, sys
        print("SUCCEEDED to poison" if hasattr(builtins, "poisoned") else "denied : no poison")
        try:
            left = [name for name in os.listdir(".") if name.endswith(".py")]
        except OSError:
            left = []
        print(f"SUCCEEDED to leave {left}" if left else "denied: nothing left")
        """,
    ),
    files(
        "devices",
        """
        character, block, pipe = 0o020000, 0o060000, 0o010000
        for kind, major, minor in ((character, 1, 1), (character, 1, 3), (block, 254, 0), (block, 8, 0), (pipe, 0, 0)):
            attempt(f"mknod {kind:o} {major} {minor}", lambda: system("mknodat", -100,
                f"node{kind}{major}{minor}\\0".encode(), kind | 0o666, major << 8 | minor),
                bad=lambda _: kind != pipe)
        for path in ("/dev/sda", "/dev/vda", "/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/loop-control",
                     "/dev/nvidia0", "/dev/nvidiactl", "/dev/ptmx", "/dev/tty", "/dev/console"):
            attempt(path, lambda: os.open(path, os.O_RDWR))
        """,
    ),
    files(
        "switches of the kernel",
        """
        for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe",
                     "/proc/self/oom_score_adj", "/proc/sys/vm/drop_caches", "/proc/sys/kernel/hostname",
                     "/proc/self/uid_map", "/proc/self/coredump_filter", "/sys/kernel/uevent_helper",
                     "/sys/fs/cgroup/cgroup.procs", "/sys/power/state", "/sys/module/kernel"):
            attempt(path, lambda: os.open(path, os.O_WRONLY))
        """,
    ),
    files(
        "shared memory",
        """
        size = 1 << 20
        attempt("shmget with a key", lambda: system("shmget", W["ipc_key"], size, 0o1666))
        attempt("shmget", lambda: system("shmget", 0, size, 0o1600))
        attempt("semget", lambda: system("semget", W["ipc_key"], 1, 0o1666))
        attempt("msgget", lambda: system("msgget", W["ipc_key"], 0o1666))
        attempt("mq_open", lambda: system("mq_open", f"queue-{W['token']}\\0".encode(), 0o102, 0o666, 0))
        attempt("shm_open", lambda: checked(libc.shm_open(f"/shm-{W['token']}".encode(), 0o102, 0o666)))
        attempt("shared_memory", lambda: multiprocessing.shared_memory.SharedMemory(f"shm-{W['token']}", True, size))
        """,
        imports="multiprocessing.shared_memory",
    ),
    files(
        "watching the host's files",
        """
        def watch(path):
            return system("inotify_add_watch", system("inotify_init1", 0), path.encode() + b"\\0", 0xFFF)
        for path in (W["project"], W["folder"], "/tmp", "/dev/shm", W["root"]):
            attempt(f"inotify on {path}", lambda: watch(path),
                bad=lambda _: path != "/tmp" or os.path.exists(W["temporary"]))
        for flags in (0, 0x4, 0x200, 0x600):
            attempt("fanotify", lambda: system("fanotify_init", flags, 0))
        """,
    ),
    files(
        "a notice of changes in a directory",
        """
        def watch(path):
            return fcntl.fcntl(os.open(path, os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_MODIFY | fcntl.DN_CREATE)
        for path in (W["folder"], W["root"], os.path.dirname(W["temporary"])):
            attempt(f"dnotify on {path}", lambda: watch(path), bad=lambda _: os.path.exists(W["project"]))
        """,
        imports="fcntl",
    ),
    files(
        "looking at host files without opening them",
        """
        for path in (W["project"], W["key"], W["root"] + "/pyproject.toml"):
            attempt("stat", lambda: os.stat(path).st_size)
            attempt("access", lambda: os.access(path, os.R_OK), bad=bool)
            attempt("extended attributes", lambda: os.listxattr(path))
            attempt("statvfs", lambda: os.statvfs(path).f_bavail)
        """,
        succeeds_in="T1 T0",  # asking for names and sizes is no right that Landlock knows
    ),
    files(
        "file handles",
        """
        handle = (ctypes.c_uint32 * 34)(128, 0)
        mount = ctypes.c_int()
        def of(path):
            handle[0] = 128
            system("name_to_handle_at", -100, path.encode() + b"\\0", handle, ctypes.byref(mount), 0)
            return list(handle[:4])
        attempt("name_to_handle_at", lambda: of(W["project"]))
        def root():  # the root of the host's file system is inode 2 or 128
            directory = os.open("/", os.O_RDONLY)
            for inode in (2, 128, 1):
                handle[:4] = [8, 1, inode, 0]
                return system("open_by_handle_at", directory, handle, 0)
        attempt("open_by_handle_at", root)
        """,
        ran=r"(?m)^(denied|harmless|SUCCEEDED) ",
    ),
)
