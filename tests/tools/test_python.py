"""The Python tool: a notebook for the policy, and a cage for what it may write."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlsys.errors import ToolError
from rlsys.interfaces import ToolResult
from rlsys.tools.python import PythonTool

_tools: dict[tuple[tuple[str, Any], ...], PythonTool] = {}
_runner = asyncio.Runner()


@pytest.fixture(scope="module", autouse=True)
def _end_tools() -> Iterator[None]:
    """End what the tests of this module shared."""
    yield
    for tool in _tools.values():
        _runner.run(tool.close())
    _runner.close()


def tool_with(**options: Any) -> PythonTool:
    """A tool that the tests of this module share; for use in `_runner` only."""
    return _tools.setdefault(tuple(options.items()), PythonTool(**({"timeout_seconds": 10.0} | options)))


def run(*cells: str, **options: Any) -> list[ToolResult]:
    """The results of some cells in one session, which is closed afterwards."""

    async def session() -> list[ToolResult]:
        opened = await tool_with(**options).open("rollout")
        try:
            return [await opened.call({"code": cell}) for cell in cells]
        finally:
            await opened.close()

    return _runner.run(session())


def processes_of(marker: str) -> list[int]:
    """Ids of living processes whose command line holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if marker in (entry / "cmdline").read_text() and state != "Z":
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def wait_until(condition: Any, seconds: float = 15.0) -> bool:
    """Whether `condition()` became true within a generous time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def texts(results: Iterable[ToolResult]) -> list[str]:
    return [result.text for result in results]


def test_variables_live_from_call_to_call_and_a_last_expression_is_shown() -> None:
    results = run("x = 20", "print('hi')\nx + 1", "_ * 2", "x;", "'ü'", "None")
    assert texts(results) == ["", "hi\n21", "42", "20", "'ü'", ""]
    assert all(result.ok and result.seconds > 0 for result in results)


def test_a_value_is_shown_whatever_became_of_the_standard_stream_meanwhile() -> None:
    [result] = run("import os\nprint(1)\nos.dup2(os.open('/dev/null', os.O_WRONLY), 1)\nprint(2)\n6 * 7")
    assert (result.ok, result.text) == (True, "1\n42")


def test_definitions_classes_and_modules_behave_as_in_a_script() -> None:
    cell = "import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: int\npickle.loads(pickle.dumps(A(3)))"
    assert texts(run(cell, "__name__")) == ["A(x=3)", "'__main__'"]


def test_a_session_starts_no_process_before_its_first_call() -> None:
    async def main() -> None:
        session = await PythonTool().open("rollout")
        assert session._clone is None
        await session.close()
        await session.close()
        with pytest.raises(RuntimeError, match="closed"):
            await session.call({"code": "1"})

    asyncio.run(main())


@pytest.mark.parametrize("arguments", [{}, {"code": 3}, {"code": None}, {"source": "1"}, [], None, "1"])
def test_wrong_arguments_are_answered_with_text(arguments: Any) -> None:
    async def main() -> ToolResult:
        return await (await PythonTool().open("rollout")).call(arguments)

    result = asyncio.run(main())
    assert not result.ok
    assert '{"code"' in result.text


def test_errors_show_the_cells_own_frames_only() -> None:
    syntax, runtime, library, chained = run(
        "def f(:",
        "def f():\n    return 1 / 0\nf()",
        "import json\njson.loads('{')",
        "try:\n    f()\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e",
    )
    assert "SyntaxError" in syntax.text
    assert '<cell 1>", line 1' in syntax.text
    assert "ZeroDivisionError" in runtime.text
    assert "return 1 / 0" in runtime.text
    assert '<cell 2>", line 2' in runtime.text
    assert "JSONDecodeError" in library.text
    assert "decoder.py" not in library.text
    assert "direct cause" in chained.text
    assert "KeyError: 'k'" in chained.text
    assert not any(result.ok or "python_c" in result.text for result in (syntax, runtime, library, chained))


def test_errors_that_cannot_be_shown_do_not_break_the_session() -> None:
    hostile = "class E(Exception):\n    def __str__(self): raise ValueError\n    __repr__ = __str__\nraise E"
    value = "class R:\n    def __repr__(self): raise RuntimeError('no repr')\nR()"
    results = run(hostile, value, "raise BaseException", "x\0y", "7")
    assert [result.ok for result in results] == [False, False, False, False, True]
    assert "no repr" in results[1].text
    assert results[-1].text == "7"


def test_exit_keeps_the_variables_and_a_dead_interpreter_says_that_they_are_lost() -> None:
    results = run("x = 1", "import sys; sys.exit(3)", "exit()", "x", "import os; os._exit(7)", "x", "2")
    assert "SystemExit: 3" in results[1].text
    assert not results[1].ok
    assert results[2].ok
    assert results[3].text == "1"
    assert "exit status 7" in results[4].text
    assert "variables are lost" in results[4].text
    assert not results[4].ok
    assert "fresh interpreter" in results[5].text
    assert "NameError" in results[5].text
    assert results[6].text == "2"


def test_reading_input_fails_instead_of_waiting() -> None:
    assert "EOFError" in run("input()")[0].text


def test_output_is_cut_in_the_middle_and_the_number_of_cut_characters_is_told() -> None:
    result = run("print('a' * 700 + 'é' * 700, end='')", max_output_characters=1000)[0]
    assert result.ok
    assert result.text == "a" * 500 + "\n[... 400 characters cut ...]\n" + "é" * 500


def test_hundreds_of_megabytes_of_output_fill_no_memory() -> None:
    code = "part = 'ab' * 500_000\nfor _ in range(300): print(part, end='')\nprint('the end')"
    result = run(code, timeout_seconds=60.0, max_output_characters=500)[0]
    assert result.ok
    assert result.text.endswith("the end")
    assert len(result.text) < 600
    assert f"[... {300 * 1_000_000 + 8 - 500} characters cut ...]" in result.text


def test_a_huge_repr_is_cut() -> None:
    result = run("list(range(10**6))")[0]
    assert result.ok
    assert result.text.startswith("[0, 1,")
    assert result.text.endswith("999999]")
    assert len(result.text) < 2100


def test_output_that_is_not_text_is_replaced() -> None:
    result = run(
        "import os, sys\nsys.stdout.buffer.write(b'\\xff\\xfe ok')\nprint('\\ud800')\nos.write(1, b'\\x80') and None"
    )[0]
    assert result.ok
    assert "\ufffd\ufffd ok" in result.text
    assert "\\ud800" in result.text


def test_output_of_stdout_and_stderr_is_shown_in_order() -> None:
    code = "import os, sys\nprint(1)\nprint(2, file=sys.stderr)\nos.write(1, b'3\\n') and None\nprint(4)"
    assert run(code)[0].text.split() == ["1", "2", "3", "4"]


def test_an_endless_loop_is_interrupted_and_keeps_the_variables() -> None:
    loop, after = run("x = 5\nprint('before')\nwhile True: pass", "x", timeout_seconds=0.5)
    assert not loop.ok
    assert "before" in loop.text
    assert "interrupted after 0.5 s; variables are kept" in loop.text
    assert after.ok
    assert after.text == "5"


def test_a_loop_that_catches_the_interrupt_is_killed_and_the_next_call_starts_anew() -> None:
    stubborn = "import time\nx = 1\nwhile True:\n    try: time.sleep(9)\n    except BaseException: print('caught')"
    ignoring = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    results = run(stubborn, "'x' in globals()", ignoring, "3", timeout_seconds=0.3)
    assert "caught" in results[0].text
    assert "variables are lost" in results[0].text
    assert not results[0].ok
    assert results[1].ok
    assert "fresh interpreter" in results[1].text
    assert results[1].text.endswith("False")
    assert "variables are lost" in results[2].text
    assert results[3].text.endswith("\n3")


def test_programs_and_forks_are_denied_with_an_error() -> None:
    results = run("import os, subprocess\nos.fork()", "subprocess.run(['ls'])", "os.execv('/bin/ls', ['ls'])", "6 * 7")
    assert ["PermissionError" in result.text for result in results] == [True, True, True, False]
    assert results[3].text == "42"


def test_memory_is_bounded() -> None:
    results = run("b = bytearray(4 * 2**30)", "c = [0] * 10**9", "'alive'")
    assert ["MemoryError" in result.text for result in results] == [True, True, False]
    assert results[2].text == "'alive'"


def test_deep_recursion_ends_in_an_error_or_a_dead_interpreter() -> None:
    deep = "def f(n): return f(n + 1)\nf(0)"
    crash = "import ctypes\nctypes.string_at(0)"
    results = run(deep, "(" * 5000, f"import sys\nsys.setrecursionlimit(10**9)\n{deep}", crash, "8", memory_mb=256)
    assert "RecursionError" in results[0].text
    assert "SyntaxError: too many nested parentheses" in results[1].text
    assert not results[2].ok
    assert "signal 11" in results[3].text
    assert results[4].text.endswith("8")


def test_the_network_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        results = run(
            f"import socket\nsocket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), timeout=5)",
            "socket.create_connection(('192.0.2.1', 80), timeout=5)",
            "socket.getaddrinfo('example.com', 80)",
        )
        assert all("error" in result.text.lower() and not result.ok for result in results)


WITHOUT_NAMESPACES = """
import asyncio, sys
from rlsys.tools.python import PythonTool
async def main(tier):
    tool = PythonTool(tier=tier)
    session = await tool.open("r")
    print(tier, await session.call({"code": "6 * 7"}), tool.tier)
    await session.close()
    await tool.close()
