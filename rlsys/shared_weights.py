"""Weights in memory that processes of one host share: the learner writes them once, engines load them from there.

The memory is an anonymous file without any name in a file system (memfd), which others on the host open through /proc.
So nothing can be left behind, however a process ends: the kernel frees the memory when nobody has it open or mapped.
There are two blocks in turn, so that the weights that were published last stay readable while the next are written.

A block is a page with a header and then the tensors of the plan, one after another. The header is the token of its
writer, the serial number of the weights in it (-N if number N will never be complete), and how many tensors of them are
there already: readers follow the writer from tensor to tensor.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.errors import WeightSyncError
from rlsys.weights import WeightPlan, copy_and_checksum

_HEADER_BYTES = 4096
_ALIGNMENT = 64
_POLL_SECONDS = 0.0002
_TOKEN, _SERIAL, _NUM_WRITTEN = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPlace:
    """Where weights lie, for other processes of the host that the writer runs on."""

    process: int
    descriptors: tuple[int, int]
    """Of the two blocks, in the writer's process."""
    token: int
    """Drawn by the writer: whoever reads something else there has another host's process before it."""
    serial: int
    """Which weights are meant; those with odd numbers lie in the second block."""


class SharedWriter:
    """The learner's side: has the two blocks, which take no memory before they are written."""

    def __init__(self, plan: WeightPlan) -> None:
        places, size = _layout(plan)
        self._files = (_anonymous_file(size), _anonymous_file(size))
        self._token = secrets.randbits(63)
        self._next, self._published = 1, 0
        blocks = [mmap.mmap(file, size) for file in self._files]
        self._headers = [_header(block) for block in blocks]
        self._tensors = [_views(block, plan, places) for block in blocks]
        for header in self._headers:
            header[_TOKEN] = self._token

    @classmethod
    def where_it_fits(cls, plan: WeightPlan) -> SharedWriter | None:
        """One for this plan; None on a host that could not hold two sets of weights in half of its free memory."""
        if not hasattr(os, "memfd_create"):
            return None
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return cls(plan) if 2 * _layout(plan)[1] <= free / 2 else None

    def reserve(self) -> None:
        """Take the memory now, because the first write to each of its pages is slow.

        Raises:
            OSError: there is not enough.
        """
        for file in self._files:
            os.posix_fallocate(file, 0, os.fstat(file).st_size)

    @property
    def coming(self) -> SharedPlace:
        """The place of the weights that will be written next; who opens it may wait for them."""
        return self._place(self._next)

    @property
    def published(self) -> SharedPlace | None:
        """The place of the weights that were written last, which stays as it is while the next are written."""
        return self._place(self._published) if self._published else None

    def _place(self, serial: int) -> SharedPlace:
        first, second = self._files
        return SharedPlace(process=os.getpid(), descriptors=(first, second), token=self._token, serial=serial)

    @contextmanager
    def writing(self) -> Iterator[Callable[[str, Tensor], int]]:
        """A function that writes the next tensor of the plan and returns its checksum; all must come in the context.

        Raises:
            WeightSyncError: a tensor is not that of the plan, or they are not all.
        """
        header, tensors = self._headers[self._next % 2], self._tensors[self._next % 2]
        names = iter(tensors)

        def put(name: str, tensor: Tensor) -> int:
            if (expected := next(names, None)) != name:
                raise WeightSyncError(f"the learner's plan has {expected or 'nothing'} where {name} comes")
            written = copy_and_checksum(tensor, tensors[name])
            header[_NUM_WRITTEN] += 1
            return written

        header[_NUM_WRITTEN] = 0
        header[_SERIAL] = self._next
        try:
            yield put
            if (missing := next(names, None)) is not None:
                raise WeightSyncError(f"the learner's plan has {missing}, which did not come")
        except BaseException:
            self.withdraw()
            raise
        self._published = self._next
        self._next += 1

    def withdraw(self) -> None:
        """Let those that wait for the next weights know that they will not come."""
        self._headers[self._next % 2][_SERIAL] = -self._next
        self._next += 2  # not the other block: it holds what was published last

    def close(self) -> None:
        """Give the memory back; readers keep what they have mapped."""
        self._headers, self._tensors = [], []
        for file in self._files:
            os.close(file)


