"""The math reward: what counts as an answer, what counts as equal, and what cannot hang it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rlsys.interfaces import RewardResult
from rlsys.rewards import math as reward_math
from rlsys.rewards.math import MathReward
from rlsys.rewards.pool import WorkerError, WorkerPool
from rlsys.types import Problem, Rollout

EMPTY = Rollout(
    tokens=np.zeros(0, np.int32),
    loss_mask=np.zeros(0, np.bool_),
    logprobs=np.zeros(0, np.float32),
    versions=np.zeros(0, np.int32),
)


def problem(answer: str | None) -> Problem:
    return Problem(id="p7", prompt=({"role": "user", "content": "?"},), answer=answer)


def grade(reward: MathReward, *pairs: tuple[str, str]) -> list[str]:
    """The statuses of `(gold, response)` pairs, graded all at once."""

    async def main() -> list[RewardResult]:
        return await asyncio.gather(*(reward.score(problem(gold), response, EMPTY) for gold, response in pairs))

    results = asyncio.run(main())
    assert all(result.score == (reward.correct if result.status == "correct" else reward.wrong) for result in results)
    return [result.status for result in results]


def worker_ids(reward: MathReward) -> list[int]:
    return [worker._process.pid for worker in reward._pool._living]


def sleeper(folder: Path) -> Path:
    """A program that takes a second to start and then sleeps as long as it is told."""
    program = folder / "sleeper.py"
    program.write_text(
        "import os, time\ndef warm(): time.sleep(1.0)\n"
        "def grade(request):\n    time.sleep(float(request['seconds']))\n    return 'done'\n"
    )
    return program


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_ended(pids: list[int]) -> bool:
    end = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, pids))


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    """One reward for all tests that only ask, so that its worker is warm; a deadline that a busy machine can keep."""
    shared = MathReward(timeout_seconds=20.0)
    yield shared
    shared.close()


def test_an_empty_box_is_no_answer(reward: MathReward) -> None:
    assert grade(reward, ("1", r"\boxed{}"), ("1", r"\boxed{ $ }"), ("1", "<answer> </answer>")) == ["no_answer"] * 3


def test_a_form_that_is_demanded_is_the_only_one_that_counts() -> None:
    strict = MathReward(form="boxed", correct=2.0, wrong=-1.0)
    assert grade(strict, ("1", "the answer is 1"), ("1", "<answer>1</answer>"), ("1", r"\boxed{1}")) == [
        "no_answer",
        "no_answer",
        "correct",
    ]


@pytest.mark.parametrize(
    ("gold", "response", "status"),
    [
        ("1/2", r"\boxed{0.5}", "correct"),
        (r"$\frac{1}{2}$", r"\boxed{\dfrac{2}{4}}", "correct"),
        (r"so \boxed{12}", r"\boxed{12.0}", "correct"),
        ("x^2 + 1", r"\boxed{1 + x^2}", "correct"),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", "correct"),
        (r"\sqrt{2}", r"\boxed{√2}", "correct"),
        (r"2\pi", r"\boxed{2π}", "correct"),
        ("0.5", r"\boxed{50\%}", "correct"),
        (r"50\%", r"\boxed{50%}", "correct"),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", "correct"),
        ("5", r"the answer is $x = 5$.", "correct"),
        (r"\text{blue}", r"\boxed{\text{blue}}", "correct"),
        ("3", r"\boxed{4}", "wrong"),
        ("x", r"\boxed{y}", "wrong"),
        (r"\sqrt{2}", r"\boxed{1.41}", "wrong"),
        ("7", r"\boxed{\frac{1}{0}}", "wrong"),
        ("7", r"\boxed{" + "7" * 5000 + "}", "wrong"),
        ("7", r"\boxed{\frac{}}", "wrong"),
        ("7", r"\boxed{七 \u0000 🙂}", "wrong"),
        ("7", "\\boxed{\ud800\n\x00}", "wrong"),
    ],
)
def test_equal_answers_are_correct_and_others_wrong(reward: MathReward, gold: str, response: str, status: str) -> None:
    assert grade(reward, (gold, response)) == [status]


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_problem_without_an_answer_is_an_error_that_names_it(reward: MathReward, answer: str | None) -> None:
    with pytest.raises(ValueError, match="p7"):
        asyncio.run(reward.score(problem(answer), r"\boxed{1}", EMPTY))


def test_a_worker_that_is_killed_is_an_error_and_is_replaced(reward: MathReward) -> None:
    assert grade(reward, ("2^{x}", r"\boxed{2^{x-1} \cdot 2}")) == ["correct"]
    (template,) = worker_ids(reward)
    (worker,) = reward._pool._living
    assert worker._pid is not None
    os.kill(worker._pid, signal.SIGKILL)
    assert grade(reward, ("3^{x}", r"\boxed{3^{x-1} \cdot 3}")) == ["error"]
    assert grade(reward, ("3^{x}", r"\boxed{3^{x-1} \cdot 3}")) == ["correct"]
    assert worker_ids(reward) == [template]  # which made another one
    served = worker._pid
    os.kill(template, signal.SIGKILL)
    assert wait_until_ended([template, served])
    assert grade(reward, ("3^{x}", r"\boxed{3^{x-1} \cdot 3}")) == ["error"]
    assert grade(reward, ("3^{x}", r"\boxed{3^{x-1} \cdot 3}")) == ["correct"]
    assert worker_ids(reward) != [template]


def test_a_reply_that_comes_too_late_is_no_answer_to_the_next_question(tmp_path: Path) -> None:
    program = tmp_path / "late.py"
    program.write_text(
        "import os, time\ndef warm(): time.sleep(0.2)\n"
        "def grade(request):\n    if request['what'] == 'die':\n        time.sleep(0.2)\n        os._exit(1)\n"
        "    return request['what']\n"
    )

    async def main() -> list[str]:
        pool = WorkerPool(program, num_workers=1, timeout_seconds=1.0)
        found = [await pool.ask({"what": "first"})]
        (worker,) = pool._living
        found.append(await pool.ask({"what": "die"}))
        found.append(await pool.ask({"what": "second"}))
        assert worker.renew()
        worker._unread = b"late\n" + worker._unread
        found.append(await pool.ask({"what": "third"}))
        pool.close()
        return found

    assert asyncio.run(main()) == ["first", "", "second", "third"]


def test_one_worker_is_used_again_from_any_thread_and_event_loop(reward: MathReward) -> None:
    statuses: list[str] = []
    assert grade(reward, ("4^{x}", r"\boxed{4^{x-1} \cdot 4}")) == ["correct"]
    before = worker_ids(reward)
    pair = ("5^{x}", r"\boxed{5^{x-1} \cdot 5}")
    threads = [threading.Thread(target=lambda: statuses.extend(grade(reward, pair))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == ["correct"] * 4
    assert worker_ids(reward) == before


def test_plain_numbers_need_no_worker() -> None:
    idle = MathReward()
    assert grade(idle, ("12", r"\boxed{12}"), ("1/3", r"\boxed{2/3}")) == ["correct", "wrong"]
    assert worker_ids(idle) == []
    idle.close()


def test_hostile_answers_end_at_the_deadline_and_the_next_one_is_graded() -> None:
    hostile = [r"9^{9^{9^9}} - 9^{9^{9^9}} + 5", r"\lfloor (10^{10^8})! \rfloor"]
    short = MathReward(timeout_seconds=0.5, num_workers=2)
    assert grade(short, *(("5", rf"\boxed{{{each}}}") for each in hostile)) == ["timeout", "timeout"]
    short._pool._timeout_seconds = 20.0
    assert grade(short, ("2^{x}", r"\boxed{2^{x-1} \cdot 2}")) == ["correct"]
    short.close()


def test_the_deadline_covers_neither_the_start_nor_the_queue(tmp_path: Path) -> None:
    async def main() -> tuple[list[str], int]:
        pool, ticks = WorkerPool(sleeper(tmp_path), num_workers=1, timeout_seconds=1.0), 0
        tasks = [asyncio.create_task(pool.ask({"seconds": "0.3"})) for _ in range(5)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.01)
            ticks += 1
        pool.close()
        return await asyncio.gather(*tasks), ticks

    replies, ticks = asyncio.run(main())
    assert replies == ["done"] * 5
    assert ticks > 50  # and the event loop went on


def test_a_pool_past_its_deadline_kills_and_goes_on(tmp_path: Path) -> None:
    async def main() -> tuple[list[int], str]:
        pool = WorkerPool(sleeper(tmp_path), num_workers=1, timeout_seconds=1.0)
        hung = asyncio.create_task(pool.ask({"seconds": "600"}))
        while not pool._living:
            await asyncio.sleep(0.01)
        pids = [worker._process.pid for worker in pool._living]
        with pytest.raises(TimeoutError):
            await hung
        reply = await pool.ask({"seconds": "0"})
        pool.close()
        return pids, reply

    pids, reply = asyncio.run(main())
    assert reply == "done"
    assert wait_until_ended(pids)


def test_close_ends_the_workers_even_in_the_middle(tmp_path: Path) -> None:
    async def main() -> tuple[str, list[int]]:
        pool = WorkerPool(sleeper(tmp_path), num_workers=2, timeout_seconds=60.0)
        await pool.ask({"seconds": "0"})
        task = asyncio.create_task(pool.ask({"seconds": "600"}))
        await asyncio.sleep(0.3)
        pids = [worker._process.pid for worker in pool._living]
        pool.close()
        with pytest.raises(WorkerError, match="closed"):
            await pool.ask({"seconds": "0"})
        return await task, pids

    reply, pids = asyncio.run(main())
    assert reply == ""
    assert len(pids) == 1
    assert wait_until_ended(pids)


def test_a_worker_that_cannot_start_is_an_error_that_says_why(tmp_path: Path) -> None:
    program = tmp_path / "broken.py"
    program.write_text("def warm(): import sums_of_nothing")
    pool = WorkerPool(program, num_workers=1, timeout_seconds=1.0)
    with pytest.raises(WorkerError, match="No module named 'sums_of_nothing'"):
        asyncio.run(pool.ask({}))
    pool.close()


@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_worker_survives_its_process_however_that_ends(ending: str) -> None:
    root = Path(reward_math.__file__).resolve().parents[1]
    program = f"""
