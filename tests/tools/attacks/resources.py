"""Attacks that want more memory or more disk than their share."""

from functools import partial

from tests.tools.attacks.attack import LOST, TRIED, attack

memory = partial(attack, "memory", ran=rf"{TRIED}|{LOST}")
disk = partial(attack, "disk", ran=r"denied|SUCCEEDED|harmless")

MEMORY = (
    memory(
        "bytearrays",
        """held = []\nexhaust("MiB", lambda n: held.append(bytearray(b"x") * (1 << 20)), allowed=W["memory_mb"])""",
    ),
    memory(
        "a list of numbers",
        """
        held = []
        exhaust("MiB", lambda n: held.append([n] * (1 << 17)), allowed=W["memory_mb"])
        """,
    ),
    memory(
        "one doubling string",
        """
        text = "x" * (1 << 20)
        def double():
            global text
            while len(text) >> 20 < 4 * W["memory_mb"]:
                text += text
        attempt("double", double)
        attempt("multiply", lambda: len("x" * (1 << 42)))
        """,
    ),
    memory(
        "anonymous mappings",
        """
        held = []
        def step(n):
            page = mmap.mmap(-1, 1 << 23)
            page.write(b"x" * (1 << 23))
            held.append(page)
        exhaust("MiB", step, size=8, allowed=W["memory_mb"])
        """,
        imports="mmap",
    ),
    memory(
        "mappings by number",
        """
        def step(n):
            address = system("mmap", 0, 1 << 24, 3, 0x22 | 0x8000, -1, 0)
        exhaust("MiB", step, size=16, allowed=W["memory_mb"])
        """,
    ),
    memory(
        "stacks of many threads",
        """
        _thread.stack_size(32 << 20)
        exhaust("MiB", lambda n: _thread.start_new_thread(time.sleep, (20,)), size=32, allowed=W["memory_mb"])
        """,
        imports="time _thread",
    ),
    memory(
        "a numpy array",
        """
        attempt("ones", lambda: numpy.ones((4 * W["memory_mb"], 1 << 17)).nbytes)
        held = []
        exhaust("MiB", lambda n: held.append(numpy.full(1 << 20, n, dtype=numpy.int64)), size=8, allowed=W["memory_mb"])
        """,
        imports="numpy",
    ),
    memory(
        "a decompression bomb",
        """
        def bomb():
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
            return len(zlib.decompressobj(-15).decompress(piece * (4 * W["memory_mb"]))) >> 20
        attempt("decompress", bomb, bad=lambda size: size > 1.25 * W["memory_mb"])
        """,
        imports="zlib",
    ),
    memory(
        "files in memory",
        """
        block = b"x" * (1 << 20)
        def step(n):
            descriptor = system("memfd_create", b"hidden\\0", 0) if n % 16 == 0 else held[-1]
            held.append(descriptor)
            os.write(descriptor, block)
        held = []
        exhaust("MiB", step, allowed=W["memory_mb"])
        attempt("memfd_secret", lambda: os.ftruncate(system("memfd_secret", 0), 1 << 30))
        """,
    ),
    memory(
        "buffers of the kernel",
        """
        held, block = [], b"x" * (1 << 16)
        def fill(descriptor):
            size = 0
            os.set_blocking(descriptor, False)
            try:
                while True:
                    size += os.write(descriptor, block)
            except BlockingIOError:
                return size
        def park():
            total = 0
            try:
                for _ in range(4000):
                    pair = socket.socketpair()
                    held.extend(pair)
                    for end in pair:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
                        total += fill(end.fileno())
                    reader, writer = os.pipe()
                    held.extend((reader, writer))
                    fcntl.fcntl(writer, 1031, 1 << 20)  # F_SETPIPE_SZ
                    total += fill(writer)
            except Exception:
                pass
            return total >> 20
        attempt("MiB in sockets and pipes", park, bad=lambda size: size > W["memory_mb"])
        """,
        imports="socket fcntl",
    ),
    memory(
        "descriptors",
        """
        held = []
        exhaust("descriptors", lambda n: held.append(os.dup(1)), allowed=1024, times=8)
        """,
    ),
    memory(
        "a huge number and a huge constant",
        """
        attempt("shift", lambda: (1 << (8 << 33)).bit_length())
        attempt("a constant", lambda: len(eval("(1,) * (1 << 30)")))
        attempt("nested brackets", lambda: eval("(" * 100000 + ")" * 100000))
        attempt("many signs", lambda: compile("-" * 500000 + "1", "bomb", "eval"))
        """,
    ),
)

