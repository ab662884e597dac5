"""Attacks that want too much output or too much time."""

from functools import partial

from tests.tools.attacks.attack import ANYTHING, LOST, attack

output = partial(attack, "output", ran=ANYTHING)
endless = partial(attack, "time", ran=LOST, waits=True)

OUTPUT = (
    output(
        "a flood on standard output", """block = b"x" * (1 << 16)\nfor _ in range(1 << 15):\n    os.write(1, block)"""
    ),
    output(
        "a flood on standard error",
        """block = b"line\\n" * (1 << 13)\nfor _ in range(1 << 15):\n    os.write(2, block)""",
    ),
    output(
        "a flood from many threads",
        """
        def flood():
            while True:
                os.write(1, b"y" * (1 << 16))
        for _ in range(8):
            _thread.start_new_thread(flood, ())
        """,
        "1 + 1",
        imports="_thread",
    ),
    output("one line without an end", """for _ in range(300):\n    print("x" * (1 << 20), end="")"""),
    output("a huge repr", """["x" * 1000] * 200_000"""),
    output(
        "a repr that never ends",
        """
        class Endless:
            def __repr__(self):
                while True:
                    pass
        Endless()
        """,
        ran=LOST,
        waits=True,
    ),
    output(
        "a repr that is no text",
        """
        class Wrong:
            def __repr__(self):
                return 7
        Wrong()
        """,
        """
        class Text(str):
            def __str__(self):
                raise SystemError("no")
            def encode(self, *_):
                raise SystemError("no")
        class Wrong:
            def __repr__(self):
                return Text("SUCCEEDED" * 0 + "fine")
        Wrong()
        """,
        ran="TypeError.*non-string",
    ),
    output(
        "bytes that are no text", """os.write(1, bytes(range(256)) * 4)\nos.write(2, b"\\xff\\xfe\\x00\\x00" * 100)"""
    ),
    output("lone surrogates", """print("\\ud800 \\udfff")\n"\\udc80" * 10""", "raise ValueError('\\ud800')"),
    output("half a character at every cut", """os.write(1, ("ü" * 10000 + "\\U0001d6fc" * 10000).encode()[1:-1])"""),
    output(
        "terminal escapes",
        """
        print("\\x1b[2J\\x1b]0;owned\\x07\\x1b]52;c;b3duZWQ=\\x07\\x1b[31mred\\x1b[0m\\x08\\x08\\r")
        print("\\x00" * 10, "\\x9b31m")
        """,
    ),
    output(
        "errors that cannot be shown",
        """
        class Evil(Exception):
            def __str__(self):
                raise self
            __repr__ = __str__
        raise Evil("x" * 1000000)
        """,
        """
        def make(depth):
            try:
                raise ValueError("x" * 10000)
            except ValueError as error:
                if depth:
                    make(depth - 1)
                raise KeyError("y" * 10000) from error
        make(60)
        """,
        """raise ExceptionGroup("many", [ValueError("z" * 1000) for _ in range(5000)])""",
        "raise KeyboardInterrupt",
        "raise GeneratorExit",
        "raise BaseException",
    ),
    output(
        "a source that is no text",
        "print('\udc80')",
        "x = '\0'\n",
        "\0",
        "def f(:\n" * 1000,
        "#" * 190_000,
        ran="SyntaxError",
    ),
)

TIME = (
    endless("a plain loop", "while True:\n    pass"),
    endless(
        "a loop that catches the interrupt",
        """
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
        """,
    ),
    endless(
        "a loop that ignores the interrupt", "signal.signal(2, signal.SIG_IGN)\nwhile True:\n    pass", imports="signal"
    ),
    endless(
        "a handler that never returns",
        """
        def forever(*_):
            while True:
                pass
        signal.signal(2, forever)
        while True:
            pass
        """,
        imports="signal",
    ),
    endless("a power", "3 ** (10 ** 9)"),
    endless("a loop in C", "sum(range(10 ** 13))"),
    endless("a regular expression", """re.match(r"(x+x+)+y", "x" * 200)""", imports="re"),
    endless("a long sleep", "time.sleep(1000)", imports="time"),
    endless(
        "a lock that nobody opens", "lock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()", imports="_thread"
    ),
    endless("a wait for a descriptor", "reader, writer = os.pipe()\nos.read(reader, 1)"),
    endless(
        "signals blocked by a C function",
        """
        signals = (ctypes.c_ubyte * 128)(*[255] * 128)
        print(libc.pthread_sigmask(0, signals, None))
        while True:
            pass
        """,
    ),
    endless(
        "signals blocked and a sleep in C",
        """
        signals = (ctypes.c_ubyte * 128)(*[255] * 128)
        libc.pthread_sigmask(0, signals, None)
        libc.sleep(1000)
        """,
    ),
    endless("a wait for signals", "signal.sigwait({10, 2})\nsignal.sigwait({10, 2})", imports="signal"),
    endless(
        "an end that never ends",
        """
        class Undead:
            def __del__(self):
                while True:
                    pass
        Undead() and None
        """,
    ),
    endless(
        "a trace function that never returns",
        """
        def trace(*_):
            while True:
                pass
        sys.settrace(trace)
        (lambda: 1)()
        """,
    ),
    endless(
        "a comparison that never ends",
        """
        class Never:
            def __eq__(self, other):
                while True:
                    pass
            __hash__ = object.__hash__
        [Never()].index(1)
        """,
    ),
    endless("a wait for a process", """attempt("wait", lambda: os.waitpid(-1, 0))\nwhile True:\n    pass"""),
    endless(
        "a sort with the lock held",
        """
        ctypes.pythonapi.usleep.argtypes = [ctypes.c_uint]
        while True:  # PyDLL keeps the interpreter's lock, so no handler of Python's runs
            ctypes.pythonapi.usleep(900000)
        """,
    ),
    endless("an endless generator to a list", """for _ in iter(int, 1):\n    pass"""),
)
