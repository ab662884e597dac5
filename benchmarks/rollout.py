"""Rollout throughput through our actors against vLLM itself: what the whole path around the engine costs.

    python -m benchmarks.rollout

Both sides write the same number of tokens to the same prompts (32 problems x 8 rollouts x 128 tokens by default, `eos`
ignored) with the same model (3.3 M parameters, so that overhead shows: a larger model hides it) and the same engine
settings: float32, processed log-probs of the sampled tokens, 64 sequences at a time, prefix caching, eager, the same
number of threads, no text decoded in the engine. vLLM's own runs in the driver's process, which spares it a hop that
ours has; ours reports a completion once (`rlsys.actors.scheduler`), which spares it most of that hop.

Ours: `RolloutFleet.act` in the driver -> Ray -> `RolloutActor.act` -> one coroutine of `run_rollout` for each rollout
(chat template, token axis, decoding, reward, versions) -> `RolloutGroup`s back through Ray. Raw: `vllm.LLM.generate` in
the driver process with the rendered prompts as token ids; its result is vLLM's own objects, nothing is made of them.

Checked: token counts equal; greedy completions of both sides are the same tokens, and their log-probs agree to 1e-4.

Not comparable: ours renders prompts, grades, and returns arrays that a learner can use; raw does none of that, and this
difference is what is measured. Both engines are alive during the race, but only one works at a time.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Sample, must, say
from benchmarks.ours import config_for, problems, tiny_model
from rlsys import cluster
from rlsys.chat import Chat
from rlsys.config import ChatConfig, Config, SamplingConfig
from rlsys.fleet import RolloutFleet
from rlsys.types import Problem, RolloutGroup


class Ours:
    """One rollout actor in a Ray cluster of its own."""

    def __init__(self, fleet: RolloutFleet) -> None:
        self._fleet = fleet

    @classmethod
    async def start(cls, config: Config, model: Path) -> Ours:
        """Start Ray, the actor and its engine."""
        cluster.connect(config.cluster)
        return cls(await RolloutFleet.start(config, str(model)))

    async def groups(self, chosen: list[Problem], size: int, sampling: SamplingConfig) -> list[RolloutGroup]:
        """All groups at once, as the loop does."""
        work = (self._fleet.act(problem, size=size, sampling=sampling, group_id=problem.id) for problem in chosen)
        return list(await asyncio.gather(*work))

    async def arm(self, chosen: list[Problem], size: int, sampling: SamplingConfig) -> Sample:
        """One timed arm."""
        started = time.perf_counter()
        groups = await self.groups(chosen, size, sampling)
        seconds = time.perf_counter() - started
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        return _sample(seconds, len(rollouts), sum(rollout.num_trained_tokens for rollout in rollouts))

    async def close(self) -> None:
        """End the actor and the cluster."""
        await self._fleet.close()
        cluster.disconnect()


class Raw:
    """vLLM's synchronous engine, fed with token ids."""

    def __init__(self, config: Config, model: Path, prompts: list[list[int]]) -> None:
        from vllm import LLM

        actors = config.actors
        self._prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        # The options that actors/engine.py gives to its asynchronous engine, except those of the weight transfer.
        self._llm = LLM(
            model=str(model),
            dtype=actors.dtype,
            seed=config.seed,
            max_model_len=actors.max_model_tokens,
            max_num_seqs=actors.max_rollouts,
            enable_prefix_caching=True,
            enforce_eager=True,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
        )

    def outputs(self, size: int, sampling: SamplingConfig) -> list[Any]:
        """`size` completions of each prompt, in the order of the prompts."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            detokenize=False,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_response_tokens,
            ignore_eos=True,
            skip_special_tokens=False,
            logprobs=0,
        )
        prompts = [prompt for prompt in self._prompts for _ in range(size)]
        return [result.outputs[0] for result in self._llm.generate(prompts, parameters, use_tqdm=False)]

    async def arm(self, size: int, sampling: SamplingConfig) -> Sample:
        """One timed arm."""
        started = time.perf_counter()
        outputs = self.outputs(size, sampling)
        seconds = time.perf_counter() - started
        self._llm.reset_prefix_cache()
        return _sample(seconds, len(outputs), sum(len(output.token_ids) for output in outputs))


def _sample(seconds: float, rollouts: int, tokens: int) -> Sample:
    return {"seconds": seconds, "rollouts": rollouts, "tokens": tokens, "tokens_per_second": tokens / seconds}


async def same_results(ours: Ours, raw: Raw, chosen: list[Problem], tokens: int) -> dict[str, float]:
    """Greedy completions of both sides, token by token."""
    greedy = SamplingConfig(temperature=0.0, max_response_tokens=tokens)
    groups = await ours.groups(chosen, 1, greedy)
    outputs = raw.outputs(1, greedy)
    equal, gap = 0, 0.0
    for group, output in zip(groups, outputs, strict=True):
        rollout = group.rollouts[0]
        mine, theirs = rollout.tokens[rollout.loss_mask], np.array(output.token_ids)
        must(len(mine) == len(theirs) == tokens, f"greedy completions of {len(mine)} and {len(theirs)} tokens")
        # After a near tie in float32 two right answers may part; compare up to there.
        same = len(mine) if (mine == theirs).all() else int((mine != theirs).argmax())
        equal += same
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)][:same]
        gap = max(gap, float(np.abs(rollout.logprobs[rollout.loss_mask][:same] - np.array(logprobs)).max(initial=0.0)))
    share = equal / (tokens * len(outputs))
    say(f"greedy completions: {share:.1%} of the tokens equal, log-probs differ by at most {gap:.1e}")
    must(share > 0.95, "greedy completions differ")
    must(gap < 1e-4, "log-probs of equal tokens differ")
    return {"equal_share": share, "logprob_gap": gap}


async def main() -> None:
    """Start both engines, compare, warm up, race, write."""
    parser = common.arguments(__doc__)
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--size", type=int, default=8, help="rollouts of each problem")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each rollout")
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine")
    options = parser.parse_args()
    common.set_threads(options.threads)
    common.quiet_vllm()
    folder = Path(tempfile.mkdtemp(prefix="rollout_"))
    model = tiny_model(folder / "model")
    config = config_for(
        model,
        max_response_tokens=options.tokens,
        max_model_tokens=options.tokens + 128,
        engines=1,
        actor="benchmarks.ours:FixedLengthActor",
    )
    sampling = config.rl.sampling
    chosen = problems(options.problems)
    chat = Chat.load(str(model), [], ChatConfig())
    ours = await Ours.start(config, model)
    try:
        raw = Raw(config, model, [chat.render(problem) for problem in chosen])
        same = await same_results(ours, raw, chosen, options.tokens)
        await ours.arm(chosen, options.size, sampling)
        await raw.arm(options.size, sampling)
        samples = await common.race(
            {"ours": lambda: ours.arm(chosen, options.size, sampling), "raw": lambda: raw.arm(options.size, sampling)},
            rounds=options.rounds,
            settle_seconds=options.settle,
        )
    finally:
        await ours.close()
    counts = {sample["tokens"] for side in samples.values() for sample in side}
    must(counts == {options.problems * options.size * options.tokens}, f"token counts differ: {counts}")
    found = common.ratios(samples["ours"], samples["raw"], "tokens_per_second")
    for name, side in samples.items():
        say(f"{name:>5}: {common.median(side, 'tokens_per_second'):,.0f} tokens/s")
    common.show("tokens per second, ours / raw vLLM", found, "0.85x")
    common.write("rollout", options, {"ratios": {"tokens_per_second": found}, "same": same, "samples": samples})
    shutil.rmtree(folder)


if __name__ == "__main__":
    asyncio.run(main())
