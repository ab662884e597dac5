"""A preference step beside two supervised ones on the same tokens; a sampling stage beside vLLM itself.

    python -m benchmarks.preference            # both; --only learner or --only sampling for one

`learner`: one process, one learner (`FsdpLearner`, one rank, one thread, float32, an untrained Qwen2-shaped model of 6
layers), whose loss is switched between rounds of one race. `preference`: one DPO step on P pairs, packed in pairs that
share their prompt, reference log-probs given, one update. `sft`: two steps of cross-entropy on the same rollouts, the P
chosen ones and then the P rejected ones, packed, two updates. `sft_together`: one such step on all 2 P, which has the
prompts in common and one update, as the preference step has. Tokens are those of the rollouts, each counted once per
side, whatever packing makes of them. Packing is counted. Left out, because they happen once and not in every step: the
reference's log-probs.

`sampling`: `Answering`, what a sampling stage does between start and filters (`PolicySampler`, parts on disk), on one
rollout actor, against `vllm.LLM.generate` in the driver with the same prompts as token ids; model, engine settings and
lengths are those of `benchmarks.rollout`, `eos` ignored.

Checked: losses of `sft` and `sft_together` agree; DPO's first loss is ln 2 and its trained tokens are those of the two
supervised steps; token counts of both sides of `sampling` are equal, and the parts hold every sample.

Not comparable: a preference step computes each prompt once for both answers, which two separate steps cannot; the
sampling stage grades, and writes its answers to disk.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import Sample, must, say
from benchmarks.learner import untrained_model
from benchmarks.ours import config_for, problems, tiny_model
from benchmarks.rollout import Raw
from rlsys import cluster, losses, preference
from rlsys.chat import Chat
from rlsys.config import ChatConfig, LearnersConfig, OptimizerConfig, SampleConfig
from rlsys.console import Console
from rlsys.learners.fsdp import FsdpLearner
from rlsys.losses import LossInputs, LossOutputs
from rlsys.packing import shard, unpack
from rlsys.pairs import over_pairs, pair_batch, with_logprobs
from rlsys.records import RunDirectory
from rlsys.sample_parts import SampleParts
from rlsys.samplers import PolicySampler, SamplerContext
from rlsys.stages.common import Run, assemble
from rlsys.stages.sampling import Answering
from rlsys.types import Rollout, TrainBatch

VOCABULARY = 8_000
DPO: Callable[[LossInputs], LossOutputs] = partial(over_pairs, loss=preference.dpo, beta=0.1)


class Switched:
    """A loss that can be exchanged while the learner lives."""

    def __init__(self) -> None:
        self.loss: Callable[[LossInputs], LossOutputs] = losses.cross_entropy

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        return self.loss(inputs)


def pairs(count: int, prompt_tokens: int, median: int, longest: int) -> list[tuple[Rollout, Rollout]]:
    """Pairs with lognormal lengths, the chosen answers about twice as long as the rejected ones."""
    generator = np.random.default_rng(5)

    def rollout(prompt: Any, middle: float) -> Rollout:
        length = int(np.clip(generator.lognormal(math.log(middle), 0.5), 8, longest))
        tokens = np.concatenate([prompt, generator.integers(100, VOCABULARY, length)]).astype(np.int32)
        return Rollout(
            tokens=tokens,
            loss_mask=np.arange(len(tokens)) >= prompt_tokens,
            logprobs=np.zeros(len(tokens), np.float32),
            versions=np.full(len(tokens), -1, np.int32),
        )

    found = []
    for _ in range(count):
        prompt = generator.integers(100, VOCABULARY, prompt_tokens)
        found.append((rollout(prompt, 1.4 * median), rollout(prompt, 0.7 * median)))
    return found


class Learner:
    """The one learner of the race."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        untrained_model(folder, VOCABULARY)
        self._max_tokens, self._switched = max_tokens, Switched()
        self._learner = FsdpLearner(
            model_path=str(folder), config=LearnersConfig(count=1, cpus=1), rank=0, world_size=1
        )
        self._learner.start(
            master=self._learner.rendezvous(),
            optimizer=OptimizerConfig(lr=1e-9),  # the weights stay what they are, so that every round does the same
            total_steps=1_000_000,
            loss=self._switched,
            timeout=60.0,
        )

    def step(self, batch: TrainBatch, loss: Callable[[LossInputs], LossOutputs]) -> dict[str, float]:
        """Packing, forward, loss, backward, update; means over the batch's trained tokens."""
        self._switched.loss = loss
        (micro_batches,) = shard(batch, num_ranks=1, max_tokens=self._max_tokens)
        found = self._learner.step(micro_batches, num_tokens=batch.num_tokens, temperature=1.0)
        return {
            name.removeprefix("sum/"): value / batch.num_tokens
            for name, value in found.items()
            if name.startswith("sum/")
        }

    def with_reference(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts with the log-probs of the model as it is."""
        batch = assemble(rollouts, [0.0] * len(rollouts))
        (micro_batches,) = shard(batch, num_ranks=1, max_tokens=self._max_tokens)
        found = unpack(batch, micro_batches, self._learner.infer(micro_batches, temperature=1.0))
        return [with_logprobs(rollout, logprobs) for rollout, logprobs in zip(rollouts, found, strict=True)]

    def close(self) -> None:
        """Leave the process group."""
        self._learner.close()


async def learner_race(options: Any) -> dict[str, Any]:
    """One preference step, two supervised ones, one supervised one of all."""
    folder = Path(tempfile.mkdtemp(prefix="preference_"))
    learner = Learner(folder, options.max_tokens)
    try:
        both = pairs(options.pairs, options.prompt_tokens, options.median, options.longest)
        flat = learner.with_reference([rollout for pair in both for rollout in pair])
        paired = pair_batch(list(zip(flat[0::2], flat[1::2], strict=True)))
        halves = [assemble(flat[side::2], [0.0] * len(both)) for side in (0, 1)]
        together = assemble(flat, [0.0] * len(flat))
        tokens = sum(map(len, flat))
        _check(learner, paired, halves, together)

        def side(work: Callable[[], Any]) -> Callable[[], Any]:
            async def run() -> Sample:
                started = time.perf_counter()
                work()
                seconds = time.perf_counter() - started
                return {"seconds": seconds, "tokens_per_second": tokens / seconds}

            return run

        samples = await common.race(
            {
                "preference": side(lambda: learner.step(paired, DPO)),
                "sft": side(lambda: [learner.step(half, losses.cross_entropy) for half in halves]),
                "sft_together": side(lambda: learner.step(together, losses.cross_entropy)),
            },
            rounds=options.rounds,
            settle_seconds=options.settle,
            what="learner: ",
        )
    finally:
        learner.close()
        shutil.rmtree(folder)
    found = {
        other: common.ratios(samples["preference"], samples[other], "tokens_per_second")
        for other in ("sft", "sft_together")
    }
    common.show("tokens per second, preference step / two SFT steps", found["sft"], "0.9x")
    common.show("tokens per second, preference step / one SFT step of all", found["sft_together"])
    packed = sum(len(micro.tokens) for micro in shard(paired, num_ranks=1, max_tokens=options.max_tokens)[0])
    return {"ratios": found, "samples": samples, "tokens": {"rollouts": tokens, "computed for pairs": packed}}


def _check(learner: Learner, paired: TrainBatch, halves: list[TrainBatch], together: TrainBatch) -> None:
    """The sides do the same work on the same tokens; this warms them up as well."""
    trained = sum(half.num_tokens for half in halves)
    must(paired.num_tokens == trained == together.num_tokens, "the sides train other tokens")
    first = learner.step(paired, DPO)["loss"]
    must(abs(first - math.log(2)) < 1e-4, f"the policy is still the reference, but DPO's loss is {first}")
    apart = sum(learner.step(half, losses.cross_entropy)["loss"] * half.num_tokens for half in halves) / trained
    whole = learner.step(together, losses.cross_entropy)["loss"]
    must(abs(apart - whole) < 1e-4 * whole, f"cross-entropy in two steps {apart}, in one {whole}")


async def sampling_race(options: Any) -> dict[str, Any]:
    """A sampling stage on one rollout actor, and vLLM by itself."""
    folder = Path(tempfile.mkdtemp(prefix="sampling_"))
    model = tiny_model(folder / "model")
    config = config_for(
        model,
        max_response_tokens=options.tokens,
        max_model_tokens=options.tokens + 128,
        engines=1,
        actor="benchmarks.ours:FixedLengthActor",
    )
    stage = SampleConfig(samples_per_problem=options.size, sampling=config.rl.sampling)
    config = replace(config, samples={"own": stage}, run_dir=str(folder / "run"))
    chosen = problems(options.problems)
    chat = Chat.load(str(model), [], ChatConfig())
    (folder / "run").mkdir()
    run = Run(
        config=config, directory=RunDirectory(folder / "run", trackers=()), console=Console(), stop=asyncio.Event()
    )
    cluster.connect(config.cluster)
    sampler = PolicySampler()
    try:
        context = SamplerContext(config=config, stage="own", model=model, sampling=stage.sampling, tell=say)
        await sampler.start(context)
        raw = Raw(config, model, [chat.render(problem) for problem in chosen])
        rounds = iter(range(1_000_000))

        async def ours() -> Sample:
            parts = SampleParts.open(
                folder / f"parts-{next(rounds)}", chosen, {}, size=stage.problems_per_part, place="benchmark"
            )
            started = time.perf_counter()
            await Answering(run, "own", sampler, parts, chosen).through(range(len(chosen)))
            seconds = time.perf_counter() - started
            samples = parts.samples()
            tokens = sum(sample.num_tokens for sample in samples)
            must(len(samples) == options.problems * options.size, f"the parts hold {len(samples)} samples")
            return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}

        await ours()
        await raw.arm(options.size, stage.sampling)
        samples = await common.race(
            {"ours": ours, "raw": lambda: raw.arm(options.size, stage.sampling)},
            rounds=options.rounds,
            settle_seconds=options.settle,
            what="sampling: ",
        )
    finally:
        await sampler.close()
        cluster.disconnect()
        shutil.rmtree(folder)
    counts = {sample["tokens"] for side in samples.values() for sample in side}
    must(counts == {options.problems * options.size * options.tokens}, f"token counts differ: {counts}")
    found = common.ratios(samples["ours"], samples["raw"], "tokens_per_second")
    common.show("tokens per second, sampling stage / raw vLLM", found, "0.85x")
    return {"ratios": found, "samples": samples}


RACES = {"learner": learner_race, "sampling": sampling_race}


async def main() -> None:
    """Race, print, write."""
    parser = common.arguments(__doc__)
    parser.add_argument("--only", choices=RACES, help="only this race")
    parser.add_argument("--pairs", type=int, default=16, help="learner: pairs of one step")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="learner: tokens of a prompt")
    parser.add_argument("--median", type=int, default=260, help="learner: about the median length of an answer")
    parser.add_argument("--longest", type=int, default=1024, help="learner: no answer is longer")
    parser.add_argument("--max-tokens", type=int, default=2048, help="learner: tokens of a micro-batch")
    parser.add_argument("--problems", type=int, default=64, help="sampling: problems")
    parser.add_argument("--size", type=int, default=8, help="sampling: answers to each problem")
    parser.add_argument("--tokens", type=int, default=128, help="sampling: tokens of an answer")
    options = parser.parse_args()
    common.set_threads()
    common.quiet_vllm()
    torch.set_num_threads(1)
    results = {}
    for name, race in RACES.items():
        if options.only in (None, name):
            results[name] = await race(options)
    common.write("preference" if options.only is None else f"preference_{options.only}", options, {"races": results})


if __name__ == "__main__":
    asyncio.run(main())