class SharedReader:
    """An engine's side: has both blocks mapped.

    Raises:
        WeightSyncError: this process cannot see them, as on another host, under another user or in another container.
    """

    def __init__(self, place: SharedPlace) -> None:
        self._place = place
        folder = Path(f"/proc/{place.process}/fd")
        self._path = folder / str(place.descriptors[0])
        try:
            self._blocks = [_mapped(folder / str(descriptor)) for descriptor in place.descriptors]
        except (OSError, ValueError) as error:
            raise WeightSyncError(f"the learner's shared memory cannot be opened from here: {error}") from error
        self._headers = [_header(block) for block in self._blocks]
        if any(header[_TOKEN] != place.token for header in self._headers):
            raise WeightSyncError(f"{self._path} is no shared memory of this run's learner")

    def read(self, serial: int, plan: WeightPlan, *, seconds: float) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of weights `serial`, in the order of the plan, each as soon as it is there.

        The tensors are the shared memory itself: whoever keeps one longer than this iterates must copy it.

        Raises:
            WeightSyncError: they did not all come within `seconds`, will not come, are of another plan, or were
                overwritten before all were read.
        """
        until = time.monotonic() + seconds
        places, size = _layout(plan)
        block, header = self._blocks[serial % 2], self._headers[serial % 2]
        if len(block) != size:
            raise WeightSyncError(
                f"the learner shares {len(block)} bytes of weights where {size} are expected: another model"
            )
        for number, pair in enumerate(_views(block, plan, places).items()):
            while not (self._has_begun(serial) and header[_NUM_WRITTEN] > number):
                if not self._path.exists():
                    raise WeightSyncError(f"the learner (process {self._place.process}) ended before it sent {pair[0]}")
                if time.monotonic() > until:
                    raise WeightSyncError(f"the learner did not share its weights within {seconds:g} s, not {pair[0]}")
                time.sleep(_POLL_SECONDS)
            yield pair
        self._has_begun(serial)  # still

    def _has_begun(self, serial: int) -> bool:
        """Whether these weights are in their block, or on their way into it; False if they will come later.

        Raises:
            WeightSyncError: they will not come, or are there no longer.
        """
        found = int(self._headers[serial % 2][_SERIAL])
        if found == -serial:
            raise WeightSyncError(f"shared weights {serial} will not come: the learner gave them up")
        if abs(found) > serial:
            raise WeightSyncError(f"shared weights {serial} were overwritten before all of them were read")
        return found == serial


def _layout(plan: WeightPlan) -> tuple[list[tuple[int, int]], int]:
    """Where each tensor of the plan begins and ends in a block, and the size of a block, all in bytes."""
    places, end = [], _HEADER_BYTES
    for dtype_name, shape in zip(plan.dtype_names, plan.shapes, strict=True):
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = begin + math.prod(shape) * getattr(torch, dtype_name).itemsize
        places.append((begin, end))
    return places, end


def _views(block: mmap.mmap, plan: WeightPlan, places: list[tuple[int, int]]) -> dict[str, Tensor]:
    """The tensors in a block, by name."""
    memory = torch.frombuffer(block, dtype=torch.uint8)
    return {
        name: memory[begin:end].view(getattr(torch, dtype_name)).view(shape)
        for name, dtype_name, shape, (begin, end) in zip(plan.names, plan.dtype_names, plan.shapes, places, strict=True)
    }


def _header(block: mmap.mmap) -> NDArray[np.int64]:
    """The header of a block [3]."""
    return np.frombuffer(block, dtype=np.int64, count=3)


def _anonymous_file(size: int) -> int:
    file = os.memfd_create("rlsys-weights")
    os.ftruncate(file, size)
    return file


def _mapped(path: Path) -> mmap.mmap:
    """A file's memory as it is and becomes; what this process might write into it, nobody else sees."""
    file = os.open(path, os.O_RDONLY)
    try:
        return mmap.mmap(file, os.fstat(file).st_size, access=mmap.ACCESS_COPY)
    finally:
        os.close(file)
