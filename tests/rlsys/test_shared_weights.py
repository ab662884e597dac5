"""Weights in shared memory: read in place by other processes, and nothing is left of them however anybody ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlsys.errors import WeightSyncError
from rlsys.shared_weights import SharedPlace, SharedReader, SharedWriter
from rlsys.weights import WeightPlan

PLAN = WeightPlan(
    names=["matrix", "halves", "number", "nothing", "bytes"],
    dtype_names=["float32", "bfloat16", "int64", "float32", "uint8"],
    shapes=[[300, 7], [33], [], [0, 4], [5]],
)


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 200, shape, generator=generator).to(getattr(torch, dtype_name))
        for name, dtype_name, shape in zip(PLAN.names, PLAN.dtype_names, PLAN.shapes, strict=True)
    }


def write(writer: SharedWriter, seed: int) -> None:
    with writer.writing() as put:
        for name, tensor in tensors(seed).items():
            put(name, tensor)


def copies(reader: SharedReader, serial: int, *, seconds: float = 20.0) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in reader.read(serial, PLAN, seconds=seconds)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    pairs = zip(one.values(), other.values(), strict=True)
    return list(one) == list(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def writer() -> Iterator[SharedWriter]:
    made = SharedWriter.where_it_fits(PLAN)
    assert made is not None
    yield made
    made.close()


def in_another_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs `code`; its standard output comes in lines."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_every_tensor_arrives_in_its_format_shape_and_order(writer: SharedWriter) -> None:
    reader = SharedReader(writer.coming)
    for serial in (1, 2, 3, 4):
        assert writer.coming.serial == serial
        write(writer, seed=serial)
        assert same(copies(reader, serial), tensors(serial))
    assert writer.published == replace(writer.coming, serial=4)


def test_what_is_read_is_the_shared_memory_itself_aligned_for_any_format(writer: SharedWriter) -> None:
    reader = SharedReader(writer.coming)
    write(writer, seed=1)
    first = [tensor.data_ptr() for _, tensor in reader.read(1, PLAN, seconds=1)]
    write(writer, seed=2)
    write(writer, seed=3)
    assert first == [tensor.data_ptr() for _, tensor in reader.read(3, PLAN, seconds=1)]
    assert all(pointer % 64 == 0 for pointer in first if pointer)


def test_what_a_reader_writes_into_it_nobody_else_sees(writer: SharedWriter) -> None:
    reader, other = SharedReader(writer.coming), SharedReader(writer.coming)
    write(writer, seed=1)
    for _, tensor in reader.read(1, PLAN, seconds=1):
        tensor.zero_()
    assert same(copies(other, 1), tensors(1))


def test_who_comes_late_reads_what_was_published_last_while_the_next_is_being_written(writer: SharedWriter) -> None:
    assert writer.published is None
    write(writer, seed=1)
    write(writer, seed=2)
    published = writer.published
    assert published is not None
    with writer.writing() as put:
        for name, tensor in tensors(3).items():
            put(name, tensor)
            assert writer.published == published
            assert same(copies(SharedReader(published), published.serial, seconds=0), tensors(2))
    assert writer.published == replace(published, serial=3)


def test_a_reader_follows_the_writer_from_tensor_to_tensor(writer: SharedWriter) -> None:
    for seed in (1, 2, 3):
        reading = SharedReader(writer.coming).read(writer.coming.serial, PLAN, seconds=60)
        with writer.writing() as put:
            for name, tensor in tensors(seed).items():
                put(name, tensor)
                found, there = next(reading)
                assert found == name
                assert torch.equal(there, tensor)
        assert list(reading) == []


def test_a_reader_waits_until_the_weights_are_there(writer: SharedWriter) -> None:
    reader = SharedReader(writer.coming)
    timer = threading.Timer(0.2, write, (writer, 1))
    timer.start()
    assert same(copies(reader, 1), tensors(1))
    timer.join()


def test_a_reader_gives_up_at_its_deadline_and_names_what_did_not_come(writer: SharedWriter) -> None:
    with pytest.raises(WeightSyncError, match=r"did not share its weights within 0\.1 s, not matrix"):
        copies(SharedReader(writer.coming), 1, seconds=0.1)
    place = writer.coming
    with writer.writing() as put:
        put("matrix", tensors(1)["matrix"])
        with pytest.raises(WeightSyncError, match="not halves"):
            copies(SharedReader(place), 1, seconds=0.1)
        for name, tensor in list(tensors(1).items())[1:]:
            put(name, tensor)


def test_weights_that_were_overwritten_are_not_read(writer: SharedWriter) -> None:
    reader = SharedReader(writer.coming)
    for seed in (1, 2, 3):
        write(writer, seed)
    with pytest.raises(WeightSyncError, match="weights 1 were overwritten"):
        copies(reader, 1)


@pytest.mark.parametrize("num_read", [1, 4, 5])
def test_weights_that_are_overwritten_while_they_are_read_are_refused(writer: SharedWriter, num_read: int) -> None:
    reader = SharedReader(writer.coming)
    write(writer, seed=1)
    reading = reader.read(1, PLAN, seconds=1)
    assert next(reading)[0] == "matrix"
    write(writer, seed=2)  # into the other block
    for name in PLAN.names[1:num_read]:
        assert next(reading)[0] == name
    write(writer, seed=3)
    with pytest.raises(WeightSyncError, match="weights 1 were overwritten"):
        list(reading)


def break_after(writer: SharedWriter, num_written: int) -> None:
    def write_some() -> None:
        with writer.writing() as put:
            for name, tensor in list(tensors(9).items())[:num_written]:
                put(name, tensor)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_some()


@pytest.mark.parametrize("num_written", [0, 2, 5])
def test_a_writer_that_fails_tells_readers_at_once_and_keeps_what_was_published(
    writer: SharedWriter, num_written: int
) -> None:
    write(writer, seed=1)
    reader = SharedReader(writer.coming)
    break_after(writer, num_written)
    with pytest.raises(WeightSyncError, match="weights 2 will not come"):
        copies(reader, 2, seconds=60)
    break_after(writer, num_written)
    published = writer.published
    assert published is not None
    assert same(copies(reader, published.serial), tensors(1))
    serial = writer.coming.serial
    write(writer, seed=5)
    assert same(copies(SharedReader(replace(writer.coming, serial=serial)), serial), tensors(5))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["halves"], "has matrix where halves comes"),
        (["matrix", "matrix"], "has halves where matrix comes"),
        ([*PLAN.names, "more"], "has nothing where more comes"),
        (["matrix"], "has halves, which did not come"),
    ],
)
def test_only_the_tensors_of_the_plan_in_their_order_are_taken(
    writer: SharedWriter, names: list[str], message: str
) -> None:
    def write_these() -> None:
        with writer.writing() as put:
            for name in names:
                put(name, tensors(1).get(name, torch.zeros(1)))

    with pytest.raises(WeightSyncError, match=message):
        write_these()
    assert writer.published is None


def test_another_plan_is_refused(writer: SharedWriter) -> None:
    write(writer, seed=1)
    other = replace(PLAN, shapes=[[300, 8], [33], [], [0, 4], [5]])
    with pytest.raises(WeightSyncError, match="another model"):
        list(SharedReader(writer.coming).read(1, other, seconds=1))


@pytest.mark.parametrize("wrong", ["token", "descriptors", "process"])
def test_a_place_that_is_not_there_is_refused(writer: SharedWriter, tmp_path: Path, wrong: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with open(tmp_path / "empty", "w") as file:
        places = {
            "token": replace(writer.coming, token=1),
            "descriptors": replace(writer.coming, descriptors=(file.fileno(), file.fileno())),
            "process": replace(writer.coming, process=ended.pid),
        }
        with pytest.raises(WeightSyncError, match="shared memory"):
            SharedReader(places[wrong])


def test_a_model_that_the_host_cannot_hold_twice_is_not_shared() -> None:
    huge = WeightPlan(names=["a"], dtype_names=["float32"], shapes=[[2**20, 2**20]])
    assert SharedWriter.where_it_fits(huge) is None


WRITER = """
import sys, time
from rlsys.shared_weights import SharedWriter
from tests.rlsys.test_shared_weights import PLAN, write
writer = SharedWriter(PLAN)
writer.reserve()
write(writer, 1)
place = writer.coming
print(place.process, *place.descriptors, place.token, place.serial, flush=True)
time.sleep(60)
"""


def started_writer() -> tuple[subprocess.Popen[str], SharedPlace]:
    process = in_another_process(WRITER)
    assert process.stdout is not None
    number, first, second, token, serial = map(int, process.stdout.readline().split())
    return process, SharedPlace(process=number, descriptors=(first, second), token=token, serial=serial)


def test_another_process_reads_it_and_goes_on_reading_when_the_learner_was_killed() -> None:
    learner, place = started_writer()
    reader = SharedReader(place)
    assert same(copies(reader, 1), tensors(1))
    learner.kill()
    learner.wait()
    assert same(copies(reader, 1), tensors(1))
    with pytest.raises(WeightSyncError, match=f"process {place.process}. ended"):
        copies(reader, place.serial, seconds=60)


def test_a_learner_that_was_killed_while_somebody_waits_ends_the_wait() -> None:
    learner, place = started_writer()
    reader = SharedReader(place)
    killing = threading.Timer(0.3, lambda: (learner.kill(), learner.wait()))
    killing.start()
    with pytest.raises(WeightSyncError, match="ended before it sent"):
        copies(reader, place.serial, seconds=60)
    killing.join()


def test_a_frozen_learner_ends_the_wait_at_the_deadline() -> None:
    learner, place = started_writer()
    reader = SharedReader(place)
    os.kill(learner.pid, signal.SIGSTOP)
    try:
        with pytest.raises(WeightSyncError, match=r"did not share its weights within 0\.3 s"):
            copies(reader, place.serial, seconds=0.3)
    finally:
        learner.kill()
        learner.wait()


def test_nothing_is_left_of_a_learner_that_was_killed() -> None:
    before = set(os.listdir("/dev/shm"))
    learner, place = started_writer()
    descriptor = Path(f"/proc/{place.process}/fd/{place.descriptors[0]}")
    assert "memfd:rlsys-weights" in os.readlink(descriptor)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "rlsys" in name}
    learner.kill()
    learner.wait()
    assert not descriptor.exists()


def test_nothing_is_left_open_after_close_and_no_tracker_complains() -> None:
    code = """
import gc, os
from rlsys.shared_weights import SharedReader
from tests.rlsys.test_shared_weights import PLAN, SharedWriter, copies, write
before = len(os.listdir("/proc/self/fd"))
writer = SharedWriter(PLAN)
write(writer, 1)
reader = SharedReader(writer.coming)
copies(reader, 1)
writer.close()
del reader
gc.collect()
print("left", len(os.listdir("/proc/self/fd")) - before, open("/proc/self/maps").read().count("rlsys-weights"))
"""
    process = in_another_process(code)
    assert process.communicate(timeout=60)[0] == "left 0 0\n"
