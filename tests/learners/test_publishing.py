"""What a learner sends to engines: one rank of FSDP2 in this process, and threads in the place of engines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.actors.receivers import GlooReceiver, SharedReceiver, WeightReceiver, open_receiver
from rlsys.errors import WeightSyncError
from rlsys.learners.fsdp import FsdpLearner
from rlsys.shared_weights import SharedReader
from rlsys.weights import GLOO_BACKEND, WeightGroup, WeightPlan, checksum, join_gloo_group
from tests.learners.ranks import Ranks, batches, build, free_ports, weights


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder: Path = tmp_path_factory.mktemp("publishing")
    build(folder)
    return Ranks(FsdpLearner, folder, rank=0, ports=free_ports(8), world_size=1)


@pytest.fixture
def learner(ranks: Ranks) -> Iterator[Any]:
    started = ranks.start()
    yield started
    started.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def group() -> WeightGroup:
    return WeightGroup(master_address="127.0.0.1", master_port=free_ports(1)[0], world_size=2)


def meet(learner: Any, threads: ThreadPoolExecutor) -> WeightReceiver:
    members = group()
    engine = threads.submit(open_receiver, members, rank=1, seconds=60)
    learner.open_weights(members, backend=GLOO_BACKEND, timeout=60)
    return engine.result()


def copies(pairs: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pairs}


def num_shared_files() -> int:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum("rlsys-weights" in os.readlink(link) for link in links if link.is_symlink())


def assert_sent(learner: Any, sent: dict[str, int], received: dict[str, Tensor]) -> None:
    now = weights(learner)
    assert list(received) == list(sent) == list(now) == learner._plan.names
    assert all(torch.equal(received[name], tensor) for name, tensor in now.items())
    assert sent == {name: checksum(tensor) for name, tensor in now.items()}


def test_every_update_reaches_an_engine_of_the_same_host_through_shared_memory(
    ranks: Ranks, learner: Any, threads: ThreadPoolExecutor
) -> None:
    engine = meet(learner, threads)
    assert isinstance(engine, SharedReceiver)
    assert learner.published_weights() is None
    for batch in batches(ranks.folder)[:3]:
        ranks.step(learner, batch)
        receiving = threads.submit(copies, engine.receive(learner._plan))
        assert_sent(learner, learner.send_weights(), receiving.result())


def test_an_engine_that_joins_reads_what_was_sent_last_while_the_learner_goes_on(
    ranks: Ranks, learner: Any, threads: ThreadPoolExecutor
) -> None:
    meet(learner, threads)
    sent = learner.send_weights()
    place = learner.published_weights()
    ranks.step(learner, batches(ranks.folder)[0])
    received = copies(SharedReader(place).read(place.serial, learner._plan, seconds=0))
    assert {name: checksum(tensor) for name, tensor in received.items()} == sent
    meet(learner, threads)
    assert learner.published_weights() == place, "a meeting sends nothing"


def test_a_learner_whose_engines_use_gloo_keeps_no_shared_memory(learner: Any, threads: ThreadPoolExecutor) -> None:
    before = num_shared_files()
    meet(learner, threads)
    learner.send_weights()
    assert num_shared_files() > before
    members = group()
    engine = threads.submit(join_gloo_group, members, rank=1, seconds=60)
    learner.open_weights(members, backend=GLOO_BACKEND, timeout=60)
    assert num_shared_files() == before
    assert learner.published_weights() is None, "what is there is no longer what was sent last"
    plan: WeightPlan = learner._plan
    receiving = threads.submit(copies, GlooReceiver(engine.result(), 60).receive(plan))
    assert_sent(learner, learner.send_weights(), receiving.result())


def test_a_learner_that_has_ended_keeps_no_shared_memory(ranks: Ranks, threads: ThreadPoolExecutor) -> None:
    before = num_shared_files()
    learner = ranks.start()
    meet(learner, threads)
    learner.send_weights()
    learner.close()
    assert num_shared_files() == before


def test_the_ranks_gather_to_the_end_also_what_cannot_be_sent(learner: Any, threads: ThreadPoolExecutor) -> None:
    meet(learner, threads)
    gathered: list[str] = []
    full_weights = learner._full_weights

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in full_weights():
            gathered.append(name)
            yield name if len(gathered) != 2 else "no tensor of the plan", tensor

    learner._full_weights = noted
    with pytest.raises(WeightSyncError, match="where no tensor of the plan comes"):
        learner.send_weights()
    assert gathered == learner._plan.names
    del learner._full_weights
    engine = meet(learner, threads)
    receiving = threads.submit(copies, engine.receive(learner._plan))
    assert_sent(learner, learner.send_weights(), receiving.result())
