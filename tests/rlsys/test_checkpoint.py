"""Checkpoints: whole or passed over, whatever happens to their files; written while training goes on."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys import checkpoint
from rlsys.checkpoint import Checkpoint, CheckpointStore, CheckpointWriter, check_same_model
from rlsys.errors import CheckpointError

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


# --- killed at any moment --------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_between_writing_and_committing_goes_on_from_the_checkpoint_before(
    store: CheckpointStore, tmp_path: Path
) -> None:
    former = commit(store, 10)
    draft = store.draft(20)
    (draft / "learner").mkdir()
    (draft / SHARD).write_bytes(b"all ranks have written")
    again = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert again.newest(tell=pytest.fail) == former
    commit(again, 30)
    assert not draft.exists(), "what was left behind takes no room for ever"


def test_a_checkpoint_that_was_set_aside_for_another_of_its_step_is_found_if_that_never_came(
    store: CheckpointStore, tmp_path: Path
) -> None:
    former = commit(store, 10, cursor=1)
    former.folder.rename(tmp_path / "checkpoints" / "step-000010.replaced")
    found = store.newest(tell=pytest.fail)
    assert found == former


def test_what_was_set_aside_and_left_behind_is_in_nobodys_way(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000010.replaced" / "learner").mkdir(parents=True)
    commit(store, 10, cursor=1)
    (tmp_path / "checkpoints" / "step-000010.replaced" / "learner").mkdir(parents=True)
    made = commit(store, 10, cursor=2)
    assert store.newest(tell=pytest.fail) == made
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]


_COMMITS_FOR_EVER = """
import sys
from pathlib import Path
from rlsys.checkpoint import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]), keep=1)
for step in range(1, 100_000):
    draft = store.draft(step // 2)  # every step twice, so that one takes the place of another
    (draft / "shard").write_bytes(bytes([step % 256]) * 50_000)
    store.commit(draft, step=step // 2, state={"turn": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("patience", [1, 2, 3, 5, 8, 13])
def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_the_last_that_was_committed_or_the_one_under_way(
    tmp_path: Path, patience: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMITS_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    committed = 0
    for _ in range(patience):
        committed = int(process.stdout.readline())
    process.kill()
    committed = max([committed, *map(int, process.stdout.read().split())])
    process.wait()
    found = CheckpointStore(tmp_path, keep=1).newest(tell=pytest.fail)
    assert found is not None
    assert found.state["turn"] in (committed, committed + 1)
    assert (found.folder / "shard").read_bytes() == bytes([found.state["turn"] % 256]) * 50_000


# --- written in the background ---------------------------------------------------------------------------------------


class Weights:
    """A learner of one number, which it copies at once and writes when it may."""

    def __init__(self, *, failing: Exception | None = None) -> None:
        self.value = 0
        self.may_write = asyncio.Event()
        self.failing = failing
        self.copies: list[tuple[Path, int]] = []

    async def save(self, folder: Path) -> None:
        self.copies.append((folder, self.value))

    async def saved(self) -> None:
        await self.may_write.wait()
        if self.failing is not None:
            failing, self.failing = self.failing, None
            raise failing
        folder, value = self.copies[-1]
        folder.mkdir()
        (folder / "value").write_text(str(value))


def written(checkpoint: Checkpoint | None, part: str = "learner") -> str:
    assert checkpoint is not None
    return (checkpoint.folder / part / "value").read_text()


def writing(store: CheckpointStore, body: Callable[[CheckpointWriter, Weights], Awaitable[None]], **made: Any) -> None:
    """Run the body inside the writer's block."""

    async def main() -> None:
        weights = Weights(**made)
        async with CheckpointWriter(store, {"learner": weights}, tell=pytest.fail) as writer:
            await body(writer, weights)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_training_goes_on_while_the_state_of_the_save_is_written(store: CheckpointStore) -> None:
    async def body(writer: CheckpointWriter, weights: Weights) -> None:
        state: dict[str, Any] = {"cursor": 7, "dropped": {}}
        weights.value = 1
        await writer.save(10, state)
        weights.value = 2
        state["dropped"]["later"] = 1
        assert newest(store) == (None, []), "nothing is a checkpoint before it is whole"
        weights.may_write.set()
        await writer.finish()
        found = store.newest(tell=pytest.fail)
        assert written(found) == "1"
        assert found is not None
        assert found.state == {"cursor": 7, "dropped": {}}

    writing(store, body)


def test_a_save_waits_for_the_one_before_it(store: CheckpointStore) -> None:
    async def body(writer: CheckpointWriter, weights: Weights) -> None:
        weights.value = 1
        await writer.save(10, {})
        second = asyncio.create_task(writer.save(20, {}))
        await asyncio.sleep(0.05)
        assert (len(weights.copies), second.done()) == (1, False)
        weights.value = 2
        weights.may_write.set()
        await second
        assert newest(store)[0] == 10
        await writer.finish()
        assert (newest(store)[0], written(store.newest(tell=pytest.fail))) == (20, "2")

    writing(store, body)


def test_the_end_of_the_block_waits_for_the_last_save(store: CheckpointStore) -> None:
    async def body(writer: CheckpointWriter, weights: Weights) -> None:
        await writer.save(10, {})
        asyncio.get_running_loop().call_later(0.05, weights.may_write.set)

    writing(store, body)
    assert newest(store) == (10, [])


def test_hashing_and_syncing_do_not_hold_the_loop(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    committing = threading.Event()
    ordinary = store.commit

    def slow(*arguments: Any, **named: Any) -> Checkpoint:
        assert committing.wait(30)
        return ordinary(*arguments, **named)

    monkeypatch.setattr(store, "commit", slow)

    async def body(writer: CheckpointWriter, weights: Weights) -> None:
        weights.may_write.set()
        await writer.save(10, {})
        for _ in range(20):
            await asyncio.sleep(0.001)  # a held loop would never come here
        committing.set()

    writing(store, body)
    assert newest(store) == (10, [])


def test_what_a_save_failed_with_is_raised_by_the_next_one_and_the_checkpoint_before_it_stays(
    store: CheckpointStore,
) -> None:
    commit(store, 5)

    async def body(writer: CheckpointWriter, weights: Weights) -> None:
        weights.may_write.set()
        await writer.save(10, {})
        with pytest.raises(CheckpointError, match="the disk is full"):
            await writer.save(20, {})
        assert newest(store) == (5, [])
        await writer.save(30, {})

    writing(store, body, failing=CheckpointError("the disk is full"))
    assert newest(store) == (30, [])


def test_what_the_last_save_failed_with_is_raised_by_the_end(store: CheckpointStore) -> None:
    async def body(writer: CheckpointWriter, weights: Weights) -> None:
        weights.may_write.set()
        await writer.save(10, {})

    with pytest.raises(OSError, match="no space"):
        writing(store, body, failing=OSError("no space"))
    assert newest(store) == (None, [])


def test_a_full_disk_is_an_error_that_says_what_to_do(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def body(writer: CheckpointWriter, weights: Weights) -> None:
        weights.may_write.set()
        await writer.save(10, {})
        await writer.finish()
        monkeypatch.setattr(checkpoint, "_sync", full)
        await writer.save(20, {})

    with pytest.raises(CheckpointError, match=r"of step 20 could not be written .*No space left on device.*--resume"):
        writing(store, body)
    assert newest(store) == (10, [])


@pytest.mark.parametrize("failing", [None, CheckpointError("the disk is full")])
def test_an_error_of_the_run_waits_for_the_save_and_is_not_covered_by_its_failure(
    store: CheckpointStore, failing: Exception | None
) -> None:
    told: list[str] = []

    async def main() -> None:
        weights = Weights(failing=failing)
        async with CheckpointWriter(store, {"learner": weights}, tell=told.append) as writer:
            await writer.save(10, {})
            asyncio.get_running_loop().call_later(0.05, weights.may_write.set)
            raise ValueError("of the run itself")

    with pytest.raises(ValueError, match="of the run itself"):
        asyncio.run(main())
    if failing is None:
        assert (newest(store)[0], told) == (10, [])
    else:
        assert (newest(store)[0], told) == (
            None,
            ["the last checkpoint was not written: CheckpointError: the disk is full"],
        )


def test_all_parts_of_a_checkpoint_are_in_it_or_there_is_none(store: CheckpointStore) -> None:
    async def save(critic: Weights) -> None:
        policy = Weights()
        policy.may_write.set()
        critic.may_write.set()
        async with CheckpointWriter(store, {"learner": policy, "critic": critic}, tell=pytest.fail) as writer:
            await writer.save(10, {})

    with pytest.raises(CheckpointError, match="critic"):
        asyncio.run(save(Weights(failing=CheckpointError("of the critic"))))
    assert newest(store) == (None, [])
    asyncio.run(save(Weights()))
    found = store.newest(tell=pytest.fail)
    assert (written(found), written(found, "critic")) == ("0", "0")


def test_a_cancelled_wait_does_not_cancel_the_save(store: CheckpointStore) -> None:
    async def body(writer: CheckpointWriter, weights: Weights) -> None:
        await writer.save(10, {})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.finish(), 0.01)
        weights.may_write.set()

    writing(store, body)
    assert newest(store) == (10, [])


# --- another model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({"a": [2, 3]}, r"1 differences, the first: it has no b"),
        ({"a": [2, 3], "b": [4], "c": [1]}, "the model has no c"),
        ({"a": [3, 2], "b": [4]}, r"a is \[3, 2\] there and \[2, 3\] in the model"),
        ({}, "2 differences"),
    ],
)
def test_weights_of_another_model_are_refused_by_name_or_shape(saved: dict[str, list[int]], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        check_same_model("somewhere", saved=saved, mine={"a": [2, 3], "b": [4]})
    check_same_model("somewhere", saved={"b": (4,), "a": (2, 3)}, mine={"a": [2, 3], "b": [4]})
