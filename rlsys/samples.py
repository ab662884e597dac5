"""Samples: answers to problems as data, in Parquet, with what came of them and where they come from."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.chat import Chat
from rlsys.demonstrations import Demonstration, Recorded
from rlsys.errors import DataError
from rlsys.tables import did_you_mean
from rlsys.types import FinishReason, Problem, Rollout

_ABOUT = b"rlsys"
"""Key of a file's metadata, under which stands what its rows do not say."""

_ARRAYS = ("tokens", "loss_mask")
"""Columns that are never made Python lists of numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer to a problem, graded.

    `num_tokens` counts what the policy wrote; `correct` is the verdict of the first reward, None where nothing graded.
    `provenance` says who wrote it and how: model, stage, sampler, sampling settings, seed.
    """

    demonstration: Demonstration
    num_tokens: int
    correct: bool | None = None
    reward: float = 0.0
    finish_reason: FinishReason = "stop"
    metrics: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def problem(self) -> Problem:
        """What was answered."""
        return self.demonstration.problem

    @property
    def text(self) -> str:
        """The whole turn, tool output included."""
        return self.demonstration.text


def sample_of(problem: Problem, rollout: Rollout, chat: Chat, *, provenance: Mapping[str, Any]) -> Sample:
    """A rollout as a sample: its turn behind the prompt as text, and its token ids as they were generated."""
    # The turn begins with what the policy wrote, if it wrote anything.
    prompt_length = int(rollout.loss_mask.argmax()) if rollout.loss_mask.any() else len(rollout)
    tokens, mask = rollout.tokens[prompt_length:].tolist(), rollout.loss_mask[prompt_length:].tolist()
    if rollout.finish_reason == "stop" and tokens and tokens[-1] == chat.tokenizer.eos_token_id:
        tokens, mask = tokens[:-1], mask[:-1]
    segments = []
    for trained, run in groupby(zip(tokens, mask, strict=True), key=lambda pair: pair[1]):
        segments.append((str(chat.tokenizer.decode([token for token, _ in run], skip_special_tokens=False)), trained))
    correct = rollout.metrics.get("correct")
    return Sample(
        demonstration=Demonstration(
            problem=problem,
            segments=tuple(segments),
            recorded=Recorded(tokens=rollout.tokens, loss_mask=rollout.loss_mask, template=chat.fingerprint),
            complete=rollout.finish_reason == "stop",
        ),
        num_tokens=rollout.num_trained_tokens,
        correct=None if correct is None else bool(correct),
        reward=rollout.reward,
        finish_reason=rollout.finish_reason,
        metrics=rollout.metrics,
        provenance=provenance,
    )


def write_samples(path: Path, samples: Sequence[Sample], *, about: Mapping[str, Any] | None = None) -> None:
    """Write a Parquet file, one row for each sample; it is whole or not there. `read_about` reads `about` again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number, flag = pa.string(), pa.int64(), pa.bool_()
    schema = pa.schema(
        {
            "problem_id": text,
            "prompt": text,
            "answer": text,
            "source": text,
            "metadata": text,
            "response": text,
            "segments": pa.list_(pa.struct({"text": text, "trained": flag})),
            "num_tokens": number,
            "correct": flag,
            "reward": pa.float64(),
            "finish_reason": text,
            "metrics": text,
            "tokens": pa.list_(pa.int32()),
            "loss_mask": pa.list_(flag),
            "template": text,
            "provenance": text,
        }
    )
    schema = schema.with_metadata({_ABOUT: json.dumps(dict(about or {}))})
    partial = path.with_suffix(".partial")
    table = pa.Table.from_pylist([_row(sample) for sample in samples], schema=schema)
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, path)


def _row(sample: Sample) -> dict[str, Any]:
    problem, recorded = sample.problem, sample.demonstration.recorded
    return {
        "problem_id": problem.id,
        "prompt": json.dumps([dict(message) for message in problem.prompt]),
        "answer": problem.answer,
        "source": problem.source,
        "metadata": json.dumps(dict(problem.metadata), default=str),
        "response": sample.text,
        "segments": [{"text": text, "trained": trained} for text, trained in sample.demonstration.segments],
        "num_tokens": sample.num_tokens,
        "correct": sample.correct,
        "reward": sample.reward,
        "finish_reason": sample.finish_reason,
        "metrics": json.dumps(dict(sample.metrics)),
        "tokens": None if recorded is None else recorded.tokens,
        "loss_mask": None if recorded is None else recorded.loss_mask,
        "template": None if recorded is None else recorded.template,
        "provenance": json.dumps(dict(sample.provenance), default=str),
    }


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a file, or of all parts in a folder.

    Raises:
        DataError: there is no such file, or it is not one of samples; names file, row and what is wrong.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no .parquet file is in this folder; name one that a sampling stage wrote")
    return [_sample(row, f"{file} row {number}") for file in files for number, row in enumerate(_rows(file), 1)]


def read_about(path: Path) -> dict[str, Any]:
    """What `write_samples` was told about a file; raises as `read_samples` does."""
    import pyarrow.parquet as pq

    with _readable(path):
        return dict(json.loads((pq.read_schema(path).metadata or {})[_ABOUT]))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, long ones of numbers as arrays."""
    import pyarrow.parquet as pq

    with _readable(path):
        table = pq.read_table(path)
    long = [table.column(name) for name in _ARRAYS if name in table.column_names]
    names = [name for name in _ARRAYS if name in table.column_names]
    for number, row in enumerate(table.drop_columns(names).to_pylist()):
        for name, column in zip(names, long, strict=True):
            cell = column[number]
            row[name] = cell.values.to_numpy(zero_copy_only=False) if cell.is_valid else None
        yield row


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")], n=1)
        raise DataError(f"{path}: no such file{did_you_mean(near)}; a sampling stage writes samples.parquet") from error
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file of samples, or damaged: {error}") from error


def _sample(row: Mapping[str, Any], place: str) -> Sample:
    try:
        problem = Problem(
            id=row["problem_id"],
            prompt=tuple(json.loads(row["prompt"])),
            answer=row["answer"],
            source=row["source"],
            metadata=json.loads(row["metadata"]),
        )
        recorded = None
        if row["tokens"] is not None:
            recorded = Recorded(
                tokens=row["tokens"].astype(np.int32),
                loss_mask=row["loss_mask"].astype(np.bool_),
                template=row["template"],
            )
        return Sample(
            demonstration=Demonstration(
                problem=problem,
                segments=tuple((segment["text"], segment["trained"]) for segment in row["segments"]),
                recorded=recorded,
                complete=row["finish_reason"] == "stop",
            ),
            num_tokens=row["num_tokens"],
            correct=row["correct"],
            reward=row["reward"],
            finish_reason=row["finish_reason"],
            metrics=json.loads(row["metrics"]),
            provenance=json.loads(row["provenance"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{place}: no sample ({type(error).__name__}: {error}); read a file that a sampling stage wrote, "
            "or another table with rlsys.pair_data:table_pairs"
        ) from error
