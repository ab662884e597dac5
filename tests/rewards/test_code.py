"""The code reward: what counts as a program and a test, what counts as equal, and that no program can talk its way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rlsys.errors import ConfigError, ToolError
from rlsys.interfaces import RewardResult
from rlsys.rewards.code import CodeReward, find_program
from rlsys.rewards.code_tests import FunctionTest, StdinTest, read_tests, same_text, same_value
from rlsys.rewards.sandbox import Sandbox
from rlsys.types import Problem, Rollout
from tests.rewards.tampering_code import ADD, SUM, WRONG, WRONG_FUNCTIONS

EMPTY = Rollout(
    tokens=np.zeros(0, np.int32),
    loss_mask=np.zeros(0, np.bool_),
    logprobs=np.zeros(0, np.float32),
    versions=np.zeros(0, np.int32),
)


class Graders:
    """Rewards that share one event loop, as their sandboxes need it."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.made: list[CodeReward] = []

    def make(self, **options: Any) -> CodeReward:
        self.made.append(CodeReward(**{"timeout_seconds": 20.0, **options}))
        return self.made[-1]

    def grade(self, reward: CodeReward, tests: Any, *programs: str) -> list[RewardResult]:
        """What programs (not whole responses) get, graded all at once."""

        async def main() -> list[RewardResult]:
            return await asyncio.gather(*(reward.score(problem(tests), fenced(each), EMPTY) for each in programs))

        return self.runner.run(main())

    def close(self) -> None:
        for reward in self.made:
            self.runner.run(reward.close())
        self.runner.close()


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    shared = Graders()
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def reward(graders: Graders) -> CodeReward:
    """One reward for all tests that only ask; its deadline is one that a busy machine can keep."""
    return graders.make()


def problem(tests: Any) -> Problem:
    return Problem(id="p7", prompt=({"role": "user", "content": "?"},), metadata={"tests": tests})


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


# --- finding the program ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("```python\na\n```\n```python\nb\n```", "b"),
        ("```\na\n```", "a"),
        ("```python\na\n```\nIt prints\n```\n7\n```", "a"),
        ("```py\na\n```", "a"),
        ("```Python3\na\n```", "a"),
        ("```python title=x\na\n```", "a"),
        ("``` python\na\n```", "a"),
        ("```python\r\na\r\n```\r\n", "a\r"),
        ("````python\n```\n````", "```"),
        ("1. so\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b"),
        ("```python\nx = '''\n    y'''\n```", "x = '''\n    y'''"),
        ("<think>```python\na\n```</think>\n```python\nb\n```", "b"),
        ("```python\na\n```</think>```python\nc\n```\n```python\nb\n```", "b"),
        ("<think>a</think> call <think>b</think>\n```python\nc\n```", "c"),
        ("```cpp\na\n```\n```python\nb\n```\n```json\n{}\n```", "b"),
    ],
)
def test_the_program_is_the_last_closed_block_behind_the_thinking(response: str, program: str) -> None:
    assert find_program(response) == program


@pytest.mark.parametrize(
    "response",
    [
        "",
        "print(7)",
        "```python\nprint(7)",
        "```python\n \n```",
        "```cpp\nint main() {}\n```",
        "`print(7)`",
        "```print(7)```",
        "<think>```python\nprint(7)\n```",
        "<think>```python\nprint(7)\n```</think>",
        "</think><think>\n```python\nprint(7)\n```",
    ],
)
def test_a_response_without_a_program_has_no_answer(graders: Graders, reward: CodeReward, response: str) -> None:
    result = graders.runner.run(reward.score(problem(SUM), response, EMPTY))
    assert (result.score, result.status, result.terms, result.extracted) == (0.0, "no_answer", {"passed": 0.0}, None)


def test_a_flood_of_fences_is_read_in_one_pass() -> None:
    assert find_program("```" + " " * 200_000 + "!\n" + "`" * 200_000) is None
    assert find_program("```python\n" * 100_000) is None
    assert find_program("```python\n1\n```\n" * 50_000) == "1"


