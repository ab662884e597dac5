"""The preference stage without a learner: pairs on tokens, the reference, held-out pairs, what is refused and told."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rlsys.chat import Chat
from rlsys.config import Config, PreferenceConfig
from rlsys.config_file import structure
from rlsys.demonstrations import Demonstration, Recorded
from rlsys.errors import ConfigError, DataError
from rlsys.pair_tokens import PairRollouts, hold_out, mismatches, on_tokens, prompt_of, recorded_or_rendered
from rlsys.pairs import PairList, PreferencePair, by_label
from rlsys.preference import dpo
from rlsys.records import RunDirectory
from rlsys.scratch import byte_tokenizer
from rlsys.stages import Run
from rlsys.stages.offline import num_steps, to_rollout
from rlsys.stages.pair_batches import Reference, compared, digest_of
from rlsys.stages.preference import preference, reward_model
from rlsys.types import Problem, Rollout, TrainBatch

TOKENIZER = byte_tokenizer()
CHAT = Chat(TOKENIZER, [])


def problem(number: int) -> Problem:
    return Problem(id=f"p{number}", prompt=({"role": "user", "content": f"{number}?"},), answer="2")


def pair(number: int, chosen: str = "long long", rejected: str = "short", **options: Any) -> PreferencePair:
    return PreferencePair(problem=problem(number), chosen=((chosen, True),), rejected=((rejected, True),), **options)


def rollouts(pairs: Sequence[PreferencePair], limit: int = 200, **options: Any) -> list[PairRollouts]:
    settings = {"chat": CHAT, "limit": limit, "too_long": "error", "place": "here", **options}
    return on_tokens(pairs, lambda one: to_rollout(one, CHAT), **settings).rollouts


def recorded(number: int, text: str, template: str = CHAT.fingerprint, prompt: str = "") -> Recorded:
    """Ids that no rendering gives: each word of the answer one by one, so that they can be told apart."""
    before = CHAT.render(problem(number)) + CHAT.encode(prompt)
    answer = [token for character in text for token in CHAT.encode(character)]
    tokens = np.array([*before, *answer, TOKENIZER.eos_token_id], np.int32)
    return Recorded(tokens=tokens, loss_mask=np.arange(len(tokens)) >= len(before), template=template)


@pytest.mark.parametrize(
    ("chosen", "rejected", "way"),
    [
        (recorded(1, "Let me check"), recorded(1, "Wait"), "recorded"),
        (None, None, "text"),
        (recorded(1, "Let me check"), None, "mixed"),
        (None, recorded(1, "Wait"), "mixed"),
        (recorded(1, "Let me check"), recorded(1, "Wait", template="another"), "mixed"),
        (recorded(1, "Let me check", template="another"), recorded(1, "Wait", template="another"), "other_template"),
        (recorded(1, "Let me check", prompt="x"), recorded(1, "Wait"), "other_prompt"),
    ],
)
def test_both_sides_train_on_their_ids_or_both_are_rendered_and_it_is_counted(
    chosen: Recorded | None, rejected: Recorded | None, way: str
) -> None:
    one = pair(1, "Let me check", "Wait", chosen_recorded=chosen, rejected_recorded=rejected)
    sides, found = recorded_or_rendered(one, CHAT)
    assert found == way
    assert [side.recorded is not None for side in sides] == [way == "recorded"] * 2
    made = on_tokens([one], lambda d: to_rollout(d, CHAT), chat=CHAT, limit=99, too_long="error", place="here")
    assert made.counts == {f"tokens/{way}": 1}
    rendered = to_rollout(Demonstration(problem=problem(1), segments=(("Let me check", True),)), CHAT)
    if way == "recorded":
        assert chosen is not None
        assert made.rollouts[0].chosen.tokens.tolist() == chosen.tokens.tolist() != rendered.tokens.tolist()
    else:
        assert made.rollouts[0].chosen.tokens.tolist() == rendered.tokens.tolist()


def test_a_pair_that_is_too_long_is_an_error_or_dropped_and_counted() -> None:
    pairs = [pair(1), pair(2, "x" * 300), pair(3)]
    settings: dict[str, Any] = {"chat": CHAT, "limit": 100, "place": "preference.pairs"}
    with pytest.raises(
        DataError,
        match=r"preference\.pairs: a pair of problem 'p2' has \d+ tokens, more than the limit of 100 .*too_long: drop",
    ):
        on_tokens(pairs, lambda d: to_rollout(d, CHAT), too_long="error", **settings)
    made = on_tokens(pairs, lambda d: to_rollout(d, CHAT), too_long="drop", **settings)
    assert (len(made.rollouts), made.counts) == (2, {"tokens/text": 2, "removed/too_long": 1})
    with pytest.raises(DataError, match="none of 1 pairs fits into 100 tokens"):
        on_tokens(pairs[1:2], lambda d: to_rollout(d, CHAT), too_long="drop", **settings)


def test_two_sides_that_do_not_begin_to_train_at_one_place_are_refused() -> None:
    odd = PreferencePair(problem=problem(1), chosen=(("given", False), ("a", True)), rejected=(("b", True),))
    with pytest.raises(DataError, match="'p1' do not begin to train at the same place"):
        rollouts([odd])


def test_held_out_pairs_are_those_of_whole_prompts_and_the_same_each_time() -> None:
    pairs = rollouts([pair(number % 10, chosen=f"long {number}") for number in range(40)])
    learned, held_out = hold_out(pairs, 0.2, 3, place="here")
    assert (len(learned), len(held_out)) == (32, 8)
    assert not {one.prompt for one in learned} & {one.prompt for one in held_out}
    assert [one.prompt for one in hold_out(pairs, 0.2, 3, place="here")[1]] == [one.prompt for one in held_out]
    assert hold_out(pairs, 0.0, 3, place="here") == (pairs, [])
    with pytest.raises(DataError, match=r"held_out_share=0\.5 leaves nothing to learn from, of 4 pairs with 1 "):
        hold_out(pairs[::10], 0.5, 3, place="here")


def test_a_mismatched_answer_is_to_another_prompt_and_fits() -> None:
    pairs = rollouts([pair(1, "a" * 60), pair(1, "b"), pair(2, "c" * 60), pair(3, "d")])
    limit = len(pairs[0].chosen) - 5
    found = mismatches(pairs, limit=limit, place="here")
    for one, other in zip(pairs, found, strict=True):
        assert prompt_of(other) == one.prompt
        assert len(other) <= limit
    texts = [TOKENIZER.decode(other.tokens[other.loss_mask])[0] for other in found]
    assert texts == ["d", "d", "d", "b"]  # of 3, because that of 2 is too long; and none to its own prompt


def test_kto_refuses_pairs_of_one_prompt_and_answers_that_fit_nowhere() -> None:
    with pytest.raises(DataError, match="all 2 pairs have one prompt; give pairs of two problems at least"):
        mismatches(rollouts([pair(1), pair(1, "other")]), limit=99, place="here")
    pairs = rollouts([pair(1, "a" * 60), pair(2, "b" * 60)])
    with pytest.raises(DataError, match="no answer to another problem fits behind the prompt of pair 0 within 40"):
        mismatches(pairs, limit=40, place="here")


def test_rewards_of_a_label_are_means_over_the_answers_of_that_label() -> None:
    # Of 4 answers 1 is desirable: the learner divides by 4 what belongs to 1 and to 3.
    found = by_label(
        {
            "desirable": 0.25,
            "reward_desirable": 0.5,
            "reward_undesirable": -0.75,
            "length_desirable": 2.5,
            "length_undesirable": 9.0,
            "loss": 0.4,
        }
    )
    assert found == {
        "desirable": 0.25,
        "reward_desirable": 2.0,
        "reward_undesirable": -1.0,
        "length_desirable": 10.0,
        "length_undesirable": 12.0,
        "reward_margin": 3.0,
        "loss": 0.4,
    }


def test_a_label_without_an_answer_has_no_mean() -> None:
    names = [f"{what}_{label}" for what in ("reward", "length") for label in ("desirable", "undesirable")]
    found = by_label({"desirable": 1.0, **dict.fromkeys(names, 1.0)})
    assert set(found) == {"desirable", "reward_desirable", "length_desirable"}


def test_held_out_numbers_worked_by_hand() -> None:
    # Two pairs of one token each. Log-ratios 1 and -1, then 0 and 2; beta 0.5: margins 1 and -1.
    def one(reference: float) -> Rollout:
        arrays = {"tokens": np.zeros(2, np.int32), "versions": np.full(2, -1, np.int32)}
        return Rollout(loss_mask=np.array([False, True]), logprobs=np.array([0, reference], np.float32), **arrays)

    flat = [one(-3), one(-3), one(-1), one(-4)]
    logprobs = [np.array([0, value], np.float32) for value in (-2, -4, -1, -2)]
    found = compared(flat, logprobs, stage=PreferenceConfig(beta=0.5), loss=dpo)
    expected = (np.log1p(np.exp(-1)) + np.log1p(np.exp(1))) / 2
    assert found == pytest.approx(
        {
            "held_out_loss": expected,
            "held_out_accuracy": 0.5,
            "held_out_reward_chosen": 0.25,
            "held_out_reward_rejected": 0.25,
            "held_out_reward_margin": 0.0,
        }
    )


@pytest.mark.parametrize(
    ("settings", "items", "expected"),
    [
        ({"steps": 7}, 10, 7),
        ({"epochs": 1, "pairs_per_step": 4}, 10, 3),
        ({"epochs": 2, "pairs_per_step": 5}, 10, 4),
        ({"epochs": 0.1, "pairs_per_step": 50}, 10, 1),
        ({}, 10, 100),
    ],
)
def test_epochs_stand_for_steps(settings: dict[str, Any], items: int, expected: int) -> None:
    stage = PreferenceConfig(**settings)
    assert num_steps(stage, items, stage.pairs_per_step) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1, "epochs": 1.0}, r"preference\.steps and preference\.epochs are both given"),
        ({"epochs": 0.0}, r"preference\.epochs is 0\.0; it must be above 0"),
        ({"held_out_share": 1.0}, r"preference\.held_out_share is 1\.0"),
        ({"held_out_every": 5}, r"but preference\.held_out_share is 0"),
        ({"held_out_every": -1, "held_out_share": 0.1}, "held_out_every is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferenceConfig(**settings)


class FakeLearners:
    """Learners whose log-probs are -1 for each trained token, and which count what they are asked."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.batches: list[TrainBatch] = []
        self.on_step: Callable[[int], None] = lambda _: None

    async def infer(self, batch: TrainBatch, *, temperature: float) -> list[NDArray[np.float32]]:
        assert temperature == 1.0
        self.log.append(f"infer {len(batch.rollouts)}")
        return [np.where(rollout.loss_mask, -1, 0).astype(np.float32) for rollout in batch.rollouts]

    async def step(self, batch: TrainBatch, **options: Any) -> dict[str, float]:
        self.batches.append(batch)
        self.log.append("step")
        self.on_step(len(self.batches))
        labels = {f"{what}_{label}": 0.5 for what in ("reward", "length") for label in ("desirable", "undesirable")}
        kto = {"desirable": 0.5, **labels} if "kl_baseline" in options else {}
        return {"loss": 0.5, "accuracy": 1.0, "lr": 1e-3, "skipped_in_a_row": 0.0, **kto}

    async def load(self, _folder: Path) -> None:
        self.log.append("load")

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "shard").write_text("weights")

    async def saved(self) -> None: ...

    async def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    async def close(self) -> None: ...


