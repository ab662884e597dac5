"""The Python tool: starts, calls, copies, memory, and what hostile neighbours cost.

    python -m benchmarks.tools

Starts: the same snippet (numpy and sympy, printing a result) from nothing to its result. Ours: a session of the running
tool, opened, called and closed. `bubblewrap`: `bwrap` with all namespaces, read-only libraries and a private folder,
around a fresh Python. `subprocess`: a fresh Python without any isolation. `jupyter`: a fresh kernel, another product:
it isolates nothing and brings a whole protocol; it is measured where `benchmarks/.venv-jupyter` exists.

Calls: `x += 1; x` in a live session, against a cell of a Jupyter kernel.

Checked: every side prints the same text; bubblewrap passes the tool's own canaries for network, files and signals (it
allows forks and programs, which the tool denies).

Not comparable: the tool's libraries are loaded once, when it starts; that second is not in a session's time.

`jupyter` needs, once: python -m venv benchmarks/.venv-jupyter && benchmarks/.venv-jupyter/bin/pip install
jupyter-client ipykernel numpy sympy
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks import common
from benchmarks.common import Sample, must, say
from rlsys import cluster
from rlsys.cluster import Actor
from rlsys.config import ClusterConfig, PoolConfig, PooledPlugIn
from rlsys.pool import ActorPool
from rlsys.remote_tool import RemoteTool
from rlsys.tools.python import GRACE_SECONDS, PythonTool
from rlsys.tools.python_host import probe

SNIPPET = "import numpy, sympy\nx = sympy.Symbol('x')\nprint(sympy.expand((x + 1)**3), numpy.arange(4).sum())"
USABLE = "import numpy, sympy\nint(sympy.Integer(40) + numpy.int64(2))"
RESULT = "x**3 + 3*x**2 + 3*x + 1 6"
JUPYTER = Path(__file__).parent / ".venv-jupyter/bin/python"
JUPYTER_SIDE = """
import json, sys, time
from jupyter_client.manager import start_new_kernel
starts, cells, number, snippet = [], [], int(sys.argv[1]), sys.argv[2]
def run(client, code):
    shown = []
    client.execute_interactive(code, timeout=60, output_hook=lambda m: shown.append(m["content"]))
    return shown
for _ in range(number):
    begin = time.perf_counter()
    manager, client = start_new_kernel()
    shown = run(client, snippet)
    starts.append(time.perf_counter() - begin)
    text = "".join(content.get("text", "") for content in shown).strip()
    run(client, "x = 0")
    for _ in range(30):
        begin = time.perf_counter()
        run(client, "x += 1; x")
        cells.append(time.perf_counter() - begin)
    client.stop_channels()
    manager.shutdown_kernel(now=True)
print(json.dumps({"starts": starts, "cells": cells, "text": text}))
"""
HOSTILE = (
    "while True: pass",
    "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
    "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "import os\nwhile True: print('x' * 100_000)",
    "import os\nfor _ in range(10**9):\n    try: os.fork()\n    except OSError: pass",
    "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "for i in range(10**9): open(str(i), 'w').write('x' * 10**6)",
    "import os\nos._exit(1)",
)


async def ours(tool: PythonTool, number: int, code: str = SNIPPET, shown: str = RESULT) -> Sample:
    """Fresh sessions one after another, each with one call: median seconds of one."""
    seconds = []
    for index in range(number):
        begin = time.perf_counter()
        session = await tool.open(f"start-{index}")
        result = await session.call({"code": code})
        seconds.append(time.perf_counter() - begin)
        await session.close()
        must(result.text == shown, f"the tool printed {result.text!r}")
    return {"seconds": median(seconds), "p99": quantiles(seconds, n=100)[98]}


async def fresh(command: list[str], number: int) -> Sample:
    """Fresh processes one after another: median seconds of one."""
    seconds = []
    for _ in range(number):
        begin = time.perf_counter()
        done = subprocess.run([*command, SNIPPET], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
        must(done.stdout.strip() == RESULT, f"{command[0]} printed {done.stdout!r}")
    return {"seconds": median(seconds)}


def bubblewrap() -> list[str]:
    """A command line that runs Python code with about the tool's namespaces; its isolation is tried out."""
    program = shutil.which("bwrap")
    must(program is not None, "bubblewrap is not installed (apt-get install bubblewrap)")
    folders = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
    folders |= {"/lib", "/lib64", "/usr/lib", "/etc/ld.so.cache"}
    command = [str(program), "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    for folder in sorted(folder for folder in folders if Path(folder).exists()):
        command += ["--ro-bind", folder, folder]
    command += ["--dev", "/dev", "--tmpfs", "/policy", "--chdir", "/policy", sys.executable, "-s", "-P", "-c"]
    with probe() as (code, succeeded):
        without_programs = "\n".join(
            line for line in code.splitlines() if '"a fork"' not in line and "execv" not in line
        )
        done = subprocess.run([*command, without_programs], capture_output=True, text=True, check=True)
        must(not succeeded(done.stdout), f"bubblewrap is not isolated: {done.stdout}")
    return command


async def calls(tool: Any, number: int) -> Sample:
    """Calls in one live session."""
    session = await tool.open("calls")
    await session.call({"code": "x = 0"})
    seconds = []
    for _ in range(number):
        begin = time.perf_counter()
        await session.call({"code": "x += 1; x"})
        seconds.append(time.perf_counter() - begin)
    must((await session.call({"code": "x"})).text == str(number), "calls were lost")
    await session.close()
    return {"seconds": median(seconds), "p99": quantiles(seconds, n=100)[98]}


async def throughput(tool: PythonTool, number: int, at_once: int = 8) -> Sample:
    """Sessions per second, several at once."""
    waiting = iter(range(number))

    async def work() -> None:
        for index in waiting:
            session = await tool.open(f"many-{index}")
            must((await session.call({"code": "6 * 7"})).text == "42", "a session did not answer")
            await session.close()

    begin = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "sessions_per_second": number / seconds}


