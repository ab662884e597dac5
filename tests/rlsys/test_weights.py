"""Weight transfer: a checksum that sees every change, a comparison that names what differs, a group that delivers."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsys.errors import WeightSyncError
from rlsys.learners.host import free_port
from rlsys.weights import WeightGroup, broadcast, checksum, copy_and_checksum, join_gloo_group, table_checksum, verify

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SIZES = [1, 3, 4, 7, 8, 9, 31, 4095, 4096, 4097, 8192, 12_300, 40_001]


def bytes_of(size: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


SumUp = Callable[[Tensor], int]
both = pytest.mark.parametrize("sum_up", [checksum, table_checksum])


@both
@pytest.mark.parametrize("size", SIZES)
def test_equal_bytes_have_equal_checksums_whatever_their_type_and_shape(sum_up: SumUp, size: int) -> None:
    data = bytes_of(size * 8)
    value = sum_up(data)
    assert value == sum_up(data.clone())
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.float64):
        assert value == sum_up(data.view(dtype))
        assert value == sum_up(data.view(dtype).view(1, -1, 1))
    assert 0 <= value < 2**64


@both
@PATIENT
@given(st.sampled_from(SIZES), st.data())
def test_one_flipped_bit_anywhere_changes_the_sum_up(sum_up: SumUp, size: int, data: Any) -> None:
    before = bytes_of(size, seed=size)
    after = before.clone()
    place = data.draw(st.integers(0, size - 1))
    after[place] ^= 1 << data.draw(st.integers(0, 7))
    assert sum_up(after) != sum_up(before)


@both
def test_a_flipped_sign_of_any_number_changes_the_sum_up(sum_up: SumUp) -> None:
    for dtype, size in ((torch.float32, 2100), (torch.bfloat16, 100)):
        tensor = torch.ones(size, dtype=dtype)
        value = sum_up(tensor)
        for index in range(len(tensor)):
            tensor[index] *= -1
            assert sum_up(tensor) != value, f"element {index} of {dtype}"
            tensor[index] *= -1


@both
@PATIENT
@given(st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([8, 100, 5000]), st.data())
def test_two_swapped_elements_change_the_sum_up(sum_up: SumUp, dtype: torch.dtype, size: int, data: Any) -> None:
    before = torch.arange(1, size + 1).to(dtype)
    first, second = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    opposite = data.draw(st.booleans())
    if opposite:
        before[second] = -before[first]
    after = before.clone()
    after[[first, second]] = before[[second, first]]
    assert (sum_up(after) == sum_up(before)) == torch.equal(after, before)


@both
@PATIENT
@given(st.integers(1, 3000), st.integers(0, 50), st.integers(0, 3000), st.integers(0, 99))
def test_two_swapped_blocks_change_the_sum_up(sum_up: SumUp, width: int, lead: int, gap: int, seed: int) -> None:
    before = torch.from_numpy(np.random.default_rng(seed).standard_normal(lead + 2 * width + gap, dtype=np.float32))
    after = before.clone()
    other = lead + width + gap
    after[lead : lead + width] = before[other : other + width]
    after[other : other + width] = before[lead : lead + width]
    assert sum_up(after) != sum_up(before)


@both
@pytest.mark.parametrize("size", [2, 3, 64, 200, 2048])
def test_blocks_with_the_same_sum_may_not_be_swapped_either(sum_up: SumUp, size: int) -> None:
    # The rows of the identity hold the same numbers, so a checksum that weights linearly by position is blind to this.
    identity = torch.eye(size)
    swapped = identity.clone()
    swapped[[0, size - 1]] = identity[[size - 1, 0]]
    assert sum_up(swapped) != sum_up(identity)
    assert sum_up(identity.flip(0)) != sum_up(identity)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_number_of_zeros_matters(sum_up: SumUp, dtype: torch.dtype) -> None:
    values = [sum_up(torch.zeros(size, dtype=dtype)) for size in [0, *SIZES]]
    assert len(set(values)) == len(values)


@both
def test_an_empty_tensor_and_a_single_number_have_checksums(sum_up: SumUp) -> None:
    assert sum_up(torch.zeros(0)) == sum_up(torch.zeros(3, 0, dtype=torch.bfloat16))
    assert sum_up(torch.tensor(1.5)) == sum_up(torch.tensor([1.5])) != sum_up(torch.tensor(-1.5))


@both
@pytest.mark.parametrize("offset", range(9))
def test_a_view_that_is_not_aligned_has_the_checksum_of_its_bytes(sum_up: SumUp, offset: int) -> None:
    data = bytes_of(9000)
    view = data[offset : offset + 8191]
    assert sum_up(view) == sum_up(view.clone())
    numbers = bytes_of(9000).view(torch.bfloat16)
    assert sum_up(numbers[offset : offset + 4001]) == sum_up(numbers[offset : offset + 4001].clone())
    shifted = torch.frombuffer(bytearray(9000), dtype=torch.uint8, offset=offset)
    assert sum_up(shifted[4:4100]) == sum_up(torch.zeros(4096, dtype=torch.uint8))


@both
def test_a_transposed_view_has_the_checksum_of_its_own_order(sum_up: SumUp) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert sum_up(matrix.T) == sum_up(matrix.T.contiguous()) != sum_up(matrix)


@both
def test_the_checksum_of_a_parameter_is_that_of_its_numbers(sum_up: SumUp) -> None:
    parameter = torch.nn.Parameter(torch.arange(5.0))
    assert sum_up(parameter) == sum_up(torch.arange(5.0))


@pytest.mark.parametrize(
    "source",
    [
        bytes_of(3_000_001),
        bytes_of(1 << 19).view(torch.int16).view(64, -1),
        torch.arange(600_000.0).view(600, 1000).T,
        torch.nn.Parameter(torch.arange(5.0)),
        torch.tensor(1.5),
        torch.zeros(3, 0),
    ],
    ids=["many parts", "whole parts", "transposed", "parameter", "number", "empty"],
)
def test_a_copy_has_the_bytes_and_the_checksum_of_what_was_copied(source: torch.Tensor) -> None:
    target = torch.full(source.shape, 7, dtype=source.dtype)
    assert copy_and_checksum(source.detach(), target) == checksum(source)
    assert target.numpy(force=True).tobytes() == source.contiguous().numpy(force=True).tobytes()


def test_a_copy_into_another_format_has_the_checksum_of_what_is_there_afterwards() -> None:
    target = torch.zeros(9, dtype=torch.bfloat16)
    assert copy_and_checksum(torch.arange(9.0), target) == checksum(torch.arange(9).bfloat16()) == checksum(target)
    with pytest.raises(RuntimeError, match="size"):
        copy_and_checksum(torch.arange(8.0), target)


def test_weights_that_agree_pass() -> None:
    verify({"a": 1, "b": 2}, {"rollout actor 0": {"b": 2, "a": 1}, "rollout actor 1": {"a": 1, "b": 2}}, version=3)


def test_weights_that_differ_name_the_engine_the_tensor_and_the_version() -> None:
    with pytest.raises(WeightSyncError, match=r"rollout actor 1 holds a different b .* version 3 .*00000000000000ff"):
        verify(
            {"a": 1, "b": 2}, {"rollout actor 0": {"a": 1, "b": 2}, "rollout actor 1": {"a": 1, "b": 255}}, version=3
        )


def test_a_tensor_that_did_not_arrive_is_named() -> None:
    with pytest.raises(WeightSyncError, match="rollout actor 0 did not receive b of weights version 3"):
        verify({"a": 1, "b": 2}, {"rollout actor 0": {"a": 1}}, version=3)


def test_a_tensor_that_was_not_sent_is_named() -> None:
    with pytest.raises(WeightSyncError, match="rollout actor 0 received c, which the learner did not send"):
        verify({"a": 1}, {"rollout actor 0": {"a": 1, "c": 5}}, version=3)


def test_a_group_of_one_sender_and_two_receivers_delivers_every_byte() -> None:
    sent = [
        torch.randn(300, 7),
        torch.randn(33).to(torch.bfloat16),
        torch.tensor(4, dtype=torch.int64),
        torch.randn(2, 3, dtype=torch.float64),
    ]
    received = {rank: [torch.zeros_like(tensor) for tensor in sent] for rank in (1, 2)}
    group = WeightGroup(master_address="127.0.0.1", master_port=free_port(), world_size=3)
    failures: list[BaseException] = []

    def take_part(rank: int) -> None:
        try:
            members = join_gloo_group(group, rank=rank, seconds=60)
            for tensor in sent if rank == 0 else received[rank]:
                broadcast(tensor, members)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for tensors in received.values():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors, sent, strict=True))
        assert [checksum(tensor) for tensor in tensors] == [checksum(tensor) for tensor in sent]
    assert not torch.distributed.is_initialized(), "the group lives beside the default one"


def test_a_sender_whose_receivers_do_not_come_gives_up_at_its_deadline() -> None:
    group = WeightGroup(master_address="127.0.0.1", master_port=free_port(), world_size=2)
    with pytest.raises(WeightSyncError, match="did not meet within 1 s"):
        join_gloo_group(group, rank=0, seconds=1)
