"""Attacks that want to read what is not theirs: keys, answers, other sessions, other processes."""

from functools import partial

from tests.tools.attacks.attack import attack

secrets = partial(attack, "secrets")

SECRETS = (
    secrets(
        "the environment",
        """
        print(dict(os.environ))
        attempt("the C environment", lambda: libc.getenv(b"RLSYS_WORLD_SECRET"), bad=bool)
        for pid in ("self", 1, os.getppid(), W["test_pid"], W["witness_pid"], W["other_pid"]):
            attempt(f"/proc/{pid}/environ", lambda: read(f"/proc/{pid}/environ"),
                bad=lambda value: b"RLSYS_WORLD" in value)
        """,
    ),
    secrets(
        "the memory around the environment",
        """
        def scan():
            libc.environ_of = ctypes.c_void_p.in_dll(libc, "environ")
            first = ctypes.c_void_p.from_address(libc.environ_of.value).value
            return ctypes.string_at(first, 900)
        attempt("strings on the stack", scan, bad=lambda value: b"RLSYS_WORLD" in value)
        strings = [value for value in gc.get_objects() if isinstance(value, dict)]
        found = [str(value) for part in strings for value in part.values() if isinstance(value, (str, bytes))]
        attempt("strings of the interpreter", lambda: [text for text in found if "secret-" in text], bad=bool)
        """,
        imports="gc",
    ),
    secrets(
        "the project's files",
        """
        attempt("the configuration", lambda: print(read(W["project"])))
        attempt("the sources", lambda: read(W["root"] + "/pyproject.toml"))
        attempt("the tool's sources", lambda: read(W["tools"] + "/python.py"))
        attempt("a list of the project", lambda: [n for n in os.listdir(W["root"]) if n != W["environment"]], bad=bool)
        attempt("a list of the stand-in", lambda: os.listdir(W["folder"]))
        """,
    ),
    secrets(
        "a private key",
        """
        attempt("the key", lambda: print(open(W["key"]).read()))
        installed = f"{sys.base_prefix}/{sys.prefix}".split("/")  # the way to it must exist
        for place in ("~/.ssh", "/root", "/home"):
            attempt(place, lambda: os.listdir(os.path.expanduser(place)), bad=lambda names: set(names) - set(installed))
        """,
    ),
    secrets("the answer key", """attempt("the answers", lambda: print(open(W["answers"], "rb").read()))"""),
    secrets(
        "a file in /tmp",
        """
        attempt("the file", lambda: print(read(W["temporary"])))
        def names():
            with os.scandir("/tmp") as found:
                return [entry.name for entry in found if "rlsys" in entry.name and entry.name not in os.getcwd()]
        attempt("a list of /tmp", names, bad=bool)
        """,
    ),
    secrets(
        "password files",
        """
        attempt("/etc/shadow", lambda: read("/etc/shadow"))
        attempt("/etc/gshadow", lambda: read("/etc/gshadow"))
        """,
    ),
    secrets(
        "files by other ways to open them",
        """
        path, at, close = W["answers"].encode() + b"\\0", -100, 0o2000000
        attempt("open", lambda: print(os.read(system("open", path, 0), 100)))
        attempt("openat", lambda: print(os.read(system("openat", at, path, 0), 100)))
        attempt("openat with high bits", lambda: print(os.read(system("openat", at, path, 1 << 32), 100)))
        how = (ctypes.c_uint64 * 3)(0, 0, 0)
        attempt("openat2", lambda: print(os.read(system("openat2", at, path, how, 24), 100)))
        def reopened():
            descriptor = os.open(W["answers"], os.O_PATH)
            print(read(f"/proc/self/fd/{descriptor}"))
        attempt("O_PATH and /proc/self/fd", reopened)
        def from_a_directory():
            directory = os.open(os.path.dirname(W["answers"]), os.O_PATH | os.O_DIRECTORY)
            print(os.read(os.open("answers.jsonl", os.O_RDONLY, dir_fd=directory), 100))
        attempt("a directory opened with O_PATH", from_a_directory)
        attempt("open_tree", lambda: read(f"/proc/self/fd/{system('open_tree', at, path, 0)}"))
        """,
    ),
    secrets(
        "files by links",
        """
        def link():
            os.symlink(W["answers"], "soft")
            print(read("soft"))
        attempt("a symbolic link", link)
        def hard():
            os.link(W["answers"], "hard")
            print(read("hard"))
        attempt("a hard link", hard)
        def raw_link():
            system("linkat", -100, W["answers"].encode() + b"\\0", -100, b"raw\\0", 0x400)
            print(read("raw"))
        attempt("a hard link by number", raw_link)
        def moved():
            os.rename(W["answers"], "moved")
            print(read("moved"))
        attempt("a move into the own directory", moved)
        """,
    ),
    secrets(
        "files by going up",
        """
        up = "../" * 40
        for path in (up + W["answers"][1:], "./" + up + W["answers"][1:], "/." + W["answers"], "//" + W["answers"]):
            attempt(path[-70:], lambda: print(read(path)))
        def change():
            os.chdir(os.path.dirname(W["answers"]))
            print(read("answers.jsonl"))
        attempt("chdir", change)
        def climb():
            directory = os.open(".", os.O_RDONLY)
            for _ in range(40):
                directory = os.open("..", os.O_RDONLY, dir_fd=directory)
            print(os.read(os.open(W["answers"][1:], os.O_RDONLY, dir_fd=directory), 100))
        attempt("openat ..", climb)
        """,
        "os.chdir(os.environ.get('HOME', '/'))",
    ),
    secrets(
        "directories that were inherited",
        """
        tried = 0
        for descriptor in range(0, 1024):
            try:
                if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
                    os.scandir(descriptor).close()
            except OSError:
                continue
            tried += 1
            attempt(f"from descriptor {descriptor}", lambda: print(os.read(
                os.open("../" * 40 + W["answers"][1:], os.O_RDONLY, dir_fd=descriptor), 100)))
        print(f"denied the rest; {tried} directories were open")
        """,
    ),
    secrets(
        "the roots in /proc",
        """
        for pid in ("self", "thread-self", 1, 2, os.getppid(), W["test_pid"], W["witness_pid"], W["other_pid"]):
            for place in ("root", "cwd/../../../../../../../.."):
                attempt(f"/proc/{pid}/{place}", lambda: print(read(f"/proc/{pid}/{place}{W['answers']}")))
        """,
    ),
    secrets(
        "command lines and descriptors in /proc",
        """
        for pid in (1, os.getppid(), W["test_pid"], W["witness_pid"]):
            attempt(f"/proc/{pid}/cmdline", lambda: read(f"/proc/{pid}/cmdline"),
                bad=lambda value: pid in (W["test_pid"], W["witness_pid"]) or b"pytest" in value)
            attempt(f"/proc/{pid}/fd", lambda: os.listdir(f"/proc/{pid}/fd"), bad=lambda value: pid != os.getpid())
            attempt(f"/proc/{pid}/maps", lambda: read(f"/proc/{pid}/maps"),
                bad=lambda value: value and pid != os.getpid())
        """,
    ),
    secrets(
        "memory of a host process by /proc",
        """
        def peek(pid, address):
            descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
            print(os.pread(descriptor, W["secret_length"], address))
        attempt("the witness", lambda: peek(W["witness_pid"], W["witness_address"]))
        for pid in {1, 2, os.getppid(), W["other_pid"]}:
            attempt(f"process {pid}", lambda: peek(pid, W["other_address"]), bad=lambda value: pid != os.getpid())
        """,
    ),
    secrets(
        "memory of a host process by process_vm_readv",
        """
        buffer = ctypes.create_string_buffer(256)
        def vm(pid, address, call="process_vm_readv"):
            size = W["secret_length"]
            local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), size)
            remote = (ctypes.c_uint64 * 2)(address, size)
            system(call, pid, local, 1, remote, 1, 0)
            print(buffer.value)
        attempt("the witness", lambda: vm(W["witness_pid"], W["witness_address"]))
        attempt("writing to the witness", lambda: vm(W["witness_pid"], W["witness_address"], "process_vm_writev"))
        for pid in {1, 2, os.getppid(), W["other_pid"]} - {os.getpid(), 0}:
            attempt(f"process {pid}", lambda: vm(pid, W["other_address"]))
        """,
        ran=r"(?m)^(denied|harmless|SUCCEEDED) |cannot import ctypes",
    ),
    secrets(
        "another session's files",
        """
        other = W["other_directory"]
        if other != os.getcwd():
            attempt("by path", lambda: print(read(other + "/secret.txt")))
            attempt("a list", lambda: os.listdir(other))
            attempt("writing", lambda: os.open(other + "/planted", os.O_CREAT | os.O_WRONLY))
            attempt("removing", lambda: os.unlink(other + "/secret.txt"))
        for pid in {1, 2, W["other_pid"], os.getppid()}:
            attempt(f"/proc/{pid}/cwd", lambda: print(read(f"/proc/{pid}/cwd/secret.txt")))
        attempt("in the own directory", lambda: print(read("secret.txt")))
        attempt("next to it", lambda: [name for name in os.listdir("..") if name not in os.getcwd()],
            bad=lambda names: any("rlsys" in name for name in names))
        """,
    ),
    secrets(
        "the host's memory and logs",
        """
        for path in ("/dev/mem", "/dev/kmem", "/dev/port", "/proc/kcore", "/dev/kmsg", "/proc/kallsyms",
                     "/sys/kernel/notes", "/proc/self/mem", "/var/log/syslog", "/run/secrets", "/proc/keys",
                     "/var/run/docker.sock"):
            attempt(path, lambda: read(path), bad=lambda value: value and path != "/proc/self/mem")
        buffer = ctypes.create_string_buffer(4096)
        attempt("syslog", lambda: system("syslog", 3, buffer, 4096))
        attempt("the size of the log", lambda: system("syslog", 10, 0, 0))
        """,
    ),
    secrets(
        "a descriptor of a host process",
        """
        for pid in (W["witness_pid"], W["test_pid"], W["other_pid"], os.getppid(), 1, 2):
            def steal():
                descriptor = system("pidfd_open", pid, 0)
                return [system("pidfd_getfd", descriptor, number, 0) for number in range(3)]
            attempt(f"pidfd_getfd of {pid}", steal)
        attempt("kcmp", lambda: system("kcmp", os.getpid(), W["witness_pid"], 0, 0, 0))
        """,
    ),
)