import asyncio, os, pathlib, signal, threading
from rlsys.rewards.pool import WorkerPool
pool = WorkerPool(pathlib.Path("rewards/math_worker.py"), num_workers=1, timeout_seconds=1.0)
async def ask():
    await pool.ask({{"gold": "5", "answer": "9^{{9^{{9^9}}}} - 1 + x"}})
threading.Thread(target=asyncio.run, args=(ask(),)).start()
while not pool._living or not next(iter(pool._living)).is_ready:
    pass
print(*(worker._process.pid for worker in pool._living), flush=True)
{ending}
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 1, done.stderr
    assert wait_until_ended(pids)


def test_options_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout_seconds"):
        MathReward(timeout_seconds=0)
    with pytest.raises(ValueError, match="num_workers"):
        MathReward(num_workers=0)
    with pytest.raises(ValueError, match="any, boxed, tag, phrase, bare"):
        MathReward(form="box")  # type: ignore[arg-type]


def test_every_answer_gets_its_status_while_workers_are_killed_and_stopped_at_random() -> None:
    reward, dice = MathReward(timeout_seconds=2.0, num_workers=2), random.Random(7)
    pairs = [(f"{n}^{{x}}", rf"\boxed{{{n}^{{x-1}} \cdot {n if n % 2 else n + 1}}}") for n in range(3, 63)]
    over = threading.Event()

    def strike() -> None:
        while not over.wait(dice.uniform(0.05, 0.2)):
            for worker in list(reward._pool._living)[:1]:
                if (serves := worker._pid) is not None:
                    blows = [(serves, signal.SIGKILL), (serves, signal.SIGSTOP), (worker._process.pid, signal.SIGKILL)]
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(*dice.choice(blows))

    striker = threading.Thread(target=strike)
    striker.start()
    statuses = grade(reward, *pairs)
    over.set()
    striker.join()
    for (gold, _), status in zip(pairs, statuses, strict=True):
        right = "correct" if int(gold.partition("^")[0]) % 2 else "wrong"
        assert status in (right, "error", "timeout"), "a blow never becomes a verdict"
    assert statuses.count("error") + statuses.count("timeout") > 0
    assert set(grade(reward, pairs[0], pairs[2])) <= {"correct", "error", "timeout"}  # the last blow may show only now
    assert grade(reward, pairs[0], pairs[2]) == ["correct", "correct"]
    reward.close()


