"""The learner's forward and backward pass: packed and with shared prompts, beside a padded one, and beside none of it.

    python -m benchmarks.learner

One process, one thread, float32, an untrained Qwen2-shaped model of 6 layers; 4 groups of 8 rollouts with lognormal
lengths. All sides compute log-probs and entropies of the trained tokens by the same function for the head, the clipped
policy gradient, and its gradient; none makes an optimizer step.

`padded`: every rollout padded to the longest of the batch, attention by PyTorch's own kernel with a mask, the head on
the whole padded window of completions, as trainers do that pad. `packed`: our learner on rollouts that all have
prompts of their own. `shared`: our learner on the groups as they are, each prompt computed once. `bare`: the micro-
batches of `shared` through the same model and attention, with nothing but logits, log-softmax and a sum behind it: no
entropy, no recomputation, no loss function.

Checked: loss and gradients of `packed` and `shared` equal those of `padded` on the same rollouts.

Not comparable: the attention of `padded` computes what its mask hides, which is what padding costs; with FlashAttention
on GPUs, padded positions can be cheaper.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks import common
from benchmarks.common import Sample, must, say
from rlsys.learners.model import Policy, to_tensors
from rlsys.losses import LossInputs, clipped_policy_gradient
from rlsys.packing import MicroBatch, shard
from rlsys.stages.common import assemble
from rlsys.types import Rollout, TrainBatch

MAX_TOKENS = 2048
CASES = {"prompt 128, vocabulary 32k": (128, 32_000), "prompt 512, vocabulary 8k": (512, 8_000)}
AIMS = {128: ("2.8x", "3.5x"), 512: ("2x", "4.7x")}


def batch(prompt_tokens: int, vocabulary: int, *, own_prompts: bool) -> TrainBatch:
    """4 groups of 8; with `own_prompts` the first token of each differs, so that nothing can be shared."""
    generator = np.random.default_rng(3)
    rollouts = []
    for _ in range(4):
        prompt = generator.integers(100, vocabulary, prompt_tokens)
        for number in range(8):
            length = int(np.clip(generator.lognormal(np.log(260), 0.6), 16, 1024))
            first = [len(rollouts) if own_prompts else prompt[0]]
            tokens = np.concatenate([first, prompt[1:], generator.integers(100, vocabulary, length)])
            rollouts.append(
                Rollout(
                    tokens=tokens.astype(np.int32),
                    loss_mask=np.arange(len(tokens)) >= prompt_tokens,
                    logprobs=np.where(np.arange(len(tokens)) >= prompt_tokens, -np.log(vocabulary), 0).astype(
                        np.float32
                    ),
                    versions=np.zeros(len(tokens), np.int32),
                    reward=float(number % 2),
                )
            )
    return assemble(rollouts, [1.0 if rollout.reward else -1.0 for rollout in rollouts])


def loss_of(logprobs: Tensor, recorded: Tensor, advantages: Tensor, sequences: Tensor) -> Tensor:
    """The sum over tokens, as the learner makes it."""
    inputs = LossInputs(logprobs=logprobs, rollout_logprobs=recorded, advantages=advantages, sequences=sequences)
    return clipped_policy_gradient(inputs).loss.sum()


def ours(policy: Policy, micro_batches: Sequence[MicroBatch], num_tokens: int) -> float:
    """What a rank of the learner does before its optimizer."""
    total = 0.0
    for micro in micro_batches:
        logprobs, entropy = policy(*to_tensors(micro, torch.device("cpu")), 1.0)
        arrays = (micro.rollout_logprobs, micro.advantages, micro.sequences)
        loss = loss_of(logprobs, *map(torch.from_numpy, arrays)) / num_tokens
        loss.backward()
        total += float(loss.detach()) + 0 * float(entropy.sum())
    return total


def bare(policy: Policy, micro_batches: Sequence[MicroBatch], num_tokens: int) -> float:
    """The same model on the same tokens, and hardly anything else."""
    total = 0.0
    for micro in micro_batches:
        tokens, positions, layout, targets, sources = to_tensors(micro, torch.device("cpu"))
        hidden = policy.hf.model(input_ids=tokens[None], position_ids=positions[None], layout=layout, use_cache=False)
        logits = policy.hf.lm_head(hidden[0][0][sources])
        loss = -logits.log_softmax(-1).gather(-1, tokens[targets][:, None]).sum() / num_tokens
        loss.backward()
        total += float(loss.detach())
    return total


def padded(policy: Policy, data: TrainBatch, prompt_tokens: int) -> float:
    """The whole batch, padded to its longest rollout."""
    lengths = [len(rollout) for rollout in data.rollouts]
    longest = max(lengths)
    shape = (len(lengths), longest)
    tokens, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    recorded, trained = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for row, (rollout, length) in enumerate(zip(data.rollouts, lengths, strict=True)):
        tokens[row, :length] = torch.from_numpy(rollout.tokens.astype(np.int64))
        mask[row, :length] = 1
        recorded[row, :length] = torch.from_numpy(rollout.logprobs)
        trained[row, :length] = torch.from_numpy(rollout.loss_mask)
    hidden = policy.hf.model(input_ids=tokens, attention_mask=mask, use_cache=False)[0]
    window = slice(prompt_tokens, longest)
    before = hidden[:, prompt_tokens - 1 : -1].reshape(-1, hidden.shape[-1])
    labels = tokens[:, window].reshape(-1)
    chunks = [
        checkpoint(policy._head, before[i : i + MAX_TOKENS], labels[i : i + MAX_TOKENS], 1.0, use_reentrant=False)
        for i in range(0, len(labels), MAX_TOKENS)
    ]
    logprobs = torch.cat([chunk[0] for chunk in chunks])
    keep = trained[:, window].reshape(-1)
    rows = torch.arange(len(lengths)).repeat_interleave(longest - prompt_tokens)
    advantages = torch.tensor([float(array[0]) for array in data.advantages])[rows]
    loss = (
        loss_of(logprobs[keep], recorded[:, window].reshape(-1)[keep], advantages[keep], rows[keep]) / data.num_tokens
    )
    loss.backward()
    return float(loss.detach()) + 0 * float(sum(chunk[1].sum() for chunk in chunks))


def gradients(policy: Policy) -> Tensor:
    """All of them, and none afterwards."""
    flat = torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])
    policy.zero_grad(set_to_none=True)
    return flat


def same(label: str, one: Callable[[], float], policy: Policy, other: Callable[[], float], peer: Policy) -> float:
    """Check that both sides have one loss and one gradient; the relative difference of the gradients."""
    first, second = one(), other()
    left, right = gradients(policy), gradients(peer)
    difference = float((left - right).norm() / right.norm())
    must(abs(first - second) <= 1e-5 * max(1.0, abs(second)), f"{label}: losses {first} and {second}")
    must(difference <= 1e-4, f"{label}: gradients differ by {difference}")
    return difference


async def case(name: str, prompt_tokens: int, vocabulary: int, folder: Path, options: Any) -> dict[str, Any]:
    """All sides on one shape."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    policy = Policy.load(str(folder))
    peer = Policy(AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="sdpa"))
    own, groups = (batch(prompt_tokens, vocabulary, own_prompts=flag) for flag in (True, False))
    packs = {
        label: shard(data, num_ranks=1, max_tokens=MAX_TOKENS)[0] for label, data in (("own", own), ("all", groups))
    }
    real = sum(map(len, groups.rollouts))
    longest = max(map(len, groups.rollouts))
    computed = {label: sum(len(micro.tokens) for micro in micros) for label, micros in packs.items()}
    shares = longest * len(groups.rollouts) / real, computed["all"] / real
    say(f"{name}: {real} tokens; padded {shares[0]:.2f}x of them, with shared prompts {shares[1]:.2f}x")
    difference = {
        "packed": same(
            "packed",
            lambda: ours(policy, packs["own"], own.num_tokens),
            policy,
            lambda: padded(peer, own, prompt_tokens),
            peer,
        ),
        "shared": same(
            "shared",
            lambda: ours(policy, packs["all"], groups.num_tokens),
            policy,
            lambda: padded(peer, groups, prompt_tokens),
            peer,
        ),
    }

    def side(work: Callable[[], float], owner: Policy) -> Callable[[], Any]:
        async def run() -> Sample:
            started = time.perf_counter()
            work()
            seconds = time.perf_counter() - started
            owner.zero_grad(set_to_none=True)
            return {"seconds": seconds, "tokens_per_second": real / seconds}

        return run

    samples = await common.race(
        {
            "padded": side(lambda: padded(peer, groups, prompt_tokens), peer),
            "packed": side(lambda: ours(policy, packs["own"], own.num_tokens), policy),
            "shared": side(lambda: ours(policy, packs["all"], groups.num_tokens), policy),
            "bare": side(lambda: bare(policy, packs["all"], groups.num_tokens), policy),
        },
        rounds=options.rounds,
        settle_seconds=options.settle,
        what=f"{name}: ",
    )
    ratios = {label: common.ratios(samples["padded"], samples[label]) for label in ("packed", "shared")}
    for label, aim in zip(ratios, AIMS[prompt_tokens], strict=True):
        common.show(f"{name}: padded / {label}, time", ratios[label], aim)
    ratios["bare"] = common.ratios(samples["bare"], samples["shared"])
    common.show(f"{name}: bare / shared, time", ratios["bare"], "0.9x")
    return {
        "ratios": ratios,
        "samples": samples,
        "gradient_differences": difference,
        "tokens": computed | {"real": real},
    }


async def main() -> None:
    """Measure all shapes, print, write."""
    options = common.arguments(__doc__, rounds=5).parse_args()
    common.set_threads()
    torch.set_num_threads(1)
    results = {}
    for name, (prompt_tokens, vocabulary) in CASES.items():
        with TemporaryDirectory() as folder:
            results[name] = await case(name, prompt_tokens, vocabulary, Path(folder), options)
    common.write("learner", options, {"cases": results})


if __name__ == "__main__":
    asyncio.run(main())
