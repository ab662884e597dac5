"""Runs one program on one test. The text of this file is the first cell of a session, which holds nothing else.

Loaded by `sandbox.py` as text, never by rlsys. The program shares the process and may do to it whatever it likes: what
is here knows the test's input only, and whoever reads the output compares it elsewhere.
"""

import atexit
import json
import os
import sys
import threading
import types
from typing import Any, TextIO

OUTPUT, NOTHING = 101, 102  # descriptors of the session: what it shows, and the null device
parts: list[str] = []


def run() -> None:
    """Run the job in `parts`: what is shown is the program's standard output, or its function's value as JSON."""
    job = json.loads("".join(parts))
    calls = "function" in job
    os.dup2(NOTHING, 2)
    if calls:
        os.dup2(NOTHING, 1)
    else:
        give_input(job["stdin"].encode("utf-8", "replace"))
    own = set_streams()
    # A program to be called is imported, so to speak: it must not begin to read its standard input.
    module = types.ModuleType("solution" if calls else "__main__")
    sys.modules[module.__name__] = module
    sys.argv = ["program.py"]
    code = compile(job["program"], "<program>", "exec", dont_inherit=True)
    if calls:
        exec(code, module.__dict__)
        function = find_function(module.__dict__, job["function"])
        show(json.dumps(function(*job["arguments"], **job["keywords"]), default=as_list))
        return
    try:
        exec(code, module.__dict__)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    end_as_a_program_does(own)


def give_input(data: bytes) -> None:
    """Make the bytes readable at descriptor 0, as a file, so that every way of reading works."""
    try:
        file = os.open("input", os.O_RDWR | os.O_CREAT)
    except OSError:  # the weakest tier has no files
        source, target = os.pipe()
        threading.Thread(target=write_and_close, args=(target, data), daemon=True).start()
    else:
        write(file, data)
        os.lseek(file, 0, os.SEEK_SET)
        os.unlink("input")
        source = file
    os.dup2(source, 0)
    os.close(source)


def write_and_close(file: int, data: bytes) -> None:
    """Fill a pipe."""
    write(file, data)
    os.close(file)


def write(file: int, data: bytes) -> None:
    """Write everything."""
    while data:
        data = data[os.write(file, data) :]


def set_streams() -> TextIO:
    """Buffered streams as a program of its own has them, the session's are flushed after each line; returns stdout."""
    options: Any = {"encoding": "utf-8", "errors": "replace", "closefd": False}
    own: TextIO = open(1, "w", **options)  # noqa: SIM115
    streams = {"stdin": open(0, **options), "stdout": own, "stderr": open(2, "w", **options)}  # noqa: SIM115
    for name, stream in streams.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return own


def find_function(names: dict[str, Any], name: str) -> Any:
    """A function by its name, or a method: `Class.method`, or one of the class `Solution`."""
    if name in names:
        return names[name]
    owner, _, method = name.rpartition(".")
    return getattr(names[owner or "Solution"](), method)


def as_list(value: Any) -> Any:
    """What JSON does not know: arrays and numbers of numpy."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} is no JSON value")
    return value.tolist()


def end_as_a_program_does(own: TextIO) -> None:
    """Wait for threads, call what is registered for the end, flush its own standard output (the session flushes what
    the program has put in its place)."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    own.flush()


def show(text: str) -> None:
    """Write to the session's output, past the program's streams."""
    write(OUTPUT, text.encode())
