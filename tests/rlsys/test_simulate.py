"""The simulation: its clock, its models against hand-worked cases, and what holds of every simulated run."""

import asyncio
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rlsys.cli import app
from rlsys.config import Config
from rlsys.config_file import load_config, to_yaml
from rlsys.errors import ActorDiedError, ActorTimeoutError, ConfigError, DataError, FleetLostError
from rlsys.records import RunDirectory
from rlsys.simulate import clock
from rlsys.simulate.config import SimulateConfig
from rlsys.simulate.engine import EngineModel
from rlsys.simulate.fit import fit, measured
from rlsys.simulate.simulation import Simulated, simulate, without_faults
from rlsys.simulate.sizes import modelled, of_run
from rlsys.simulate.worker import Process
from rlsys.types import Problem, Rollout, RolloutGroup

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def config(*overrides: str) -> Config:
    """A small run: 4 workers of 16 rollouts, steps of 8 groups of 4, responses of about 100 tokens."""
    return load_config(
        QUICKSTART,
        [
            "actors.count=4",
            "actors.max_rollouts=16",
            "actors.max_model_tokens=4096",
            "rl.groups_per_step=8",
            "rl.group_size=4",
            "rl.steps=6",
            "rl.sampling.max_response_tokens=2000",
            "simulate.response_tokens=100",
            "simulate.response_tokens_p99=800",
            "simulate.learn_seconds=2",
            "simulate.start_seconds=10",
            *overrides,
        ],
    )


# --- the clock -------------------------------------------------------------------------------------------------------


def test_a_day_passes_in_no_time() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(86_400 * 3)
        return loop.time()

    began = time.monotonic()
    assert clock.run(main()) == pytest.approx(86_400 * 3)
    assert time.monotonic() - began < 60


def test_timers_run_in_the_order_of_their_times_and_deadlines_hold() -> None:
    async def main() -> list[tuple[str, float]]:
        loop, seen = asyncio.get_running_loop(), []

        async def later(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((name, loop.time()))

        tasks = [asyncio.create_task(later(name, seconds)) for name, seconds in (("c", 3), ("a", 1), ("b", 2))]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 2.5)
        seen.append(("deadline", loop.time()))
        await asyncio.gather(*tasks)
        return seen

    assert clock.run(main()) == [("a", 1.0), ("b", 2.0), ("deadline", 2.5), ("c", 3.0)]


def test_waiting_for_what_never_comes_is_an_error_and_not_a_hang() -> None:
    async def main() -> None:
        await asyncio.sleep(7)
        await asyncio.Event().wait()

    with pytest.raises(clock.StandstillError, match="at 7 s every task waits"):
        clock.run(main())


# --- the engine ------------------------------------------------------------------------------------------------------


def engine(*, a: float = 0.1, b: float = 0.1, prefill: float = 50.0, max_running: int = 2) -> EngineModel:
    return EngineModel(seconds=a, seconds_per_rollout=b, prefill=prefill, max_running=max_running)


async def ends(model: EngineModel, *tokens: int, prompt: int = 0) -> list[float]:
    """When generations of these lengths end that begin together."""

    async def one(count: int) -> float:
        await model.generate(count, prompt=prompt)
        return asyncio.get_running_loop().time()

    return await asyncio.gather(*(one(count) for count in tokens))


def test_generations_share_an_engine_as_worked_out_by_hand() -> None:
    # Two run: 0.1 + 2 * 0.1 = 0.3 s a token. The first ends after 10 * 0.3 = 3 s. The third takes its place and ends
    # after 5 more tokens at 0.3 s, at 4.5 s. The second has 20 - 15 = 5 left, alone at 0.2 s a token: 5.5 s.
    async def main() -> None:
        model = engine()
        assert await ends(model, 10, 20, 5) == pytest.approx([3.0, 5.5, 4.5])
        assert model.tokens == pytest.approx(35)
        assert model.busy_seconds == pytest.approx(5.5)
        assert model.rollout_seconds == pytest.approx(2 * 4.5 + 1.0)

    clock.run(main())


def test_reading_a_prompt_stops_the_writing() -> None:
    async def main() -> None:  # 100 tokens at 50/s are 2 s, then 10 tokens at 0.2 s
        assert await ends(engine(), 10, prompt=100) == pytest.approx([4.0])

    clock.run(main())