# --- reading tests ---------------------------------------------------------------------------------------------------


def test_all_forms_of_tests_become_one() -> None:
    sums = (StdinTest(stdin="1 2", stdout="3"), StdinTest(stdin="a\nb", stdout="c"))
    lines = {"inputs": ["1 2", ["a", "b"]], "outputs": ["3", ["c"]]}
    rows = [{"stdin": test.stdin, "stdout": test.stdout, "function": None} for test in sums]
    for tests in (lines, json.dumps(lines), rows, json.dumps(rows), tuple(rows)):
        assert read_tests(problem(tests)) == sums
    call = FunctionTest(function="f", arguments=[[1], "x"], keywords={"k": 2}, accepted=([None, 1.5],))
    row = {"function": "f", "arguments": ([1], "x"), "keywords": {"k": 2}, "expected": (None, 1.5), "stdin": None}
    assert read_tests(problem([row])) == (call,)
    assert read_tests(problem([{"function": "f", "expected": None}]))[0].accepted == (None,)


def test_tests_of_functions_in_columns_are_lists_or_lines_of_json() -> None:
    texts = {"fn_name": "f", "inputs": ["[1, 2]\n3", '"a"'], "outputs": ["[1]", '"b"']}
    first, second = read_tests(problem(texts))
    assert (first.function, first.arguments, first.accepted) == ("f", [[1, 2], 3], ([1],))
    assert (second.arguments, second.accepted) == (["a"], ("b",))
    values = {"fn_name": "f", "inputs": [[1, 2], [3]], "outputs": [[3], [1, 2]]}
    first, second = read_tests(problem(values))
    assert (first.arguments, first.accepted) == ([1, 2], ([3], 3))  # wrapped or not
    assert second.accepted == ([1, 2],)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, r"must be a list of tests.*got None"),
        (7, r"must be a list of tests"),
        ("[{]", r"Expecting property name"),
        ("[" * 100_000, r"recursion"),
        ([], r"is empty"),
        ({"inputs": [], "outputs": []}, r"is empty"),
        ([SUM[0], "x"], r"test 1 must be an object, got 'x'"),
        ([{"stdin": "1"}], r"test 0: `stdout` must be a text, got None"),
        ([{"stdin": 1, "stdout": "1"}], r"test 0: `stdin` must be a text, got 1"),
        ([{"stdin": "1", "stdin_": "", "stdout": "1"}], r"test 0 has 'stdin_'; such a test has stdin, stdout"),
        ([{"function": "f", "arguments": [1]}], r"test 0 has no `expected`; .* 'f' must return"),
        ([{"function": "f", "arguments": "1", "expected": 1}], r"arguments of 'f' must be a list, got '1'"),
        ([{"function": "f", "keywords": [1], "expected": 1}], r"keywords of 'f' must be an object, got \[1\]"),
        ([{"function": 3, "expected": 1}], r"test 0: the function's name must be a text, got 3"),
        ([{"function": "f", "expected": {1, 2}}], r"test 0: arguments and expected values must be JSON values; .*set"),
        ({"inputs": ["1"]}, r"`outputs` of the tests must be a list, got None"),
        ({"inputs": "1", "outputs": ["1"]}, r"`inputs` of the tests must be a list, got '1'"),
        ({"inputs": ["1", "2"], "outputs": ["1"]}, r"2 inputs, but 1 outputs"),
        ({"inputs": [1], "outputs": ["1"]}, r"test 0: `stdin` must be a text, got 1"),
        ({"inputs": ["1", "x"], "outputs": ["1", "1"], "fn_name": "f"}, r"test 1: with `fn_name`, a text is one JSON"),
    ],
)
def test_malformed_tests_are_an_error_that_names_the_problem_and_the_test(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"problem 'p7': .*{message}"):
        read_tests(problem(tests))


