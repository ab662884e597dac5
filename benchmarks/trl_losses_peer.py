"""TRL's preference losses as the other side of `trl_losses.py`; runs in benchmarks/.venv-trl.

For every case one of TRL's trainers is made, and what it computes is asked of it: `compute_loss` on a batch that TRL's
own collator (DPO, KTO) or padding (CPO, ORPO) has made of the given token ids, then backward. One line of JSON on
standard input is one case; one line of JSON answers, with the gradients in a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from benchmarks.common import versions

_OUT = sys.stdout
sys.stdout = sys.stderr  # whatever a library prints must not mix with the answers

Rows = list[dict[str, list[int]]]
"""The pairs: `prompt_ids`, `chosen_ids`, `rejected_ids`, and `mismatched_ids` for KTO's baseline."""


def answer(line: dict[str, Any]) -> None:
    """One line of JSON to the parent."""
    _OUT.write(json.dumps(line) + "\n")
    _OUT.flush()


class Side:
    """The models and pairs of the job, and a trainer for each case."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job, self.rows = job, json.loads(Path(job["pairs"]).read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(job["model"])

    def model(self, which: str = "model") -> Any:
        """The policy or the reference."""
        return AutoModelForCausalLM.from_pretrained(self._job[which], dtype=torch.float32)

    def common(self) -> dict[str, Any]:
        """Settings that all trainers have: nothing that changes a number."""
        return {
            "output_dir": self._job["folder"],
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": len(self.rows),
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "max_length": 4096,
        }


def dpo(side: Side, case: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """DPO, cDPO's relatives and IPO: DPOTrainer."""
    arguments = DPOConfig(
        loss_type=[case["loss_type"]], beta=case["beta"], label_smoothing=case["label_smoothing"], **side.common()
    )
    trainer = DPOTrainer(
        model=side.model(),
        ref_model=side.model("reference"),
        args=arguments,
        train_dataset=_paired(len(side.rows)),
        processing_class=side.tokenizer,
    )
    return trainer, DataCollatorForPreference(pad_token_id=side.tokenizer.pad_token_id)(side.rows)


def kto(side: Side, case: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """KTO: KTOTrainer; both answers of a pair carry the same mismatched one, so that the mean is that over pairs."""
    arguments = KTOConfig(loss_type="kto", beta=case["beta"], **side.common())
    labels = [True, False] * len(side.rows)
    trainer = KTOTrainer(
        model=side.model(),
        ref_model=side.model("reference"),
        args=arguments,
        train_dataset=Dataset.from_dict(
            {
                "prompt": ["none"] * len(labels),
                "completion": [f" {number}" for number in range(len(labels))],
                "label": labels,
            }
        ),
        processing_class=side.tokenizer,
    )
    examples = [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row[ids],
            "KL_completion_ids": row["mismatched_ids"],
            "label": ids == "chosen_ids",
        }
        for row in side.rows
        for ids in ("chosen_ids", "rejected_ids")
    ]
    return trainer, DataCollatorForUnpairedPreference(pad_token_id=side.tokenizer.pad_token_id)(examples)


def simpo(side: Side, case: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """SimPO: CPOTrainer without its likelihood term."""
    arguments = CPOConfig(
        loss_type="simpo", cpo_alpha=0.0, beta=case["beta"], simpo_gamma=case["gamma"], **side.common()
    )
    trainer = CPOTrainer(
        model=side.model(),
        args=arguments,
        train_dataset=_paired(len(side.rows)),
        processing_class=side.tokenizer,
    )
    return trainer, _padded(side)


class OddsRatioTrainer(ORPOTrainer):
    """ORPO's odds ratio term: the likelihood of TRL's is over prompts too, and a mean over tokens, ours over pairs."""

    def compute_loss(self, model: Any, inputs: Any, *_args: Any, **_keywords: Any) -> Tensor:
        """What `get_batch_loss_metrics` subtracts from the likelihood, from TRL's own forward."""
        chosen, rejected, *_ = self.concatenated_forward(model, inputs)
        self.store_metrics({}, train_eval="train")
        return -self.odds_ratio_loss(chosen, rejected)[0].mean()


def orpo(side: Side, case: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """ORPO: ORPOTrainer."""
    trainer = OddsRatioTrainer(
        model=side.model(),
        args=ORPOConfig(beta=case["beta"], **side.common()),
        train_dataset=_paired(len(side.rows)),
        processing_class=side.tokenizer,
    )
    return trainer, _padded(side)


TRAINERS: dict[str, Callable[[Side, dict[str, Any]], tuple[Any, dict[str, Tensor]]]] = {
    "dpo": dpo,
    "kto": kto,
    "simpo": simpo,
    "orpo": orpo,
}


def _paired(count: int) -> Dataset:
    """What a trainer wants to be given and what nothing here reads."""
    texts = [f" {number}" for number in range(count)]
    return Dataset.from_dict(
        {
            "prompt": ["none"] * count,
            "chosen": [f"{text} a" for text in texts],
            "rejected": [f"{text} b" for text in texts],
        }
    )


def _padded(side: Side) -> dict[str, Tensor]:
    """The keys that CPO's and ORPO's trainers read, padded on the right; labels are -100 where nothing trains."""
    batch: dict[str, Tensor] = {}
    for which in ("chosen", "rejected"):
        whole = [row["prompt_ids"] + row[f"{which}_ids"] for row in side.rows]
        longest = max(map(len, whole))
        shape = (len(whole), longest)
        ids, mask, labels = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64), None
        ids += side.tokenizer.pad_token_id
        labels = torch.full(shape, -100)
        for number, (tokens, row) in enumerate(zip(whole, side.rows, strict=True)):
            ids[number, : len(tokens)] = torch.tensor(tokens)
            mask[number, : len(tokens)] = 1
            begin = len(row["prompt_ids"])
            labels[number, begin : len(tokens)] = torch.tensor(tokens[begin:])
        batch |= {f"{which}_input_ids": ids, f"{which}_attention_mask": mask, f"{which}_labels": labels}
    return batch


def ask(side: Side, case: dict[str, Any]) -> dict[str, Any]:
    """The loss of one case, what TRL logs of it, and its gradients in a file."""
    trainer, batch = TRAINERS[case["trainer"]](side, case)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in trainer.model.named_parameters() if tensor.grad is not None}
    np.savez(case["gradients"], **{name: gradient.numpy() for name, gradient in gradients.items()})
    metrics = getattr(trainer, "_metrics", {}).get("train", {}) or getattr(trainer, "_stored_metrics", {}).get(
        "train", {}
    )
    logged = {name: float(values[-1]) for name, values in metrics.items() if values}
    return {"loss": float(loss.detach()), "logged": logged}


def main() -> None:
    """Read the job (the first line of standard input), then answer cases until the input ends."""
    torch.set_num_threads(1)
    side = Side(json.loads(sys.stdin.readline()))
    answer({"ready": True, "versions": versions()})
    for line in sys.stdin:
        answer(ask(side, json.loads(line)))


if __name__ == "__main__":
    main()