class FakeConsole:
    """What a run says, as a list of lines."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def waiting(self, _what: str) -> Any:
        return _Quiet()

    def steps(self, *_: Any, **__: Any) -> Any:
        return _Quiet()


class _Quiet:
    def __enter__(self) -> Any:
        return SimpleNamespace(advance=lambda *_, **__: None)

    def __exit__(self, *_: Any) -> None: ...


def given_pairs(_problems: Any, *, count: int, removed: int = 0) -> PairList:
    """A plug-in of this test: so many pairs of different problems."""
    counts = {"removed/wrong": removed} if removed else {}
    return PairList([pair(number, chosen="long " * (1 + number % 3)) for number in range(count)], counts=counts)


def some_problems() -> list[Problem]:
    return [problem(0)]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a stage with these settings of its section on fake learners; a second time it goes on in the same folder."""
    (tmp_path / "start").mkdir()
    TOKENIZER.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "config.json").write_text("{}")
    (tmp_path / "start" / "model.safetensors").write_bytes(b"weights")
    source = {"use": f"{__name__}:some_problems"}

    def make(name: str = "preference", *, learners: FakeLearners | None = None, **settings: Any) -> Any:
        count = settings.pop("count", 20)
        tree = {
            "name": "t",
            "run_dir": str(tmp_path / "run"),
            "stages": [name],
            "model": {"path": str(tmp_path / "start")},
            "data": {"train": source, "held_out": source},
            "rewards": [{"use": "a:b"}],
            "trackers": [],
            name: {
                "pairs": {"use": f"{__name__}:given_pairs", "options": {"count": count, "removed": 3}},
                "pairs_per_step": 4,
                **settings,
            },
        }
        config = structure(Config, [tree], place="test")
        found = learners or FakeLearners([])

        async def start(*_: Any, **keywords: Any) -> FakeLearners:
            found.log.append(f"start, {keywords['total_steps']} steps")
            return found

        monkeypatch.setattr("rlsys.stages.offline.LearnerGroup", SimpleNamespace(start=start))
        monkeypatch.setattr("rlsys.length_report.plot_lengths", lambda path, *_: path.touch())  # slow, tested elsewhere
        (tmp_path / "run").mkdir(exist_ok=True)
        console = FakeConsole()
        directory = RunDirectory(tmp_path / "run", trackers=[])
        run = Run(config=config, directory=directory, console=console, stop=asyncio.Event())  # type: ignore[arg-type]
        works = {"preference": preference, "reward_model": reward_model}
        asyncio.run(works[name](run, tmp_path / "start"))
        lines = directory.metrics(name)
        return SimpleNamespace(learners=found, said=console.said, lines=lines, folder=tmp_path / "run")

    return make