def test_a_test_that_expects_more_than_is_read_is_an_error(graders: Graders) -> None:
    small = graders.make(max_output_characters=100)
    with pytest.raises(ValueError, match=r"'p7': test 1 expects 101 characters, but only max_output_characters=100"):
        graders.grade(small, [{"stdin": "", "stdout": "x" * 100}, {"stdin": "", "stdout": "x" * 101}], "1")


# --- comparing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("7", "7\n", True),
        ("1 \n2\r\n\n", "1\n2", True),
        ("1\n\n2", "1\n2", False),
        (" 1", "1", False),
        ("1 2", "1  2", False),
        ("yes", "Yes", False),
        ("", "", True),
        ("0.5", "0.5000000001", True),
        ("x 0.5 y", "x .5 y", True),
        ("1000000.5", "1000000.9", True),
        ("0.5", "0.50001", False),
        ("1e3", "1000.0", True),
        ("1000000", "1000001", False),
        ("2", "2.0", False),
        ("2.0", "2", True),
        ("2.0", "nan", False),
        ("nan", "nan", True),
        ("0.1", "x", False),
        ("1e999", "1e998", False),
        ("1.5", "1" * 100, False),
    ],
)
def test_outputs_are_equal_by_lines_and_decimals_within_the_tolerance(expected: str, actual: str, same: bool) -> None:
    assert same_text(expected, actual, 1e-6) is same


def test_without_a_tolerance_only_the_same_text_will_do() -> None:
    assert not same_text("0.5", "0.50000001", 0.0)
    assert same_value(0.5, 0.5, 0.0)
    assert not same_value(0.5, 0.5000001, 0.0)


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("[1, [2, 3]]", "[1, [2, 3]]", True),
        ("[1, 2]", "[2, 1]", False),
        ("[1]", "[1, 2]", False),
        ('{"a": 1, "b": [2]}', '{"b": [2], "a": 1}', True),
        ('{"a": 1}', '{"a": 1, "b": 2}', False),
        ("1", "1.0", True),
        ("1", "1.0000001", False),
        ("1.0", "1.0000001", True),
        ("1.0", "1", True),
        ("1", "true", False),
        ("true", "1", False),
        ("0.0", "false", False),
        ("false", "false", True),
        ("null", "null", True),
        ("null", "0", False),
        ('"1"', "1", False),
        ("[]", "{}", False),
        ('""', "[]", False),
        ("NaN", "NaN", False),
        ("[1.0, NaN]", "[1.0, NaN]", False),
        ("Infinity", "Infinity", True),
        ("Infinity", "1e308", False),
        ("1.0", "NaN", False),
        ("1.0", "1" + "0" * 400, False),
        ("9007199254740993", "9007199254740992", False),
    ],
)
def test_values_are_equal_exactly_and_decimals_within_the_tolerance(expected: str, actual: str, same: bool) -> None:
    assert same_value(json.loads(expected), json.loads(actual), 1e-6) is same


@pytest.mark.parametrize("shown", ["", "7 7", "[7", "7]", "[" * 100_000, "9" * 5000, "seven", "\x00"])
def test_what_is_not_one_json_value_is_wrong(shown: str) -> None:
    assert not FunctionTest(function="f", arguments=[], keywords={}, accepted=(7,)).passes(shown, 1e-6)


# --- right programs --------------------------------------------------------------------------------------------------

RIGHT_WITH_STDIN = [
    "print(sum(map(int, input().split())))",
    "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    "print(sum(map(int, open(0).read().split())))",
    "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
    "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.readline().split())))",
    "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "from __future__ import annotations\nprint(sum(map(int, input().split())))\nexit()",
    "import sys\nprint(sum(map(int, input().split())))\nsys.exit(0)",
    "import sys\nprint('thinking', file=sys.stderr)\nprint(sum(map(int, input().split())))",
    "import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()",
    "import atexit\natexit.register(lambda: print(sum(map(int, input().split()))))",
    "import io, sys\na = sys.stdout\nsys.stdout = io.StringIO()\nprint(sum(map(int, input().split())))\n"
    "a.write(sys.stdout.getvalue())",
    "import sys\nsys.__stdout__.write(str(sum(map(int, input().split()))))",
    "import numpy as np\nprint(np.array(input().split(), dtype=int).sum())",
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(sum(map(int, input().split()))).x)",
    "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\nprint(sum(map(int, input().split())))",
    "print(sum(map(int, input().split())))\n# 'quotes' \\ \"and\" \u00e9\U0001f642",
]


