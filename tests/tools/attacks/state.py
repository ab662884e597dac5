"""Attacks that leave something in the interpreter for the next call: threads, handlers, hooks, poisoned modules."""

from functools import partial

from tests.tools.attacks.attack import ANYTHING, attack

state = partial(attack, "state", ran=ANYTHING)

STATE = (
    state(
        "a thread that prints",
        """
        def talk():
            while True:
                print("from the thread")
                time.sleep(0.001)
        _thread.start_new_thread(talk, ())
        """,
        "1 + 1",
        imports="_thread time",
    ),
    state(
        "a thread that answers in the next call's place",
        """
        def talk():
            while True:
                os.write(1, b"43\\n")
        _thread.start_new_thread(talk, ())
        """,
        "1 + 1",
        imports="_thread",
    ),
    state(
        "a thread that burns the processor",
        """
        def burn():
            while True:
                pass
        for _ in range(4):
            _thread.start_new_thread(burn, ())
        """,
        imports="_thread",
    ),
    state(
        "a thread that raises in the main thread",
        """
        main = _thread.get_ident()
        def throw():
            while True:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(SystemExit))
                time.sleep(0.0001)
        _thread.start_new_thread(throw, ())
        """,
        "import time\ntime.sleep(0.05)\nraise ValueError('true end')",
        insider=True,
        imports="_thread time",
    ),
    state(
        "a thread that interrupts",
        """
        def interrupt():
            while True:
                _thread.interrupt_main()
                time.sleep(0.0001)
        _thread.start_new_thread(interrupt, ())
        """,
        imports="_thread time",
    ),
    state(
        "a thread that takes the lock for long",
        """
        sys.setswitchinterval(1000)
        def hold():
            while True:
                sum(range(10 ** 6))
        _thread.start_new_thread(hold, ())
        """,
        imports="_thread",
    ),
    state(
        "a thread that closes what the next call opens",
        """
        def close():
            while True:
                os.closerange(3, 64)
                time.sleep(0.001)
        time.sleep(0.01)
        _thread.start_new_thread(lambda: (time.sleep(0.02), close()), ())
        """,
        "time.sleep(0.1)",
        imports="_thread time",
    ),
    state(
        "a thread that replaces the standard streams",
        """
        def swap():
            while True:
                os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
                sys.stdout = None
        _thread.start_new_thread(swap, ())
        """,
        "print('hello')",
        imports="_thread",
    ),
    state(
        "an exit handler that never returns",
        """
        def forever():
            while True:
                pass
        atexit.register(forever)
        threading.Thread(target=forever).start()
        """,
        imports="atexit threading",
    ),
    state(
        "a time-out that ignores the interrupt",
        "signal.signal(2, signal.SIG_IGN)",
        "while True:\n    pass",
        imports="signal",
        waits=True,
    ),
    state(
        "a time-out with signals blocked",
        """
        signals = (ctypes.c_ubyte * 128)(*[255] * 128)
        libc.pthread_sigmask(0, signals, None)
        """,
        "while True:\n    pass",
        waits=True,
    ),
    state(
        "an alarm for the next call",
        """
        signal.setitimer(signal.ITIMER_REAL, 0.03, 0.001)
        """,
        "time.sleep(0.1)",
        imports="signal time",
    ),
    state(
        "an alarm that returns",
        """
        def forge(*_):
            raise SystemExit(0)
        signal.signal(signal.SIGALRM, forge)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        """,
        "import time\ntime.sleep(0.05)\nraise ValueError('true end')",
        insider=True,
        imports="signal",
    ),
    state(
        "a trace function",
        """
        def trace(frame, event, argument):
            if event == "return" and "ok" in frame.f_locals:
                raise SystemExit(0)
            if event == "exception":
                raise SystemExit(0)
            return trace
        sys.settrace(trace)
        sys.setprofile(trace)
        frame = sys._getframe()
        while frame is not None:
            frame.f_trace = trace
            frame = frame.f_back
        """,
    ),
    state(
        "an import hook",
        """
        class Hook:
            def find_spec(self, name, path=None, target=None):
                raise SystemExit(0)
        sys.meta_path.insert(0, Hook())
        sys.path_hooks.insert(0, lambda path: Hook())
        sys.path_importer_cache.clear()
        for name in ("traceback", "linecache", "ast", "_ast", "io", "json", "codeop"):
            sys.modules.pop(name, None)
        """,
    ),
    state(
        "poisoned modules",
        """
        class Poison:
            def __getattr__(self, name):
                return lambda *arguments, **options: Poison()
            def __iter__(self):
                return iter(())
            def __bool__(self):
                return True
        for name in list(sys.modules):
            if name not in ("sys", "builtins", "__main__", "_thread"):
                sys.modules[name] = Poison()
        """,
    ),
    state(
        "poisoned modules in place",
        """
        for name in ("os", "io", "_io", "traceback", "linecache", "ast", "_ast", "json", "struct", "select",
                     "time", "signal", "_signal"):
            module = sys.modules.get(name)
            for attribute in list(vars(module) if module else ()):
                if not attribute.startswith("__"):
                    try:
                        setattr(module, attribute, lambda *a, **k: 1)
                    except Exception:
                        pass
        """,
    ),
    state(
        "replaced builtins",
        """
        import builtins
        for name in ("print", "repr", "compile", "exec", "eval", "len", "open", "isinstance", "str", "bytes",
                     "type", "bool", "BaseException", "Exception", "KeyboardInterrupt", "SystemExit", "OSError",
                     "__import__", "__build_class__", "memoryview", "bytearray", "int", "getattr", "enumerate"):
            setattr(builtins, name, lambda *a, **k: 43)
        """,
    ),
    state(
        "a replaced repr", "import builtins\nbuiltins.repr = lambda value: '43'\nsys.displayhook = lambda value: None"
    ),
    state(
        "replaced streams",
        """
        class Stream:
            def __getattr__(self, name):
                raise SystemExit(0)
            def write(self, text):
                return len(text)
        sys.stdout = sys.stderr = sys.stdin = sys.__stdout__ = sys.__stderr__ = Stream()
        """,
    ),
    state(
        "hooks for errors",
        """
        sys.excepthook = sys.unraisablehook = lambda *_: os._exit(0)
        import builtins
        class Silent(type):
            def __instancecheck__(cls, value):
                return True
        """,
    ),
    state(
        "collector callbacks",
        """
        def callback(*_):
            raise SystemExit(0)
        gc.callbacks.append(callback)
        gc.set_threshold(1)
        """,
        imports="gc",
    ),
    state("a recursion limit of nothing", "sys.setrecursionlimit(30)"),
    state(
        "limits of nothing",
        """
        limits = {"NOFILE": 0, "FSIZE": 0, "STACK": 0, "AS": 1 << 20, "CPU": 1}
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        """,
        imports="resource",
    ),
    state(
        "an encoder that lies",
        """
        import codecs
        codecs.register_error("backslashreplace", lambda error: ("", error.end))
        codecs.register_error("replace", lambda error: 1 / 0)
        codecs.register_error("strict", lambda error: ("", error.end))
        codecs.register(lambda name: 1 / 0)
        """,
        "'\\ud800'",
    ),
    state("a directory that is gone", "os.mkdir('gone')\nos.chdir('gone')\nos.rmdir('../gone')", "os.getcwd()"),
    state(
        "functions of the interpreter replaced through frames",
        """
        changed = 0
        frame = sys._getframe().f_back
        while frame is not None:
            for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
                kind = value if isinstance(value, type) else type(value)
                if getattr(kind, "__module__", "builtins") in ("builtins", "sys", "types"):
                    continue
                for name, member in list(vars(kind).items()):
                    if callable(member) and not name.startswith("__"):
                        try:
                            setattr(kind, name, lambda *a, **k: True)
                            changed += 1
                        except Exception:
                            pass
            frame = frame.f_back
        print(changed)
        """,
    ),
    state(
        "code of the interpreter replaced through frames",
        """
        def lie(*arguments, **options):
            return True
        frame = sys._getframe().f_back
        while frame is not None:
            for value in gc.get_referrers(frame.f_code):
                if type(value) is type(lie):
                    try:
                        value.__code__ = lie.__code__
                    except Exception:
                        pass
            frame = frame.f_back
        """,
        imports="gc",
    ),
    state(
        "every function of the interpreter replaced through the collector",
        """
        here = sys._getframe().f_globals
        def lie(*arguments, **options):
            return True
        import builtins
        runner = sys._getframe()
        while runner.f_back is not None:
            runner = runner.f_back
        for value in gc.get_objects():
            if type(value) is type(lie) and value.__globals__ is runner.f_globals and value is not lie:
                try:
                    value.__code__ = lie.__code__
                except Exception:
                    pass
        """,
        imports="gc",
    ),
    state(
        "variables of the interpreter's frames",
        """
        frame = sys._getframe().f_back
        while frame is not None:
            for name in list(frame.f_locals):
                if name in ("ok", "running", "error", "failed", "status"):
                    frame.f_locals[name] = True
                    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
            frame = frame.f_back
        raise ValueError("true end")
        """,
        fails=True,
    ),
    state(
        "variables of one's own that look like the interpreter's",
        """
        ok = running = verdict = True
        __builtins__ = {}
        __name__ = "other"
        _ = 43
        """,
        "__builtins__ = 43",
    ),
    state(
        "a cell that never compiles and a cell that never ends its class",
        """
        class Meta(type):
            def __new__(cls, *arguments):
                raise SystemExit(0)
        class A(metaclass=Meta):
            pass
        """,
        "import this_does_not_exist",
        "from __future__ import annotations\nfrom __future__ import braces",
        ran="SyntaxError",
    ),
)