def test_held_out_pairs_are_never_learned_from_and_are_measured_in_time(stage: Callable[..., Any]) -> None:
    found = stage(epochs=2, held_out_share=0.2, held_out_every=3)
    assert found.learners.log[0] == "start, 8 steps"  # 16 of 20 pairs, twice, 4 in a step
    assert [line["step"] for line in found.lines if "held_out_accuracy" in line] == [3, 6, 8]
    assert [line["epoch"] for line in found.lines] == [step / 4 for step in range(1, 9)]
    learned = {prompt_of(rollout) for batch in found.learners.batches for rollout in batch.rollouts}
    assert len(learned) == 16
    assert json.loads((found.folder / "summary.json").read_text())["preference_held_out_accuracy"] == 0.0


def test_the_report_is_written_before_training_and_says_what_was_left_out(
    stage: Callable[..., Any], tmp_path: Path
) -> None:
    learners, seen = FakeLearners([]), []
    folder = tmp_path / "run" / "preference"
    learners.on_step = lambda _: seen.append([(folder / name).exists() for name in ("report.json", "lengths.png")])
    found = stage(steps=1, learners=learners)
    assert seen == [[True, True]]
    report = json.loads((folder / "report.json").read_text())
    assert report["pairs"] == 20
    assert report["counts"] == {"removed/wrong": 3, "tokens/text": 20, "held_out_pairs": 0}
    assert any("left out: wrong 3" in line for line in found.said)


