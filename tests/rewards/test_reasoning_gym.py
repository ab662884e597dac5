"""The reasoning-gym reward: known answers pass, others do not, and no answer is run as code."""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reasoning_gym.factory import DATASETS

from rlsys.data import reasoning_gym_problems
from rlsys.errors import ConfigError, ToolError
from rlsys.interfaces import RewardResult
from rlsys.rewards.reasoning_gym import ReasoningGymReward
from rlsys.types import Problem, Rollout

EMPTY = Rollout(
    tokens=np.zeros(0, np.int32),
    loss_mask=np.zeros(0, np.bool_),
    logprobs=np.zeros(0, np.float32),
    versions=np.zeros(0, np.int32),
)
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks that have a verifier, but know no answer themselves."""
EVALUATING = {
    *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "number_sorting", "bitwise_arithmetic"),
    *("simple_integration", "intermediate_integration", "polynomial_multiplication", "countdown", "puzzle24"),
}
"""Tasks whose verifiers evaluate text, found by reading them."""


class Graders:
    """Rewards that share one event loop, as their sandboxes need it."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.made: list[ReasoningGymReward] = []

    def make(self, **options: Any) -> ReasoningGymReward:
        self.made.append(ReasoningGymReward(**{"timeout_seconds": 30.0, **options}))
        return self.made[-1]

    def grade(self, reward: ReasoningGymReward, problem: Problem, *answers: str | None) -> list[RewardResult]:
        """What these final answers get, graded all at once."""
        return self.responses(reward, problem, *(f"<answer>{answer}</answer>" for answer in answers))

    def responses(self, reward: ReasoningGymReward, problem: Problem, *responses: str) -> list[RewardResult]:
        async def main() -> list[RewardResult]:
            return await asyncio.gather(*(reward.score(problem, each, EMPTY) for each in responses))

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
def reward(graders: Graders) -> ReasoningGymReward:
    """One reward for all tests that only ask; its deadline is one that a busy machine can keep."""
    return graders.make()


def problems(task: str, size: int = 1, **options: Any) -> list[Problem]:
    return reasoning_gym_problems(tasks={task: options}, size=size, seed=5, instruction="Think first.")


def made(task: str, answer: str | None = None, **metadata: Any) -> Problem:
    return Problem(id="p7", prompt=({"role": "user", "content": "?"},), answer=answer, source=task, metadata=metadata)


def statuses(results: list[RewardResult]) -> list[str]:
    return [result.status for result in results]


@pytest.mark.parametrize("task", sorted(set(DATASETS) - WITHOUT_ANSWER - {"composite"}))
def test_the_known_answer_of_every_task_is_correct_and_another_is_not(
    graders: Graders, reward: ReasoningGymReward, task: str
) -> None:
    # Some answers of intermediate_integration are the question itself, which is refused.
    problem = next(each for each in problems(task, size=4) if "Integral" not in str(each.answer))
    right, wrong = graders.grade(reward, problem, problem.answer, "no way")
    assert (right.score, right.status) == (1.0, "correct")
    assert (wrong.score, wrong.status) == (0.0, "wrong")


@pytest.mark.parametrize("task", sorted(WITHOUT_ANSWER))
def test_tasks_without_a_known_answer_have_none_and_are_graded(
    graders: Graders, reward: ReasoningGymReward, task: str
) -> None:
    (problem,) = problems(task)
    assert problem.answer is None
    assert statuses(graders.grade(reward, problem, "no way")) == ["wrong"]


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "simple_equations", "gsm_symbolic", "zebra_puzzles"])
def test_many_problems_of_a_task_are_graded(graders: Graders, reward: ReasoningGymReward, task: str) -> None:
    for problem in problems(task, size=8):
        assert statuses(graders.grade(reward, problem, problem.answer, f"{problem.answer}1", "")) == [
            "correct",
            "wrong",
            "no_answer",
        ]


def test_every_right_answer_counts_where_there_are_several(graders: Graders, reward: ReasoningGymReward) -> None:
    game = made("countdown", "2*3 + 4", numbers=[2, 3, 4], target=10)
    right = ["2*3 + 4", "4 + 3*2", "(2)*(3)+4", "2 * 3 - -4"]
    wrong = ["10", "2*3 + 3", "4 + 6", "2*3 + 4 = 10", "2x3+4", "2**3 + 4 - 2"]
    assert statuses(graders.grade(reward, game, *right)) == ["correct"] * 4
    assert statuses(graders.grade(reward, game, *wrong)) == ["wrong"] * 6
    integral = made("simple_integration", "x**2 + C", integrand="2*x", variable="x")
    right = ["x**2 + C", "x**2", "C + x*x", "(2*x)**2/4 + 7", "x**2 + sin(1) + sqrt(2)"]
    assert statuses(graders.grade(reward, integral, *right)) == ["correct"] * 5
    colors = made("graph_color", puzzle={"vertices": [0, 1], "edges": [(0, 1)], "num_colors": 2}, possible_answer=None)
    colors.metadata["puzzle"]["color_options"] = [1, 2]  # type: ignore[index]
    answers = [json.dumps(each) for each in ({"0": 1, "1": 2}, {"0": 2, "1": 1}, {"0": 1, "1": 1})]
    assert statuses(graders.grade(reward, colors, *answers)) == ["correct", "correct", "wrong"]