def test_a_paused_engine_writes_nothing_and_goes_on_with_other_weights() -> None:
    async def main() -> None:
        model, loop = engine(), asyncio.get_running_loop()
        model.resume(3)
        task = asyncio.create_task(model.generate(10))  # 2 s
        await asyncio.sleep(1)
        model.pause()
        late = asyncio.create_task(model.generate(10))
        await asyncio.sleep(5)
        assert model.tokens == pytest.approx(5)
        model.resume(4)
        assert await task == (3, 4)
        assert loop.time() == pytest.approx(6 + 5 * 0.3)
        assert await late == (4, 4)
        assert loop.time() == pytest.approx(7.5 + 5 * 0.2)
        assert model.busy_seconds == pytest.approx(1 + 2.5)

    clock.run(main())


def test_a_generation_that_is_given_up_frees_its_place_at_once() -> None:
    async def main() -> None:
        model = engine()
        first, second, third = (asyncio.create_task(model.generate(count)) for count in (100, 10, 10))
        await asyncio.sleep(1.5)  # 5 tokens each
        first.cancel()
        await second  # 5 left beside the third
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)
        await third  # 5 left alone
        assert asyncio.get_running_loop().time() == pytest.approx(4.0)
        assert model.num_unfinished == 0

    clock.run(main())


def token_by_token(lengths: list[int], *, a: float, b: float, max_running: int) -> list[float]:
    """The same engine, one forward pass after the other."""
    now, left, ended = 0.0, list(lengths), [0.0] * len(lengths)
    waiting, running = list(range(len(lengths))), []
    while waiting or running:
        while waiting and len(running) < max_running:
            running.append(waiting.pop(0))
        now += a + b * len(running)
        for index in list(running):
            left[index] -= 1
            if not left[index]:
                ended[index] = now
                running.remove(index)
    return ended


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 8))
def test_from_event_to_event_is_the_same_as_token_by_token(lengths: list[int], max_running: int) -> None:
    async def main() -> list[float]:
        return await ends(engine(a=0.01, b=0.003, max_running=max_running), *lengths)

    expected = token_by_token(lengths, a=0.01, b=0.003, max_running=max_running)
    assert clock.run(main()) == pytest.approx(expected, rel=1e-3)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_lengths_have_the_median_and_the_tail_that_are_asked_for_and_siblings_are_alike() -> None:
    model = SimulateConfig(response_tokens=1000, response_tokens_p99=8000, problem_share=0.5)
    draw = modelled(model, seed=3)
    lengths = np.array([[size.tokens for size in draw(problem, 8)] for problem in range(4000)])
    assert np.median(lengths) == pytest.approx(1000, rel=0.05)
    assert np.quantile(lengths, 0.99) == pytest.approx(8000, rel=0.08)
    logs = np.log(lengths)
    assert logs.mean(1).var() / logs.var() == pytest.approx(0.5 + 0.5 / 8, abs=0.03)


def test_tool_calls_have_the_mean_that_is_asked_for() -> None:
    draw = modelled(SimulateConfig(tool_calls=1.5, tool_seconds=0.3, tool_seconds_p99=3.0), seed=0)
    calls = [size.tools for problem in range(1000) for size in draw(problem, 4)]
    assert np.mean([len(one) for one in calls]) == pytest.approx(1.5, rel=0.05)
    assert np.median([seconds for one in calls for seconds in one]) == pytest.approx(0.3, rel=0.08)


def test_a_problem_has_the_same_sizes_whoever_asks_and_whenever() -> None:
    first, second = (modelled(SimulateConfig(tool_calls=1), seed=1) for _ in range(2))
    second(7, 4)
    assert first(5, 4) == second(5, 4)
    assert first(5, 4) != first(6, 4)
    assert first(5, 4) != modelled(SimulateConfig(tool_calls=1), seed=2)(5, 4)


# --- a worker --------------------------------------------------------------------------------------------------------


