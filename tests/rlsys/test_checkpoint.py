"""Checkpoints: whole or passed over, whatever happens to their files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.checkpoint import Checkpoint, CheckpointStore

SHARD = "learner/__0_0.distcp"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def commit(store: CheckpointStore, step: int, **state: Any) -> Checkpoint:
    draft = store.draft(step)
    (draft / "learner").mkdir()
    (draft / SHARD).write_bytes(bytes(range(256)) * 16 + step.to_bytes(4, "big"))
    (draft / "learner" / ".metadata").write_text("sharded")
    return store.commit(draft, step=step, state=state)


def newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    """Step of the newest valid checkpoint and what was said about the others."""
    told: list[str] = []
    found = store.newest(tell=told.append)
    return None if found is None else found.step, told


def test_a_store_without_a_checkpoint_has_none_and_says_nothing(store: CheckpointStore) -> None:
    assert newest(store) == (None, [])


def test_a_committed_checkpoint_is_found_again_with_its_state(store: CheckpointStore) -> None:
    state = {"cursor": 40, "dropped": {"reward_error: \u00e4": 2}}
    made = commit(store, 10, **state)
    found = store.newest(tell=pytest.fail)
    assert found == made
    assert (made.step, made.state) == (10, state)
    assert (made.folder / SHARD).stat().st_size == 4100


def test_the_newest_of_several_is_found(store: CheckpointStore) -> None:
    for step in (9, 10, 100):
        commit(store, step)
    assert newest(store) == (100, [])


def test_the_newest_of_more_than_a_million_steps_is_found(store: CheckpointStore) -> None:
    commit(store, 999_999)
    commit(store, 1_000_000)
    assert newest(store) == (1_000_000, [])


def test_only_so_many_are_kept(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        commit(store, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


def truncate(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    shard = folder / SHARD
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))


def lose_a_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-9])


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def change_the_state(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"cursor": 1}))


def make_a_shard_a_folder(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, f"{SHARD} has changed"),
        (flip_a_bit, f"{SHARD} has changed"),
        (lose_a_shard, "not whole (FileNotFoundError"),
        (lose_the_manifest, "not whole (FileNotFoundError"),
        (cut_the_manifest, "not whole (JSONDecodeError"),
        (empty_the_manifest, "not whole (KeyError"),
        (change_the_state, "state.json has changed"),
        (make_a_shard_a_folder, "not whole (IsADirectoryError"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it_and_said_so(
    store: CheckpointStore, damage: Callable[[Path], None], says: str
) -> None:
    commit(store, 10)
    newer = commit(store, 20)
    damage(newer.folder)
    step, told = newest(store)
    assert step == 10
    assert len(told) == 1
    assert told[0].startswith(f"passing over {newer.folder}: ")
    assert says in told[0]


def test_where_all_are_damaged_there_is_none(store: CheckpointStore) -> None:
    for step in (1, 2):
        truncate(commit(store, step).folder)
    step, told = newest(store)
    assert (step, len(told)) == (None, 2)


def test_a_draft_is_not_a_checkpoint(store: CheckpointStore) -> None:
    commit(store, 10)
    draft = store.draft(20)
    (draft / "state.json").write_text("{}")
    assert newest(store) == (10, [])


def test_a_draft_that_was_left_behind_is_begun_anew(store: CheckpointStore) -> None:
    left = store.draft(20)
    (left / "half-written").write_text("x")
    assert list(store.draft(20).iterdir()) == []


def test_a_checkpoint_of_the_same_step_is_replaced(store: CheckpointStore) -> None:
    commit(store, 10, cursor=1)
    made = commit(store, 10, cursor=2)
    assert store.newest(tell=pytest.fail) == made
    assert made.state == {"cursor": 2}


def test_a_damaged_newer_checkpoint_does_not_push_out_the_valid_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    truncate(commit(store, 30).folder)
    assert newest(store)[0] is None
    made = commit(store, 10)
    assert made.folder.exists()
    assert newest(store)[0] == 10
    commit(store, 20)
    assert newest(store)[0] == 20
    assert not made.folder.exists()
    commit(store, 30)
    assert newest(store) == (30, [])


def test_a_file_beside_the_checkpoints_is_left_alone(store: CheckpointStore, tmp_path: Path) -> None:
    made = commit(store, 10)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "step-000011").write_text("not a folder")
    for step in (12, 13):
        commit(store, step)
    assert (tmp_path / "checkpoints" / "notes.txt").exists()
    assert not made.folder.exists()
    assert newest(store)[0] == 13
