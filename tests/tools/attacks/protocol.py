"""Attacks on the talk between the interpreter and the tool: its descriptors, its frames, its life."""

from functools import partial

from tests.tools.attacks.attack import ANYTHING, attack

protocol = partial(attack, "protocol", ran=ANYTHING)

FORGE = """
import struct
def bodies(key):
    text = key if isinstance(key, str) else key.hex() if isinstance(key, bytes) else str(key)
    number = int(text, 16) if all(letter in "0123456789abcdef" for letter in text) and text else 0
    said = '"ok": true, "text": "FORGED", "output": "FORGED", "value": "FORGED", "shown": "FORGED"'
    for written in (f'"{text}"', str(number)):
        yield f'{{"id": {written}, "request": {written}, "request_id": {written}, {said}}}'.encode()
    raw = key if isinstance(key, bytes) else text.encode()
    for flag in (b"+", b"-", b"\\x01", b"1", b"ok"):
        yield raw + flag
        yield raw + flag + b"FORGED"
def frames(key):
    for body in bodies(key):
        yield body
        yield body + b"\\n"
        for form in (">I", "<I", ">Q", "<Q", ">H"):
            yield struct.pack(form, len(body)) + body
        yield b"R" + struct.pack(">I", len(body)) + body
        yield b"+" + struct.pack(">I", len(body)) + body
def is_open(descriptor):
    try:
        return os.get_blocking(descriptor) or True
    except OSError:
        return False
targets = [descriptor for descriptor in range(3, 1024) if is_open(descriptor)]
def send_everywhere(data):
    for descriptor in targets:
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, data)
        except OSError:
            pass
"""

FIND_KEY = """
import stat
sockets = [descriptor for descriptor in targets if stat.S_ISSOCK(os.fstat(descriptor).st_mode)]
def keys(frame):  # what this tool gives a request; the interpreter holds it in a variable of its main loop
    while frame is not None:
        yield from (value for value in list(frame.f_locals.values()) if isinstance(value, bytes) and len(value) == 16)
        frame = frame.f_back
def answer(key, flag):
    for descriptor in sockets:
        os.write(descriptor, key + flag)
"""