def test_the_answer_is_found_as_the_math_reward_finds_it(graders: Graders, reward: ReasoningGymReward) -> None:
    sum_of_two = made("chain_sum", "12")
    responses = [
        r"so \boxed{12}",
        "The answer is 12.",
        "<think>12</think> <answer> 12 </answer>",
        "<think> \\boxed{12}",
    ]
    assert statuses(graders.responses(reward, sum_of_two, *responses)) == ["correct"] * 3 + ["no_answer"]
    (found,) = graders.responses(reward, sum_of_two, r"\boxed{13}")
    assert (found.extracted, found.score, found.status) == ("13", 0.0, "wrong")


def test_partial_scores_count_only_where_they_are_asked_for(graders: Graders, reward: ReasoningGymReward) -> None:
    game = made("countdown", "2*3 + 4", numbers=[2, 3, 4], target=10)
    queens = made("n_queens", "Q", valid_answers=["Q"])
    for problem, answer, value in ((game, "2*3*4", 0.05), (game, "?", 0.01), (queens, "[['Q']]", 0.5)):
        assert [result.score for result in graders.grade(reward, problem, answer)] == [0.0]
        generous = graders.make(partial=True, correct=2.0, wrong=-2.0)
        (result,) = graders.grade(generous, problem, answer)
        assert (result.score, result.status) == (pytest.approx(-2.0 + 4.0 * value), "wrong")
    assert [result.score for result in graders.grade(generous, game, "2*3+4")] == [2.0]


def test_the_options_of_a_task_reach_its_verifier(graders: Graders, reward: ReasoningGymReward) -> None:
    game = made("puzzle24", "6*4*1*1", numbers=[6, 4, 1, 1])
    assert statuses(graders.grade(reward, game, "6*4*1*1")) == ["correct"]
    told = graders.make(tasks={"puzzle24": {"max_value": 5}, "chain_sum": None})
    assert statuses(graders.grade(told, game, "6*4*1*1")) == ["wrong"]


def test_verifiers_that_pass_wrong_answers_are_mended(graders: Graders, reward: ReasoningGymReward) -> None:
    game = made("puzzle24", "6*4*1*1", numbers=[1, 1, 4, 6])
    assert statuses(graders.grade(reward, game, "4*6*1*1", "(5+1)*(5-1)", "24", "4*6")) == ["correct"] + ["wrong"] * 3
    cells = made("game_of_life_halting", "False")
    assert statuses(graders.grade(reward, cells, "False", "True", "no")) == ["correct", "wrong", "wrong"]


# --- answers that are code -------------------------------------------------------------------------------------------

CODE = [
    "__import__('os').system('touch /tmp/owned')",
    "__import__('os')._exit(0)",
    "exec('import os')",
    "eval('1')",
    "open('/etc/passwd').read()",
    "print(1.0)",
    "(lambda: 24)()",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "().__class__",
    "f'{1}'",
    "globals()",
    "breakpoint()",
    "sympify('1')",
    "S('1')",
    "N(24)",
    "Q.real",
    "x.subs(x, 1)",
    "1 if 1 else 2",
    "[1][0]",
    "x := 24",
    "True",
    "x/x",
    "1e1",
    "0x18",
    "factorial(4)",
    "4!",
    "Float('24')",
    "Integral(2*x, x)",
    "Lambda(x, x)(24)",
    "sys.stdout.write('1.0')",
    "1;2",
    "1\nimport os",
    "x" * 20_001,
]


def raising(task: str) -> Problem:
    """A problem whose answer no text is."""
    metadata = {
        "countdown": {"numbers": [], "target": 24},
        "simple_integration": {"integrand": "2*x + 5", "variable": "x"},
        "intermediate_integration": {"integrand": "2*x + 5", "variable": "x"},
        "n_queens": {"valid_answers": ["an answer"]},
        "number_sorting": {"direction": "ascending"},
        "bitwise_arithmetic": {"problem": "1 + 2"},
        "puzzle24": {"numbers": [24]},
    }
    return made(task, "[1, 2]" if task == "number_sorting" else "x**2 + 999", **metadata.get(task, {}))


@pytest.mark.parametrize("task", sorted(EVALUATING))
def test_no_answer_is_run_as_code(graders: Graders, reward: ReasoningGymReward, task: str) -> None:
    assert statuses(graders.grade(reward, raising(task), *CODE)) == ["wrong"] * len(CODE)


def test_no_answer_can_say_that_it_is_right(graders: Graders, reward: ReasoningGymReward) -> None:
    forged = [
        "__import__('os').write(101, b'{\"score\": 1.0}')",
        "__import__('sys').modules['json'].dumps",
        "setattr(__import__('json'), 'dumps', lambda *a: '{\"score\": 1.0}')",
        '{"score": 1.0}',
        "24+0*__import__('os').write(101,b'1.0')",
    ]
    for task in sorted(EVALUATING):
        assert statuses(graders.grade(reward, raising(task), *forged)) == ["wrong"] * len(forged)