async def copies(tool: PythonTool, number: int) -> Sample:
    """Copies of a live session with some data in it."""
    session = await tool.open("copied")
    await session.call({"code": "data = list(range(100_000)); open('file', 'w').write('x' * 10_000)"})
    seconds = []
    for _ in range(number):
        begin = time.perf_counter()
        copy = await session.fork()
        seconds.append(time.perf_counter() - begin)
        must((await copy.call({"code": "len(data)"})).text == "100000", "a copy lacks its data")
        await copy.close()
    await session.close()
    return {"seconds": median(seconds)}


def available_bytes() -> int:
    """Memory that the machine could still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise OSError("no MemAvailable in /proc/meminfo")


async def crowd(number: int) -> dict[str, Any]:
    """So many sessions alive at once: what they take from the machine's available memory."""
    tool = PythonTool(max_sessions=number, memory_mb=512)
    await tool.start()
    before = available_bytes()
    sessions = [await tool.open(f"crowd-{index}") for index in range(number)]
    for index, session in enumerate(sessions):
        must((await session.call({"code": f"x = {index}\nx"})).text == str(index), "a session did not answer")
    taken = before - available_bytes()
    must((await sessions[0].call({"code": "x"})).text == "0", "the first session did not last")
    await asyncio.gather(*(session.close() for session in sessions))
    await tool.close()
    return {"sessions": number, "gib": taken / 2**30}


async def neighbours(tool: PythonTool, *, seconds: float, num_good: int, num_hostile: int) -> Sample:
    """Good sessions of three short calls, in turns beside hostile ones: how many good ones end in a second."""
    end = time.perf_counter() + seconds
    good, late = 0, [-1.0]

    async def behave() -> None:
        nonlocal good
        while time.perf_counter() < end:
            session = await tool.open("good")
            for code in ("import sympy\nn = 360360", "sympy.factorint(n)", "sum(_.values())"):
                result = await session.call({"code": code})
            must(result.text == "9", f"a good session got {result.text!r}")
            await session.close()
            good += 1

    async def attack(first: int) -> None:
        number = first
        while time.perf_counter() < end:
            session = await tool.open("hostile")
            await session.call({"code": "1"})  # its start is not a part of its time
            begin = time.perf_counter()
            await session.call({"code": HOSTILE[number % len(HOSTILE)]})
            late.append(time.perf_counter() - begin - tool.timeout_seconds - GRACE_SECONDS)
            await session.close()
            number += 1

    begin = time.perf_counter()
    await asyncio.gather(*(behave() for _ in range(num_good)), *(attack(index) for index in range(num_hostile)))
    return {"seconds": time.perf_counter() - begin, "good": good, "rate": good / seconds, "latest_kill": max(late)}