open("/proc/sys/user/max_user_namespaces", "w").write("0")
asyncio.run(main("auto"))
asyncio.run(main("T2"))
"""


def test_a_host_that_refuses_namespaces_gets_the_weaker_tier_and_is_told() -> None:
    # A user namespace that may hold no other one stands for such a host.
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", WITHOUT_NAMESPACES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert "auto ToolResult(text='42', ok=True" in done.stdout, done.stderr
    assert "T1" in done.stdout
    assert "weaker tier T1 (T2: [Errno 28] unshare()" in done.stderr
    assert "RuntimeError: the Python tool cannot be isolated on this host" in done.stderr
    assert "tier: T0" in done.stderr


@pytest.mark.parametrize("tier", ["T1", "T0"])
def test_the_weaker_tiers_run_code_too(tier: str) -> None:
    results = run("x = 20", "x + 1", "import sympy\nsympy.factorint(12)", "1 / 0", tier=tier)
    assert [result.ok for result in results] == [True, True, True, False]
    assert texts(results)[1:3] == ["21", "{2: 2, 3: 1}"]
    assert "ZeroDivisionError" in results[3].text


def test_an_interpreter_below_tmp_is_isolated_as_well(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    assert run("import os\n6 * 7", python=str(tmp_path / "env/bin/python"), tier="T2")[0].text == "42"


def test_files_live_as_long_as_the_session_and_are_bounded() -> None:
    results = run(
        "open('a.txt', 'w').write('kept') and None",
        "open('a.txt').read()",
        "import tempfile, os\nwith tempfile.NamedTemporaryFile('w') as f: f.write('x')\nos.listdir()",
        "with open('big', 'wb') as f:\n    for _ in range(40): f.write(bytes(1 << 20))",
        "os.remove('big')\nfor i in range(3000): open(str(i), 'w').close()",
        disk_mb=16,
    )
    assert texts(results)[1:3] == ["'kept'", "['a.txt']"]
    assert "No space left on device" in results[3].text
    assert "No space left on device" in results[4].text
    assert texts(run("import os\nos.listdir()", disk_mb=16)) == ["[]"]


def test_modules_that_were_not_loaded_can_be_and_the_project_cannot() -> None:
    results = run("import tarfile, wave\n1", "import rlsys")
    assert results[0].text == "1"
    assert "ModuleNotFoundError" in results[1].text


def test_random_numbers_differ_between_rollouts_and_repeat_for_one() -> None:
    async def draw(rollout_id: str) -> str:
        session = await tool_with().open(rollout_id)
        result = await session.call({"code": "import random, numpy\nrandom.random(), numpy.random.rand()"})
        await session.close()
        return result.text

    first, again, other = (_runner.run(draw(name)) for name in ("a", "a", "b"))
    assert first == again
    assert first != other


def test_a_fork_has_its_own_variables_and_files_from_there_on() -> None:
    async def main() -> list[str]:
        session = await tool_with(forkable=True, timeout_seconds=0.5).open("r")
        found = [await session.call({"code": "x = [1]\nopen('f', 'w').write('1') and None"})]
        first = await session.fork()
        second = await first.fork()
        for branch, value in ((session, 2), (first, 3), (second, 4)):
            await branch.call({"code": f"x.append({value})\nopen('f', 'a').write('{value}') and None"})
        found += [await branch.call({"code": "x, open('f').read()"}) for branch in (session, first, second)]
        denied = await first.call({"code": "import os\nos.fork()"})
        assert "PermissionError" in denied.text
        await session.close()
        found.append(await second.call({"code": "x[-1]"}))
        await first.close()
        found.append(await second.call({"code": "while True: pass"}))
        found.append(await second.call({"code": "x"}))
        await second.close()
        return texts(found)

    results = _runner.run(asyncio.wait_for(main(), 60))
    assert results[:5] == ["", "([1, 2], '12')", "([1, 3], '13')", "([1, 4], '14')", "4"]
    assert "variables are kept" in results[5]
    assert results[6] == "[1, 4]"


def test_a_thread_that_steals_the_permission_to_fork_gains_nothing() -> None:
    thief = (
        "import os, threading\n"
        "def steal():\n"
        "    while True:\n"
        "        try: os.fork()\n"
        "        except OSError: pass\n"
        "for _ in range(3): threading.Thread(target=steal, daemon=True).start()"
    )

    async def main() -> int:
        tool = PythonTool(forkable=True, timeout_seconds=2.0)
        for number in range(4):
            session = await tool.open(str(number))
            await session.call({"code": thief})
            with contextlib.suppress(RuntimeError):  # a thief was faster: then there is no copy
                copy = await asyncio.wait_for(session.fork(), 30)
                await copy.close()
            await session.close()
        assert tool._zygote is not None
        place = tool._zygote._place
        left = len(processes_of(place))
        session = await tool.open("after")
        assert (await session.call({"code": "6 * 7"})).text == "42"
        await tool.close()
        return left

    assert _runner.run(main()) == 1


def test_descriptors_that_code_sends_are_not_taken_and_a_silent_end_keeps_no_event_loop_busy() -> None:
    # Behind the answers of a session stands its code: in a copy's first words it may send what it likes.
    sends = (
        "import array, socket, threading, time\n"
        "def send():\n"
        "    pipes = [socket.socketpair()[0].fileno() for _ in range(50)]\n"
        "    while True:\n"
        "        for fd in range(100, 140):\n"
        "            try: socket.send_fds(socket.socket(fileno=fd), [b'L'], [pipes[0]])\n"
        "            except OSError: pass\n"
    )
    ends = "import os, threading\nthreading.Timer(0.2, os._exit, (3,)).start()"

    async def main() -> None:
        tool = PythonTool(forkable=True)
        await tool.start()
        session = await tool.open("a")
        await session.call({"code": sends + "threading.Thread(target=send, daemon=True).start()"})
        before = len(os.listdir("/proc/self/fd"))
        with contextlib.suppress(RuntimeError):
            copy = await asyncio.wait_for(session.fork(), 30)
            await copy.close()
        assert len(os.listdir("/proc/self/fd")) <= before
        await session.close()

        quiet = await tool.open("b")
        await quiet.call({"code": ends})
        assert quiet._clone is not None
        gate = quiet._clone._gate
        assert gate is not None
        await asyncio.sleep(0.6)
        assert gate._listener == -1
        assert "exit status 3" in (await quiet.call({"code": "1"})).text
        await quiet.close()
        await tool.close()

    _runner.run(main())


def test_a_fork_is_lost_with_its_original_and_says_that_it_was_not_to_blame() -> None:
    async def main() -> None:
        session = await tool_with(forkable=True).open("r")
        await session.call({"code": "x = 1"})
        copy = await session.fork()
        assert "exit status 3" in (await session.call({"code": "import os; os._exit(3)"})).text
        with pytest.raises(ToolError, match="ended with its parent"):
            await copy.call({"code": "x"})
        await copy.close()
        await session.close()

    _runner.run(asyncio.wait_for(main(), 60))


def test_a_tool_that_was_not_made_to_fork_says_so() -> None:
    async def main() -> None:
        session = await tool_with().open("r")
        with pytest.raises(RuntimeError, match="forkable: true"):
            await session.fork()
        await session.close()

    _runner.run(main())


def test_a_killed_zygote_is_replaced_and_its_sessions_are_failures_of_the_tool() -> None:
    async def main() -> str:
        tool = PythonTool()
        await tool.start()
        session, other = await tool.open("a"), await tool.open("b")
        await session.call({"code": "x = 1"})
        assert tool._zygote is not None
        tool._zygote._process.kill()
        tool._zygote._process.wait()
        with pytest.raises(ToolError, match="ended with its parent"):
            await session.call({"code": "x"})
        text = (await other.call({"code": "6 * 7"})).text
        await session.close()
        await other.close()
        await tool.close()
        return text

    assert _runner.run(main()) == "42"


def test_a_hundred_and_twenty_sessions_live_side_by_side() -> None:
    # More than the zygote has low descriptors: the numbers that a session's own are moved to are taken by then.
    async def main() -> list[str]:
        tool = tool_with(max_sessions=120)
        sessions = [await tool.open(str(index)) for index in range(120)]
        for index, session in enumerate(sessions):
            await session.call({"code": f"x = {index}"})
        found = [(await session.call({"code": "x"})).text for session in sessions]
        await asyncio.gather(*(session.close() for session in sessions))
        return found

    assert _runner.run(main()) == [str(index) for index in range(120)]


@pytest.mark.slow
def test_a_hundred_thousand_calls_leave_nothing_behind() -> None:
    def state(tool: PythonTool) -> tuple[int, int, int]:
        """Descriptors and resident pages of this process and the zygote, and the zygote's children."""
        assert tool._zygote is not None
        pids = [os.getpid(), tool._zygote._process.pid]
        descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return descriptors, pages, len(processes_of(tool._zygote._place))

    async def main() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        tool = PythonTool(timeout_seconds=5.0)
        for round_number in range(101):  # the first one warms up
            if round_number == 1:
                before = state(tool)
            for number in range(10):
                session = await tool.open(f"{round_number}-{number}")
                for call in range(100):
                    result = await session.call({"code": f"x = {call}\nx"})
                    assert result.text == str(call)
                await session.close()
        after = state(tool)
        await tool.close()
        return before, after

    before, after = asyncio.run(main())
    assert after[0] == before[0]
    assert after[1] - before[1] < 2048  # pages: 8 MiB
    assert after[2] == before[2] == 1