class Sleeper(Process):
    async def sleep(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "awake"


def test_a_simulated_process_answers_misses_deadlines_and_dies_like_a_real_one() -> None:
    async def main() -> None:
        sleeper = Sleeper("sleeper 1", call_seconds=100)
        assert await sleeper.call("sleep", 5.0) == "awake"
        with pytest.raises(ActorTimeoutError, match=r"sleeper 1\.sleep did not answer within 2 s"):
            await sleeper.call("sleep", 5.0, seconds=2.0)
        call = asyncio.create_task(sleeper.call("sleep", 5.0))
        await asyncio.sleep(1)
        sleeper.kill()
        with pytest.raises(ActorDiedError, match="sleeper 1 died during sleep"):
            await call
        with pytest.raises(ActorDiedError):
            await sleeper.call("sleep", 1.0)
        assert asyncio.get_running_loop().time() == pytest.approx(8.0)

    clock.run(main())


# --- whole runs ------------------------------------------------------------------------------------------------------


def settled(one: Simulated) -> Simulated:
    """Without what depends on the machine."""
    return replace(one, driver_share=0.0)


@pytest.mark.parametrize("overrides", [[], ["rl.max_staleness=2"], ["simulate.hours_between_deaths=0.1"]])
def test_the_same_configuration_takes_the_same_course(overrides: list[str]) -> None:
    first, second = (settled(simulate(config(*overrides))) for _ in range(2))
    assert first == second
    assert first != settled(simulate(config(*overrides, "seed=5")))


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("update", ["in_flight", "at_groups"])
@pytest.mark.parametrize("deaths", ["null", "0.05"])
def test_no_run_loses_a_problem_or_breaks_the_bound(staleness: int, update: str, deaths: str) -> None:
    found = simulate(
        config(
            f"rl.max_staleness={staleness}",
            f"rl.update={update}",
            f"simulate.hours_between_deaths={deaths}",
            "simulate.hang_share=0.3",
            "actors.answer_seconds=5",
            "actors.attempts=100",
        )
    )
    counts = found.ledger
    assert counts["issued"] == counts["in_flight"] + counts["done"] + counts["trained"] + counts["dropped"]
    assert counts["trained"] == 8 * (6 + staleness + 1)
    assert counts["dropped"] == counts["refused"] == counts["discarded"] == 0
    assert found.staleness_max <= staleness
    assert 0 <= found.engine_idle <= 1
    assert 0 <= found.learner_idle <= 1
    parts = found.rollout_seconds + found.learn_seconds + found.publish_seconds
    assert parts == pytest.approx(found.step_seconds)


def test_a_synchronous_step_takes_what_is_worked_out_by_hand() -> None:
    # All 32 responses have 100 tokens; 4 workers have 8 each: 100 * (0.01 + 8 * 0.001) = 1.8 s, and 2 prompts of 50
    # tokens at 1000/s 0.1 s. Learning: 2 s + 32 * (100 + 50) * 0.001 / 2 ranks = 4.4 s. Publishing: 0.5 + 1e9 / 1e9 s.
    found = simulate(
        config(
            "simulate.response_tokens_p99=100",
            "simulate.prompt_tokens=50",
            "simulate.prefill_tokens_per_second=1000",
            "simulate.decode_seconds=0.01",
            "simulate.decode_seconds_per_rollout=0.001",
            "simulate.reward_seconds=0",
            "simulate.learn_seconds_per_token=0.001",
            "simulate.sync_seconds=0.5",
            "simulate.weight_bytes=1e9",
            "simulate.link_bytes_per_second=1e9",
            "simulate.step_seconds=0.25",
        )
    )
    assert found.rollout_seconds == pytest.approx(1.9, rel=1e-3)
    assert found.learn_seconds == pytest.approx(4.4, rel=1e-3)
    assert found.publish_seconds == pytest.approx(1.5, rel=1e-3)
    assert found.step_seconds == pytest.approx(1.9 + 4.4 + 1.5 + 0.25, rel=1e-3)
    assert found.engine_idle == pytest.approx(1 - 1.9 / 8.05, rel=1e-2)
    assert found.learner_idle == pytest.approx(1 - 4.4 / 8.05, rel=1e-2)
    assert found.tokens_per_second == pytest.approx(3200 / 8.05, rel=1e-2)


def test_deaths_make_a_run_slower_and_lose_nothing() -> None:
    ill = config("simulate.hours_between_deaths=0.005", "actors.attempts=100")
    found, well = simulate(ill), simulate(without_faults(ill))
    assert well.deaths == well.redispatched == 0
    assert found.deaths >= 3
    assert found.redispatched > 0
    assert found.step_seconds > well.step_seconds
    assert found.ledger["trained"] == well.ledger["trained"]
    assert not found.dropped


def test_silent_deaths_cost_more_than_loud_ones_until_the_deadline_finds_them() -> None:
    loud = ["simulate.hours_between_deaths=0.05", "actors.attempts=100", "actors.answer_seconds=60"]
    silent = simulate(config(*loud, "simulate.hang_share=1"))
    assert silent.deaths > 0
    assert silent.step_seconds > simulate(config(*loud)).step_seconds


def test_a_fleet_that_dies_faster_than_it_starts_ends_with_a_typed_error() -> None:
    with pytest.raises(FleetLostError):
        simulate(
            config("simulate.hours_between_deaths=0.0005", "simulate.start_seconds=300", "actors.wait_seconds=100")
        )


def test_overlapping_learning_and_generation_is_faster_than_taking_turns() -> None:
    times = [simulate(config(f"rl.max_staleness={bound}")).step_seconds for bound in (0, 1, 4)]
    assert times[0] > times[1] > times[2]


def test_groups_that_teach_nothing_are_dropped_and_replaced() -> None:
    found = simulate(config("rl.skip_uninformative=true", "simulate.uninformative=0.4"))
    assert found.dropped.keys() == {"uninformative"}
    share = found.ledger["dropped"] / (found.ledger["dropped"] + found.ledger["trained"])
    assert share == pytest.approx(0.4, abs=0.15)
    assert found.ledger["trained"] == 8 * 7


def test_a_hundred_workers_have_equal_work() -> None:
    found = simulate(config("actors.count=100", "rl.groups_per_step=200", "rl.steps=2"))
    assert found.workers == 100
    assert found.ledger["trained"] == 200 * 3


# --- from a real run -------------------------------------------------------------------------------------------------

A, B = 0.004, 0.0005
LEARN, LEARN_PER_TOKEN, PUBLISH, REST = 0.5, 2e-4, 0.3, 0.1


def written_run(folder: Path, *overrides: str, steps: int = 8) -> Path:
    """The folder of a run on engines of which every number is known."""
    setup = config(f"run_dir={folder}", f"rl.steps={steps}", "simulate=null", *overrides)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(setup))
    directory = RunDirectory.__new__(RunDirectory)
    directory.folder = folder
    draw = modelled(SimulateConfig(response_tokens=100, response_tokens_p99=800), seed=1)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            lengths = [[size.tokens for size in draw(8 * step + group, 4)] for group in range(8)]
            flat = [tokens for group in lengths for tokens in group]
            seconds = [sum(A + B * sum(other > k for other in flat) / 4 for k in range(tokens)) for tokens in flat]
            rollouts = iter(zip(flat, seconds, strict=True))
            groups = [
                RolloutGroup(
                    problem=Problem(id=str(number), prompt=({"role": "user", "content": ""},)),
                    rollouts=tuple(rollout(*next(rollouts)) for _ in group),
                )
                for number, group in enumerate(lengths)
            ]
            directory.write_rollouts(f"rl-step-{step:06d}", groups)
            learn = LEARN + LEARN_PER_TOKEN / 2 * sum(tokens + 20 for tokens in flat)
            line = {"rollout": max(seconds), "learn": learn, "publish": PUBLISH}
            named = {f"seconds/{name}": value for name, value in line.items()}
            whole = sum(line.values()) + REST
            file.write(json.dumps({"stage": "rl", "step": step, "seconds/step": whole, **named}) + "\n")
    return folder