PROTOCOL = (
    protocol("closing every descriptor", "os.closerange(0, 1024)", "print('after')"),
    protocol("closing the standard streams", "os.close(0); os.close(1); os.close(2)", "print('after')"),
    protocol(
        "closing every descriptor from a thread",
        """
        def close():
            while True:
                os.closerange(3, 1024)
        _thread.start_new_thread(close, ())
        time.sleep(0.05)
        """,
        imports="_thread time",
    ),
    protocol(
        "standard output over every descriptor",
        """
        for descriptor in range(3, 256):
            os.dup2(1, descriptor)
        print("x" * 1000)
        """,
    ),
    protocol(
        "/dev/null over every descriptor",
        """
        for descriptor in range(0, 256):
            os.dup2(os.open("/dev/null", os.O_RDWR), descriptor)
        """,
    ),
    protocol(
        "garbage on every descriptor",
        f"{FORGE}\nsend_everywhere(os.urandom(300))\nraise ValueError('true end')",
        fails=True,
    ),
    protocol(
        "a newline on every descriptor", f"{FORGE}\nsend_everywhere(b'\\n')\nraise ValueError('true end')", fails=True
    ),
    protocol(
        "frames of a huge length",
        f"""{FORGE}
for form in (">I", "<I", ">Q"):
    send_everywhere(struct.pack(form, 0xFFFFFFFF) + b"x" * 100)
raise ValueError("true end")
""",
        fails=True,
    ),
    protocol("half a frame", f"{FORGE}\nsend_everywhere(b'\\0\\0\\0')\nraise ValueError('true end')", fails=True),
    protocol(
        "half a frame and silence", f"{FORGE}\nsend_everywhere(b'\\0\\0\\0\\x40' + b'x' * 8)\nwhile True:\n    pass"
    ),
    protocol(
        "a flood on every descriptor",
        f"""{FORGE}
def flood():
    while True:
        send_everywhere(b"x" * 65536)
_thread.start_new_thread(flood, ())
time.sleep(0.2)
""",
        imports="_thread time",
    ),
    protocol(
        "frames with guessed ids",
        f"""{FORGE}
for number in (0, 1, 2, 3, "0", "1", "2", b"\\0" * 16, b"\\0" * 8):
    for frame in frames(number if not isinstance(number, int) else str(number)):
        send_everywhere(frame)
raise ValueError("true end")
""",
        fails=True,
    ),
    protocol(
        "the answer before the end",
        f"""{FORGE}{FIND_KEY}
answer(next(keys(sys._getframe())), b"+")
raise ValueError("true end")
""",
        insider=True,
    ),
    protocol(
        "the answer and then silence",
        f"""{FORGE}{FIND_KEY}
answer(next(keys(sys._getframe())), b"+")
while True:
    pass
""",
        insider=True,
        waits=True,
    ),
    protocol(
        "the answer and then the end",
        f"""{FORGE}{FIND_KEY}
answer(next(keys(sys._getframe())), b"+")
os._exit(0)
""",
        insider=True,
    ),
    protocol(
        "the answer to the next call",
        f"""{FORGE}{FIND_KEY}
def forge():
    answered = set()
    while True:
        for key in keys(sys._current_frames()[main]):
            if key not in answered:
                answered.add(key)
                answer(key, b"+")
main = _thread.get_ident()
sys.setswitchinterval(1e-6)
_thread.start_new_thread(forge, ())
""",
        "import time\ntime.sleep(0.1)\nraise ValueError('true end')",
        imports="_thread time",
        insider=True,
    ),
    protocol(
        "answers to every call by a patched loop",
        f"""{FORGE}{FIND_KEY}
frame = sys._getframe()
while frame is not None:
    for value in list(frame.f_locals.values()):
        if hasattr(value, "show_error") and hasattr(value, "run"):
            type(value).show_error = lambda self, error: True
    frame = frame.f_back
""",
        "raise ValueError('true end')",
        insider=True,
    ),
    protocol(
        "stealing the next call",
        """
        def steal():
            while True:
                for descriptor in range(0, 256):
                    try:
                        os.set_blocking(descriptor, False)
                        if descriptor not in (1, 2):
                            os.read(descriptor, 1 << 16)
                    except OSError:
                        pass
        _thread.start_new_thread(steal, ())
        """,
        "print('the second call')",
        imports="_thread",
    ),
    protocol(
        "shutting the sockets down",
        """
        for descriptor in range(3, 256):
            try:
                socket.socket(fileno=os.dup(descriptor)).shutdown(socket.SHUT_RDWR)
            except Exception:
                pass
        """,
        imports="socket",
    ),
    protocol(
        "descriptors sent to the tool",
        """
        for descriptor in range(3, 256):
            for _ in range(20):
                try:
                    channel = socket.socket(fileno=os.dup(descriptor))
                    channel.setblocking(False)
                    channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2] * 60))])
                except Exception:
                    break
        """,
        imports="socket array",
    ),
    protocol(
        "a wrong mode on every descriptor",
        """
        for descriptor in range(0, 256):
            try:
                os.set_blocking(descriptor, False)
                fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC)
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pass
        print("x" * 100_000)
        """,
        imports="fcntl",
    ),
    protocol(
        "no descriptor is left",
        """
        held = []
        try:
            while True:
                held.append(os.dup(1))
        except OSError as error:
            print(error)
        """,
        "print('after')",
    ),
    protocol("ending at once", "os._exit(0)"),
    protocol("ending with a status", "os._exit(99)", "exit(3)", "raise SystemExit('gone')", "import sys\nsys.exit(0)"),
    protocol("abort", "os.abort()"),
    protocol("a crash", "ctypes.string_at(0)"),
    protocol(
        "a crash in a thread",
        "_thread.start_new_thread(ctypes.string_at, (0,))\ntime.sleep(0.1)",
        imports="_thread time",
    ),
    protocol("SIGKILL to itself", "os.kill(os.getpid(), 9)\nwhile True: pass", waits=True),
    protocol(
        "SIGSTOP to itself",
        "os.kill(os.getpid(), 19)\nlibc.raise_(19) if hasattr(libc, 'raise_') else 0\nwhile True: pass",
        waits=True,
    ),
    protocol(
        "SIGTSTP, SIGTTIN and SIGTTOU to itself",
        "for number in (20, 21, 22):\n    os.kill(os.getpid(), number)\nwhile True: pass",
        waits=True,
    ),
    protocol("SIGTERM and SIGHUP to itself", "os.kill(os.getpid(), 15)\nos.kill(os.getpid(), 1)", "print('after')"),
    protocol(
        "a stop of its own threads by number",
        """
        attempt("tgkill", lambda: system("tgkill", os.getpid(), os.getpid(), 19), bad=lambda _: False)
        while True:
            pass
        """,
        waits=True,
    ),
    protocol("the end of the main thread alone", """system("exit", 0)""", waits=True),
    protocol(
        "deep recursion",
        """
        def down(n):
            return down(n + 1) + 1
        down(0)
        """,
    ),
    protocol(
        "recursion without a limit",
        """
        sys.setrecursionlimit(10 ** 9)
        def down(n):
            return [down(n + 1)]
        down(0)
        """,
    ),
    protocol(
        "recursion in C",
        """
        sys.setrecursionlimit(10 ** 9)
        value = []
        for _ in range(10 ** 6):
            value = [value]
        repr(value)
        """,
    ),
    protocol(
        "values that cannot be pickled", "(lambda: 1, sys.stdout, sys._getframe())", "_", "import __main__; __main__"
    ),
    protocol("an end in the middle of its output", "print('x' * 100, end='', flush=True)\nos._exit(1)"),
)
