"""The mathematics reward beside Math-Verify 0.9: accuracy, throughput, and a stream with hostile answers.

    python -m benchmarks.rewards [--data FOLDER]

Accuracy, by hand: `answers_by_hand.jsonl`, pairs of answers of all kinds that were written and labelled without a look
at either grader. Accuracy, real: the reference answers of real problems (`--data`: a folder with gsm8k_test.jsonl,
math500.jsonl, aime24.jsonl, amc23.jsonl) in forms that `benchmarks/reward_forms.py` writes and labels; ours was
developed with these forms at hand. Every answer on which the two graders differ, or both err, is in the results.

Throughput: one core each, one thread, fresh answers, each behind 5 kB of text; Math-Verify as in its own README, with
its own time limit off (its fastest setting).

Hostile: 600 answers of which six are hostile. Both have two processes beside the one that asks. Math-Verify: a process
pool, at its default limit of 5 s and at its least, 1 s (it takes whole seconds only). Ours at its default of 0.5 s from
the main thread, from another thread and inside a Ray actor, and at 1 s. Checked: every answer that is not hostile
gets the right verdict on all sides, and no side loses a process.

Not comparable: Math-Verify looks for an answer anywhere in the text; ours takes the box. Here there always is one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Sample, must, say
from benchmarks.reward_forms import HOSTILE, KINDS, STUBBORN, Form, fresh, read_answers, rewrite
from rlsys import cluster
from rlsys.cluster import Demand
from rlsys.config import ClusterConfig
from rlsys.rewards.answers.equality import same
from rlsys.rewards.answers.spelling import normalize
from rlsys.rewards.math import MathReward
from rlsys.types import Problem, Rollout

FILLER = "So we compute the next step and look at what we have. " * 95
NUM_WORKERS = 2
_NONE = np.zeros(0, np.int32)
EMPTY = Rollout(
    tokens=_NONE, loss_mask=_NONE.astype(np.bool_), logprobs=_NONE.astype(np.float32), versions=_NONE, response=""
)
BY_HAND = ("answers_by_hand", "answers_held_out")


def response(form: Form) -> str:
    """What a policy would have written."""
    return rf"{FILLER}So the final answer is \boxed{{{form.answer}}}"


def problem(form: Form) -> Problem:
    """The problem of an answer."""
    return Problem(id="p", prompt=({"role": "user", "content": "?"},), answer=form.gold)


def peer_grade(gold: str, text: str, limit: int | None = None) -> bool:
    """Math-Verify's verdict."""
    from math_verify import parse, verify

    expected = parse(f"${gold}$", parsing_timeout=limit)
    return bool(verify(expected, parse(text, parsing_timeout=limit), timeout_seconds=limit))


def peer_pair(pair: tuple[str, str, int]) -> tuple[bool, float]:
    """The same in a process of a pool, with the seconds it took."""
    started = time.perf_counter()
    verdict = peer_grade(*pair)
    return verdict, time.perf_counter() - started


async def ours(reward: MathReward, forms: Sequence[Form]) -> list[str]:
    """The statuses, one after the other."""
    return [(await reward.score(problem(form), response(form), EMPTY)).status for form in forms]


# --- accuracy --------------------------------------------------------------------------------------------------------


def real_forms(folder: Path) -> list[Form]:
    """Every form of every reference answer."""
    generator = random.Random(0)
    return [form for source, gold in read_answers(folder) for form in rewrite(source, gold, generator)]


def forms_by_hand(name: str) -> list[Form]:
    """The pairs of a file that were labelled by hand."""
    path = Path(__file__).parent / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Form(source=name, gold=row["gold"], answer=row["answer"], rule=row["why"], right=row["right"]) for row in rows
    ]


async def accuracy(forms: Sequence[Form], what: str) -> dict[str, Any]:
    """Both graders on these answers."""
    reward = MathReward(timeout_seconds=10.0)
    statuses = await ours(reward, forms)
    reward.close()
    with ProcessPoolExecutor(1) as pool:
        peer = [verdict for verdict, _ in pool.map(peer_pair, [(f.gold, response(f), 5) for f in forms], chunksize=64)]
    differences, errors = [], {"ours": 0, "peer": 0}
    by_rule: Counter[tuple[str, str]] = Counter()
    for form, status, theirs in zip(forms, statuses, peer, strict=True):
        mine = status == "correct"
        errors["ours"] += mine != form.right
        errors["peer"] += theirs != form.right
        if mine != form.right or theirs != form.right:
            wrong = "both" if mine == theirs else "ours" if mine != form.right else "peer"
            by_rule[form.rule, wrong] += 1
            differences.append(
                {"source": form.source, "gold": form.gold, "answer": form.answer, "rule": form.rule}
                | {"right": form.right, "ours": status, "peer": theirs, "errs": wrong}
            )
    agreed = sum((status == "correct") == theirs for status, theirs in zip(statuses, peer, strict=True))
    exactly = sum(same(normalize(form.gold), normalize(form.answer)) is not None for form in forms)
    say(f"{what}: {len(forms):,} answers, errors {errors}, the two agree on {agreed / len(forms):.1%}")
    say(f"  decided by exact arithmetic: {exactly / len(forms):.1%}; statuses {dict(Counter(statuses))}")
    for (rule, wrong), count in by_rule.most_common(40):
        say(f"  {wrong:<5} {count:>5}  {rule}")
    return {
        "forms": len(forms),
        "sources": dict(Counter(form.source for form in forms)),
        "errors": errors,
        "agreement": agreed / len(forms),
        "exact_share": exactly / len(forms),
        "statuses": dict(Counter(statuses)),
        "by_rule": [{"rule": rule, "errs": wrong, "count": count} for (rule, wrong), count in by_rule.most_common()],
        "differences": differences,
    }


