"""The Python tool: a notebook for the policy, and a cage for what it may write."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rlsys.interfaces import ToolResult
from rlsys.tools.python import PythonTool


def run(*cells: str, **options: Any) -> list[ToolResult]:
    """The results of some cells in one session, which is closed afterwards."""

    async def session() -> list[ToolResult]:
        opened = await PythonTool(**({"timeout_seconds": 10.0} | options)).open("rollout")
        try:
            return [await opened.call({"code": cell}) for cell in cells]
        finally:
            await opened.close()

    return asyncio.run(session())


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


def test_definitions_classes_and_modules_behave_as_in_a_script() -> None:
    cell = "import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: int\npickle.loads(pickle.dumps(A(3)))"
    assert texts(run(cell, "__name__")) == ["A(x=3)", "'__main__'"]


def test_a_session_starts_no_process_before_its_first_call() -> None:
    async def main() -> None:
        session = await PythonTool().open("rollout")
        assert session._keeper is None
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


def test_a_gigabyte_of_output_fills_no_memory() -> None:
    code = "part = 'ab' * 500_000\nfor _ in range(1000): print(part, end='')\nprint('the end')"
    result = run(code, timeout_seconds=60.0, max_output_characters=500)[0]
    assert result.ok
    assert result.text.endswith("the end")
    assert len(result.text) < 600
    assert f"[... {1000 * 1_000_000 + 8 - 500} characters cut ...]" in result.text


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


def test_output_of_children_and_of_stderr_is_shown_in_order() -> None:
    code = "import os, sys\nprint(1)\nprint(2, file=sys.stderr)\nos.system('echo 3')\nprint(4)"
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


def test_a_fork_bomb_stays_small_and_dies_with_its_session() -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    killed, after = run(bomb, "import os\n1", timeout_seconds=1.0)
    assert not killed.ok
    assert after.ok
    fork = "import os, time\nn = 0\ntry:\n  while True:\n    if os.fork() == 0: time.sleep(60)\n    n += 1\n"
    limited = run(fork + "except OSError as error: print(error)\nn < 100")[0]
    assert limited.ok
    assert "temporarily unavailable" in limited.text
    assert limited.text.endswith("True")


def test_a_fork_that_returns_does_not_answer_in_its_parents_place() -> None:
    fork = "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse: print('child')"
    assert texts(run(fork, "1 + 1")) == ["child", "2"]


def test_memory_is_bounded() -> None:
    results = run("b = bytearray(4 * 2**30)", "c = [0] * 10**9", "'alive'")
    assert ["MemoryError" in result.text for result in results] == [True, True, False]
    assert results[2].text == "'alive'"


def test_deep_recursion_ends_in_an_error_or_a_dead_interpreter() -> None:
    deep = "def f(n): return f(n + 1)\nf(0)"
    crash = "import ctypes\nctypes.string_at(0)"
    results = run(deep, "(" * 5000, f"import sys\nsys.setrecursionlimit(10**9)\n{deep}", crash, "8", memory_mb=128)
    assert "RecursionError" in results[0].text
    assert "SyntaxError: too many nested parentheses" in results[1].text
    assert not results[2].ok
    assert "signal 11" in results[3].text
    assert results[4].text.endswith("8")


def test_the_network_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), timeout=5)"
        results = run(
            code, "socket.create_connection(('192.0.2.1', 80), timeout=5)", "socket.getaddrinfo('example.com', 80)"
        )
        assert all("error" in result.text.lower() and not result.ok for result in results)
        allowed = run(code + "\n'connected'", allow_network=True)[0]
        assert allowed.text == "'connected'"


def test_a_host_that_refuses_namespaces_is_refused_with_the_fix() -> None:
    # A user namespace that may hold no other one stands for such a host.
    program = (
        "import asyncio, sys\nfrom rlsys.tools.python import PythonTool\n"
        "async def main(allow):\n"
        "    session = await PythonTool(allow_network=allow).open('r')\n"
        "    print(await session.call({'code': 'import os; os.getuid()'}))\n"
        "    await session.close()\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "asyncio.run(main(True))\n"
        "asyncio.run(main(False))\n"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert "ok=True" in done.stdout, done.stderr
    assert "RuntimeError" in done.stderr
    assert "allow_network: true" in done.stderr


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
    assert "PermissionError" in results[1].text
    assert "hunter2" not in results[1].text
    assert "ProcessLookupError" in results[2].text
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
        tool = PythonTool(timeout_seconds=30.0)
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

    results, ticks = asyncio.run(main())
    assert results == [str(index**2) for index in range(64)]
    assert ticks > 20


def test_it_works_in_an_event_loop_off_the_main_thread_whatever_signals_are_blocked() -> None:
    results: list[ToolResult] = []

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD})
        results.extend(run("1 + 1", "while True: pass", "2 + 2", timeout_seconds=0.5))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert [result.text.split()[-1] for result in results] == ["2", "kept]", "4"]


def test_a_cancelled_call_and_a_close_in_the_middle_leave_no_process() -> None:
    async def main() -> tuple[str, ToolResult, str]:
        tool = PythonTool(timeout_seconds=60.0)
        cancelled, closed = await tool.open("a"), await tool.open("b")
        directory = (await cancelled.call({"code": "import os; os.getcwd()"})).text.strip("'")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cancelled.call({"code": "while True: pass"}), 0.3)
        after = await cancelled.call({"code": "'again'"})
        call = asyncio.create_task(closed.call({"code": "while True: pass"}))
        await asyncio.sleep(0.3)
        await closed.close()
        await cancelled.close()
        return directory, after, (await call).text

    directory, after, text = asyncio.run(main())
    assert after.ok
    assert "fresh interpreter" in after.text
    assert "gone" in text
    assert not Path(directory).exists()
    assert wait_until(lambda: not processes_of(f"\0{os.getpid()}\0"))


def test_nothing_survives_when_the_process_that_holds_the_session_is_killed() -> None:
    program = (
        "import asyncio\nfrom rlsys.tools.python import PythonTool\n"
        "code = '''import ctypes, os, time\n"
        "ctypes.CDLL(None).prctl(1, 0)\n"  # the interpreter withdraws its own parent-death signal
        "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(600)\n"
        "os.getcwd()'''\n"
        "async def main():\n"
        "    session = await PythonTool().open('r')\n"
        "    print((await session.call({'code': code})).text, flush=True)\n"
        "    await session.call({'code': 'while True: pass'})\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as holder:
        assert holder.stdout is not None
        directory = holder.stdout.readline().strip().strip("'")
        mine = f"\0{holder.pid}\0"  # in the arguments of the keeper, which its forks inherit
        assert wait_until(lambda: len(processes_of(mine)) == 4)  # keeper, interpreter and two below it
        os.kill(holder.pid, signal.SIGKILL)
    assert wait_until(lambda: not processes_of(mine))
    assert wait_until(lambda: not Path(directory).exists())


@pytest.mark.parametrize("options", [{"timeout_seconds": 0.0}, {"memory_mb": 1}, {"max_output_characters": 1}])
def test_options_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PythonTool(**options)


def test_a_host_that_cannot_run_it_is_found_out_at_the_start(tmp_path: Path) -> None:
    async def start(tool: PythonTool) -> None:
        await tool.start()

    asyncio.run(start(PythonTool()))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended while it started"):
        asyncio.run(start(PythonTool(python=str(broken))))
