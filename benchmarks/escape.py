"""Every attack of the escape suite against every tier of the Python tool that this host can make, as a table.

    python -m benchmarks.escape

The attacks and the judge are those of `tests/tools/test_escape.py`: an attack *succeeds* where the host shows it (a
listener was reached, a file changed, a secret came out, a process stayed, memory or time went beyond its bound), or
where its own code reports that a refused thing worked. *denied* means that nothing of that was seen, that another
session went on undisturbed and that a new one worked. The Markdown table is printed, and stored with all evidence.

Not measured: attacks that nobody has thought of, and faults of the kernel, which the tiers share with the host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from benchmarks import common
from benchmarks.common import must, say
from tests.tools.attacks import ATTACKS, TIERS, Arena, Verdict, World

NOT_POSSIBLE = "not possible here"


async def try_tier(tier: Any, world: World) -> dict[str, Verdict] | str:
    """What became of every attack; the reason where this host cannot make the tier."""
    try:
        arena = await Arena.open(tier, world)
    except RuntimeError as error:
        return str(error)
    try:
        verdicts = await arena.fight_side_by_side([attack for attack in ATTACKS if attack.waits])
        for attack in ATTACKS:
            if not attack.waits:
                verdicts[attack.name] = await arena.fight(attack)
        return verdicts
    finally:
        await arena.tool.close()


def word(verdict: Verdict | None) -> str:
    """One cell of the table."""
    if verdict is None:
        return NOT_POSSIBLE
    return "**succeeds**" if verdict.succeeded else "**breaks**" if verdict.broken else "denied"


def table(found: Mapping[str, dict[str, Verdict] | str]) -> str:
    """Attack by tier, in Markdown."""
    lines = [f"| attack | {' | '.join(TIERS)} |", f"|---|{'---|' * len(TIERS)}"]
    for attack in ATTACKS:
        tried = [verdicts if isinstance(verdicts := found[tier], dict) else {} for tier in TIERS]
        cells = [word(verdicts.get(attack.name)) for verdicts in tried]
        lines.append(f"| {attack.family}: {attack.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(tier: str, verdicts: dict[str, Verdict] | str) -> str:
    """One line on one tier."""
    if isinstance(verdicts, str):
        return f"{tier}: {NOT_POSSIBLE} ({verdicts})"
    succeeded = [name for name, verdict in verdicts.items() if verdict.succeeded]
    broken = [name for name, verdict in verdicts.items() if verdict.broken]
    return f"{tier}: {len(succeeded)} of {len(verdicts)} attacks succeed, {len(broken)} are not survived"


def main() -> None:
    """Try everything, print, store."""
    options = common.arguments(__doc__).parse_args()
    world = World()
    try:
        with asyncio.Runner() as runner:
            found = {tier: runner.run(try_tier(tier, world)) for tier in TIERS}
    finally:
        world.close()
    say(table(found))
    lines = {tier: summary(tier, verdicts) for tier, verdicts in found.items()}
    say("\n" + "\n".join(lines.values()))
    stored = {
        tier: {
            name: {"succeeded": verdict.succeeded, "evidence": verdict.evidence, "broken": verdict.broken}
            for name, verdict in verdicts.items()
        }
        if isinstance(verdicts, dict)
        else verdicts
        for tier, verdicts in found.items()
    }
    common.write("escape", options, {"summary": lines, "attacks": stored})
    best = found["T2"]
    must(isinstance(best, str) or not any(verdict.succeeded for verdict in best.values()), "T2 let an attack through")


if __name__ == "__main__":
    main()