def rollout(tokens: int, seconds: float) -> Rollout:
    length = 20 + tokens
    return Rollout(
        tokens=np.zeros(length, np.int32),
        loss_mask=np.arange(length) >= 20,
        logprobs=np.zeros(length, np.float32),
        versions=np.zeros(length, np.int32),
        metrics={"rollout_seconds": seconds, "tool_calls": 0.0, "tool_seconds": 0.0, "reward_seconds": 0.0},
    )


def test_the_numbers_of_a_run_are_found_again(tmp_path: Path) -> None:
    found = fit(written_run(tmp_path / "run"))
    assert found.decode_seconds == pytest.approx(A, rel=0.02)
    assert found.decode_seconds_per_rollout == pytest.approx(B, rel=0.02)
    assert found.learn_seconds == pytest.approx(LEARN, rel=0.02)
    assert found.learn_seconds_per_token == pytest.approx(LEARN_PER_TOKEN, rel=0.02)
    assert found.transfer_seconds == pytest.approx(PUBLISH)
    assert found.step_seconds == pytest.approx(REST)


def test_a_run_and_its_simulation_agree(tmp_path: Path) -> None:
    real = measured(written_run(tmp_path / "run"))
    assert real.steps == 7  # the first one is cold
    model = fit(tmp_path / "run")
    found = simulate(replace(real.config, simulate=model, rl=replace(real.config.rl, steps=real.steps)))
    assert found.step_seconds == pytest.approx(real.step_seconds, rel=0.1)
    assert found.learn_seconds == pytest.approx(real.learn_seconds, rel=0.05)