def test_a_loss_without_a_reference_asks_for_none(stage: Callable[..., Any]) -> None:
    assert "infer" not in " ".join(stage(loss="rlsys.preference:simpo", steps=2).learners.log)


def test_kto_is_measured_by_label_and_on_mismatched_answers(stage: Callable[..., Any]) -> None:
    found = stage(loss="rlsys.preference:kto", steps=2, held_out_share=0.1)
    assert found.learners.log[1] == "infer 58"  # 18 pairs with a mismatched answer each, and 2 that are held out
    assert found.learners.log[2:4] == ["infer 4", "step"]
    assert found.lines[0]["reward_desirable"] == 1.0  # 0.5 over half of the answers
    assert found.lines[0]["reward_margin"] == 0.0
    assert "held_out_accuracy" in found.lines[1]
    assert "held_out_loss" not in found.lines[1]
    with pytest.raises(DataError, match=r"preference\.pairs: KTO measures its baseline on answers to other problems"):
        stage(loss="rlsys.preference:kto", steps=2, count=1)


def test_a_reward_model_reports_its_pairs_as_well(stage: Callable[..., Any]) -> None:
    found = stage("reward_model", epochs=1)
    assert len(found.lines) == 5
    assert json.loads((found.folder / "reward_model" / "report.json").read_text())["pairs"] == 20


