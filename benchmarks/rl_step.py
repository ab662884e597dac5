"""One whole RL step, ours against TRL's GRPOTrainer, both on the CPUs of this machine.

    python -m benchmarks.rl_step --case fixed      # every completion has exactly 128 tokens
    python -m benchmarks.rl_step --case free       # completions end by chance after about 100 tokens, 1,024 at most

A step is: 64 completions (8 prompts x 8) sampled at temperature 1, the reward, group advantages, one AdamW step of the
clipped loss without KL, and new weights where the next completions are sampled. float32 everywhere.

Ours: real Ray, two rollout actors with a vLLM engine each, two FSDP2 ranks, `Loop` at staleness 0, weights published
over gloo with checksums: the quickstart's layout, one thread per process. Left out is what a run records (files of
rollouts, metrics, checkpoints, evaluation). TRL: one process, generation by transformers, TRL's training loop
untouched. Before the race its settings are tried one after another (1 and 2 threads, micro-batches of 64 and 8, padded
and continuous batching) and the fastest one races. Both start from one untrained model folder (3.3 M parameters), get
the same prompts, the same reward function and the same optimizer numbers.

Checked: the first batch that TRL trained on, given to our learner, gives the same log-probs and gradient norm; equal
numbers of completions, prompt tokens and optimizer steps; equal numbers of generated tokens (`fixed`) or mean lengths
within 15 % over the race (`free`; chance decides them, so the ratio of time per token stands beside that of steps).

Not comparable: with a GPU, TRL would generate with vLLM too; this is TRL as it runs on a CPU. Its log-prob head has a
fast path for GPUs only, so it is printed apart: what it costs here says nothing about a GPU, and "without its head"
compares what is left if TRL's head cost nothing at all, while ours is counted in full.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Sample, must, say
from benchmarks.ours import config_for, problems, stopping_model, tiny_model
from benchmarks.peer import Peer, Settings
from rlsys import cluster
from rlsys.advantages import grpo
from rlsys.fleet import RolloutFleet
from rlsys.learner_group import LearnerGroup
from rlsys.ledger import Ledger
from rlsys.loop import Loop
from rlsys.stages.common import assemble
from rlsys.types import Problem, Rollout, RolloutGroup, TrainBatch

GROUPS, GROUP_SIZE, LR = 8, 8, 1e-6
CASES = {
    "fixed": {"max_tokens": 128, "ignore_eos": True, "target": 1.3},
    "free": {"max_tokens": 1024, "ignore_eos": False, "target": 4.0},
}
SETTINGS = [Settings(threads=t, micro_batch=m, continuous=c) for c in (False, True) for t in (2, 1) for m in (64, 8)]


class Ours:
    """The quickstart's layout, stopped between steps."""

    def __init__(self, fleet: RolloutFleet, learners: LearnerGroup, config: Any, stream: list[Problem]) -> None:
        self._fleet, self._learners, self._config = fleet, learners, config
        self._ledger = Ledger()
        self._stream = stream
        self._parts: list[Sample] = []

    @classmethod
    async def start(cls, case: Mapping[str, Any], model: Path, stream: list[Problem]) -> Ours:
        """Two engines, two ranks."""
        actor = "benchmarks.ours:FixedLengthActor" if case["ignore_eos"] else "rlsys.actors.rollout:RolloutActor"
        config = config_for(
            model, max_response_tokens=case["max_tokens"], max_model_tokens=case["max_tokens"] + 256, lr=LR, actor=actor
        )
        cluster.connect(config.cluster)
        fleet, learners = await asyncio.gather(
            RolloutFleet.start(config, str(model)),
            LearnerGroup.start(
                config, str(model), optimizer=config.rl.optimizer, total_steps=10**6, loss=config.rl.loss
            ),
        )
        learners.serve(fleet)
        await learners.publish(fleet, 0)
        return cls(fleet, learners, config, stream)

    async def learn_peer_batch(self, dump: Path) -> Sample:
        """Our learner on the batch that TRL took its first step on."""
        batch, norm = _read_batch(dump)
        metrics = await self._learners.step(batch, temperature=1.0)
        await self._learners.publish(self._fleet, 0)
        return {"gap": metrics["logprob_gap_max"], "norm": metrics["grad_norm"], "peer_norm": norm}

    async def steps(self, count: int) -> Sample:
        """Do `count` whole steps."""
        self._parts = []
        loop = Loop(
            act=self._act,
            learn=self._learn,
            publish=self._publish,
            drop_reason=lambda *_: None,
            groups_per_step=GROUPS,
            max_staleness=0,
            max_skipped_groups=1,
        )
        started = self._rollout_since = time.perf_counter()
        first = self._ledger.step * GROUPS
        numbers = iter(range(first + 1, first + 1 + count * GROUPS))
        await loop.run(self._ledger, numbers, steps=self._ledger.step + count, stop=asyncio.Event())
        seconds = time.perf_counter() - started
        total = {key: sum(part[key] for part in self._parts) for key in self._parts[0]}
        total |= {"reward": total["reward"] / count, "longest": max(part["longest"] for part in self._parts)}
        return {"seconds": seconds, "steps": count, **total}

    async def _act(self, number: int, _: int) -> RolloutGroup:
        problem, sampling = self._stream[number - 1], self._config.rl.sampling
        return await self._fleet.act(problem, size=GROUP_SIZE, sampling=sampling, group_id=problem.id)

    async def _learn(self, step: int, groups: Mapping[int, RolloutGroup]) -> None:
        """As `rlsys.stages` does, without files."""
        rolled_out = time.perf_counter()
        rollouts = [rollout for group in groups.values() for rollout in group.rollouts]
        advantages = [float(a) for group in groups.values() for a in grpo(group.rewards)]
        metrics = await self._learners.step(
            assemble(rollouts, advantages), temperature=1.0, clip_low=0.2, clip_high=0.2, kl_coef=0.0
        )
        must(0 < metrics["grad_norm"] < float("inf"), f"our step {step} had the gradient norm {metrics['grad_norm']}")
        self._part: dict[str, float] = {
            "completions": len(rollouts),
            "tokens": sum(rollout.num_trained_tokens for rollout in rollouts),
            "prompt_tokens": sum(len(rollout) - rollout.num_trained_tokens for rollout in rollouts),
            "longest": max(rollout.num_trained_tokens for rollout in rollouts),
            "reward": statistics.mean(rollout.reward for rollout in rollouts),
            "rollout": rolled_out - self._rollout_since,
            "learn": time.perf_counter() - rolled_out,
        }

    async def _publish(self, step: int) -> None:
        started = time.perf_counter()
        await self._learners.publish(self._fleet, step)
        self._rollout_since = time.perf_counter()
        self._parts.append({**self._part, "publish": self._rollout_since - started})

    async def close(self) -> None:
        """End everything that was started."""
        await asyncio.gather(self._learners.close(), self._fleet.close())
        cluster.disconnect()