# --- throughput ------------------------------------------------------------------------------------------------------


async def throughput(rounds: int, settle: float) -> dict[str, Any]:
    """Per core, by kind and on an even mix."""
    generator = random.Random(1)
    reward = MathReward(timeout_seconds=10.0)
    results: dict[str, Any] = {}
    for kind in (*KINDS, "even mix"):

        def batch(number: int, kind: str = kind) -> list[Form]:
            kinds = KINDS if kind == "even mix" else (kind,)
            return [form for each in kinds for form in fresh(each, number // len(kinds), generator)]

        async def race_ours(make: Any = batch) -> Sample:
            forms = make(2000)
            started = time.perf_counter()
            statuses = await ours(reward, forms)
            return judged(forms, [status == "correct" for status in statuses], time.perf_counter() - started)

        async def race_peer(make: Any = batch) -> Sample:
            forms = make(160)
            started = time.perf_counter()
            verdicts = [peer_grade(form.gold, response(form)) for form in forms]
            return judged(forms, verdicts, time.perf_counter() - started)

        samples = await common.race(
            {"ours": race_ours, "math-verify": race_peer},
            rounds=rounds,
            settle_seconds=settle,
            what=f"{kind}: ",
        )
        ratio = common.ratios(samples["ours"], samples["math-verify"], "per_second")
        common.show(f"{kind}: answers per second and core, ours / Math-Verify", ratio)
        results[kind] = {"ratio": ratio, "samples": samples}
    reward.close()
    return results


def judged(forms: Sequence[Form], verdicts: Sequence[bool], seconds: float) -> Sample:
    """A sample, with how many verdicts are right: nearly all on both sides, or the times mean nothing."""
    right = sum(verdict == form.right for form, verdict in zip(forms, verdicts, strict=True)) / len(forms)
    must(right >= 0.995, f"only {right:.1%} of {forms[0].rule} were graded right")
    return {"seconds": seconds, "per_second": len(forms) / seconds, "right": right}


# --- hostile ---------------------------------------------------------------------------------------------------------


def stream(hostile: Sequence[str], seed: int, number: int = 600, share: float = 0.01) -> list[Form]:
    """Fresh answers of all kinds with hostile ones spread over them."""
    generator = random.Random(seed)
    forms = [form for kind in KINDS for form in fresh(kind, number // len(KINDS), generator)]
    generator.shuffle(forms)
    every = round(1 / share)
    for index in range(round(number * share) if hostile else 0):
        text = hostile[index % len(hostile)]
        forms[index * every + every // 2] = Form(source="made", gold="7", answer=text, rule="hostile", right=False)
    return forms


async def stream_ours(forms: Sequence[Form], limit: float) -> Sample:
    """All at once through one reward, with the latest answer past its deadline."""
    reward = MathReward(timeout_seconds=limit, num_workers=NUM_WORKERS)
    await asyncio.gather(*(reward._grade("2^x", rf"\sin{{{n}x}}") for n in range(NUM_WORKERS)))  # started and warm
    taken: dict[int, float] = {}

    async def one(form: Form) -> str:
        result = await reward.score(problem(form), response(form), EMPTY)
        return result.status

    asked = reward._pool._ask

    def timed(line: bytes) -> str:
        started = time.perf_counter()
        try:
            return asked(line)
        finally:
            taken[len(taken)] = time.perf_counter() - started

    reward._pool._ask = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    statuses = await asyncio.gather(*map(one, forms))
    seconds = time.perf_counter() - started
    living = len(reward._pool._living)
    reward.close()
    must(living <= NUM_WORKERS, "more processes than were asked for")
    good = [(form, status) for form, status in zip(forms, statuses, strict=True) if form.rule != "hostile"]
    must(all((status == "correct") == form.right for form, status in good), "a good answer was graded wrong")
    must(not any(s == "correct" for f, s in zip(forms, statuses, strict=True) if f.rule == "hostile"), "a hostile won")
    return {
        "seconds": seconds,
        "per_second": len(forms) / seconds,
        "timeouts": statuses.count("timeout"),
        "lost": statuses.count("error"),
        "latest": max([0.0, *(each - limit for each in taken.values())]),
    }


async def stream_peer(forms: Sequence[Form], limit: int) -> Sample:
    """A process pool with Math-Verify's own time limits."""
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(NUM_WORKERS) as pool:
        warm = [("2^x", rf"\boxed{{\sin {n}x}}", limit) for n in range(2 * NUM_WORKERS)]
        await asyncio.gather(*(loop.run_in_executor(pool, peer_pair, pair) for pair in warm))
        started = time.perf_counter()
        pairs = [(form.gold, response(form), limit) for form in forms]
        results = await asyncio.gather(*(loop.run_in_executor(pool, peer_pair, pair) for pair in pairs))
        seconds = time.perf_counter() - started
    good = [verdict == form.right for form, (verdict, _) in zip(forms, results, strict=True) if form.rule != "hostile"]
    must(sum(good) >= 0.995 * len(good), "good answers were graded wrong")
    latest = max(0.0, *(taken - 2 * limit for _, taken in results))  # it limits parsing and comparing each
    return {"seconds": seconds, "per_second": len(forms) / seconds, "latest": latest}


class StreamActor:
    """Grades a stream inside a Ray actor."""

    async def run(self, seed: int, hostile: Sequence[str], limit: float, number: int) -> Sample:
        """As `stream_ours`."""
        return await stream_ours(stream(hostile, seed, number), limit)


def in_thread(forms: Sequence[Form], limit: float) -> Sample:
    """As `stream_ours`, from a thread that is not the main one."""
    found: list[Sample] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(stream_ours(forms, limit))))
    thread.start()
    thread.join(300)
    must(bool(found), "the thread did not end")
    return found[0]


async def hostile_streams(rounds: int, settle: float) -> dict[str, Any]:
    """Clean, hostile and stubborn streams on all sides."""
    cluster.connect(ClusterConfig())
    try:
        (actor,) = cluster.place(StreamActor, Demand(what="stream actor", count=1), [{}], call_seconds=300.0)
        results: dict[str, Any] = {}
        for name, hostile in (("clean", ()), ("hostile", HOSTILE), ("stubborn", STUBBORN)):
            seeds = iter(range(10_000))

            def forms(hostile: Sequence[str] = hostile, seeds: Any = seeds, number: int = 600) -> list[Form]:
                return stream(hostile, next(seeds), number)

            # The clean and the hostile stream are over in milliseconds for us: a longer one measures better.
            number = 600 if name == "stubborn" else 6000
            limits = {"ours at 0.5 s": 0.5, "ours at 1 s": 1.0}
            sides: dict[str, Any] = {
                label: (lambda limit=limit, make=forms, n=number: stream_ours(make(number=n), limit))
                for label, limit in limits.items()
            }
            sides["ours in a thread"] = lambda make=forms, n=number: asyncio.to_thread(in_thread, make(number=n), 0.5)
            sides["ours in Ray"] = lambda h=hostile, s=seeds, n=number: actor.call("run", next(s), list(h), 0.5, n)
            sides["math-verify at 1 s"] = lambda make=forms: stream_peer(make(), 1)
            sides["math-verify at 5 s"] = lambda make=forms: stream_peer(make(), 5)
            results[name] = await common.race(sides, rounds=rounds, settle_seconds=settle, what=f"{name}: ")
    finally:
        cluster.disconnect()
    for name, samples in results.items():
        for label in ("ours at 0.5 s", "ours at 1 s", "ours in a thread", "ours in Ray"):
            for limit in (1, 5):
                ratio = common.ratios(samples[label], samples[f"math-verify at {limit} s"], "per_second")
                common.show(f"{name}: {label} / Math-Verify at {limit} s", ratio)
    for name in ("hostile", "stubborn"):
        kept = common.ratios(results[name]["ours at 0.5 s"], results["clean"]["ours at 0.5 s"], "per_second")
        common.show(f"{name}: of our own clean throughput", kept, "0.5x" if name == "hostile" else "")
        latest = max(s["latest"] for label, many in results[name].items() if "ours" in label for s in many)
        say(f"{name}: the latest answer came {1e3 * latest:.0f} ms past its deadline (aim: 100)")
        lost = sum(s["lost"] for label, many in results[name].items() if "ours" in label for s in many)
        say(f"{name}: {lost} processes lost")
    return results


async def main() -> None:
    """Measure everything, print, write."""
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--data", type=Path, help="folder of real problems")
    parser.add_argument("--only", choices=["accuracy", "throughput", "hostile"], help="measure only this")
    options = parser.parse_args()
    common.set_threads()
    os.environ["PYTHONPATH"] = str(Path.cwd())  # for the Ray actor
    results: dict[str, Any] = {}
    if options.only in (None, "accuracy"):
        for name in BY_HAND:
            results[name] = await accuracy(forms_by_hand(name), name)
        if options.data is not None:
            results["real"] = await accuracy(real_forms(options.data), "real problems")
    if options.only in (None, "throughput"):
        results["throughput"] = await throughput(options.rounds, options.settle)
    if options.only in (None, "hostile"):
        results["hostile"] = await hostile_streams(options.rounds, options.settle)
    common.write(f"rewards_{options.only}" if options.only else "rewards", options, results)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
