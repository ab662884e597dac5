"""How level the ranks of a learner are: our `assign` and `shard`, and verl's Karmarkar-Karp, on the same lengths.

    python -m benchmarks.balance --verl FOLDER      # a checkout of verl; one file of it is loaded, by its path

512 and 2,048 lognormal lengths (median 2,500 tokens, sigma 0.9, 64 to 16,384) for 4 to 64 ranks, several seeds, in two
units of cost: tokens, and tokens with attention, `24,576 L + L^2`, which is the weight that verl gives to a sequence
and (divided by 24,576) the one of `rlsys.packing`. A number is the greatest cost of a rank over the mean, in parts of a
thousand above 1.

`ranks`: sequences to ranks and nothing else, the question that verl's `get_seqlen_balanced_partitions` answers. It is
asked both ways: `equal_size=True`, as verl's trainer does, and `False`, which is freer. Ours is compared with the
better one; up to a tenth of a thousandth above the mean counts as level.

`rounds`: into micro-batches of at most 16,384 or 32,768 tokens too, equally many on every rank. Sharded ranks wait for
one another in each micro-batch, so a number is the sum over rounds of the dearest micro-batch, over the mean cost of a
rank. Verl's side is built of its function as its trainer does it (ranks with equal sizes, then micro-batches within a
rank), with the number raised on all ranks until none is over the limit, which verl does not check, and with the dearest
of every rank in one round. The other cost is levelled within the same limit of tokens.

`families`: groups of 8 with a prompt of 1,024 tokens, by `shard`, which computes a prompt once where siblings stay
together, into micro-batches of at most 32,768 tokens. Verl places every rollout by itself, here without a limit. Both
are measured by what the dearest rank computes, attention included.

Not comparable: ours also keeps the limit of tokens in `ranks`, where it never binds.
"""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import must, say
from rlsys.packing import MicroBatch, assign, shard
from rlsys.stages.common import assemble
from rlsys.types import Rollout

RANKS = (4, 8, 16, 32, 64)
COUNTS = (512, 2048)
LIMITS = (16_384, 32_768)
ATTENTION_LENGTH = 24_576
LEVEL_ENOUGH = 1e-4
PROMPT, GROUP_SIZE = 1024, 8

Plan = list[list[list[int]]]
"""Indices by rank and micro-batch."""

Partition = Callable[[Sequence[int], int, bool], list[list[int]]]