def _read_batch(dump: Path) -> tuple[TrainBatch, float]:
    """TRL's padded batch as ours: padding cut off, its log-probs as those of the sampling policy (its ratio is 1)."""
    data = np.load(dump)
    rollouts = []
    for row in range(len(data["advantages"])):
        prompt = data["prompt_ids"][row][data["prompt_mask"][row] > 0]
        kept = data["completion_mask"][row] > 0
        completion, logprobs = data["completion_ids"][row][kept], data["logprobs"][row][kept]
        rollouts.append(
            Rollout(
                tokens=np.concatenate([prompt, completion]).astype(np.int32),
                loss_mask=np.arange(len(prompt) + len(completion)) >= len(prompt),
                logprobs=np.concatenate([np.zeros(len(prompt)), logprobs]).astype(np.float32),
                versions=np.zeros(len(prompt) + len(completion), dtype=np.int32),
            )
        )
    return assemble(rollouts, data["advantages"].tolist()), float(data["grad_norm"])


async def tune(
    job: dict[str, Any], candidates: list[Settings], steps: int, log: Path
) -> tuple[Settings, dict[str, float]]:
    """The fastest setting of TRL, and the seconds per step at each, after one step of warm-up."""
    seconds: dict[Settings, float] = {}
    for settings in candidates:
        try:
            peer = await Peer.start(job, settings, log=log)
            try:
                await peer.steps(1, log=log)
                seconds[settings] = (await peer.steps(steps, log=log))["seconds"] / steps
            finally:
                await peer.close()
        except RuntimeError as error:
            say(f"  TRL, {settings}: does not run ({str(error).strip().splitlines()[-1]})")
            continue
        say(f"  TRL, {settings}: {seconds[settings]:.2f} s a step")
    best = min(seconds, key=lambda settings: seconds[settings])
    return best, {str(settings): value for settings, value in seconds.items()}


def check(case: Mapping[str, Any], ours: list[Sample], peer: list[Sample]) -> None:
    """Both sides did the same work."""
    for key in ("steps", "completions", "prompt_tokens") + (("tokens",) if case["ignore_eos"] else ()):
        a, b = [s[key] for s in ours], [s[key] for s in peer]
        must(a == b, f"{key} differ: ours {a}, TRL {b}")
    lengths = [sum(s["tokens"] for s in side) / sum(s["completions"] for s in side) for side in (ours, peer)]
    ratio = lengths[0] / lengths[1]
    say(f"mean length: ours {lengths[0]:.1f}, TRL {lengths[1]:.1f} tokens; generated tokens ours / TRL {ratio:.3f}")
    must(abs(ratio - 1) < 0.15, f"mean lengths differ by more than 15 %: {lengths}")