async def remote(number: int) -> dict[str, Any]:
    """The same calls through a Ray actor that hosts the tool: seconds of one, and calls per second of 16 sessions."""
    plug_in = PooledPlugIn(use="rlsys.tools.python:PythonTool", actors=PoolConfig(count=1, cpus=0.5))
    cluster.connect(ClusterConfig())
    try:
        pool = ActorPool(plug_in, place="tools.0")
        await pool.start()
        tools = {"inline": PythonTool(), "remote": RemoteTool(PythonTool(), pool_config(plug_in))}

        async def tell(actors: Sequence[Actor]) -> None:
            tools["remote"].use_actors(actors)

        await pool.serve(tell)
        found: dict[str, Any] = {}
        for name, tool in tools.items():
            await calls(tool, 50)  # warm
            one = await calls(tool, number)
            begin = time.perf_counter()
            await asyncio.gather(*(calls(tool, number // 4) for _ in range(16)))
            rate = 16 * (number // 4) / (time.perf_counter() - begin)
            found[name] = {"seconds": one["seconds"], "calls_per_second": rate}
        await tools["inline"].close()
        await pool.close()
    finally:
        cluster.disconnect()
    return found


def pool_config(plug_in: PooledPlugIn) -> PoolConfig:
    """The pool's settings."""
    must(plug_in.actors is not None, "no pool")
    return plug_in.actors or PoolConfig()


def jupyter(number: int) -> dict[str, Any] | None:
    """Starts and cells of Jupyter kernels; None where they are not installed."""
    if not JUPYTER.exists():
        say("jupyter: not measured, there is no benchmarks/.venv-jupyter (see --help)")
        return None
    command = [str(JUPYTER), "-c", JUPYTER_SIDE, str(number), SNIPPET]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    must(found["text"] == RESULT, f"the kernel printed {found['text']!r}")
    return found


async def main() -> None:
    """Measure everything, print, write."""
    parser = common.arguments(__doc__)
    parser.add_argument("--starts", type=int, default=20, help="fresh interpreters of each side in a round")
    parser.add_argument("--crowd", type=int, default=1000, help="sessions alive at once")
    options = parser.parse_args()
    common.set_threads()
    command = bubblewrap()
    tool = PythonTool()
    await tool.start()
    must(tool.tier == "T2", f"this host has only tier {tool.tier}")
    await ours(tool, 5)  # warm
    sides = {
        "usable": lambda: ours(tool, options.starts, USABLE, "42"),
        "ours": lambda: ours(tool, options.starts),
        "bubblewrap": lambda: fresh(command, options.starts),
        "subprocess": lambda: fresh([sys.executable, "-s", "-P", "-c"], options.starts),
        "calls": lambda: calls(tool, 500),
        "throughput": lambda: throughput(tool, 400),
    }
    found = await common.race(sides, rounds=options.rounds, settle_seconds=options.settle)
    forkable = PythonTool(forkable=True)
    await forkable.start()
    found["copies"] = [await copies(forkable, 30) for _ in range(options.rounds)]
    await forkable.close()
    starts = {name: common.ratios(found[name], found["ours"]) for name in ("bubblewrap", "subprocess")}
    say(f"a new session with numpy and sympy usable: {1e3 * common.median(found['usable']):.2f} ms (aim: 6)")
    say(f"a new session to the snippet's result: {1e3 * common.median(found['ours']):.2f} ms")
    for name, ratio in starts.items():
        common.show(f"the same with {name}, over ours", ratio, "25x")
    say(f"a call in a live session: {1e3 * common.median(found['calls']):.3f} ms (aim: 0.5)")
    say(f"new sessions: {common.median(found['throughput'], 'sessions_per_second'):.0f}/s (aim: 150)")
    say(f"a copy of a live session: {1e3 * common.median(found['copies']):.2f} ms (aim: 10)")
    kernels = jupyter(max(3, options.rounds))
    if kernels is not None:
        start, cell = median(kernels["starts"]), median(kernels["cells"])
        say(
            f"a Jupyter kernel, over ours: start {start / common.median(found['ours']):.0f}x (aim: 50x), ",
        )
        say(f"  a cell {cell / common.median(found['calls']):.1f}x (aim: 8x); another product, without isolation")
    lively = PythonTool(timeout_seconds=0.5, memory_mb=512)
    await lively.start()
    await neighbours(lively, seconds=1.0, num_good=18, num_hostile=0)  # warm
    mixed = await common.race(
        {
            "clean": lambda: neighbours(lively, seconds=8.0, num_good=18, num_hostile=0),
            "hostile": lambda: neighbours(lively, seconds=8.0, num_good=18, num_hostile=2),
        },
        rounds=max(2, options.rounds // 2),
        settle_seconds=options.settle,
    )
    await lively.close()
    kept = common.ratios(mixed["hostile"], mixed["clean"], "rate")
    common.show("good sessions beside 10 % hostile ones, over good ones alone", kept, "0.8x")
    latest = max(sample["latest_kill"] for sample in mixed["hostile"])
    say(f"the latest kill: {1e3 * latest:.0f} ms behind its limit (aim: 50)")
    await tool.close()
    crowded = await crowd(options.crowd)
    say(f"{crowded['sessions']} sessions alive: {crowded['gib']:.2f} GiB (aim: 4)")
    ray = await remote(400)
    over = 1e3 * (ray["remote"]["seconds"] - ray["inline"]["seconds"])
    rates = " and ".join(f"{ray[name]['calls_per_second']:.0f}/s {name}" for name in ("inline", "remote"))
    say(f"a call through a Ray tool actor takes {over:.2f} ms more; 16 sessions make {rates}")
    common.write(
        "tools",
        options,
        {
            "samples": {**found, **mixed},
            "ratios": {**starts, "kept_beside_hostile": kept},
            "jupyter": kernels,
            "latest_kill_seconds": latest,
            "crowd": crowded,
            "ray": ray,
        },
    )


if __name__ == "__main__":
    asyncio.run(main())