@pytest.mark.parametrize("program", RIGHT_WITH_STDIN)
def test_every_usual_way_to_read_and_write_passes(graders: Graders, reward: CodeReward, program: str) -> None:
    (result,) = graders.grade(reward, SUM, program)
    assert (result.score, result.status, result.terms, result.extracted) == (1.0, "correct", {"passed": 1.0}, program)


RIGHT_FUNCTIONS = [
    "def add(a, b):\n    return a + b",
    "add = lambda a, b: a + b",
    "class Solution:\n    def add(self, a, b):\n        return a + b",
    "def add(a, b):\n    print('noise', flush=True)\n    return a + b",
    "import os\nos.write(1, b'noise')\ndef add(a, b):\n    return a + b",
    "import numpy as np\ndef add(a, b):\n    return np.int64(a + b)",
    "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))",
]


@pytest.mark.parametrize("program", RIGHT_FUNCTIONS)
def test_functions_and_methods_are_called_with_their_arguments(
    graders: Graders, reward: CodeReward, program: str
) -> None:
    assert [result.status for result in graders.grade(reward, ADD, program)] == ["correct"]


def test_values_cross_as_json(graders: Graders, reward: CodeReward) -> None:
    program = (
        "def f(x, *, y=0):\n    return {'a': (x, y), 1: [None, True, 0.1 + 0.2], 'é': 'ü'}\n"
        "class A:\n    def g(self):\n        return [[]]"
    )
    tests = [
        {"function": "f", "arguments": [[1]], "keywords": {"y": "z"}, "expected": '{"no": "text"}'},
        {"function": "f", "arguments": [[1]], "keywords": {"y": "z"}}
        | {"expected": {"a": [[1], "z"], "1": [None, True, 0.3], "é": "ü"}},
        {"function": "A.g", "expected": [[]]},
    ]
    (result,) = graders.grade(reward, tests[1:], program)
    assert result.status == "correct"
    (result,) = graders.grade(reward, tests, program)
    assert (result.status, result.terms) == ("wrong", {"passed": 0.0})


def test_inputs_and_outputs_may_be_large(graders: Graders, reward: CodeReward) -> None:
    tests = [
        {"stdin": "1 " * 500_000, "stdout": "500000"},
        {"stdin": "\\'\"" * 100_000 + "\u00e9", "stdout": "1"},
        {"stdin": "50000", "stdout": "\n".join(map(str, range(50_000)))},
    ]
    program = "t = input()\nif t.isdigit():\n    for i in range(int(t)): print(i)\nelse:\n    print(len(t.split()))"
    assert [result.status for result in graders.grade(reward, tests, program)] == ["correct"]


def test_no_state_passes_from_one_test_to_the_next(graders: Graders, reward: CodeReward) -> None:
    program = (
        "import builtins, os, pathlib\n"
        "seen = getattr(builtins, 'seen', 0) + len(os.listdir()) + len(os.environ.get('seen', ''))\n"
        "builtins.seen = 1\nos.environ['seen'] = 'x'\npathlib.Path('seen').write_text('x')\nprint(seen)"
    )
    assert [result.status for result in graders.grade(reward, [{"stdin": "", "stdout": "0"}] * 6, program)] == [
        "correct"
    ]


def test_in_the_weakest_tier_input_comes_through_a_pipe(graders: Graders) -> None:
    weakest = graders.make(sandbox={"tier": "T0"})
    graders.runner.run(weakest.start())
    assert weakest.tier == "T0"
    tests = [*SUM, {"stdin": "1 " * 200_000, "stdout": "200000"}]
    assert [result.status for result in graders.grade(weakest, tests, RIGHT_WITH_STDIN[0])] == ["correct"]
    assert [result.status for result in graders.grade(weakest, tests, "print(7)")] == ["wrong"]