async def main() -> None:
    """Tune the peer, warm both up, compare one batch, race, write."""
    parser = common.arguments(__doc__)
    parser.add_argument("--case", choices=CASES, default="fixed")
    parser.add_argument("--steps", type=int, default=3, help="RL steps in one arm")
    parser.add_argument("--tune-steps", type=int, default=2, help="steps that each setting of TRL is tried for")
    parser.add_argument("--settings", type=int, nargs="*", help="try only these settings of TRL, by index")
    parser.add_argument("--max-tokens", type=int, help="another limit of tokens, for a quick trial")
    options = parser.parse_args()
    case = {**CASES[options.case], **({"max_tokens": options.max_tokens} if options.max_tokens else {})}
    folder = Path(tempfile.mkdtemp(prefix="rl_step_"))
    common.set_threads()
    model = tiny_model(folder / "model") if case["ignore_eos"] else stopping_model(folder / "model")
    stream = problems(GROUPS * (2 + options.rounds * options.steps))
    log = folder / "trl.log"
    job = {
        **{key: case[key] for key in ("max_tokens", "ignore_eos")},
        **{"model": str(model), "folder": str(folder / "trl"), "dump": str(folder / "batch.npz"), "lr": LR, "seed": 0},
        **{"completions": GROUPS * GROUP_SIZE, "group_size": GROUP_SIZE},
        "prompts": [[dict(message) for message in problem.prompt] for problem in stream],
    }
    candidates = SETTINGS if options.settings is None else [SETTINGS[index] for index in options.settings]
    say(f"case {options.case}; TRL at {len(candidates)} settings:")
    best, tuned = await tune(job, candidates, options.tune_steps, log)
    peer = await Peer.start(job, best, log=log)
    ours = await Ours.start(case, model, stream)
    try:
        await peer.steps(2, log=log)
        same = await ours.learn_peer_batch(folder / "batch.npz")
        say(
            f"TRL's first batch in our learner: gradient norm {same['norm']:.6f}, TRL {same['peer_norm']:.6f}; "
            f"log-probs differ by at most {same['gap']:.1e}"
        )
        must(abs(same["norm"] / same["peer_norm"] - 1) < 1e-3, f"gradient norms differ: {same}")
        must(same["gap"] < 1e-4, f"log-probs differ: {same}")
        await ours.steps(2)
        samples = await common.race(
            {"ours": lambda: ours.steps(options.steps), "trl": lambda: peer.steps(options.steps, log=log)},
            rounds=options.rounds,
            settle_seconds=options.settle,
        )
    finally:
        await peer.close()
        await ours.close()
    check(case, samples["ours"], samples["trl"])
    notes = {"peer_settings": str(best), "tuned": tuned, "same_batch": same, "peer_versions": peer.versions}
    report(options, case, samples, notes)
    shutil.rmtree(folder)


def report(options: Any, case: Mapping[str, Any], samples: dict[str, list[Sample]], notes: dict[str, Any]) -> None:
    """Ratios, the split of both sides, JSON."""
    for side in samples.values():
        for sample in side:
            sample["step"] = sample["seconds"] / sample["steps"]
            sample["token"] = sample["seconds"] / sample["tokens"]
            sample["without_head"] = sample["step"] - sample.get("head", 0.0) / sample["steps"]
    found = {key: common.ratios(samples["trl"], samples["ours"], key) for key in ("step", "token", "without_head")}
    for name, parts in (("ours", ("rollout", "learn", "publish")), ("trl", ("generate", "backbone_and_rest", "head"))):
        side = samples[name]
        split = ", ".join(f"{part} {statistics.median(s[part] / s['steps'] for s in side):.3f}" for part in parts)
        rate = statistics.median(s["tokens"] / s["seconds"] for s in side)
        say(f"{name:>5}: {common.median(side, 'step'):.3f} s a step ({split}), {rate:,.0f} tokens/s")
    common.show("time of a step, TRL / ours", found["step"], f"{case['target']}x")
    common.show("time per generated token, TRL / ours", found["token"])
    common.show("time of a step, TRL without its head / ours", found["without_head"])
    common.write(f"rl_step_{options.case}", options, {"ratios": found, "samples": samples, **notes})


if __name__ == "__main__":
    asyncio.run(main())