def test_no_more_sessions_live_at_once_than_allowed() -> None:
    async def main() -> list[str]:
        tool = tool_with(max_sessions=2)
        sessions = [await tool.open(str(index)) for index in range(3)]
        first = [await session.call({"code": "1"}) for session in sessions[:2]]
        waiting = asyncio.create_task(sessions[2].call({"code": "3"}))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await sessions[0].close()
        first.append(await waiting)
        for session in sessions[1:]:
            await session.close()
        return texts(first)

    assert _runner.run(main()) == ["1", "1", "3"]


def test_secrets_of_this_process_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSYS_TEST_SECRET", "hunter2")
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    code = f"import os\ndict(os.environ), open('/proc/{os.getpid()}/environ').read()"
    results = run(
        "import os\nsorted(os.environ)", code, f"os.kill({os.getpid()}, 0)", f"os.write({writing}, b'x')", "os.getcwd()"
    )
    for fd in (reading, writing):
        os.close(fd)
    assert "HOME" in results[0].text
    assert "SECRET" not in results[0].text
    assert "FileNotFoundError" in results[1].text
    assert "hunter2" not in results[1].text
    assert "PermissionError" in results[2].text
    assert "OSError" in results[3].text
    assert not Path(results[4].text.strip("'")).exists()


def test_closed_streams_are_restored_for_the_next_call() -> None:
    results = run(
        "import os\nos.close(1); os.close(2); os.close(0)\nprint('lost')",
        "print('back')",
        "import sys\nsys.stdout.close()",
        "9",
    )
    assert not results[0].ok
    assert "lost" in results[0].text
    assert [results[1].text, results[3].text] == ["back", "9"]