# --- wrong programs and tampering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRONG)
def test_no_other_program_passes(graders: Graders, reward: CodeReward, name: str) -> None:
    (result,) = graders.grade(reward, SUM, WRONG[name])
    assert (result.score, result.status) == (0.0, "wrong")


@pytest.mark.parametrize("name", WRONG_FUNCTIONS)
def test_no_other_function_passes(graders: Graders, reward: CodeReward, name: str) -> None:
    (result,) = graders.grade(reward, ADD, WRONG_FUNCTIONS[name])
    assert (result.score, result.status) == (0.0, "wrong")


def test_nothing_of_what_is_expected_goes_into_the_sandbox() -> None:
    tests = [
        {"stdin": "in", "stdout": "secret"},
        {"function": "f", "arguments": ["in"], "keywords": {"k": "in"}, "expected": "secret"},
    ]
    for test in read_tests(problem(tests)):
        assert "secret" not in json.dumps(test.job())


# --- time ------------------------------------------------------------------------------------------------------------

SLOW = {
    "a loop": "while True: pass",
    "a sleep": "import time\ntime.sleep(600)",
    "a loop that catches the interrupt": (
        "print(7)\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass"
    ),
    "right when interrupted": (
        "try:\n    while True: pass\nexcept BaseException:\n    print(sum(map(int, input().split())))"
    ),
    "in C": "x = 9 ** 9 ** 8\nprint(x % 10)",
    "a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\nprint(7)",
}


@pytest.mark.parametrize("name", SLOW)
def test_a_program_over_its_time_is_too_slow(graders: Graders, name: str) -> None:
    impatient = graders.make(timeout_seconds=0.5, wrong=-1.0)
    (result,) = graders.grade(impatient, SUM, SLOW[name])
    assert (result.score, result.status) == (-1.0, "too_slow")


def test_all_tests_together_have_a_deadline(graders: Graders) -> None:
    hasty = graders.make(total_seconds=3.0, partial=True, max_parallel=1)
    program = "import time\nn = int(input())\ntime.sleep(n)\nprint(n)"
    tests = [{"stdin": str(number), "stdout": str(number)} for number in (0, 600, 0, 600)]
    (result,) = graders.grade(hasty, tests, program)
    assert (result.status, result.terms) == ("too_slow", {"passed": 0.25})


def test_time_in_the_queue_is_no_time_of_the_program(graders: Graders) -> None:
    one_place = graders.make(total_seconds=3.0, max_parallel=1)
    program = "import time\ntime.sleep(0.8)\nprint(7)"
    results = graders.grade(one_place, SUM[:1], *[program] * 5)
    assert [result.status for result in results] == ["correct"] * 5


# --- several tests, scores, failures of the sandbox ------------------------------------------------------------------

SQUARES = [{"stdin": str(number), "stdout": str(number**2)} for number in range(8)]
UP_TO_FIVE = "n = int(input())\nprint(n * n if n < 5 else 0)"


def test_partial_scores_are_in_proportion_and_else_all_or_nothing(graders: Graders) -> None:
    for options, score in (({"partial": True, "correct": 2.0, "wrong": -2.0}, 0.5), ({}, 0.0)):
        (result,) = graders.grade(graders.make(**options), SQUARES, UP_TO_FIVE)
        assert (result.score, result.status, result.terms) == (score, "wrong", {"passed": 5 / 8})
    generous = graders.make(correct=2.0, wrong=-2.0)
    right, wrong = graders.grade(generous, SQUARES, "print(int(input()) ** 2)", "print(1)")
    assert (right.score, wrong.score) == (2.0, -2.0)
    assert wrong.terms == {"passed": 0.0}