def test_a_run_that_goes_on_keeps_the_reference_and_one_with_other_pairs_computes_it_again(
    stage: Callable[..., Any], tmp_path: Path
) -> None:
    assert "infer 40" in stage(steps=1).learners.log
    again = stage(steps=2)
    assert again.learners.log == ["start, 2 steps", "step", "step"]
    other = stage(steps=2, count=18)
    assert "infer 36" in other.learners.log
    assert any("belongs to other pairs or another model: the reference's log-probs" in line for line in other.said)
    (tmp_path / "start" / "model.safetensors").write_bytes(b"WEIGHTS")
    assert "infer 36" in stage(steps=2, count=18).learners.log
    path = tmp_path / "run" / "preference" / "reference.npz"
    path.write_bytes(path.read_bytes()[:100])
    damaged = stage(steps=2, count=18)
    assert "infer 36" in damaged.learners.log
    assert any("cannot be read" in line for line in damaged.said)


def test_tokens_masks_and_models_each_make_another_digest(tmp_path: Path) -> None:
    one = rollouts([pair(1)])[0].chosen
    moved = one.loss_mask.copy()
    moved[-1] = False
    changed = one.tokens.copy()
    changed[-2] += 1
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 100_000)
    found = {
        digest_of([one], tmp_path / "a"),
        digest_of([one], tmp_path / "b"),
        digest_of([replace(one, tokens=changed)], tmp_path / "a"),
        digest_of([replace(one, loss_mask=moved)], tmp_path / "a"),
        digest_of([one, one], tmp_path / "a"),
        digest_of([one], Path("some/hub-name")),
    }
    assert len(found) == 6
    assert digest_of([one], tmp_path / "a") in found


def test_log_probs_of_the_reference_belong_to_their_rollouts(tmp_path: Path) -> None:
    given = [rollout for one in rollouts([pair(1), pair(2, "other")]) for rollout in one[:2]]
    for _ in range(2):
        reference = Reference(tmp_path / "reference.npz", tmp_path, pytest.fail)
        found = asyncio.run(reference.given_to(given, FakeLearners([])))  # type: ignore[arg-type]
        for before, after in zip(given, found, strict=True):
            assert after.tokens is before.tokens
            assert after.logprobs.tolist() == np.where(before.loss_mask, -1, 0).tolist()
