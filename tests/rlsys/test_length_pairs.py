"""Long chains of thought over short ones: bands, matching, caps, what is left out and how it is told."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.demonstrations import Demonstration, Recorded
from rlsys.errors import ConfigError, DataError
from rlsys.length_pairs import LengthGap, thinkpo_pairs
from rlsys.length_report import plot_lengths, write_report
from rlsys.pair_tokens import PairRollouts
from rlsys.pairs import PairList
from rlsys.samples import Sample, write_samples
from rlsys.types import Problem, Rollout

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


def problem(name: str, question: str | None = None, answer: str = "2") -> Problem:
    return Problem(id=name, prompt=({"role": "user", "content": question or f"{name}?"},), answer=answer)


def sample(name: str, length: int, text: str | None = None, **options: Any) -> Sample:
    """An answer of so many tokens to the problem of this name."""
    settings = {"correct": True, **options}
    asked = settings.pop("problem", problem(name))
    recorded = settings.pop("recorded", None)
    segments = ((text or f"{name} in {length}", True),)
    return Sample(
        demonstration=Demonstration(problem=asked, segments=segments, recorded=recorded),
        num_tokens=length,
        **settings,
    )


def saved(folder: Path, name: str, samples: Sequence[Sample]) -> str:
    path = folder / f"{name}.parquet"
    write_samples(path, samples)
    return str(path)


def lengths(pairs: PairList) -> list[tuple[str, int, int]]:
    """Problem and both lengths of each pair, which their texts tell."""
    return [
        (pair.problem.id, *(int(side.text.rpartition(" ")[2]) for side in pair.demonstrations))  # type: ignore[misc]
        for pair in pairs
    ]


def of_one_file(folder: Path, found: Sequence[int], **options: Any) -> PairList:
    return thinkpo_pairs([], long=saved(folder, "all", [sample("p", length) for length in found]), **options)


def test_the_long_answer_is_chosen_over_the_short_one_to_the_same_problem(tmp_path: Path) -> None:
    long = saved(tmp_path, "long", [sample("p", 90), sample("q", 50)])
    short = saved(tmp_path, "short", [sample("q", 10), sample("p", 30), sample("r", 5)])
    pairs = thinkpo_pairs([], long=long, short=short)
    assert lengths(pairs) == [("p", 90, 30), ("q", 50, 10)]
    assert pairs.counts == {"problems": 3, "removed/no_partner": 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(80, 10)]),
        ({"pairs_per_problem": 9}, [(80, 10), (40, 20)]),  # 10, 20, 40, 80: each in one pair
        ({"match": "nearest", "target_ratio": 2}, [(20, 10)]),
        ({"match": "nearest", "target_ratio": 3.9}, [(80, 20)]),  # as near as 40 to 10, and read first
        ({"max_ratio": 2}, [(80, 40)]),
        ({"max_ratio": 2, "max_difference": 20}, [(40, 20)]),
        ({"min_difference": 25, "max_difference": 60}, [(80, 20)]),
        ({"max_tokens": 40}, [(40, 10)]),
    ],
)
def test_bands_and_matching_rules(options: dict[str, Any], expected: list[tuple[int, int]], tmp_path: Path) -> None:
    found = of_one_file(tmp_path, [20, 80, 10, 40], **options)
    assert [(long, short) for _, long, short in lengths(found)] == expected


def test_random_matching_is_the_same_for_a_seed_and_another_for_another(tmp_path: Path) -> None:
    found = [
        lengths(of_one_file(tmp_path, range(1, 40), match="random", pairs_per_problem=5, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 5


@PATIENT
@given(
    st.lists(st.integers(1, 200), min_size=2, max_size=12),
    st.floats(1, 4),
    st.integers(1, 60),
    st.sampled_from(["widest", "random"]),
    st.integers(1, 4),
)
def test_no_pair_breaks_the_band_and_no_answer_is_used_twice(
    tmp_path: Path, found: list[int], ratio: float, difference: int, match: Any, count: int
) -> None:
    band = {"min_ratio": ratio, "min_difference": difference, "max_difference": 150}
    try:
        pairs = lengths(of_one_file(tmp_path, found, match=match, pairs_per_problem=count, **band))
    except DataError:
        different = sorted(set(found))
        assert not any(
            long / short >= ratio and difference <= long - short <= 150
            for short in different
            for long in different
            if long > short
        )
        return
    assert 1 <= len(pairs) <= count
    used = [length for _, *both in pairs for length in both]
    assert len(used) == len(set(used))
    assert all(long / short >= ratio and difference <= long - short <= 150 for _, long, short in pairs)


def test_what_is_left_out_is_counted_by_its_rule(tmp_path: Path) -> None:
    long = [
        sample("p", 90),
        sample("p", 91, correct=False),
        sample("p", 92, correct=None),
        sample("p", 93, finish_reason="length"),
        sample("p", 999),
        sample("p", 90),  # the same text again
        sample("q", 90),
        sample("r", 90, text="the same 90"),
        sample("s", 9),
    ]
    short = [sample("p", 10), sample("q", 80), sample("r", 90, text="the same 90"), sample("s", 10), sample("t", 10)]
    pairs = thinkpo_pairs(
        [],
        long=saved(tmp_path, "long", long),
        short=saved(tmp_path, "short", short),
        min_ratio=1.5,
        max_tokens=500,
    )
    assert lengths(pairs) == [("p", 90, 10)]
    assert pairs.counts == {
        "problems": 5,
        "removed/wrong": 1,
        "removed/ungraded": 1,
        "removed/not_completed": 1,
        "removed/over_max_tokens": 1,
        "removed/duplicate": 1,
        "removed/ratio_below": 1,
        "removed/equal_text": 1,
        "removed/not_longer": 1,
        "removed/no_partner": 1,
    }


def test_wrong_and_unfinished_answers_may_be_asked_for(tmp_path: Path) -> None:
    long = saved(tmp_path, "long", [sample("p", 90, correct=False, finish_reason="length")])
    short = saved(tmp_path, "short", [sample("p", 10, correct=None)])
    pairs = thinkpo_pairs([], long=long, short=short, require_correct=False, require_completed=False)
    assert lengths(pairs) == [("p", 90, 10)]


def test_a_limit_keeps_the_first_pairs_and_counts_the_rest(tmp_path: Path) -> None:
    path = saved(tmp_path, "all", [sample(name, length) for name in "pqr" for length in (10, 30)])
    pairs = thinkpo_pairs([], long=path, limit=2)
    assert [name for name, _, _ in lengths(pairs)] == ["p", "q"]
    assert pairs.counts["removed/over_limit"] == 1


def test_several_files_are_one_side(tmp_path: Path) -> None:
    paths = [saved(tmp_path, name, [sample(name, 90)]) for name in "pq"]
    short = saved(tmp_path, "short", [sample(name, 10) for name in "pq"])
    assert len(thinkpo_pairs([], long=paths, short=short)) == 2


def test_nothing_left_says_which_rule_removed_how_many_and_what_helps(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no pair is left of 1 problems.*ratio_below 3\. Most by ratio_below: lower min"
    ):
        of_one_file(tmp_path, [10, 20, 30], min_ratio=5)
    wrong = saved(tmp_path, "wrong", [sample("p", n, correct=False) for n in (1, 2)])
    with pytest.raises(DataError, match=r"wrong 2\. Most by wrong: .*require_correct=false"):
        thinkpo_pairs([], long=wrong)
    with pytest.raises(DataError, match="no such file"):
        thinkpo_pairs([], long=str(tmp_path / "nowhere.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_ratio": 3, "max_ratio": 2}, r"max_ratio \(2\) is below min_ratio \(3\); the band is empty"),
        ({"min_difference": 9, "max_difference": 8}, r"max_difference \(8\) is below"),
        ({"min_ratio": 0.5}, "long / short is at least 1"),
        ({"min_difference": 0}, "min_difference is 0"),
        ({"match": "longest"}, "match is 'longest'; known: widest, nearest, random"),
        ({"match": "nearest"}, "needs the ratio that it is to be near to"),
        ({"target_ratio": 2}, "match=widest with target_ratio=2"),
        ({"pairs_per_problem": 0}, "pairs_per_problem is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"same": "text"}, "same is 'text'; known: prompt, id"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        thinkpo_pairs([], long="never/read.parquet", **options)


def test_problems_are_the_same_by_prompt_and_answer_or_by_id(tmp_path: Path) -> None:
    ids = Recorded(tokens=np.arange(4, dtype=np.int32), loss_mask=np.arange(4) > 1, template="t")
    long = saved(
        tmp_path,
        "long",
        [
            sample("p", 90, problem=problem("p", "Think long. p?"), recorded=ids),
            sample("q", 90, problem=problem("q", answer="7")),
        ],
    )
    short = saved(tmp_path, "short", [sample("p", 10, recorded=ids), sample("q", 10)])
    with pytest.raises(DataError, match="no_partner 4"):
        thinkpo_pairs([], long=long, short=short)
    pairs = thinkpo_pairs([], long=long, short=short, same="id")
    assert pairs.counts == {"problems": 2, "removed/other_answer": 1}
    (pair,) = pairs
    assert pair.problem.prompt[0]["content"] == "Think long. p?"
    assert pair.chosen_recorded is not None
    assert pair.rejected_recorded is None, "its ids have another prompt in front"


def test_the_widest_of_equals_is_the_one_that_was_read_first() -> None:
    long, short = np.array([5.0, 9.0, 9.0]), np.array([1.0, 2.0, 2.0])
    assert LengthGap().order(long, short, "").tolist() == [1, 2, 0]


def answers(chosen: Sequence[int], rejected: Sequence[int]) -> list[PairRollouts]:
    def rollout(number: int, length: int) -> Rollout:
        tokens = np.full(2 + length, number, np.int32)
        mask = np.arange(2 + length) >= 2
        zeros = np.zeros(2 + length, np.float32)
        return Rollout(tokens=tokens, loss_mask=mask, logprobs=zeros, versions=np.full(2 + length, -1, np.int32))

    return [
        PairRollouts(rollout(number, one), rollout(number, other))
        for number, (one, other) in enumerate(zip(chosen, rejected, strict=True))
    ]


def test_the_report_tells_lengths_gap_and_counts(tmp_path: Path) -> None:
    report = write_report(tmp_path / "preference", answers([4, 8, 6], [2, 2, 6]), {"removed/wrong": 3})
    assert report == json.loads((tmp_path / "preference" / "report.json").read_text())
    assert (report["pairs"], report["prompts"], report["counts"]) == (3, 3, {"removed/wrong": 3})
    assert report["lengths"]["chosen"]["mean"] == 6
    assert report["gap"]["difference"] | {} == {"mean": 8 / 3, "min": 0, "p10": 0.4, "median": 2, "p90": 5.2, "max": 6}
    assert report["gap"]["ratio"]["max"] == 4
    assert report["gap"]["share_with_longer_chosen"] == pytest.approx(2 / 3)
    assert (tmp_path / "preference" / "lengths.png").stat().st_size > 10_000


@pytest.mark.parametrize(("chosen", "rejected"), [([5], [5]), ([1, 4000], [1, 1]), ([3, 3, 3], [1, 2, 3])])
def test_any_lengths_can_be_drawn(chosen: list[int], rejected: list[int], tmp_path: Path) -> None:
    plot_lengths(tmp_path / "lengths.png", np.array(chosen, np.float64), np.array(rejected, np.float64))
    assert (tmp_path / "lengths.png").exists()
