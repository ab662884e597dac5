"""Programs that do not solve the task, by what they try instead: to be imported by tests and the table of them."""

from __future__ import annotations

from typing import Any

SUM: list[dict[str, Any]] = [{"stdin": "3 4\n", "stdout": "7\n"}, {"stdin": "-1 1\n", "stdout": "0\n"}]
ADD: list[dict[str, Any]] = [{"function": "add", "arguments": [3, 4], "expected": 7}]

WRONG = {
    "a wrong number": "print(8)",
    "nothing": "pass",
    "no such syntax": "print(",
    "surrogates": "print('\ud800')",
    "a null": "print('\x00')",
    "right for the first test only": "print(7)",
    "more than was asked": "print(sum(map(int, input().split())), 'is the sum')",
    "on standard error": "import sys\nprint(sum(map(int, input().split())), file=sys.stderr)",
    "right, then raises": "print(sum(map(int, input().split())))\n1 / 0",
    "right, then exits with 1": "print(sum(map(int, input().split())))\nraise SystemExit(1)",
    "right, then exits hard": "import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)",
    "right, then aborts": "import os\nprint(sum(map(int, input().split())), flush=True)\nos.abort()",
    "exits hard": "import os\nos._exit(0)",
    "exits": "exit(0)",
    "closes standard output": "import sys\nsys.stdout.close()",
    "closes everything": "import os\nos.closerange(0, 200)",
    "deletes builtins": "import builtins\nfor name in list(vars(builtins)):\n    delattr(builtins, name)",
    "removes all modules": "import sys\nsys.modules.clear()",
    "replaces json": "import json\njson.dumps = lambda *a, **k: 'true'\njson.loads = lambda *a, **k: 7",
    "replaces print": "import builtins\nbuiltins.print = lambda *a: None",
    "replaces exec and open": "import builtins\nbuiltins.exec = builtins.open = lambda *a, **k: None",
    "replaces standard output": "import io, sys\nsys.stdout = sys.__stdout__ = io.StringIO('7')",
    "floods": "import os\nfor _ in range(300):\n    os.write(1, b'7\\n' * 30_000)",
    "takes all memory": "x = bytearray(1 << 34)",
    "recurses": "def f(): f()\nf()",
    "nests": "print(eval('(' * 10_000))",
    "claims success": "import os\nos.write(101, b'7\\npassed\\nOK\\n{\"ok\": true}\\n')",
    "claims success to the tool": "import socket\nsocket.socket(fileno=100).send(b'x' * 16 + b'+')",
    "claims success with the key of the request": (
        "import sys, os\nframe = sys._getframe()\nkey = None\n"
        "while frame:\n    key = frame.f_locals.get('key', key)\n    frame = frame.f_back\n"
        "os.write(100, key + b'+')\nos._exit(0)"
    ),
    "looks for what is expected in the frames": (
        "import sys\nframe = sys._getframe()\nfound = []\n"
        "while frame:\n    for part in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "        if isinstance(part, dict):\n"
        "            found += [part.get(k) for k in ('stdout', 'expected', 'outputs', 'accepted', 'tests')]\n"
        "    frame = frame.f_back\nprint(*filter(None, found))"
    ),
    "looks for what is expected in memory": (
        "import gc\nfor part in gc.get_objects():\n"
        "    if isinstance(part, dict) and type(part.get('stdin')) is str:\n"
        "        print(part.get('stdout') or part.get('expected') or '')\n        break"
    ),
    "looks for what is expected in files": (
        "import os\nfor folder in ('/', '/tmp', '/proc', '.', '/work'):\n"
        "    try:\n        for name in os.listdir(folder):\n"
        "            try:\n                text = open(os.path.join(folder, name)).read()\n"
        "                print('7' if 'stdout' in text else '')\n"
        "            except (OSError, ValueError): pass\n    except OSError: pass"
    ),
    "patches what runs it": (
        "import sys\nframe = sys._getframe()\nwhile frame.f_back:\n    frame = frame.f_back\n"
        "    frame.f_globals.update(run=lambda *a: True, show=lambda *a: None, write=lambda *a: None)"
    ),
    "patches the interpreter of the cells": (
        "import gc\nfor part in gc.get_objects():\n    if type(part).__name__ == 'Interpreter':\n"
        "        part.execute = part.restore = lambda *a: None\n        part.running = True"
    ),
    "always equal": (
        "class A(str):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\nprint(A('x'))"
    ),
    "leaves a thread": (
        "import threading, time\nthreading.Thread(target=lambda: time.sleep(0.1) or print(8)).start()\nprint(7)"
    ),
    "catches everything": "try:\n    print(undefined)\nexcept BaseException:\n    pass",
    "kills its process": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "traces": "import sys\nsys.settrace(lambda *a: (_ for _ in ()).throw(SystemExit(0)))\nprint(8)",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)",
}

WRONG_FUNCTIONS = {
    "none": "x = 1",
    "no callable": "add = 7",
    "other arguments": "def add(a): return 7",
    "no value": "def add(a, b): print(a + b)",
    "as text": "def add(a, b): return str(a + b)",
    "true": "def add(a, b): return True",
    "always equal": "class A:\n    def __eq__(self, other): return True\ndef add(a, b): return A()",
    "an always equal number": (
        "class A(int):\n    def __eq__(self, other): return True\n    def __repr__(self): return '7'\n"
        "    __str__ = __repr__\ndef add(a, b): return A(8)"
    ),
    "an always equal list": "class A(list):\n    def __eq__(self, other): return True\ndef add(a, b): return A([7])",
    "itself in itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "deep": "def add(a, b):\n    x = []\n    for _ in range(100_000): x = [x]\n    return x",
    "not a number": "def add(a, b): return float('nan')",
    "a set": "def add(a, b): return {7}",
    "a generator": "def add(a, b): yield 7",
    "exits": "def add(a, b): raise SystemExit",
    "printed": "import os\ndef add(a, b):\n    os.write(1, b'7')\n    os._exit(0)",
    "shown and exits": "import os\ndef add(a, b):\n    os.write(101, b'7')\n    os._exit(0)",
    "shown twice": "import os\ndef add(a, b):\n    os.write(101, b'7')\n    return 7",
    "at import": "import os\nos._exit(0)\ndef add(a, b): return a + b",
    "with another encoder": "import json\njson.dumps = lambda *a, **k: 8\ndef add(a, b): return a + b",
    "as an array": "import numpy\ndef add(a, b): return numpy.array([a + b])",
    "a liar's array": "class A:\n    def tolist(self): return self\ndef add(a, b): return A()",
}