def test_a_reply_that_a_successor_gives_late_is_not_taken_for_the_next_one() -> None:
    reward = MathReward(timeout_seconds=20.0)
    wrong, right = ("2^{x}", r"\boxed{2^{x-1} \cdot 3}"), ("3^{x}", r"\boxed{3^{x-1} \cdot 3}")
    assert grade(reward, right) == ["correct"]
    (worker,) = reward._pool._living
    assert worker._pid is not None
    os.kill(worker._pid, signal.SIGKILL)  # between two requests
    assert select.select([worker._process.stdout], [], [], 20.0)[0], "no successor came"
    assert grade(reward, wrong) == ["error"]
    assert grade(reward, right) == ["correct"]
    reward.close()


def test_a_template_that_hangs_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlsys.rewards.pool.RENEW_SECONDS", 0.3)
    reward = MathReward(timeout_seconds=1.0)
    pair = ("2^{x}", r"\boxed{2^{x-1} \cdot 2}")
    assert grade(reward, pair) == ["correct"]
    (worker,) = reward._pool._living
    assert worker._pid is not None
    for pid in (worker._process.pid, worker._pid):
        os.kill(pid, signal.SIGSTOP)
    assert grade(reward, pair) == ["timeout"]
    reward._pool._timeout_seconds = 20.0
    assert grade(reward, pair) == ["correct"]
    assert worker_ids(reward) != [worker._process.pid]
    assert wait_until_ended([worker._process.pid])
    reward.close()