def test_garbage_on_the_reply_pipe_kills_the_session_and_is_never_a_reply() -> None:
    garbage = "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'+' * 17)\n    except OSError: pass\n"
    now, after = run(garbage + "import time; time.sleep(5)", "1 + 1")
    assert not now.ok
    assert "protocol" in now.text
    assert after.text.endswith("\n2")
    closed = run("import os\nos.closerange(3, 256)", "1 + 1")
    assert not closed[0].ok
    assert closed[1].text.endswith("\n2")


def test_threads_may_go_on_and_cannot_disturb_the_next_call() -> None:
    background = "import threading, time\ndef loop():\n    while True: time.sleep(0.01); print('.')\n"
    results = run(background + "threading.Thread(target=loop).start()", "40 + 2", "41 + 2")
    assert all(result.ok for result in results)
    assert results[1].text.replace(".", "").strip() == "42"


def test_many_sessions_run_at_once_and_do_not_block_the_event_loop() -> None:
    async def main() -> tuple[list[str], int]:
        tool = tool_with(timeout_seconds=30.0)
        sessions = [await tool.open(str(index)) for index in range(64)]
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticker = asyncio.create_task(tick())
        code = "import time; time.sleep(0.5); {} ** 2"
        results = await asyncio.gather(*(each.call({"code": code.format(i)}) for i, each in enumerate(sessions)))
        await asyncio.gather(*(each.close() for each in sessions))
        ticker.cancel()
        return texts(results), ticks

    results, ticks = _runner.run(main())
    assert results == [str(index**2) for index in range(64)]
    assert ticks > 20


