"""Every attempt to be rewarded without having solved the problem, and what came of it, as a table.

    python -m benchmarks.tampering [--markdown docs/tampering.md]

The attempts are those of the tests: responses to the mathematics reward, programs for the code reward (in the real
sandbox), and texts that talk to a judge. The judge here is a named fake that obeys everything it reads outside the
quotations, which no real one does: what holds against it holds by construction. What a real judge makes of an order
*inside* a quotation is not measured here.

A reward must not be given for any of them; where it is, this fails.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common
from benchmarks.common import must, say
from rlsys.interfaces import RewardResult
from rlsys.rewards.code import CodeReward
from rlsys.rewards.judge import JudgeReward
from rlsys.rewards.math import MathReward
from rlsys.scratch import MARKS, WORDS, byte_tokenizer
from rlsys.types import Problem, Rollout
from tests.rewards import tampering_code, tampering_judge, tampering_math

_NONE = np.zeros(0, np.int32)
JUDGE_TOKENS = [*MARKS, *WORDS, " no", "<tool_call>"]


class Row(NamedTuple):
    """One attempt."""

    reward: str
    attempt: str
    status: str
    score: float


async def graded(name: str, reward: Any, attempts: Iterable[tuple[str, Problem, str]]) -> list[Row]:
    """All attempts on one reward."""
    if hasattr(reward, "start"):
        await reward.start()
    rows = []
    for attempt, problem, response in attempts:
        rollout = Rollout(
            tokens=_NONE,
            loss_mask=_NONE.astype(np.bool_),
            logprobs=_NONE.astype(np.float32),
            versions=_NONE,
            response=response,
        )
        result: RewardResult = await reward.score(problem, response, rollout)
        rows.append(Row(name, attempt, result.status, result.score))
    closing = reward.close()
    if closing is not None:
        await closing
    return rows


def task(answer: str | None, tests: Any = None) -> Problem:
    """A problem with this answer, or these tests."""
    metadata = {"tests": json.dumps(tests)} if tests else {}
    return Problem(id="task", prompt=({"role": "user", "content": "Solve it."},), answer=answer, metadata=metadata)


def program(text: str) -> str:
    """A response with a program."""
    return f"```python\n{text}\n```"


async def all_rows() -> list[Row]:
    """Every family of attempts."""
    rows = await graded(
        "mathematics",
        MathReward(timeout_seconds=1.0),
        [(name, task(gold), response) for name, gold, response in tampering_math.ATTEMPTS],
    )
    programs = [
        *((name, task(None, tampering_code.SUM), program(text)) for name, text in tampering_code.WRONG.items()),
        *(
            (name, task(None, tampering_code.ADD), program(text))
            for name, text in tampering_code.WRONG_FUNCTIONS.items()
        ),
    ]
    rows += await graded("code", CodeReward(timeout_seconds=5.0), programs)
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer(words=JUDGE_TOKENS).save_pretrained(folder)
        judge = JudgeReward(path=folder, engine="tests.rewards.tampering_judge:GullibleEngine")
        return rows + await graded("judge", judge, [(name, task("4"), text) for name, text in tampering_judge.ATTEMPTS])


def table(rows: Iterable[Row]) -> str:
    """In Markdown."""
    lines = ["| reward | attempt | status | score |", "|---|---|---|---|"]
    lines += [f"| {row.reward} | {row.attempt} | {row.status} | {row.score:.2g} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Try everything, print, write."""
    parser = common.arguments(__doc__)
    parser.add_argument("--markdown", type=Path, help="write the table into this file, behind its first `| reward |`")
    options = parser.parse_args()
    rows = asyncio.run(all_rows())
    say(table(rows))
    counts = Counter((row.reward, row.status) for row in rows)
    say("\n".join(f"{reward}: {count} {status}" for (reward, status), count in sorted(counts.items())))
    if options.markdown is not None:
        text = options.markdown.read_text()
        options.markdown.write_text(text[: text.index("| reward |")] + table(rows) + "\n")
    rewarded = [row for row in rows if row.score > 0.5 or row.status == "correct"]
    must(not rewarded, f"rewarded: {rewarded}")
    say(f"{len(rows)} attempts, none rewarded")


if __name__ == "__main__":
    main()