def load_verl(folder: Path) -> Partition:
    """Verl's function; what its file imports for other functions is replaced by empty modules while it is loaded."""
    path = folder / "verl" / "utils" / "seqlen_balancing.py"
    if not path.exists():
        raise SystemExit(f"no {path}; give --verl a checkout of verl")
    needed = {"verl": "", "verl.protocol": "DataProto", "verl.utils": "tensordict_utils"}
    stand_ins = {}
    for name, attribute in {**needed, "verl.utils.device": "get_device_name"}.items():
        stand_ins[name] = types.ModuleType(name)
        setattr(stand_ins[name], attribute or "nothing", object)
    specification = importlib.util.spec_from_file_location("verl_seqlen_balancing", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules.update(stand_ins)
    try:
        specification.loader.exec_module(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]
    partition: Partition = module.get_seqlen_balanced_partitions
    return partition


def lengths_of(count: int, seed: int) -> list[int]:
    """Lengths of responses, with a tail."""
    drawn = np.random.default_rng(seed).lognormal(np.log(2500), 0.9, count)
    lengths: list[int] = np.clip(drawn, 64, 16_384).astype(int).tolist()
    return lengths


def costs_of(lengths: Sequence[int], unit: str) -> list[int]:
    """What a sequence costs, whole numbers, which verl needs."""
    return [length if unit == "tokens" else ATTENTION_LENGTH * length + length**2 for length in lengths]


def verl_rounds(partition: Partition, lengths: Sequence[int], costs: Sequence[int], ranks: int, limit: int) -> Plan:
    """Verl's two stages, with as many micro-batches on every rank as the fullest needs."""
    shares = partition(costs, ranks, True)
    rounds = max(-(-sum(lengths[i] for i in share) // limit) for share in shares)
    while True:
        plan = [
            [[share[j] for j in p] for p in partition([costs[i] for i in share], rounds, False)] for share in shares
        ]
        if all(len(held) == 1 or sum(lengths[i] for i in held) <= limit for rank in plan for held in rank):
            return plan
        rounds += 1


def measured(plan: Plan, lengths: Sequence[int], costs: Sequence[int], limit: int) -> dict[str, float]:
    """Max over mean of the ranks, the same with waiting in each round, and the number of rounds."""
    must(
        sorted(i for rank in plan for held in rank for i in held) == list(range(len(lengths))), "a sequence is missing"
    )
    must(len({len(rank) for rank in plan}) == 1, "ranks have different numbers of micro-batches")
    fullest = max((sum(lengths[i] for i in held) for rank in plan for held in rank if len(held) > 1), default=0)
    must(fullest <= limit, f"a micro-batch holds {fullest} tokens, more than {limit}")
    loads = np.array([sorted((sum(costs[i] for i in held) for held in rank), reverse=True) for rank in plan], float)
    mean = loads.sum() / len(loads)
    return {"ranks": loads.sum(1).max() / mean, "rounds": loads.max(0).sum() / mean, "count": loads.shape[1]}


def timed(work: Callable[[], Plan]) -> tuple[Plan, float]:
    """A plan, and the seconds that it took: the better of two, because the first pays for what is not warm."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        plan = work()
        seconds.append(time.perf_counter() - started)
    return plan, min(seconds)


def compare(partition: Partition, lengths: list[int], ranks: int, unit: str, limit: int | None) -> dict[str, Any]:
    """One batch on so many ranks; without a limit it is `ranks`, with one `rounds`."""
    costs = costs_of(lengths, unit)
    room = limit or sum(lengths)
    sides: dict[str, Callable[[], Plan]] = {
        "ours": lambda: assign(lengths, num_ranks=ranks, max_tokens=room, costs=costs)
    }
    if limit:
        sides["verl"] = lambda: verl_rounds(partition, lengths, costs, ranks, limit)
    else:
        sides["verl"] = lambda: [[share] for share in partition(costs, ranks, False)]
        sides["verl_equal"] = lambda: [[share] for share in partition(costs, ranks, True)]
    found: dict[str, Any] = {"num_sequences": len(lengths), "num_ranks": ranks, "unit": unit, "limit": limit}
    for name, work in sides.items():
        plan, seconds = timed(work)
        found[name] = {**measured(plan, lengths, costs, room), "seconds": seconds}
    key = "rounds" if limit else "ranks"
    best = min(found[name][key] for name in sides if name != "ours")
    found["no_worse"] = bool(found["ours"][key] <= max(best, 1 + LEVEL_ENOUGH))
    return found


def families(partition: Partition, ranks: int, limit: int, seed: int) -> dict[str, Any]:
    """What the dearest rank computes of groups that share their prompts, ours over verl's."""
    written = lengths_of(512, seed)
    rollouts = []
    for index, length in enumerate(written):
        tokens = np.full(PROMPT + length, index // GROUP_SIZE, np.int32)
        trained = np.arange(len(tokens)) >= PROMPT
        zeros = np.zeros(len(tokens), np.float32)
        rollouts.append(Rollout(tokens=tokens, loss_mask=trained, logprobs=zeros, versions=tokens))
    shares = shard(assemble(rollouts, [0.0] * len(rollouts)), num_ranks=ranks, max_tokens=limit)
    must(sum(len(m.targets) for rank in shares for m in rank) == sum(written), "a trained token is missing")
    ours = [sum(map(computed, rank)) for rank in shares]
    costs = costs_of([PROMPT + length for length in written], "attention")
    verl = [sum(costs[i] for i in share) for share in partition(costs, ranks, True)]
    sides = {"ours": ours, "verl": verl}
    return {
        "num_ranks": ranks,
        "limit": limit,
        "max_over_mean": {name: max(loads) / statistics.mean(loads) for name, loads in sides.items()},
        "all_ranks": sum(ours) / sum(verl),
        "dearest_rank": max(ours) / max(verl),
    }


def computed(micro: MicroBatch) -> int:
    """The cost of a micro-batch, in the unit of `attention`: every segment attends to itself and to its prefix."""
    own = np.diff(micro.boundaries).astype(np.int64)
    before = np.where(micro.prefixes >= 0, own[micro.prefixes], 0)
    return int((ATTENTION_LENGTH * own + own**2 + 2 * own * before).sum())


def report(rows: Sequence[dict[str, Any]], key: str) -> None:
    """One line for each shape, the worst of the seeds: thousandths above 1, and milliseconds."""
    shapes = list(dict.fromkeys((r["num_sequences"], r["num_ranks"], r["unit"], r["limit"]) for r in rows))
    for shape in shapes:
        here = [r for r in rows if (r["num_sequences"], r["num_ranks"], r["unit"], r["limit"]) == shape]
        parts = []
        for side in [name for name in ("ours", "verl", "verl_equal") if name in here[0]]:
            worst = max(r[side][key] for r in here)
            milliseconds = 1e3 * statistics.median(r[side]["seconds"] for r in here)
            parts.append(
                f"{side} {1e3 * (worst - 1):8.3f} ({max(r[side]['count'] for r in here)}, {milliseconds:5.0f} ms)"
            )
        count, ranks, unit, limit = shape
        say(f"{count:5} sequences {ranks:3} ranks {unit:9} {limit or '':6}  " + "   ".join(parts))
    say(f"no worse than the better of verl's in {sum(r['no_worse'] for r in rows)} of {len(rows)} batches")


async def main() -> None:
    """Compare all shapes, print, write."""
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--verl", type=Path, required=True, help="the folder of a checkout of verl")
    options = parser.parse_args()
    common.set_threads()
    partition = load_verl(options.verl)
    results: dict[str, Any] = {}
    for kind, limits in (("ranks", (None,)), ("rounds", LIMITS)):
        say(f"{kind}: thousandths above the mean, the worst of {options.rounds} seeds (rounds, time)")
        results[kind] = [
            compare(partition, lengths_of(count, seed), ranks, unit, limit)
            for limit in limits
            for unit in ("tokens", "attention")
            for count in COUNTS
            for ranks in RANKS
            for seed in range(options.rounds)
        ]
        report(results[kind], kind)
    results["families"] = [families(partition, ranks, 32_768, seed) for ranks in RANKS for seed in range(2)]
    for row in results["families"]:
        level = ", ".join(f"{side} {1e3 * (value - 1):.3f}" for side, value in row["max_over_mean"].items())
        found = f"all ranks compute {row['all_ranks']:.3f} of verl's, the dearest {row['dearest_rank']:.3f}"
        say(f"families, {row['num_ranks']} ranks: {found}; thousandths above the mean: {level}")
    common.write("balance", options, results)


if __name__ == "__main__":
    asyncio.run(main())