def test_the_rollouts_of_a_run_come_again_in_its_order(tmp_path: Path) -> None:
    draw = of_run(written_run(tmp_path / "run", steps=2), seed=0)
    assert draw(1, 4) == draw(17, 4)  # 16 groups, round again
    assert draw(1, 4) != draw(2, 4)
    assert all(size.prompt == 20 for size in draw(3, 4))
    assert {size.tokens for size in draw(1, 9)} <= {size.tokens for size in draw(1, 4)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.max_staleness=2"], r"rl\.max_staleness=2: .*synchronous run"),
        (["actors.max_rollouts=4"], r"32 rollouts in a step, more than .* = 16\); take one with fewer"),
    ],
)
def test_a_run_whose_rollouts_waited_for_one_another_is_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fit(written_run(tmp_path / "run", *overrides))


def test_a_run_without_policy_steps_is_refused(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "run", steps=1)
    with pytest.raises(DataError, match="no policy step"):
        fit(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl is missing"):
        measured(folder)
    (folder / "rollouts" / "rl-step-000001.parquet").unlink()
    with pytest.raises(DataError, match=r"has no rl-step"):
        of_run(folder, seed=0)


# --- the section and the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("simulate.decode_seconds=0", r"simulate\.decode_seconds is 0; it must be above 0"),
        ("simulate.learn_seconds=-1", r"simulate\.learn_seconds is -1; it cannot be below 0"),
        ("simulate.problem_share=1.5", r"simulate\.problem_share is 1\.5; a share is from 0 to 1"),
        ("simulate.response_tokens_p99=10", r"response_tokens_p99 \(10\) is below the median, .* \(100\)"),
        ("simulate.hours_between_deaths=0", r"hours_between_deaths is 0.*never"),
        ("simulate.decode=1", "decode"),
    ],
)
def test_a_model_that_cannot_be_meant_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(override)


def test_a_configuration_needs_no_section_and_one_that_has_it_is_read_back(tmp_path: Path) -> None:
    assert load_config(QUICKSTART).simulate is None
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config()))
    assert load_config(path) == config()


def command(*arguments: str) -> tuple[int, str, Any]:
    result = CliRunner().invoke(app, ["simulate", *arguments], env={"COLUMNS": "140"})
    return result.exit_code, result.output, result.exception


def test_the_command_says_that_everything_is_simulated_and_what_faults_cost(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config()))
    code, output, _ = command(str(path), "--workers", "6", "--learner-gpus", "3", "--faults", "0.1", "--steps", "2")
    assert code == 0
    assert "simulated, not measured: quickstart, 6 rollout workers, 3 learner ranks, 8 x 4 rollouts a step" in output
    assert "simulated, with faults" in output
    assert "a policy step takes" in output


def test_the_command_compares_a_run_with_its_simulation(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "run")
    for arguments in (["--fit", str(folder)], ["rl.max_staleness=0", "--fit", str(folder)]):
        code, output, error = command(*arguments)
        assert code == 0, error
        assert re.search(r"decode_seconds_per_rollout: 0\.000(5|49)", output)
        assert "step time within 10%" in output
    code, output, _ = command(str(folder / "config.yaml"), "rl.max_staleness=2", "--fit", str(folder), "--steps", "2")
    assert code == 0
    assert "measured  " not in output


def test_the_command_without_anything_to_simulate_says_what_to_give() -> None:
    _, _, error = command()
    assert isinstance(error, ConfigError)
    assert "give a configuration to simulate, or a run with --fit" in str(error)
