"""The escape suite: every attack against every tier of the Python tool that this host can make.

In T2 none may succeed; for the weaker tiers the attacks say themselves where they do, so that the table in the
documentation is what is tested. One tool serves all attacks on a tier, each in a session of its own.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.attacks import ATTACKS, TIERS, Arena, Attack, Verdict, World

FAMILIES = {
    "network", "secrets", "files", "processes", "kernel", "memory", "disk", "output", "time", "protocol", "state",
}  # fmt: skip
NAMESPACES = ("--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--cgroup", "--pid", "--fork")
NOT_PYTHON = {"a source that is no text", "a cell that never compiles and a cell that never ends its class"}


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture(scope="session", params=[TIERS[0], *(pytest.param(tier, marks=pytest.mark.slow) for tier in TIERS[1:])])
def arena(request: pytest.FixtureRequest, runner: asyncio.Runner, world: World) -> Iterator[Arena]:
    """One tool of each tier. Where the host cannot make one, the summary says so in one line with the reason.

    A host that lets anybody make the namespaces has no excuse: there a tier that cannot be made is a failure.
    """
    try:
        arena = runner.run(Arena.open(request.param, world))
    except RuntimeError as error:
        able = subprocess.run(["unshare", *NAMESPACES, "true"], check=False, capture_output=True).returncode == 0
        if able:
            raise
        pytest.skip(f"this host cannot make tier {request.param}: {error}")
    yield arena
    runner.run(arena.tool.close())


@pytest.fixture
def verdict(request: pytest.FixtureRequest, runner: asyncio.Runner, arena: Arena, attack: Attack) -> Verdict:
    """What became of the attack. Those that only wait are tried side by side, all that were selected, at the first."""
    if not attack.waits:
        return runner.run(arena.fight(attack))
    if not arena.waited:
        selected = {item.callspec.params.get("attack") for item in request.session.items if hasattr(item, "callspec")}
        chosen = [attack for attack in ATTACKS if attack in selected and attack.waits]
        arena.waited = runner.run(arena.fight_side_by_side(chosen))
    return arena.waited[attack.name]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.family}: {attack.name}".replace(" ", "_"))
def test_the_attack_is_denied_and_survived(attack: Attack, arena: Arena, verdict: Verdict) -> None:
    assert verdict.broken == (), verdict.texts
    if arena.tool.tier in attack.succeeds_in:
        assert verdict.evidence, "it is denied now: take the tier out of `succeeds_in`, and out of the documentation"
    elif arena.tool.tier not in attack.depends_in:
        assert verdict.evidence == ()


def test_nothing_succeeds_in_the_best_tier_and_every_family_is_tried() -> None:
    assert [attack.name for attack in ATTACKS if "T2" in attack.succeeds_in | attack.depends_in] == []
    assert len(ATTACKS) >= 70
    assert set(Counter(attack.family for attack in ATTACKS)) == FAMILIES
    assert max(Counter(attack.name for attack in ATTACKS).values()) == 1


def test_the_documentation_lists_what_succeeds_in_a_weaker_tier() -> None:
    expected = [
        f"| {attack.family}: {attack.name} | "
        + " | ".join(
            "succeeds" if tier in attack.succeeds_in else "depends" if tier in attack.depends_in else "denied"
            for tier in ("T1", "T0")
        )
        + " |"
        for attack in ATTACKS
        if attack.succeeds_in or attack.depends_in
    ]
    page = (Path(__file__).parents[2] / "docs/sandbox.md").read_text()
    table = page.partition("| attack | T1 | T0 |\n|---|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == expected
    assert f"tries {len(ATTACKS)} attacks" in page


def test_every_attack_is_python_unless_that_is_the_attack() -> None:
    for attack in ATTACKS:
        if attack.name not in NOT_PYTHON:
            for cell in (*attack.cells, attack.later):
                compile(cell, attack.name, "exec")
