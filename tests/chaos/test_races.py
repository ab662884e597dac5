"""Moments that real processes seldom hit: brought about with fake workers in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rlsys.errors import ActorDiedError
from tests.rlsys.fleet_here import FakeFleet, FakeWorker, running


def slowly(worker: FakeWorker) -> None:
    worker.seconds = 0.05


def test_a_worker_that_dies_between_being_chosen_and_being_asked_gets_its_group_done_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = FakeFleet(slowly, count=1)
    hand_out, died = fleet.dispatch.hand_out, []

    def die_once_chosen() -> None:
        waited = fleet.dispatch.num_waiting
        hand_out()
        if not died and fleet.dispatch.num_waiting < waited:
            died.append(next(iter(fleet.roster.workers)))
            fleet.lose(died[0], ActorDiedError("struck"))

    monkeypatch.setattr(fleet.dispatch, "hand_out", die_once_chosen)

    async def main() -> None:
        groups: list[Any] = await asyncio.gather(fleet.roll(0, size=8), fleet.roll(1, size=8))
        assert [group.problem.id for group in groups] == ["0", "1"]
        assert [group.dropped for group in groups] == [{}, {}]
        assert died
        assert died[0] not in fleet.roster.workers

    running(fleet, main)