def test_testing_stops_at_the_first_failure_unless_partial(graders: Graders, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    original = Sandbox._run_in_a_session

    async def counted(self: Sandbox, job: str, *more: Any) -> Any:
        started.append(json.loads(job)["stdin"])
        return await original(self, job, *more)

    monkeypatch.setattr(Sandbox, "_run_in_a_session", counted)
    for partial, count in ((False, 1), (True, 8)):
        started.clear()
        one_by_one = graders.make(partial=partial, max_parallel=1)
        program = "import sys\nprint(-1)"
        (result,) = graders.grade(one_by_one, SQUARES, program)
        assert result.status == "wrong"
        assert count <= len(started) <= count + 1 - partial


def test_the_share_before_the_first_failure_does_not_depend_on_which_test_ends_first(graders: Graders) -> None:
    side_by_side = graders.make(max_parallel=8)
    program = "import time\nn = int(input())\ntime.sleep(0.5 if n < 5 else 0)\nprint(n * n if n < 5 else 0)"
    (result,) = graders.grade(side_by_side, SQUARES, program)
    assert (result.status, result.terms) == ("wrong", {"passed": 5 / 8})


def test_a_sandbox_that_fails_twice_is_an_error_and_once_is_not(
    graders: Graders, reward: CodeReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reward._sandbox._tool.open
    failures = ["no memory", "no process"]

    async def fail(name: str) -> Any:
        if failures:
            raise ToolError(failures.pop())
        return await original(name)

    monkeypatch.setattr(reward._sandbox._tool, "open", fail)
    (result,) = graders.grade(reward, SUM[:1], RIGHT_WITH_STDIN[0])
    assert (result.score, result.status) == (0.0, "error")
    failures.append("no luck")
    assert [result.status for result in graders.grade(reward, SUM[:1], RIGHT_WITH_STDIN[0])] == ["correct"]


def test_a_zygote_that_dies_under_a_program_is_not_the_programs_fault(graders: Graders) -> None:
    own = graders.make(max_parallel=1)

    async def main() -> RewardResult:
        await own.start()
        zygote = own._sandbox._tool._zygote
        assert zygote is not None
        task = asyncio.create_task(
            own.score(problem(SUM), fenced(f"import time\ntime.sleep(1)\n{RIGHT_WITH_STDIN[0]}"), EMPTY)
        )
        await asyncio.sleep(0.5)
        zygote._process.kill()
        return await task

    assert graders.runner.run(main()).status == "correct"


def test_a_grading_that_is_given_up_leaves_no_session(graders: Graders) -> None:
    own = graders.make(max_parallel=2)

    async def main() -> int:
        task = asyncio.create_task(own.score(problem(SUM), fenced("while True: pass"), EMPTY))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (result,) = await asyncio.gather(own.score(problem(SUM), fenced(RIGHT_WITH_STDIN[0]), EMPTY))
        assert result.status == "correct"
        return own._sandbox._tool._places._value

    before = own._sandbox._tool._places._value
    assert graders.runner.run(main()) == before


def test_a_program_that_is_too_long_is_wrong(graders: Graders, reward: CodeReward) -> None:
    (result,) = graders.grade(reward, SUM, RIGHT_WITH_STDIN[0] + "\n#" + "x" * 100_000)
    assert (result.status, result.terms) == ("wrong", {"passed": 0.0})
    (result,) = graders.grade(reward, SUM, RIGHT_WITH_STDIN[0] + "\n#" + "'" * 99_000)
    assert result.status == "correct"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_seconds": 0}, "timeout_seconds must be positive, got 0"),
        ({"total_seconds": 0}, "total_seconds must be positive, got 0"),
        ({"max_parallel": 0}, "max_parallel must be at least 1, got 0"),
        ({"tolerance": -1}, "tolerance must be at least 0 and below 1, got -1"),
        ({"memory_mb": 1}, "memory_mb must be at least 256, got 1"),
        ({"sandbox": {"tier": "T3"}}, "tier must be auto, T2, T1 or T0, got 'T3'"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeReward(**options)


def test_a_misspelt_option_of_the_sandbox_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"CodeReward\.sandbox\.options: unknown option 'teir'; did you mean `tier`"):
        CodeReward(sandbox={"teir": "T1"})
