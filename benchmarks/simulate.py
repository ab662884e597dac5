"""The simulator beside published results, its figures for 16 to 1,024 GPUs, and what the driver costs.

    python -m benchmarks.simulate                        # published results, then predictions, then the driver's cost
    python -m benchmarks.simulate --only published
    python -m benchmarks.simulate --fit RUN --against RUN [RUN ...]     # real small runs beside their simulations

Everything here is simulated, but for the times of real runs (`--against`) and the driver's processor time.

`published`. What stands in a column "published" was measured by others (sources beside each); a ratio of ours within
25 % of theirs counts as reproduced. Assumed for all: lognormal lengths of which one in a hundred is 8 times the median,
half of the (logarithmic) variance shared by siblings; an engine's step is its weights and the keys and values of its
rollouts through the memory of its GPU, plus 2.5 ms and 0.01 to 0.1 ms for each rollout (data sheets: H800 3.35 TB/s,
H20 4.0 TB/s); a learner reaches 30 to 35 % of 989 TFLOP/s. The free parameter is the median length.

* AReaL 1.5B and 7B (blog/AReaL_v0_3.md, arXiv 2505.24298): our own loop. Synchronous: all GPUs generate, then all
  learn. Asynchronous: 3/4 generate, 1/4 learns, max_staleness 4. 512 problems x 16 responses of at most 27,648 tokens,
  which is how we remember the paper and not verified. The median was chosen with both published times in sight: one
  number for two times, so their ratio is a weaker proof than verl's.
* verl (docs/advance/fully_async.md, Qwen2.5-Math-7B, 128 H20, 512 x 16, at most 28K tokens): verl's own loop
  (`benchmarks.simulate_peers`). The median follows from the 114 s of verl's update at 40 % of 148 TFLOP/s. What its
  trainer takes on all 128 GPUs and on 64 of them is verl's own measurement, because no model of a learner says that
  half of the GPUs are as fast as all; predicted is when rollouts are there. At 0.1 and above ours waits less than verl.
* RollPacker (arXiv 2509.21009): tail batching alone, in a loop of its own, on a batch that is assumed. Their other
  three parts, among them a training that streams, are not modelled, so less than their whole gain is expected.

`predicted`: the default model of `rlsys simulate` (7 billion parameters on H100), 64 rollouts for each GPU and step.
Colocated and synchronous: all GPUs generate, then all learn. Asynchronous: 3/4 generate, 1/4 learns. With faults, a
worker dies every 10 hours on average, as on nodes that may be taken away.

`driver`: 1,000 simulated workers. The share of a core is processor time over simulated time, the models included; then
groups per second of processor time through loop, ledger, fleet and dispatch around workers that answer at once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import say
from benchmarks.simulate_peers import Setting, rollpacker_seconds, verl_step_seconds, verl_sync_step_seconds
from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.fleet import RolloutFleet
from rlsys.ledger import Ledger
from rlsys.loop import Loop
from rlsys.simulate import clock
from rlsys.simulate.config import SimulateConfig
from rlsys.simulate.fit import fit, measured
from rlsys.simulate.simulation import Simulated, simulate
from rlsys.simulate.worker import Process
from rlsys.types import Problem, RolloutGroup

BASE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
TAIL = 8.0
"""The 99th percentile of lengths over their median, everywhere."""
CLOSE = 0.25

H800_1_5B = SimulateConfig(
    decode_seconds=3.1e9 / 3.35e12 + 0.0025,
    decode_seconds_per_rollout=0.00005,
    response_tokens=3_000,
    response_tokens_p99=3_000 * TAIL,
    learn_seconds_per_token=5.1e-5,
    weight_bytes=3.1e9,
    start_seconds=0,
)
H800_7B = SimulateConfig(
    decode_seconds=15.2e9 / 3.35e12 + 0.0025,
    decode_seconds_per_rollout=0.00012,
    response_tokens=2_000,
    response_tokens_p99=2_000 * TAIL,
    learn_seconds_per_token=1.9e-4,
    start_seconds=0,
)
H20_7B = SimulateConfig(
    decode_seconds=15.2e9 / 4.0e12 + 0.0025,
    decode_seconds_per_rollout=0.00014,
    response_tokens=1_200,
    response_tokens_p99=1_200 * TAIL,
    sync_seconds=1.0,
)
VERL_SYNC_LEARN = 53.92 + 113.81
"""Seconds of old log-probs and update on all 128 GPUs, measured by verl."""
VERL_ASYNC_LEARN = (98.77 + 109.12 + 103.22 + 113.16) / 4
"""Seconds of the four updates on 64 GPUs, measured by verl, the mean of its four runs."""
VERL = {None: 356.30, 0.0: 231.34, 0.1: 171.30, 0.3: 146.11, 0.5: 150.63}
"""Published seconds of a step by staleness threshold; None is the synchronous one."""


def config(
    model: SimulateConfig, *, workers: int, ranks: int, groups: int, staleness: int, steps: int, **rl: Any
) -> Config:
    """A run of so many workers and learner ranks."""
    base = load_config(BASE)
    sampling = replace(base.rl.sampling, max_response_tokens=rl.pop("max_tokens", 32_000))
    stage = replace(base.rl, groups_per_step=groups, max_staleness=staleness, steps=steps, sampling=sampling, **rl)
    actors = replace(base.actors, count=workers, max_rollouts=256, max_model_tokens=40_000, watch_seconds=60.0)
    learners = replace(base.learners, count=ranks)
    return replace(base, simulate=model, rl=stage, actors=actors, learners=learners)


def against(name: str, published: float, ours: float) -> dict[str, Any]:
    """Print a published number beside the simulated one."""
    off = ours / published - 1
    close = abs(off) <= CLOSE
    verdict = "" if close else "   NOT close"
    say(f"  {name:<56} published {published:7.2f}   simulated {ours:7.2f}   {off:+6.0%}{verdict}")
    return {"what": name, "published": published, "simulated": ours, "off": off, "close": close}


# --- published results -----------------------------------------------------------------------------------------------


def areal(model: SimulateConfig, gpus: int, name: str, hours: tuple[float, float], steps: int) -> list[dict[str, Any]]:
    """AReaL's hours for 1,000 steps, synchronous and not, and their ratio."""
    shape: dict[str, Any] = {"groups": 512, "group_size": 16, "max_tokens": 27_648, "steps": steps}
    sync = simulate(config(model, workers=gpus, ranks=gpus, staleness=0, **shape))
    free = simulate(config(model, workers=gpus * 3 // 4, ranks=gpus // 4, staleness=4, **shape))
    per_step = [one * 3.6 for one in hours]
    return [
        against(f"{name}: synchronous step, s", per_step[0], sync.step_seconds),
        against(f"{name}: asynchronous step, s", per_step[1], free.step_seconds),
        against(f"{name}: ratio", hours[0] / hours[1], sync.step_seconds / free.step_seconds),
    ]


def verl(steps: int) -> list[dict[str, Any]]:
    """verl's ladder of staleness thresholds."""
    setting = Setting(model=H20_7B, engines=64, max_rollouts=256, groups=512, group_size=16, max_tokens=28_672)
    everywhere = replace(setting, engines=128)
    sync = verl_sync_step_seconds(everywhere, learn_seconds=VERL_SYNC_LEARN, steps=steps)
    found = [against("verl: synchronous step on 128 GPUs, s", VERL[None], sync)]
    for threshold, published in VERL.items():
        if threshold is None:
            continue
        seconds = verl_step_seconds(
            setting, staleness=threshold, updates=4, update_seconds=VERL_ASYNC_LEARN, steps=steps + 2
        )
        found.append(against(f"verl: 64 + 64 GPUs, staleness threshold {threshold:g}, s", published, seconds))
        found.append(against("verl: the same, ratio to synchronous", VERL[None] / published, sync / seconds))
    return found


def rollpacker(steps: int) -> list[dict[str, Any]]:
    """RollPacker's tail batching against plain synchronous training; published is the whole system against verl."""
    setting = Setting(model=H800_7B, engines=64, max_rollouts=256, groups=128, group_size=8, max_tokens=16_384)
    plain, packed, share = rollpacker_seconds(setting, ranks=64, ratio=1.25, steps=5 * steps)
    say(
        f"  RollPacker's setting is assumed: 128 x 8 rollouts of at most 16,384 tokens on 64 GPUs; rollouts {share:.0%}"
    )
    return [against("RollPacker: ratio, tail batching alone (published: all of it)", 2.3, plain / packed)]


def published(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All published results."""
    found = [
        *areal(H800_1_5B, 128, "AReaL 1.5B, 128 GPUs", (41.0, 14.8), options.steps),
        *areal(H800_7B, 192, "AReaL 7B, 192 GPUs", (57.7, 25.4), options.steps),
        *verl(options.steps),
        *rollpacker(options.steps),
    ]
    chosen = [one for one in found if "ratio" in one["what"]]
    say(f"  ratios within {CLOSE:.0%}: {sum(one['close'] for one in chosen)} of {len(chosen)}")
    return found


# --- predictions -----------------------------------------------------------------------------------------------------


def predicted(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of GPUs."""
    found = []
    heads = ("step", "tokens/s", "per GPU", "idle", "stale", "lost", "again", "over sync")
    say(f"  GPUs  {'mode':<34}" + "".join(f"{head:>11}" for head in heads))
    for gpus in options.gpus:
        modes = {
            "synchronous, colocated": (gpus, gpus, 0, None),
            "asynchronous, staleness 1": (gpus * 3 // 4, gpus // 4, 1, None),
            "asynchronous, staleness 4": (gpus * 3 // 4, gpus // 4, 4, None),
            "asynchronous, staleness 4, faults": (gpus * 3 // 4, gpus // 4, 4, 10.0),
        }
        base = 0.0
        for mode, (workers, ranks, staleness, hours) in modes.items():
            model = replace(SimulateConfig(), hours_between_deaths=hours, start_seconds=60.0)
            shape: dict[str, Any] = {"groups": 4 * gpus, "group_size": 16, "steps": options.steps}
            one = simulate(config(model, workers=workers, ranks=ranks, staleness=staleness, **shape))
            base = base or one.tokens_per_second
            cells = (
                f"{one.step_seconds:.1f} s",
                f"{one.tokens_per_second:,.0f}",
                f"{one.tokens_per_second / gpus:,.0f}",
                f"{one.engine_idle:.0%}",
                f"{one.staleness_mean:.2f}",
                str(one.deaths),
                str(one.redispatched),
                f"{one.tokens_per_second / base:.2f}x",
            )
            say(f"  {gpus:>4}  {mode:<34}" + "".join(f"{cell:>11}" for cell in cells))
            found.append({"gpus": gpus, "mode": mode, "ratio": one.tokens_per_second / base, **numbers(one)})
    return found


def numbers(one: Simulated) -> dict[str, Any]:
    """A result as JSON."""
    return {name: getattr(one, name) for name in one.__slots__}


def sixty_four(options: argparse.Namespace) -> dict[str, float]:
    """Asynchronous over synchronous throughput, 64 workers and 32 learner ranks in both."""
    shape: dict[str, Any] = {"workers": 64, "ranks": 32, "groups": 256, "group_size": 16, "steps": options.steps}
    rates = {
        bound: simulate(config(SimulateConfig(), staleness=bound, **shape)).tokens_per_second for bound in (0, 1, 4)
    }
    ratios = {f"staleness {bound}": rate / rates[0] for bound, rate in rates.items() if bound}
    for name, ratio in ratios.items():
        say(f"  64 workers, 32 learner ranks, asynchronous over synchronous, {name}: {ratio:.2f}x   (target 1.6x)")
    return ratios


# --- the driver ------------------------------------------------------------------------------------------------------


class _Instant(Process):
    """A worker that answers after a second, with nothing."""

    async def start(self) -> str:
        return "instant"

    async def resume(self, version: int) -> None:
        pass

    async def pulse(self) -> dict[str, float]:
        return {"tokens": 0.0, "running": 0.0}

    async def close(self) -> None:
        pass

    async def act(self, problem: Problem, **_: Any) -> RolloutGroup:
        await asyncio.sleep(1.0)
        return RolloutGroup(problem=problem, rollouts=())


async def _dispatch(workers: int, groups: int, steps: int) -> float:
    """Groups per second of processor time through loop, ledger, fleet and dispatch."""
    setup = config(SimulateConfig(), workers=workers, ranks=1, groups=groups, staleness=1, steps=steps)
    fleet = RolloutFleet(setup.actors, lambda index: _Instant(f"worker {index}", call_seconds=60.0))
    await fleet.started()

    async def act(number: int, attempt: int) -> RolloutGroup:
        problem = Problem(id=str(number), prompt=({"role": "user", "content": ""},))
        return await fleet.act(problem, size=8, sampling=setup.rl.sampling, group_id=f"{number}-{attempt}")

    async def learn(step: int, found: Mapping[int, RolloutGroup]) -> None:
        pass

    async def publish(step: int) -> None:
        pass

    loop = Loop(
        act=act,
        learn=learn,
        publish=publish,
        drop_reason=lambda *_: None,
        groups_per_step=groups,
        max_staleness=1,
        max_skipped_groups=1,
    )
    ledger = Ledger()
    began = time.process_time()
    await loop.run(ledger, itertools.count(1), steps=steps, stop=asyncio.Event())
    rate = ledger.trained / (time.process_time() - began)
    await fleet.close()
    return rate


def driver(options: argparse.Namespace) -> dict[str, float]:
    """What 1,000 workers cost the driver."""
    model = replace(SimulateConfig(), start_seconds=60.0)
    shape: dict[str, Any] = {"groups": 4000, "group_size": 16, "staleness": 1, "steps": 2}
    one = simulate(config(model, workers=1000, ranks=333, **shape))
    say(
        f"  1,000 workers, {one.groups_per_second:.0f} groups/s: driver and models use {one.driver_share:.0%} of a core"
    )
    rate = clock.run(_dispatch(1000, options.groups, 4))
    say(f"  loop, ledger, fleet and dispatch: {rate:,.0f} groups per second of a core   (target 5,000)")
    return {"driver_share": one.driver_share, "simulated_groups_per_second": one.groups_per_second, "dispatch": rate}


# --- real runs -------------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Real runs beside their simulations, with the model from the run of `--fit` or from each itself."""
    found = []
    for folder in options.against:
        real = measured(folder)
        model = replace(fit(options.fit or folder), rollouts=str(folder))
        one = simulate(replace(real.config, simulate=model, rl=replace(real.config.rl, steps=real.steps)))
        off = one.step_seconds / real.step_seconds - 1
        close = "" if abs(off) <= 0.1 else "   NOT within 10 %"
        say(f"  {folder}: measured {real.step_seconds:.3f} s, simulated {one.step_seconds:.3f} s   {off:+.1%}{close}")
        found.append({"run": str(folder), "measured": real.step_seconds, "simulated": one.step_seconds, "off": off})
    return found


PARTS: dict[str, list[Callable[[argparse.Namespace], Any]]] = {
    "published": [published],
    "predicted": [predicted, sixty_four],
    "driver": [driver],
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="only this part")
    parser.add_argument("--steps", type=int, default=6, help="policy steps of each simulated run (default 6)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[16, 64, 256, 1024], help="the table's rows")
    parser.add_argument("--groups", type=int, default=8000, help="groups in a step of the dispatch measurement")
    parser.add_argument("--fit", type=Path, help="a synchronous run that the model's numbers come from")
    parser.add_argument("--against", type=Path, nargs="+", help="runs to be compared with their simulations")
    parser.add_argument("--name", help="write results/NAME.json instead of the usual name")
    options = parser.parse_args()
    logging.getLogger("rlsys").setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    if options.against:
        say("real runs and their simulations")
        results["runs"] = compare(options)
    else:
        for part, work in PARTS.items():
            if options.only in (None, part):
                say(f"{part}{'' if part == 'driver' else ' (simulated, not measured)'}")
                results |= {one.__name__: one(options) for one in work}
    common.write("simulate", options, results)


if __name__ == "__main__":
    main()