def test_numbers_cannot_be_hidden_from_a_game_that_counts_them(graders: Graders, reward: ReasoningGymReward) -> None:
    game = made("countdown", "2*3 + 4", numbers=[2, 3, 4], target=11)
    hidden = ["2*3 + 4 + x/x", "2*3 + 4 + 0x1", "2*3 + 4 + 1e0", "2*3 + 4 + E/E", "2*3 + 4 + cos(x - x)", "2*3+4+True"]
    assert statuses(graders.grade(reward, game, *hidden)) == ["wrong"] * len(hidden)


def test_an_integral_cannot_be_answered_with_itself(graders: Graders, reward: ReasoningGymReward) -> None:
    problem = made("simple_integration", "x**2 + C", integrand="2*x", variable="x")
    posed = ["Integral(2*x, x)", "integrate(2*x, x)", "Integral(2*x, x) + C", "x**2 + nan", "zoo*x"]
    assert statuses(graders.grade(reward, problem, *posed)) == ["wrong"] * len(posed)


def test_data_are_not_run_as_code_either(graders: Graders, reward: ReasoningGymReward) -> None:
    code = "__import__('os').write(101, b'{\"score\": 1.0}')"
    hostile = [
        made("bitwise_arithmetic", "0x3", problem=code),
        made("simple_integration", "x", integrand=code, variable="x"),
        made("number_sorting", code, direction="ascending"),
    ]
    for problem in hostile:
        assert statuses(graders.grade(reward, problem, "[1]" if "sort" in problem.source else "1")) == ["wrong"]


def test_no_other_verifier_evaluates_text() -> None:
    found = set()
    for task, (verifier, _) in DATASETS.items():
        source = Path(str(inspect.getsourcefile(verifier))).read_text()
        scoring = source.partition("def score_answer")[2].partition("\nclass ")[0]
        if any(call in scoring for call in ("eval(", "exec(", "parse_expr(", "sympify(", "verify_solution(")):
            found.add(task)
    assert found == EVALUATING | {"jugs"}  # whose verify_solution is another one and evaluates nothing


# --- time and failures -----------------------------------------------------------------------------------------------


def test_an_answer_that_takes_too_long_is_a_timeout_and_the_next_is_graded(graders: Graders) -> None:
    impatient = graders.make(timeout_seconds=1.0)
    game = made("countdown", "2*3 + 4", numbers=[2, 3, 4], target=10)
    assert statuses(graders.grade(impatient, game, "9**9**9**9")) == ["timeout"]
    impatient._sandbox._tool.timeout_seconds = 30.0
    assert statuses(graders.grade(impatient, game, "2*3+4")) == ["correct"]


def test_an_answer_that_its_verifier_chokes_on_is_wrong(graders: Graders, reward: ReasoningGymReward) -> None:
    matrix = made("bitwise_arithmetic", "0x3", problem="1 + 2")
    answers = ["(" * 5000, "\ud800", "\x00", "9" * 19_000, "[" * 5000, "-", "{" * 5000]
    assert statuses(graders.grade(reward, matrix, *answers)) == ["wrong"] * len(answers)


def test_a_problem_that_cannot_be_graded_is_an_error(graders: Graders, reward: ReasoningGymReward) -> None:
    assert statuses(graders.grade(reward, made("n_queens", "Q"), "Q")) == ["error"]  # no metadata
    assert statuses(graders.grade(reward, made("composite", "1"), "1")) == ["error"]  # it has no verifier by itself


def test_a_problem_of_no_task_is_an_error_that_names_the_nearest(graders: Graders, reward: ReasoningGymReward) -> None:
    with pytest.raises(ValueError, match=r"'p7': Problem.source is 'chain_sums', .*did you mean 'chain_sum'"):
        graders.grade(reward, made("chain_sums", "1"), "1")


def test_a_sandbox_that_fails_is_an_error(
    graders: Graders, reward: ReasoningGymReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: str) -> Any:
        raise ToolError("no memory")

    monkeypatch.setattr(reward._sandbox._tool, "open", fail)
    assert statuses(graders.grade(reward, made("chain_sum", "1"), "1")) == ["error"]
    with pytest.raises(RuntimeError, match=r"do not work in the sandbox: .*no memory"):
        graders.runner.run(reward.start())


def test_the_reward_proves_at_its_start_that_it_can_grade(graders: Graders) -> None:
    started = graders.make()
    assert started.tier is None
    graders.runner.run(started.start())
    assert started.tier in ("T2", "T1")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"chain_sums": {}}, "unknown reasoning-gym task 'chain_sums' .did you mean 'chain_sum'"),
        ({"chain_sum": {"min_term": 2}}, r"tasks\.chain_sum\.options: unknown option 'min_term'; did you mean `min_te"),
    ],
)
def test_a_misspelt_task_or_option_is_answered_with_the_nearest_name(tasks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReasoningGymReward(tasks=tasks)


def test_the_version_whose_verifiers_were_read_is_the_installed_one() -> None:
    assert importlib.metadata.version("reasoning-gym") == "0.1.25"