def test_it_works_in_an_event_loop_off_the_main_thread_whatever_signals_are_blocked() -> None:
    results: list[ToolResult] = []

    async def session() -> None:
        tool = PythonTool(timeout_seconds=0.5)
        opened = await tool.open("r")
        for code in ("1 + 1", "while True: pass", "2 + 2"):
            results.append(await opened.call({"code": code}))
        await tool.close()

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD})
        asyncio.run(session())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert [result.text.split()[-1] for result in results] == ["2", "kept]", "4"]


def test_a_cancelled_call_and_a_close_in_the_middle_leave_no_process() -> None:
    async def main() -> tuple[str, int, ToolResult, str]:
        tool = PythonTool(timeout_seconds=60.0)
        cancelled, closed = await tool.open("a"), await tool.open("b")
        await cancelled.call({"code": "1"})
        assert tool._zygote is not None
        place = tool._zygote._place
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cancelled.call({"code": "while True: pass"}), 0.3)
        after = await cancelled.call({"code": "'again'"})
        call = asyncio.create_task(closed.call({"code": "while True: pass"}))
        await asyncio.sleep(0.3)
        assert len(processes_of(place)) == 3
        await closed.close()
        await cancelled.close()
        left = len(processes_of(place))
        await tool.close()
        return place, left, after, (await call).text

    place, left, after, text = asyncio.run(main())
    assert after.ok
    assert "fresh interpreter" in after.text
    assert "the session was closed" in text
    assert left == 1
    assert not processes_of(place)
    assert not Path(place).exists()


