"""The learner's forward and backward pass: packed and with shared prompts, beside padded ones, and beside none of it.

    python -m benchmarks.learner

One process, one thread, float32, an untrained Qwen2-shaped model of 6 layers; 4 groups of 8 rollouts with lognormal
lengths. All sides compute log-probs and entropies of the trained tokens by the same function for the head, the clipped
policy gradient, and its gradient; none makes an optimizer step. The C library keeps freed memory, as in the learner.

`padded`: every rollout padded on the right to the longest of the batch, which needs no mask (a token sees only what is
before it, and padding is behind), so that PyTorch's fused kernel for causal attention runs; four rows at a time, which
was the fastest of 2, 4, 8 and 32; the head on the whole padded window of completions, as trainers do that pad.
`picked`: the same, but the head only on the trained tokens: the best that padding allows. `packed`: our learner on
rollouts that all have prompts of their own. `shared`: our learner on the groups as they are, each prompt computed once.
`bare`: the micro-batches of `shared` through the same model and attention, with nothing but logits, log-softmax and a
sum behind it: no entropy, no bound on memory, no loss function.

Checked: loss and gradients of `packed` and `shared` equal those of both padded sides on the same rollouts.

Not comparable: the attention of `padded` computes what is behind the end of a row, which is what padding costs; kernels
for rows of different lengths, as on GPUs, do not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks import common
from benchmarks.common import Sample, must, say
from rlsys.learners.head import token_logprobs
from rlsys.learners.host import keep_freed_memory
from rlsys.learners.model import Policy, to_tensors
from rlsys.losses import LossInputs, clipped_policy_gradient
from rlsys.packing import MicroBatch, shard
from rlsys.stages.common import assemble
from rlsys.types import Rollout, TrainBatch

MAX_TOKENS = 2048
PADDED_ROWS = 4
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


def padded(policy: Policy, data: TrainBatch, prompt_tokens: int, *, picked: bool) -> float:
    """The batch, padded to its longest rollout; with `picked` the head leaves out what does not train."""
    longest = max(map(len, data.rollouts))

    def filled(arrays: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.stack([torch.from_numpy(np.pad(a, (0, longest - len(a)))).to(dtype) for a in arrays])

    tokens = filled([rollout.tokens for rollout in data.rollouts], torch.int64)
    recorded = filled([rollout.logprobs for rollout in data.rollouts], torch.float32)
    advantages = filled(data.advantages, torch.float32)
    trained = filled([rollout.loss_mask for rollout in data.rollouts], torch.bool)
    total = 0.0
    for begin in range(0, len(tokens), PADDED_ROWS):
        rows = slice(begin, begin + PADDED_ROWS)
        hidden = policy.hf.model(input_ids=tokens[rows], use_cache=False)[0]
        keep = trained[rows, prompt_tokens:]
        window = torch.ones_like(keep) if not picked else keep
        logprobs, entropy = in_chunks(
            policy, hidden[:, prompt_tokens - 1 : -1][window], tokens[rows, prompt_tokens:][window]
        )
        kept = keep[window]
        sequences = torch.arange(len(keep))[:, None].expand_as(keep)[keep]
        behind = (recorded[rows, prompt_tokens:][keep], advantages[rows, prompt_tokens:][keep], sequences)
        loss = loss_of(logprobs[kept], *behind) / data.num_tokens
        loss.backward()
        total += float(loss.detach()) + 0 * float(entropy.sum())
    return total


def in_chunks(policy: Policy, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The learner's function for the head, with as many logits at one time as the packed sides have."""
    chunks = zip(hidden.split(MAX_TOKENS), labels.split(MAX_TOKENS), strict=True)
    parts = [token_logprobs(policy.hf.lm_head(rows), targets, 1.0) for rows, targets in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


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


def untrained_model(folder: Path, vocabulary: int) -> None:
    """A Qwen2-shaped model of 6 layers with random weights, always the same ones."""
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


async def case(name: str, prompt_tokens: int, vocabulary: int, folder: Path, options: Any) -> dict[str, Any]:
    """All sides on one shape."""
    untrained_model(folder, vocabulary)
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
    sides = {
        "padded": lambda data: padded(peer, data, prompt_tokens, picked=False),
        "picked": lambda data: padded(peer, data, prompt_tokens, picked=True),
    }
    difference = {
        f"{label}, {side}": same(
            f"{label}, {side}", partial(ours, policy, packs[pack], data.num_tokens), policy, partial(work, data), peer
        )
        for label, pack, data in (("packed", "own", own), ("shared", "all", groups))
        for side, work in sides.items()
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
            **{label: side(partial(work, groups), peer) for label, work in sides.items()},
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
    for label in ("packed", "shared"):
        ratios[f"picked / {label}"] = common.ratios(samples["picked"], samples[label])
        common.show(f"{name}: picked / {label}, time", ratios[f"picked / {label}"])
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
    keep_freed_memory()
    results = {}
    for name, (prompt_tokens, vocabulary) in CASES.items():
        with TemporaryDirectory() as folder:
            results[name] = await case(name, prompt_tokens, vocabulary, Path(folder), options)
    common.write("learner", options, {"cases": results})


if __name__ == "__main__":
    asyncio.run(main())
