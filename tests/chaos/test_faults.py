"""The faults themselves: whom they strike, how often, and that a seed says which they are."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import Fault, Faults, Injector

PLUGINS = Path(__file__).parents[1] / "plugins"


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path)


def test_a_fault_strikes_whom_it_names_at_its_point_after_those_it_spares_and_so_often_in_all(faults: Faults) -> None:
    faults.order(Fault(point="here", action="nan", who="worker 1", spared=1, times=2))
    first, second = Injector(faults.folder, "worker 1"), Injector(faults.folder, "worker 1")
    other = Injector(faults.folder, "worker 2")
    assert [other.pass_by("here") for _ in range(3)] == ["", "", ""]
    assert [first.pass_by("there") for _ in range(3)] == ["", "", ""]
    assert [first.pass_by("here") for _ in range(3)] == ["", "nan", "nan"]
    assert [second.pass_by("here") for _ in range(3)] == ["", "", ""], "the times are those of all processes together"
    assert faults.struck == ["worker 1: nan at here"] * 2


def test_a_fault_may_wait_for_what_a_process_is_at_and_is_withdrawn(faults: Faults) -> None:
    injector = Injector(faults.folder, "worker 0")
    faults.order(Fault(point="in_act", action="truncate", what="p3", times=2))
    assert [injector.pass_by("in_act", problem) for problem in ("p2", "p3", "p4")] == ["", "truncate", ""]
    faults.withdraw()
    assert injector.pass_by("in_act", "p3") == ""


@pytest.mark.parametrize(("action", "error"), [("raise", RuntimeError), ("no_space", OSError)])
def test_what_is_to_be_raised_is_raised(faults: Faults, action: str, error: type[Exception]) -> None:
    faults.order(Fault(point="here", action=action, times=2))  # type: ignore[arg-type]
    injector = Injector(faults.folder, "driver")
    with pytest.raises(error):
        injector.pass_by("here")
    with pytest.raises(error):
        asyncio.run(injector.pass_by_waiting("here"))


def test_a_process_that_is_killed_is_no_longer_among_those_that_live(faults: Faults) -> None:
    faults.order(Fault(point="here", action="kill"))
    code = f"import faults, sys; i = faults.Injector({str(faults.folder)!r}, 'worker 0'); i.pass_by('here')"
    done = subprocess.run([sys.executable, "-c", code], cwd=PLUGINS, check=False)
    assert done.returncode == -signal.SIGKILL
    assert faults.processes() == []
    Injector(faults.folder, "driver")
    assert [process.pid for process in faults.processes()] == [os.getpid()]


def test_the_same_seed_orders_the_same_faults(tmp_path: Path) -> None:
    orders = []
    for number, seed in enumerate((1, 1, 2)):
        made = Faults(tmp_path / str(number))
        made.order_any(seed, 5, points=["a", "b", "c"], actions=["kill", "raise"])
        files = sorted((made.folder / "ordered").iterdir())
        orders.append([json.loads(file.read_text()) for file in files])
    assert orders[0] == orders[1] != orders[2]
