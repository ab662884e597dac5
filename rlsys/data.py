"""Sources of problems: any callable that returns a list of `Problem` will do; these are the ones that come along.

A config names a source as `module:object` with its options. Problems for training and for evaluation come from two
calls: `reasoning_gym_problems` keeps them apart by the question's own hash, files are kept apart by being two files.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlsys.columns import Columns, problems_of
from rlsys.errors import ConfigError, DataError
from rlsys.tables import did_you_mean, jsonl_rows, rows_of
from rlsys.types import Problem

Split = Literal["train", "held_out"]
"""Which side of the hash split a question is on."""

GSM8K_ANSWER = r"####\s*(.+)"
"""GSM8K writes its reasoning first and the final answer behind four hashes."""

TASK_SIZE = 20_000
"""Most tasks make any question when it is asked for. A few prepare so many before the first one, and have no others."""


def split_of(question: str, held_out_share: float) -> Split:
    """The side of a question: a function of its text alone.

    One text has one hash and one hash has one side, so two calls with different `split` and the same `held_out_share`
    cannot share a question, whatever their seeds and sizes are. About `held_out_share` of all questions are held out.
    """
    digest = hashlib.sha256(question.encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out_share * 2**64 else "train"


def reasoning_gym_problems(
    *,
    tasks: Mapping[str, Mapping[str, Any]],
    size: int,
    seed: int,
    split: Split = "train",
    held_out_share: float = 0.1,
    instruction: str = "",
) -> list[Problem]:
    """`size` problems with different questions from reasoning-gym, the tasks taking turns.

    `tasks` maps a reasoning-gym task to its options. Training and held-out problems are disjoint by question text for
    any seeds as long as both calls have the same `held_out_share` (see `split_of`). The same arguments give the same
    problems.
    """
    if not tasks or size < 1 or not 0 <= held_out_share <= 1:
        raise ConfigError(f"need tasks, size >= 1, 0 <= held_out_share <= 1; got {tasks=}, {size=}, {held_out_share=}")
    share = held_out_share if _choice("split", split, ("train", "held_out")) == "held_out" else 1 - held_out_share
    streams = []
    for task, options in tasks.items():
        entries = _on_side(_new_entries(task, options, seed), split, held_out_share)
        streams.append(_to_problems(task, seed, _patient(task, split, share, entries), instruction))
    turns = itertools.chain.from_iterable(zip(*streams, strict=True))
    return list(itertools.islice(turns, size))


def jsonl_problems(
    *,
    path: str | Path,
    question: str = "question",
    answer: str = "answer",
    answer_pattern: str = GSM8K_ANSWER,
    instruction: str = "",
    limit: int | None = None,
) -> list[Problem]:
    """The problems of a JSONL file: one object per line, with the columns `question` and `answer`.

    The answer is the first group of `answer_pattern` where that is found, else the column's whole text. Ids are
    `<file name>-<line>`. Errors name the file, the line and what to change.
    """
    path = Path(path)
    columns = Columns(question=question, answer=answer, answer_pattern=answer_pattern, instruction=instruction)
    return _some(problems_of(jsonl_rows(path), columns, name=path.stem, limit=limit), path)


def dataset_problems(
    *,
    path: str,
    name: str | None = None,
    split: str | None = None,
    question: str | None = None,
    messages: str | None = None,
    answer: str | None = "answer",
    source: str | None = None,
    id: str | None = None,
    metadata: Sequence[str] | Mapping[str, str] = (),
    answer_pattern: str = GSM8K_ANSWER,
    instruction: str = "",
    limit: int | None = None,
) -> list[Problem]:
    """The problems of any data set, its columns mapped by name.

    `path` is a .parquet, .jsonl, .json or .csv file, a folder (of `save_to_disk`, or of such files) or a name on the
    Hugging Face hub; `name` and `split` choose a part of the last two ("train", where there is more than one split).
    The prompt is the text in the column `question` (the default) or the chat messages in the column `messages`, with
    `instruction` behind the last message of the user. `answer` may be None where the reward needs none; of a text it
    is the first group of `answer_pattern` where that is found. `metadata` lists columns to keep, or maps keys to
    columns. Dots reach into nested columns: `reward_model.ground_truth`. Lists and objects in a column of text
    become JSON.

    Without a column for it, the source of a problem is the name of the file or data set, and its id that name with
    the row's number. Folders and the hub need the package `datasets`. Errors name the file, the row, the column and the
    nearest one that exists.
    """
    columns = Columns(
        question="question" if question is None and messages is None else question,
        messages=messages,
        answer=answer,
        source=source,
        id=id,
        metadata=metadata if isinstance(metadata, Mapping) else {column: column for column in metadata},
        answer_pattern=answer_pattern,
        instruction=instruction,
    )
    called = "-".join(filter(None, (Path(path).stem, name, split)))
    return _some(problems_of(rows_of(path, name, split), columns, name=called, limit=limit), path)


def _some(problems: list[Problem], path: str | Path) -> list[Problem]:
    if not problems:
        raise DataError(f"{path}: no problem in it; each row (in a JSONL file, each line) is one")
    return problems


def _new_entries(task: str, options: Mapping[str, Any], seed: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """An endless stream of (index, entry) of one task; None in place of a question that was there before."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    _choice("reasoning-gym task", task, DATASETS)
    config = DATASETS[task][1]
    for option in options:
        _choice(f"option of {task!r}", option, config.__dataclass_fields__)
    dataset = reasoning_gym.create_dataset(task, **{**options, "seed": seed, "size": TASK_SIZE})
    seen: set[str] = set()
    for index in itertools.count():
        try:
            entry = dataset[index]
        except IndexError as error:
            raise ConfigError(f"task {task!r} has no question after the first {index}; lower `size`") from error
        new = entry["question"] not in seen
        seen.add(entry["question"])
        yield index, entry if new else None


def _on_side(
    entries: Iterable[tuple[int, dict[str, Any] | None]], split: Split, held_out_share: float
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The same stream with None in place of the questions of the other side."""
    for index, entry in entries:
        yield index, entry if entry and split_of(entry["question"], held_out_share) == split else None


def _patient(
    task: str, split: Split, share: float, entries: Iterable[tuple[int, dict[str, Any] | None]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The stream without its gaps; a gap of hundreds of times the expected length means that the task has run out."""
    patience = 300 / share if share else 0
    last = -1
    for index, entry in entries:
        if entry is not None:
            last = index
            yield index, entry
        elif index - last > patience:
            raise ConfigError(
                f"task {task!r} has no further {split} question after {index + 1} draws; "
                "widen its options (more digits, more terms) or lower `size`"
            )


def _to_problems(
    task: str, seed: int, entries: Iterable[tuple[int, dict[str, Any]]], instruction: str
) -> Iterator[Problem]:
    for index, entry in entries:
        yield Problem(
            id=f"{task}-{seed}-{index}",
            prompt=_prompt(entry["question"], instruction),
            answer=None if entry["answer"] is None else str(entry["answer"]),  # some tasks have a verifier only
            source=task,
            metadata=entry["metadata"],
        )


def _prompt(question: str, instruction: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": f"{question}\n{instruction}" if instruction else question},)


def _choice(what: str, value: str, allowed: Iterable[str]) -> str:
    """The value itself if it is allowed; else an error with the nearest one that is."""
    names: Sequence[str] = sorted(allowed)
    if value not in names:
        near = difflib.get_close_matches(value, names, n=1)
        known = f"; known: {', '.join(names)}" if len(names) <= 12 else ""
        raise ConfigError(f"unknown {what} {value!r}{did_you_mean(near)}{known}")
    return value