DISK = (
    disk(
        "one large file",
        """
        block = b"x" * (1 << 20)
        file = os.open("large", os.O_CREAT | os.O_WRONLY)
        def step(n):
            if os.write(file, block) < len(block):
                raise OSError("a short write")
        exhaust("MiB", step, allowed=W["disk_mb"])
        """,
        ran=r"denied|SUCCEEDED|Error",
    ),
    disk(
        "many files",
        """
        block = b"x" * (1 << 20)
        def step(n):
            with open(f"part{n}", "wb", buffering=0) as file:
                if file.write(block) < len(block):
                    raise OSError("a short write")
        exhaust("MiB", step, allowed=W["disk_mb"])
        """,
        succeeds_in="T1",
    ),
    disk(
        "files without a name",
        """
        block, held = b"x" * (1 << 20), []
        def step(n):
            file = os.open("gone", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.unlink("gone")
            held.append(file)
            if os.write(file, block) < len(block):
                raise OSError("a short write")
        exhaust("MiB", step, allowed=W["disk_mb"])
        """,
        succeeds_in="T1",
    ),
    disk(
        "a sparse file",
        """
        def sparse():
            file = os.open("sparse", os.O_CREAT | os.O_RDWR)
            os.ftruncate(file, 1 << 40)
            return file
        attempt("a file of 1 TiB", sparse, bad=lambda _: False)
        file = os.open("holes", os.O_CREAT | os.O_RDWR)
        exhaust("MiB", lambda n: os.pwrite(file, b"x" * (1 << 20), n << 32) or 0, allowed=W["disk_mb"])
        attempt("fallocate", lambda: os.posix_fallocate(file, 0, 4 * W["disk_mb"] << 20))
        """,
        ran=r"denied|SUCCEEDED|Error",
    ),
    disk(
        "inode bomb",
        """exhaust("files", lambda n: os.close(os.open(f"file{n}", os.O_CREAT)), allowed=W["max_files"])""",
        succeeds_in="T1",
    ),
    disk(
        "hard links",
        """
        attempt("a file", lambda: os.close(os.open("one", os.O_CREAT)), bad=lambda _: False)
        exhaust("links", lambda n: os.link("one", f"link{n}"), allowed=W["max_files"])
        """,
        succeeds_in="T1",
    ),
    disk(
        "symbolic links",
        """exhaust("links", lambda n: os.symlink("x" * 4000, f"link{n}"), allowed=W["max_files"])""",
        succeeds_in="T1",
    ),
    disk(
        "deep directories",
        """
        def step(n):
            os.mkdir("d")
            os.chdir("d")
        exhaust("levels", step, allowed=W["max_files"])
        """,
        "os.getcwd()[:50]",
        succeeds_in="T1",
    ),
    disk(
        "directories that nobody may remove",
        """
        def lock():
            os.makedirs("locked/inside/deeper")
            os.close(os.open("locked/inside/file", os.O_CREAT))
            for name in ("locked/inside/deeper", "locked/inside", "locked"):
                os.chmod(name, 0)
            os.chmod(".", 0)
        attempt("take all rights away", lock, bad=lambda _: False)
        """,
    ),
    disk(
        "attributes of files",
        """
        attempt("a file", lambda: os.close(os.open("one", os.O_CREAT)), bad=lambda _: False)
        def step(n):
            os.setxattr("one", f"user.a{n}", b"x" * 60000)
        exhaust("KiB", step, size=60, allowed=W["disk_mb"] << 10)
        """,
    ),
)
