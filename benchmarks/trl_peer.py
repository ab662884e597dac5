"""TRL's GRPOTrainer as the other side of `rl_step.py`; runs in benchmarks/.venv-trl and imports nothing of rlsys.

Its training loop is TRL's own and unchanged. A callback waits before each optimizer step for a line on standard input
(`N` steps may be done) and answers with one line of JSON when they are. Times inside are taken by wrapping functions:
generation (`GRPOTrainer._generate_single_turn`), the log-prob head forward and backward (`ChunkedLogProbFunction`), and
everything after the generation until the optimizer has stepped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import versions, vowel_share

_OUT = sys.stdout
sys.stdout = sys.stderr  # whatever a library prints must not mix with the answers


def answer(line: dict[str, Any]) -> None:
    """One line of JSON to the parent."""
    _OUT.write(json.dumps(line) + "\n")
    _OUT.flush()


def vowels(completions: list[Any], **_: Any) -> list[float]:
    """The reward of the race, in the shape that TRL calls."""
    return [vowel_share(None, completion[0]["content"]) for completion in completions]


class TimedTrainer(GRPOTrainer):
    """The trainer with clocks around its parts, and a note of what the last step was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spent: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.batch: dict[str, Any] = {}
        self.grad_norm = 0.0
        clip = self.accelerator.clip_grad_norm_

        def watched_clip(*arguments: Any, **keywords: Any) -> Any:
            norm = clip(*arguments, **keywords)
            self.grad_norm = float(norm)
            return norm

        self.accelerator.clip_grad_norm_ = watched_clip

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        completions, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.spent["generate"] += time.perf_counter() - started
        self.done["completions"] += len(completions)
        self.done["tokens"] += sum(map(len, completions))
        self.done["prompt_tokens"] += sum(map(len, prompt_ids))
        self.done["longest"] = max(self.done["longest"], *map(len, completions))
        return completions, logprobs

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        scored = super()._generate_and_score_completions(inputs)
        self.batch = {key: value for key, value in scored.items() if isinstance(value, torch.Tensor)}
        return scored

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.last_logprobs = result[0].detach()
        self.last_batch_ids = args[1]
        return result


def time_the_head(trainer: TimedTrainer) -> None:
    """Clock TRL's fused head, forward and backward."""
    function = trl_utils._ChunkedLogProbFunction
    for name in ("forward", "backward"):
        original = getattr(function, name)

        def clocked(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return _original(*args, **kwargs)
            finally:
                trainer.spent["head"] += time.perf_counter() - started

        setattr(function, name, staticmethod(clocked))


class StepByStep(TrainerCallback):
    """Steps only when the parent says so."""

    def __init__(self, dump: str) -> None:
        self.trainer: TimedTrainer
        self.permitted = 0
        self._asked = 0
        self._dump = dump

    def on_step_begin(self, *_event: Any, **_: Any) -> None:
        """Wait for a permission if none is left."""
        if self.permitted == 0:
            line = sys.stdin.readline()
            if not line.strip():
                sys.exit(0)
            self.permitted = self._asked = int(line)
            self.trainer.spent.clear()
            self.trainer.done.clear()
            self._started = time.perf_counter()

    def on_step_end(self, *event: Any, **_: Any) -> None:
        """Answer when all permitted steps are done."""
        state = event[1]
        self.permitted -= 1
        if state.global_step == 1 and self._dump:
            self._write_batch()
        if self.permitted == 0:
            seconds = time.perf_counter() - self._started
            rewards = self.trainer._metrics["train"]["reward"][-self._asked :]
            spent = dict(self.trainer.spent)
            answer(
                {
                    "seconds": seconds,
                    "steps": self._asked,
                    **self.trainer.done,
                    "reward": float(np.mean(rewards)),
                    "grad_norm": self.trainer.grad_norm,
                    "generate": spent["generate"],
                    "head": spent["head"],
                    "backbone_and_rest": seconds - spent["generate"] - spent["head"],
                }
            )

    def _write_batch(self) -> None:
        """Everything that is needed to do the first step again elsewhere, with its log-probs and gradient norm."""
        batch = self.trainer.batch
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        # With one micro-batch the trainer has shuffled the rows after scoring them; find each row's log-probs again.
        order = [int((self.trainer.last_batch_ids == row).all(dim=1).nonzero()[0]) for row in ids]
        np.savez(
            self._dump,
            grad_norm=self.trainer.grad_norm,
            logprobs=self.trainer.last_logprobs[order].numpy(),
            **{
                name: batch[name].numpy()
                for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
            },
        )


def main() -> None:
    """Read the job (one JSON object as the first line of standard input), then train until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--continuous", action="store_true", help="transformers' continuous batching for generation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    job = json.loads(sys.stdin.readline())
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    arguments = GRPOConfig(
        output_dir=job["folder"],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=job["completions"] // options.micro_batch,
        num_generations=job["group_size"],
        max_completion_length=job["max_tokens"],
        generation_kwargs={"min_new_tokens": job["max_tokens"]} if job["ignore_eos"] else None,
        use_transformers_continuous_batching=options.continuous,
        temperature=1.0,
        beta=0.0,
        epsilon_high=0.2,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        num_train_epochs=1,
        seed=job["seed"],
    )
    stepper = StepByStep(job["dump"])
    trainer = TimedTrainer(
        model=model,
        reward_funcs=vowels,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in job["prompts"]]),
        processing_class=tokenizer,
        callbacks=[stepper],
    )
    stepper.trainer = trainer
    time_the_head(trainer)
    answer({"ready": True, "versions": versions(), "threads": torch.get_num_threads()})
    trainer.train()


if __name__ == "__main__":
    main()
