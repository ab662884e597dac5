"""The RL stage on fakes: it goes on where it was, and a lost learner, fleet or number costs no problem and no sleep."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlsys.checkpoint import CheckpointStore
from rlsys.config import Config
from rlsys.curriculum import endless
from rlsys.errors import ActorError, CheckpointError, ConfigError, FleetLostError, LearnerLostError, WeightSyncError
from rlsys.run import check
from rlsys.stages import Interrupted, Run
from tests.rlsys.rl_stage import World, configured, faked, lines, numbered, run_stage, uneven

IN_ORDER = [
    int(problem.id) for _, problem in zip(range(500), endless(numbered(size=500), seed=3, skip=0), strict=False)
]


@pytest.fixture
def world() -> Iterator[World]:
    with faked() as found:
        yield found


def at(what: str, step: int, error: BaseException, *, times: int = 1) -> Callable[[str, int], None]:
    """Raises the error so many times when `what` is about to happen after `step` policy steps or later."""
    left = [times]

    def before(happens: str, after: int) -> None:
        if happens == what and after >= step and left[0]:
            left[0] -= 1
            raise error

    return before


def in_order(trained: list[list[int]], *, dropped: set[int] | None = None) -> bool:
    """Whether this is all that the stream gives, each problem once, but for what was dropped."""
    flat = [problem for step in trained for problem in step]
    expected = [problem for problem in IN_ORDER if problem not in (dropped or set())][: len(flat)]
    return [sorted(expected[n : n + 2]) for n in range(0, len(expected), 2)] == trained


def newest(config: Config) -> Any:
    return CheckpointStore(Path(config.run_dir) / "rl" / "checkpoints", keep=2).newest(tell=print)


def test_every_problem_is_trained_once_in_the_order_of_the_stream(world: World, tmp_path: Path) -> None:
    config = configured(tmp_path)
    trained = run_stage(world, config)
    assert len(trained) == 8
    assert in_order(trained)
    assert world.published == list(range(9))
    assert [line["step"] for line in lines(config)] == list(range(1, 9))
    assert lines(config)[-1]["ledger/issued"] == lines(config)[-1]["ledger/trained"] == 16
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["dropped"]) == (8, {})


def test_what_is_dropped_is_counted_in_lines_ledger_and_summary(world: World, tmp_path: Path) -> None:
    dull = set(IN_ORDER[1:6:2])
    world.rewards = lambda problem: (1.0, 1.0) if int(problem.id) in dull else (0.0, 1.0)
    config = configured(tmp_path)
    trained = run_stage(world, config)
    assert in_order(trained, dropped=dull)
    assert [line.get("dropped_groups/uninformative", 0) for line in lines(config)] == [1, 2, 0, 0, 0, 0, 0, 0]
    assert lines(config)[-1]["ledger/dropped"] == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dropped"] == {"uninformative": 3}


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_run_that_was_stopped_goes_on_without_a_problem_lost_or_twice(
    world: World, tmp_path: Path, after: int, max_staleness: int
) -> None:
    dull = set(IN_ORDER[3:40:4])
    world.rewards = lambda problem: (1.0, 1.0) if int(problem.id) in dull else (0.0, 1.0)
    world.turns = uneven(after)
    config = configured(tmp_path, f"rl.max_staleness={max_staleness}")

    def stopped(run: Run) -> None:
        def before(what: str, step: int) -> None:
            if (what, step) == ("step" if after else "act", after):
                run.stop.set()

        world.before = before

    with pytest.raises(Interrupted):
        run_stage(world, config, with_run=stopped)
    world.before = lambda _what, _step: None
    trained = run_stage(world, config, resume=True)
    assert in_order(trained, dropped=dull)
    assert [line["step"] for line in lines(config)] == list(range(1, 9))
    assert lines(config)[-1]["ledger/in_flight"] == lines(config)[-1]["ledger/done"] == 0


# --- a lost learner --------------------------------------------------------------------------------------------------

LOST = LearnerLostError("learner rank 0 died during step")


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize(
    ("what", "step", "restored"),
    [
        ("publish", 0, 0),
        ("step", 0, 0),
        ("step", 2, 0),
        ("save", 3, 0),
        ("saved", 3, 0),
        ("publish", 3, 0),
        ("step", 4, 3),
        ("publish", 7, 6),
        ("export", 8, 6),
    ],
)
def test_a_lost_learner_is_started_again_from_the_newest_checkpoint_and_the_engines_stay(
    world: World, tmp_path: Path, what: str, step: int, restored: int, max_staleness: int
) -> None:
    world.before, world.turns = at(what, step, LOST), uneven(step)
    config = configured(tmp_path, f"rl.max_staleness={max_staleness}")
    trained = run_stage(world, config)
    assert in_order(trained), "the model that is left was trained on each problem once"
    assert len(trained) == 8
    assert (world.calls["fleets"], world.calls["policys"], world.calls["policys closed"]) == (1, 2, 2)
    assert world.calls["served"] == 2
    assert any(text.startswith("rl: the learner is lost") for text in world.said)
    assert [name for name, _ in world.noted] == ["learner", "learner"], "it is seen in the run's status"
    assert world.begun[-1] == restored, "what the engines got first from the new learner"
    assert [line["step"] for line in lines(config)] == list(range(1, 9))
    files = sorted(path.name for path in (tmp_path / "run" / "rollouts").glob("rl-step-*.parquet"))
    assert files == [f"rl-step-{number:06d}.parquet" for number in range(1, 9)]
    assert lines(config)[-1]["ledger/trained"] == 16


def test_lines_and_rollouts_of_later_steps_are_set_aside(world: World, tmp_path: Path) -> None:
    world.before = at("step", 5, LOST)
    config = configured(tmp_path)
    run_stage(world, config)
    aside = (tmp_path / "run" / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in aside] == [4, 5]
    assert sorted(path.name for path in (tmp_path / "run" / "rollouts" / "superseded").iterdir()) == [
        "rl-step-000004.parquet",
        "rl-step-000005.parquet",
    ]


def test_a_problem_that_was_in_flight_is_issued_once_more_under_another_attempt(world: World, tmp_path: Path) -> None:
    world.before = at("step", 5, LOST)
    run_stage(world, configured(tmp_path, "rl.max_staleness=1", "rl.checkpoint_every=1"))
    # At the checkpoint of step 5 its batch, 11 and 12, was done; 9 and 10 are trained, 13 and 14 begin after it.
    attempts = Counter(asked["group_id"].rsplit("-", 1)[0] for asked in world.asked)
    assert attempts["rl-11-1"] == attempts["rl-11-2"] == attempts["rl-12-2"] == 1
    assert attempts["rl-10-2"] == attempts["rl-15-2"] == 0


def test_the_critic_is_started_again_with_the_policy(world: World, tmp_path: Path) -> None:
    world.before = at("step", 4, LOST)
    config = configured(tmp_path, "rl.critic.lam=1.0")
    assert in_order(run_stage(world, config))
    assert (world.calls["policys"], world.calls["scorers"], world.calls["scorers closed"]) == (2, 2, 2)
    critic = json.loads((tmp_path / "run" / "rl" / "critic" / "weights.json").read_text())
    assert in_order(critic), "it was restored as well"


@pytest.mark.parametrize("what", ["step", "start"])
def test_a_learner_that_is_lost_again_and_again_ends_the_run(world: World, tmp_path: Path, what: str) -> None:
    starts = [0]

    def before(happens: str, step: int) -> None:
        starting = (happens, step) == ("start", 0)
        starts[0] += starting
        if (happens, step) == ("step", 4) or (what == "start" and starting and starts[0] > 1):
            raise LOST

    world.before = before
    config = configured(tmp_path)
    with pytest.raises(
        LearnerLostError, match=r"lost 4 times in a row without a new checkpoint \(the newest is of step 3"
    ):
        run_stage(world, config)
    assert starts[0] == 4
    assert world.calls["fleets closed"] == 1
    assert newest(config).step == 3


def test_a_new_checkpoint_allows_new_recoveries(world: World, tmp_path: Path) -> None:
    lost: Counter[int] = Counter()

    def before(what: str, step: int) -> None:
        if what == "step" and step % 3 == 1 and lost[step] < 2:
            lost[step] += 1
            raise LOST

    world.before = before
    assert in_order(run_stage(world, configured(tmp_path)))
    assert lost == {1: 2, 4: 2, 7: 2}


def test_no_learner_is_started_for_a_run_that_is_to_stop(world: World, tmp_path: Path) -> None:
    def stopped(run: Run) -> None:
        def before(what: str, step: int) -> None:
            if (what, step) == ("step", 4):
                run.stop.set()
                raise LOST

        world.before = before

    with pytest.raises(LearnerLostError):
        run_stage(world, configured(tmp_path), with_run=stopped)
    assert world.calls["policys"] == 1


# --- errors that the learner outlives --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [FleetLostError("no rollout worker is left"), ActorError("rollout actor 0 raised")])
@pytest.mark.parametrize("what", ["act", "publish"])
def test_an_error_that_the_learner_outlives_leaves_a_checkpoint_of_what_it_learned(
    world: World, tmp_path: Path, what: str, error: Exception
) -> None:
    world.before, world.turns = at(what, 5, error), uneven(0)
    config = configured(tmp_path, "rl.max_staleness=1", "rl.checkpoint_every=100")
    with pytest.raises(type(error), match=str(error)):
        run_stage(world, config)
    saved = newest(config).step
    assert saved in (5, 6)
    assert f"rl: step {saved} is saved, before the run ends with an error" in world.said
    assert world.calls["policys"] == 1
    assert [line["step"] for line in lines(config)] == list(range(1, saved + 1))
    assert len(list((Path(config.run_dir) / "rollouts").glob("rl-step-*"))) == saved
    assert in_order(run_stage(world, config, resume=True))
    assert [line["step"] for line in lines(config)] == list(range(1, 9))


def test_an_error_in_an_evaluation_on_the_way_leaves_the_line_of_its_step(world: World, tmp_path: Path) -> None:
    world.before = at("evaluate", 6, FleetLostError("no rollout worker is left"))
    config = configured(tmp_path, "rl.eval_every=2", "rl.checkpoint_every=3")
    with pytest.raises(FleetLostError):
        run_stage(world, config)
    assert newest(config).step == 6
    assert [line["step"] for line in lines(config)] == list(range(1, 7))
    assert in_order(run_stage(world, config, resume=True))
    assert [line["step"] for line in lines(config)] == list(range(1, 9))


def test_an_error_in_the_last_evaluation_leaves_a_checkpoint_of_the_last_step(world: World, tmp_path: Path) -> None:
    world.before = at("evaluate", 8, FleetLostError("no rollout worker is left"))
    config = configured(tmp_path)
    with pytest.raises(FleetLostError):
        run_stage(world, config)
    assert newest(config).step == 8
    assert in_order(run_stage(world, config, resume=True))
    assert [line["step"] for line in lines(config)] == list(range(1, 9))


def test_what_was_started_ends_where_the_other_cannot_start(world: World, tmp_path: Path) -> None:
    def before(what: str, step: int) -> None:
        if (what, step) == ("start", 0):
            raise ActorError("learner rank 0 could not load the model")

    world.before = before
    with pytest.raises(ActorError, match="could not load"):
        run_stage(world, configured(tmp_path))
    assert world.calls["fleets"] == world.calls["fleets closed"]


def test_an_error_in_the_middle_of_a_policy_step_leaves_the_checkpoint_before_it(world: World, tmp_path: Path) -> None:
    world.before = at("step", 4, WeightSyncError("learner and engine differ"))
    config = configured(tmp_path)
    with pytest.raises(WeightSyncError):
        run_stage(world, config)
    assert newest(config).step == 3
    assert in_order(run_stage(world, config, resume=True))


@pytest.mark.parametrize("failure", [LOST, OSError(28, "No space left on device")])
def test_a_checkpoint_that_fails_on_the_way_out_is_told_and_hides_no_error(
    world: World, tmp_path: Path, failure: Exception
) -> None:
    lost, failing = at("act", 5, FleetLostError("no rollout worker is left")), at("saved", 5, failure)

    def before(what: str, step: int) -> None:
        lost(what, step)
        failing(what, step)

    world.before = before
    config = configured(tmp_path)
    with pytest.raises(FleetLostError):
        run_stage(world, config)
    assert any(text.startswith("rl: step 5 could not be saved") for text in world.said)
    assert newest(config).step == 3


def test_an_error_before_the_first_step_leaves_no_checkpoint(world: World, tmp_path: Path) -> None:
    world.before = at("act", 0, FleetLostError("no rollout worker is left"))
    config = configured(tmp_path)
    with pytest.raises(FleetLostError):
        run_stage(world, config)
    assert newest(config) is None


def test_a_checkpoint_without_a_ledger_is_refused_with_one_message(world: World, tmp_path: Path) -> None:
    config = configured(tmp_path)
    world.before = at("act", 5, FleetLostError("no rollout worker is left"))
    with pytest.raises(FleetLostError):
        run_stage(world, config)
    store = CheckpointStore(tmp_path / "run" / "rl" / "checkpoints", keep=2)
    draft = store.draft(9)
    old = {"cursor": 40, "dropped": {}, "kl_coef": None, "curriculum": {"position": 40, "rests": {}}}
    store.commit(draft, step=9, state=old)
    with pytest.raises(
        CheckpointError, match=r"step-000009 was written by an earlier version: .* begin anew with --fresh"
    ):
        run_stage(world, config, resume=True)


# --- what does not train ---------------------------------------------------------------------------------------------


def test_a_log_prob_that_is_not_finite_drops_its_rollout_counted_and_written_down(world: World, tmp_path: Path) -> None:
    third = IN_ORDER[2]
    world.rewards = lambda _: (0.0, 1.0, 0.5)
    world.not_finite = lambda problem: {1: 2.0} if int(problem.id) == third else {}
    config = configured(tmp_path, "rl.group_size=3")
    assert in_order(run_stage(world, config)), "its siblings train"
    assert [line.get("dropped/not_finite", 0) for line in lines(config)] == [0, 1, 0, 0, 0, 0, 0, 0]
    assert lines(config)[1]["reward"] == pytest.approx((0.0 + 0.5 + 0.0 + 1.0 + 0.5) / 5)
    (row,) = pq.read_table(tmp_path / "run" / "rollouts" / "rl-not_finite-000002.parquet").to_pylist()
    assert (row["problem_id"], row["reward"]) == (str(third), 1.0)
    assert json.loads(row["metrics"])["not_finite"] == 2.0


def test_a_group_without_two_finite_siblings_is_dropped_whole(world: World, tmp_path: Path) -> None:
    third = IN_ORDER[2]
    world.not_finite = lambda problem: {0: 1.0, 1: 1.0} if int(problem.id) == third else {}
    config = configured(tmp_path)
    assert in_order(run_stage(world, config), dropped={third})
    assert lines(config)[1]["dropped_groups/not_finite"] == 1


def test_groups_may_be_given_up_and_are_counted(world: World, tmp_path: Path) -> None:
    config = configured(tmp_path, "rl.group_size=4", "rl.give_up_after=2")
    run_stage(world, config)
    assert {asked["give_up_after"] for asked in world.asked} == {2}


@pytest.mark.parametrize("value", [1, 4, -2])
def test_a_number_of_siblings_that_cannot_decide_is_refused(tmp_path: Path, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"rl\.give_up_after is {value}; it is 0, or from 2 to one less than"):
        configured(tmp_path, "rl.group_size=4", f"rl.give_up_after={value}")


def test_groups_are_not_given_up_where_siblings_are_compared(tmp_path: Path) -> None:
    config = configured(
        tmp_path, "rl.group_size=4", "rl.give_up_after=2", "rewards=[{name: ranks, use: 'reward_plugins:Ranks'}]"
    )
    with pytest.raises(ConfigError, match=r"rl\.give_up_after=2 ends siblings .* reward 'ranks' compares all of them"):
        check(config)


# --- when weights arrive ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["in_flight", "at_groups"])
def test_updates_at_groups_wait_for_all_that_is_under_way(world: World, tmp_path: Path, update: str) -> None:
    world.turns = uneven(4)
    config = configured(tmp_path, "rl.max_staleness=2", f"rl.update={update}")
    assert in_order(run_stage(world, config))
    assert all(("seconds/drain" in line) == (update == "at_groups") for line in lines(config))
    assert max(line["staleness_max"] for line in lines(config)) == 2