HOLDER = """
import asyncio, sys
from rlsys.tools.python import PythonTool
code = '''import ctypes, threading, time
ctypes.CDLL(None).prctl(1, 0)  # tries to withdraw its own parent-death signal
open('file', 'w').write('x')
threading.Thread(target=time.sleep, args=(600,)).start()
'''
async def main():
    tool = PythonTool(tier=sys.argv[1])
    session = await tool.open("r")
    await session.call({"code": code})
    print(tool._zygote._place, flush=True)
    await session.call({"code": "while True: pass"})
asyncio.run(main())
"""


@pytest.mark.parametrize("tier", ["T2", "T1"])
def test_nothing_survives_when_the_process_that_holds_the_session_is_killed(tier: str) -> None:
    command = [sys.executable, "-c", HOLDER, tier]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as holder:
        assert holder.stdout is not None
        place = holder.stdout.readline().strip()
        assert len(processes_of(place)) == 2  # the zygote and the interpreter
        os.kill(holder.pid, signal.SIGKILL)
    assert wait_until(lambda: not processes_of(place))
    assert wait_until(lambda: not Path(place).exists())


@pytest.mark.parametrize("options", [{"timeout_seconds": 0.0}, {"memory_mb": 1}, {"max_output_characters": 1}])
def test_options_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PythonTool(**options)


def test_a_host_that_cannot_run_it_is_found_out_at_the_start(tmp_path: Path) -> None:
    async def start(tool: PythonTool) -> None:
        await tool.start()

        await tool.close()

    asyncio.run(start(PythonTool()))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match="has ended; its error output says why"):
        asyncio.run(start(PythonTool(python=str(broken))))
