"""TRL's training step as the other side of `trl_step.py`; runs in benchmarks/.venv-trl.

A GRPOTrainer is made and its `training_step` is called as its loop does (forward, loss, metrics, backward) on a batch
that is given, or that it has generated, graded and padded once before. What is replaced is `_prepare_inputs`, which
would generate, and, where another head than TRL's is asked for, `_get_per_token_logps_and_entropies`: then the head is
that of rlsys, which is a function of logits and imports nothing but torch. Freed memory is kept as our learner keeps
it. One line of JSON on standard input is one step, one line of JSON answers.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import versions
from rlsys.learners.head import num_chunks, token_logprobs
from rlsys.learners.host import keep_freed_memory

END_BIAS = 3.7
"""Added to the logit of the end of turn: about 200 tokens a completion with a vocabulary of 8,000."""

_OUT = sys.stdout
sys.stdout = sys.stderr  # whatever a library prints must not mix with the answers


def answer(line: dict[str, Any]) -> None:
    """One line of JSON to the parent."""
    _OUT.write(json.dumps(line) + "\n")
    _OUT.flush()


class GivenBatchTrainer(GRPOTrainer):
    """The trainer on a batch that it did not generate, with its own head or with ours."""

    head = "trl"

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        if self.head == "trl":
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        hidden, labels = hidden[:, -logits_to_keep - 1 : -1], input_ids[:, -logits_to_keep:]
        rows = torch.ones_like(labels) if self.head == "padded" else attention_mask[:, -logits_to_keep:]
        rows = rows.bool()
        found = _scored(model.lm_head, hidden[rows], labels[rows])
        logprobs, entropies = (torch.zeros(rows.shape).masked_scatter(rows, values) for values in found)
        return logprobs, entropies, None


def _scored(head: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] by our function, in chunks where our learner would take them."""

    def scored(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(head(hidden), labels, 1.0)

    count = num_chunks(len(labels), head.out_features)
    if count == 1:
        return scored(hidden, labels)
    parts = [
        checkpoint(scored, *chunk, use_reentrant=False)
        for chunk in zip(hidden.tensor_split(count), labels.tensor_split(count), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def trainer_for(job: dict[str, Any]) -> GivenBatchTrainer:
    """A trainer of the clipped loss without KL, averaged over the tokens of the batch."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    arguments = GRPOConfig(
        output_dir=job["folder"],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=job["rollouts"],
        gradient_accumulation_steps=1,
        num_generations=job["group_size"],
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_completion_length=1024,
        # An untrained model would hardly ever end its turn; what is left is a geometric distribution of lengths.
        generation_kwargs={"sequence_bias": [[[tokenizer.eos_token_id], END_BIAS]]},
    )
    return GivenBatchTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "none"}] * job["rollouts"]),
        processing_class=tokenizer,
    )


def capture(trainer: GivenBatchTrainer, prompts: list[str], group_size: int) -> dict[str, Tensor]:
    """A batch as the trainer generates, grades and pads it by itself."""
    torch.manual_seed(0)
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(group_size)]
    found = trainer._generate_and_score_completions(rows)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
    return {name: found[name].detach() for name in names}


def step(trainer: GivenBatchTrainer, batch: dict[str, Tensor], micro_batch: int) -> dict[str, float]:
    """All micro-batches forward and backward; the optimizer is left out on both sides."""
    num_rows = len(batch["advantages"])
    # What the training loop and the config would say where a generated batch is one optimizer step.
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = num_rows // micro_batch
    total = 0.0
    started = time.perf_counter()
    for first in range(0, num_rows, micro_batch):
        rows = {key: value[first : first + micro_batch] if value.dim() else value for key, value in batch.items()}
        total += float(trainer.training_step(trainer.model, rows, None))
    return {"seconds": time.perf_counter() - started, "loss": total}


def main() -> None:
    """Read the job (the first line of standard input), then answer steps until the input ends."""
    torch.set_num_threads(1)
    keep_freed_memory()
    job = json.loads(sys.stdin.readline())
    trainer = trainer_for(job)
    if job["prompts"]:
        batch = capture(trainer, job["prompts"], job["group_size"])
        np.savez(job["batch"], **{name: value.numpy() for name, value in batch.items()})
    else:
        batch = {key: torch.from_numpy(value) for key, value in np.load(job["batch"]).items()}
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    answer({"ready": True, "versions": versions(), "threads": torch.get_num_threads()})
    for line in sys.stdin:
        asked = json.loads(line)
        trainer.head = asked["head"]
        result = step(trainer, batch, asked["micro_batch"])
        gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        if asked.get("gradients"):
            np.savez(asked["gradients"], **{name: gradient.numpy() for name, gradient in gradients.items()})
        norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
        trainer.model.zero_grad(set_to_none=True)
        answer({**result, "norm": norm})


if __name__ == "__main__":
    main()
