"""A sampling stage: nothing made is lost or made twice, failures are counted, and its report adds up."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from rlsys.errors import ActorError, ConfigError, DataError, TrainingStalledError
from rlsys.samplers import Answers
from rlsys.samples import read_about, read_samples
from rlsys.stages import Interrupted
from tests.rlsys.sampling_stage import FakeSampler, configured, in_stage, numbered, part_files, problem, sample, written

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = [f"p{number}" for number in range(10) for _ in range(2)]


def run(config: Any, **options: Any) -> Path:
    return asyncio.run(in_stage(config, **options))


def ids(folder: Path) -> list[str]:
    return [found.problem.id for found in written(folder)]


def test_every_problem_is_answered_once_and_the_order_is_that_of_the_problems(tmp_path: Path) -> None:
    FakeSampler.reset()
    folder = run(configured(tmp_path))
    assert ids(folder) == EVERYTHING
    assert set(FakeSampler.asked.values()) == {1}
    assert (FakeSampler.starts, FakeSampler.closes) == (1, 1)
    assert part_files(folder) == [f"part-{number:06d}.parquet" for number in range(4)]


def test_never_more_problems_are_in_flight_than_allowed_and_all_places_are_used(tmp_path: Path) -> None:
    FakeSampler.reset(lambda *_: asyncio.sleep(0.001))
    run(configured(tmp_path))
    assert FakeSampler.most_at_once == 4


def test_no_more_is_asked_than_twice_what_the_sampler_writes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSampler, "capacity", 2, raising=False)  # one problem has two answers
    FakeSampler.reset(lambda *_: asyncio.sleep(0.001))
    run(configured(tmp_path))
    assert FakeSampler.most_at_once == 3


def test_a_slow_problem_holds_up_neither_the_others_nor_their_parts(tmp_path: Path) -> None:
    parts_when_slow_ended: list[int] = []

    async def slow(folder: Path) -> None:
        while len(part_files(folder)) < 3:  # the other nine problems
            await asyncio.sleep(0.005)
        parts_when_slow_ended.append(len(part_files(folder)))

    own = tmp_path / "run" / "own"
    FakeSampler.reset(lambda number, _: slow(own) if number == 0 else None)
    assert ids(run(configured(tmp_path))) == EVERYTHING
    assert parts_when_slow_ended == [3]


def test_a_killed_run_keeps_finished_parts_and_goes_on_behind_them(tmp_path: Path) -> None:
    """A process of its own is killed while it samples; the rest is answered by the next."""
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.rlsys.sampling_stage import FakeSampler, configured, in_stage\n"
        "FakeSampler.reset(lambda number, _: asyncio.sleep(600) if number == 7 else None)\n"
        "asyncio.run(in_stage(configured(Path(sys.argv[1]))))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    own = tmp_path / "run" / "own"
    deadline = time.monotonic() + 60
    while len(part_files(own)) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {found.problem.id for found in read_samples(own / "parts")}
    assert len(kept) == 9
    FakeSampler.reset()
    assert ids(run(configured(tmp_path), resume=True)) == EVERYTHING
    assert {f"p{number}" for number in FakeSampler.asked} == {f"p{n}" for n in range(10)} - kept == {"p7"}


def test_an_interrupted_run_saves_what_is_answered_and_resume_does_the_rest(tmp_path: Path) -> None:
    def stop_at_five(the_run: Any) -> None:
        async def act(number: int) -> None:
            if number == 5:
                the_run.stop.set()

        FakeSampler.reset(lambda number, _: act(number))

    with pytest.raises(Interrupted, match=r"own: [0-9] of 10 problems"):
        run(configured(tmp_path), after=stop_at_five)
    own = tmp_path / "run" / "own"
    kept = {found.problem.id for found in read_samples(own / "parts")}
    assert "p5" in kept
    assert FakeSampler.closes == 1
    assert set(FakeSampler.asked) == {int(name[1:]) for name in kept}
    FakeSampler.reset()
    assert ids(run(configured(tmp_path), resume=True)) == EVERYTHING
    assert not {f"p{number}" for number in FakeSampler.asked} & kept


def test_answers_that_do_not_come_after_a_stop_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("rlsys.stages.sampling"), "_GRACE_SECONDS", 0.05)

    def stop_at_once(the_run: Any) -> None:
        async def hang() -> None:
            the_run.stop.set()
            await asyncio.sleep(600)

        FakeSampler.reset(lambda number, _: hang() if number == 1 else None)

    with pytest.raises(Interrupted):
        run(configured(tmp_path), after=stop_at_once)
    assert "p1" not in {found.problem.id for found in read_samples(tmp_path / "run" / "own" / "parts")}
    FakeSampler.reset()
    assert ids(run(configured(tmp_path), resume=True)) == EVERYTHING


def test_a_problem_that_fails_is_tried_again(tmp_path: Path) -> None:
    def fails_twice(number: int, before: int) -> None:
        if number == 4 and before < 2:
            raise ActorError("engine 3 died")

    FakeSampler.reset(fails_twice)
    folder = run(configured(tmp_path))
    assert ids(folder) == EVERYTHING
    assert FakeSampler.asked[4] == 3
    assert json.loads((folder / "report.json").read_text())["dropped"] == {}


def test_one_that_always_fails_is_left_out_and_counted(tmp_path: Path) -> None:
    def fails(number: int, _: int) -> None:
        if number == 4:
            raise ActorError("engine 3 died")

    FakeSampler.reset(fails)
    folder = run(configured(tmp_path))
    assert "p4" not in ids(folder)
    report = json.loads((folder / "report.json").read_text())
    assert report["dropped"] == {"failed": {"answers": 2, "first": "ActorError: engine 3 died"}}
    assert (report["problems"], report["problems_answered"], report["samples"]) == (10, 9, 18)


def test_too_many_failures_stop_the_stage_with_the_first_message_and_resume_tries_them_again(tmp_path: Path) -> None:
    def fails(number: int, _: int) -> None:
        if number >= 7:
            raise ValueError(f"no answer to {number}")

    FakeSampler.reset(fails)
    with pytest.raises(
        TrainingStalledError,
        match=r"samples.own: 6 of the last 20 answers could not be had \(6 failed\), more than samples.own.max_failed="
        r"0.25 allows; the first: ValueError: no answer to 7; what was answered is kept",
    ):
        run(configured(tmp_path))
    FakeSampler.reset()
    assert ids(run(configured(tmp_path), resume=True)) == EVERYTHING
    assert set(FakeSampler.asked) == {7, 8, 9}


def test_a_few_problems_that_never_work_do_not_keep_a_resumed_run_from_its_end(tmp_path: Path) -> None:
    FakeSampler.reset()
    with pytest.raises(DataError, match=r"filters.0: 'tests.rlsys.test_sampling:broken' raised"):
        run(configured(tmp_path, "samples.own.filters=[{use: 'tests.rlsys.test_sampling:broken'}]"))
    first = tmp_path / "run" / "own" / "parts" / "part-000000.parquet"
    first.unlink()  # three problems are to be answered again, and one of them cannot

    def fails(number: int, _: int) -> None:
        if number == 0:
            raise ValueError("never")

    FakeSampler.reset(fails)
    assert set(ids(run(configured(tmp_path), resume=True))) == {f"p{number}" for number in range(1, 10)}


def broken(_samples: Any) -> Any:
    raise KeyError("length")


def test_a_problem_without_an_answer_by_its_deadline_failed(tmp_path: Path) -> None:
    FakeSampler.reset(lambda number, _: asyncio.sleep(600) if number == 2 else None)
    folder = run(configured(tmp_path, "samples.own.problem_seconds=0.05", "samples.own.retries=0"))
    report = json.loads((folder / "report.json").read_text())
    assert report["dropped"]["failed"]["first"] == "no answer within 0.05 s (problem_seconds)"


def test_answers_that_rewards_failed_are_counted_by_reason_and_too_many_are_an_error(tmp_path: Path) -> None:
    def ungraded(limit: int) -> Any:
        def act(number: int, _: int) -> Answers | None:
            if number >= limit:
                return None
            return Answers(samples=[sample(number, "one")], dropped={f"reward_timeout: late for {number}": 1})

        return act

    FakeSampler.reset(ungraded(3))
    folder = run(configured(tmp_path / "few"))
    report = json.loads((folder / "report.json").read_text())
    assert report["dropped"]["reward_timeout"]["answers"] == 3
    assert report["samples"] == 17
    FakeSampler.reset(ungraded(10))
    with pytest.raises(
        TrainingStalledError, match=r"10 of the last 20 answers could not be graded \(10 reward_timeout\).*late for 0"
    ):
        run(configured(tmp_path / "many"))


def test_zeroed_answers_count_as_ungraded(tmp_path: Path) -> None:
    FakeSampler.reset(
        lambda number, _: [sample(number, "a", metrics={"reward_error: broke": 1.0}), sample(number, "b")]
    )
    with pytest.raises(TrainingStalledError, match=r"10 of the last 20 answers could not be graded .*the first: broke"):
        run(configured(tmp_path))


def test_a_prompt_that_is_too_long_is_skipped_and_counted_or_an_error(tmp_path: Path) -> None:
    def too_long(number: int, _: int) -> Answers | None:
        return Answers(samples=(), dropped={"prompt_too_long": 2}) if number < 5 else None

    FakeSampler.reset(too_long)
    folder = run(configured(tmp_path / "skip"))
    assert ids(folder) == EVERYTHING[10:]
    assert FakeSampler.asked[0] == 1
    with pytest.raises(DataError, match=r"samples.own: problem 'p[0-9]' leaves no room in actors.max_model_tokens"):
        run(configured(tmp_path / "error", "data.too_long=error"))


def test_a_sampler_that_gives_something_else_is_named(tmp_path: Path) -> None:
    FakeSampler.reset(lambda *_: ["text"])
    with pytest.raises(TrainingStalledError, match=r"the sampler gave \['text'\], not samples"):
        run(configured(tmp_path))


def test_fewer_answers_than_asked_for_are_counted(tmp_path: Path) -> None:
    FakeSampler.reset(lambda number, _: [sample(number, "only one")] if number < 3 else None)
    report = json.loads((run(configured(tmp_path)) / "report.json").read_text())
    assert report["dropped"]["not_given"]["answers"] == 3


def test_what_ends_the_run_is_not_tried_again(tmp_path: Path) -> None:
    def refused(*_: int) -> None:
        raise ConfigError("the teacher refuses the key")

    FakeSampler.reset(refused)
    with pytest.raises(ConfigError, match="refuses the key"):
        run(configured(tmp_path))
    assert max(FakeSampler.asked.values()) == 1
    assert FakeSampler.closes == 1


def test_what_a_sampler_leaves_out_on_purpose_is_counted_and_no_failure(tmp_path: Path) -> None:
    left_out = Answers(samples=(), dropped={"skipped_no_place: nowhere to put it": 2})
    FakeSampler.reset(lambda number, _: left_out if number < 8 else None)
    folder = run(configured(tmp_path))
    assert ids(folder) == EVERYTHING[16:]
    assert json.loads((folder / "report.json").read_text())["dropped"]["skipped_no_place"]["answers"] == 16
    assert max(FakeSampler.asked.values()) == 1


class Unstartable(FakeSampler):
    async def start(self, _context: Any) -> None:
        raise ConfigError("no way to start")

    async def close(self) -> None:
        raise AttributeError("not started")


def test_a_sampler_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no way to start"):
        run(configured(tmp_path, "samples.own.sampler.use=tests.rlsys.test_sampling:Unstartable"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("samples.own.samples_per_problem=3", r"samples_per_problem was 2, is 3"),
        ("samples.own.sampling.temperature=0.5", r"sampling.temperature was 1.0, is 0.5"),
        ("samples.own.sampler.use=rlsys.samplers:PolicySampler", r"sampler.use was .*FakeSampler.*PolicySampler"),
        ("seed=1", "seed was 0, is 1"),
        ("data.train.use=tests.rlsys.test_sampling:others", r"the problem at place 0 is another one now \('p0'\)"),
    ],
)
def test_parts_that_were_made_otherwise_are_refused(tmp_path: Path, override: str, told: str) -> None:
    FakeSampler.reset()
    with pytest.raises(DataError):
        run(configured(tmp_path, "samples.own.filters=[{use: 'tests.rlsys.test_sampling:broken'}]"))
    with pytest.raises(DataError, match=rf"{told}.*--fresh"):
        run(configured(tmp_path, override), resume=True)


def others(*, size: int) -> Any:
    return [problem(number, f"other {number}") for number in range(size)]


def test_more_problems_and_other_filters_go_on_with_the_old_parts(tmp_path: Path) -> None:
    FakeSampler.reset()
    with pytest.raises(DataError):
        run(configured(tmp_path, "samples.own.filters=[{use: 'tests.rlsys.test_sampling:broken'}]"))
    FakeSampler.reset()
    folder = run(configured(tmp_path, "data.train.options.size=12"), resume=True)
    assert set(FakeSampler.asked) == {10, 11}
    assert len(written(folder)) == 24


def test_a_damaged_part_is_named_with_what_to_do(tmp_path: Path) -> None:
    FakeSampler.reset()
    with pytest.raises(DataError):
        run(configured(tmp_path, "samples.own.filters=[{use: 'tests.rlsys.test_sampling:broken'}]"))
    part = tmp_path / "run" / "own" / "parts" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(DataError, match=r"part-000001.parquet: .*damaged.*delete it, and its problems are answered"):
        run(configured(tmp_path), resume=True)
    part.unlink()
    FakeSampler.reset()
    assert ids(run(configured(tmp_path), resume=True)) == EVERYTHING
    assert len(FakeSampler.asked) == 3


def test_a_disk_that_is_full_is_told_and_earlier_parts_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlsys import sample_parts

    def full(path: Path, *args: Any, **options: Any) -> None:
        if path.name == "part-000002.parquet":
            raise OSError(28, "No space left on device")
        real(path, *args, **options)

    real = sample_parts.write_samples
    monkeypatch.setattr(sample_parts, "write_samples", full)
    FakeSampler.reset()
    with pytest.raises(DataError, match=r"cannot write .*part-000002.parquet: .*No space left.*--resume"):
        run(configured(tmp_path))
    monkeypatch.setattr(sample_parts, "write_samples", real)
    FakeSampler.reset()
    assert ids(run(configured(tmp_path), resume=True)) == EVERYTHING


def test_problems_that_share_an_id_and_sources_without_problems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two problems have the id 'p0'"):
        run(configured(tmp_path / "same", "data.train.use=tests.rlsys.test_sampling:twice"))
    with pytest.raises(DataError, match="gave no problem"):
        run(configured(tmp_path / "none", "data.train.options.size=0"))


def twice(*, size: int) -> Any:
    return [*numbered(size=size), *numbered(size=size)]


def test_nothing_left_behind_the_filters_is_an_error_that_says_which_removed_how_many(tmp_path: Path) -> None:
    FakeSampler.reset()
    filters = "[{use: 'rlsys.filters:correct'}, {use: 'rlsys.filters:length', options: {at_least: 100}}]"
    with pytest.raises(
        DataError,
        match=r"samples.own: no sample is left: correct removed 10 of 20, length\(at_least=100\) removed 10 of 10",
    ):
        run(configured(tmp_path, f"samples.own.filters={filters}"))
    report = json.loads((tmp_path / "run" / "own" / "report.json").read_text())
    assert (report["kept"], report["samples"]) == (0, 20)


def test_the_report_adds_up_and_every_row_knows_where_it_comes_from(tmp_path: Path) -> None:
    FakeSampler.reset()
    filters = "[{use: 'rlsys.filters:correct'}, {use: 'rlsys.filters:per_problem', options: {count: 1}}]"
    folder = run(configured(tmp_path, f"samples.own.filters={filters}"))
    report = json.loads((folder / "report.json").read_text())
    assert (report["samples"], report["kept"], report["acceptance"], report["correct"]) == (20, 10, 0.5, 0.5)
    assert report["filters"] == [
        {"filter": "correct", "given": 20, "removed": 10},
        {"filter": "per_problem(count=1)", "given": 10, "removed": 0},
    ]
    assert report["pass_rates"] == {"0": 0, "0-0.25": 0, "0.25-0.5": 10, "0.5-0.75": 0, "0.75-1": 0, "1": 0}
    assert report["tokens"] == {"written": 60, "kept": 30}
    assert report["lengths"]["kept"]["p50"] == 3
    assert read_about(folder / "samples.parquet")["report"]["kept"] == 10
    for found in written(folder):
        assert found.provenance["filters"] == ["correct", "per_problem(count=1)"]
        assert {"run", "stage", "seed", "temperature", "top_p", "rlsys", "started"} <= found.provenance.keys()
        assert found.metrics["pass_rate"] == 0.5
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["stage"], line["kept"], line["removed/0_correct"]) == ("own", 10, 10)
