"""Both ends of a weight transfer on one host: they find the way by themselves, and nobody waits for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.actors.receivers import GlooReceiver, SharedReceiver, WeightReceiver, open_receiver
from rlsys.errors import WeightSyncError
from rlsys.learners.host import free_port
from rlsys.learners.sender import GlooSender, SharedSender, WeightSender, open_sender
from rlsys.shared_weights import SharedWriter
from rlsys.weights import GLOO_BACKEND, WeightGroup, broadcast, checksum, copy_and_checksum, join_gloo_group, verify
from tests.rlsys.test_shared_weights import PLAN, tensors

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def memory() -> Iterator[SharedWriter]:
    made = SharedWriter(PLAN)
    yield made
    made.close()


def group_of(members: int) -> WeightGroup:
    return WeightGroup(master_address="127.0.0.1", master_port=free_port(), world_size=members)


def meet(
    threads: ThreadPoolExecutor, memory: SharedWriter | None, *, receivers: int = 2, seconds: float = 60
) -> tuple[WeightSender, list[WeightReceiver]]:
    group = group_of(1 + receivers)
    sender = threads.submit(open_sender, GLOO_BACKEND, group, seconds=seconds, device=CPU, memory=memory)
    others = [threads.submit(open_receiver, group, rank=1 + n, seconds=seconds) for n in range(receivers)]
    return sender.result(), [other.result() for other in others]


def transfer(
    threads: ThreadPoolExecutor, sender: WeightSender, receivers: list[WeightReceiver], seed: int
) -> list[dict[str, Tensor]]:
    """What each receiver got, after the proof that it is what was sent."""

    def receive(receiver: WeightReceiver) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in receiver.receive(PLAN)}

    receiving = [threads.submit(receive, receiver) for receiver in receivers]
    sent = sender.send(iter(tensors(seed).items()))
    received = [future.result() for future in receiving]
    sums = {f"worker {n}": {k: checksum(v) for k, v in one.items()} for n, one in enumerate(received)}
    verify(sent, sums, version=seed)
    assert list(sent) == PLAN.names
    return received


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("num_receivers", [1, 2])
def test_what_was_sent_arrives_every_time_whatever_the_way(
    threads: ThreadPoolExecutor, memory: SharedWriter, shared: bool, num_receivers: int
) -> None:
    sender, receivers = meet(threads, memory if shared else None, receivers=num_receivers)
    assert isinstance(sender, SharedSender if shared else GlooSender)
    assert all(isinstance(receiver, SharedReceiver if shared else GlooReceiver) for receiver in receivers)
    for seed in (1, 2, 3):
        for received in transfer(threads, sender, receivers, seed):
            assert all(torch.equal(received[name], tensor) for name, tensor in tensors(seed).items())
    for end in (sender, *receivers):
        end.close()


def test_where_one_receiver_cannot_open_the_memory_all_use_gloo(
    threads: ThreadPoolExecutor, memory: SharedWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlsys import weight_meeting

    opened: list[Any] = []

    def only_the_first(place: Any) -> Any:
        opened.append(place)
        if len(opened) > 1:
            raise WeightSyncError("on another host")
        return object()

    monkeypatch.setattr(weight_meeting, "SharedReader", only_the_first)
    sender, receivers = meet(threads, memory)
    assert len(opened) == 2
    assert isinstance(sender, GlooSender)
    transfer(threads, sender, receivers, seed=1)


def test_with_a_member_that_only_knows_gloo_all_use_it(threads: ThreadPoolExecutor, memory: SharedWriter) -> None:
    group = group_of(3)
    plain = threads.submit(join_gloo_group, group, rank=2, seconds=60)
    other = threads.submit(open_receiver, group, rank=1, seconds=60)
    sender = open_sender(GLOO_BACKEND, group, seconds=60, device=CPU, memory=memory)
    assert isinstance(sender, GlooSender)

    def receive_plainly() -> list[Tensor]:
        found = [torch.empty_like(tensor) for tensor in tensors(1).values()]
        for tensor in found:
            broadcast(tensor, plain.result())
        return found

    receiving = threads.submit(receive_plainly)
    transfer(threads, sender, [other.result()], seed=1)
    assert all(torch.equal(*pair) for pair in zip(receiving.result(), tensors(1).values(), strict=True))


def test_a_sender_that_only_knows_gloo_is_understood(threads: ThreadPoolExecutor) -> None:
    group = group_of(2)
    receiver = threads.submit(open_receiver, group, rank=1, seconds=60)
    join_gloo_group(group, rank=0, seconds=60)
    assert isinstance(receiver.result(), GlooReceiver)


def test_after_another_meeting_the_next_weights_are_read_not_old_ones(
    threads: ThreadPoolExecutor, memory: SharedWriter
) -> None:
    for seed in (1, 2, 3):
        sender, receivers = meet(threads, memory, receivers=1 + seed % 2)
        transfer(threads, sender, receivers, seed)
        sender.close()


def failure_of(future: Future[Any]) -> BaseException:
    error = future.exception(timeout=60)
    assert error is not None
    return error


def test_shared_weights_are_written_though_a_receiver_has_died(
    threads: ThreadPoolExecutor, memory: SharedWriter
) -> None:
    sender, [first, _] = meet(threads, memory)
    transfer(threads, sender, [first], seed=1)
    transfer(threads, sender, [first], seed=2)


@pytest.mark.parametrize("shared", [True, False])
def test_a_sender_that_leaves_ends_the_wait_of_the_others(
    threads: ThreadPoolExecutor, memory: SharedWriter, shared: bool
) -> None:
    sender, [receiver] = meet(threads, memory if shared else None, receivers=1, seconds=50)
    waiting = threads.submit(list, receiver.receive(PLAN))
    time.sleep(0.2)
    started = time.monotonic()
    sender.close()
    del sender
    assert isinstance(failure_of(waiting), WeightSyncError if shared else RuntimeError)
    assert time.monotonic() - started < 40, "it waited for its own deadline"


@pytest.mark.parametrize("shared", [True, False])
def test_a_sender_that_sends_nothing_ends_the_wait_at_the_deadline(
    threads: ThreadPoolExecutor, memory: SharedWriter, shared: bool
) -> None:
    sender, [receiver] = meet(threads, memory if shared else None, receivers=1, seconds=3)
    assert isinstance(failure_of(threads.submit(list, receiver.receive(PLAN))), WeightSyncError | RuntimeError)
    sender.close()


@pytest.mark.parametrize("shared", [True, False])
def test_weights_that_cannot_be_gathered_fail_at_both_ends(
    threads: ThreadPoolExecutor, memory: SharedWriter, shared: bool
) -> None:
    def gathered() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors(1).items())[:2]
        raise ZeroDivisionError

    sender, [receiver] = meet(threads, memory if shared else None, receivers=1, seconds=5)
    waiting = threads.submit(list, receiver.receive(PLAN))
    with pytest.raises(ZeroDivisionError):
        sender.send(gathered())
    assert isinstance(failure_of(waiting), WeightSyncError | RuntimeError)
    if shared:  # and it is known at once, so that the same group can go on at the driver's word
        sender, [receiver] = meet(threads, memory, receivers=1)
        transfer(threads, sender, [receiver], seed=2)


def test_gathering_goes_on_while_the_tensor_before_is_sent(
    memory: SharedWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending = threading.Event()

    def noticed(source: Tensor, target: Tensor) -> int:
        sending.set()
        return copy_and_checksum(source, target)

    monkeypatch.setattr("rlsys.shared_weights.copy_and_checksum", noticed)

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(tensors(1).items()):
            assert number == 0 or sending.wait(20), "the first is not sent before the second is gathered"
            yield pair

    assert list(SharedSender(memory).send(gathered())) == PLAN.names


STOPPED = """
import os, signal, sys
from rlsys.weights import WeightGroup, open_store
group = WeightGroup(master_address="127.0.0.1", master_port=int(sys.argv[1]), world_size=2)
store = open_store(group, rank=0, seconds=30)
print("met", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_learner_that_freezes_while_they_meet_ends_the_wait_at_the_deadline() -> None:
    group = group_of(2)
    learner = subprocess.Popen([sys.executable, "-c", STOPPED, str(group.master_port)], stdout=subprocess.PIPE)
    try:
        with pytest.raises(WeightSyncError, match="did not meet within 12 s"):
            open_receiver(group, rank=1, seconds=12)
    finally:
        learner.kill()
        learner.wait()
