"""Rows of files and data sets, whatever holds them. Every error names the file, the row and what to change."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError, DataError

Row = tuple[str, str, Mapping[str, Any]]
"""A row's number in its source (of the line, where it has lines), its place for errors, and its columns."""

FILES = (".parquet", ".jsonl", ".json", ".csv")
CELL_BYTES = 1 << 30  # of one cell in a CSV file; Python's own limit is 128 KiB
INSTALL = "it needs the package `datasets`; install it with `pip install 'rlsys[data]'`"
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes


def rows_of(path: str, name: str | None, split: str | None) -> Iterator[Row]:
    """The rows of a file, of a folder, or of a data set on the hub; `name` and `split` choose a part of the last two.

    Raises:
        DataError: there is no such thing, or it cannot be read.
        ConfigError: an option that it cannot have, or `datasets` is needed and not installed.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _data_set_rows(str(local), name, split, saved=any((local / file).is_file() for file in SAVED))
    if local.exists() or local.suffix in FILES or path.startswith(("/", ".", "~")):
        for option, value in (("name", name), ("split", split)):
            if value is not None:
                raise ConfigError(f"{path}: a file has no {option}s; leave `{option}: {value}` out")
        return file_rows(local)
    return _data_set_rows(path, name, split, saved=False)


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, read as its ending says."""
    _check_exists(path)
    readers = {".parquet": _parquet_rows, ".json": _json_rows, ".csv": _csv_rows}
    if path.suffix not in FILES:
        raise DataError(f"{path}: cannot tell what it holds; its name must end with {', '.join(FILES)}")
    return readers.get(path.suffix, jsonl_rows)(path)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        there = path.parent.glob("*") if path.parent.is_dir() else ()
        near = difflib.get_close_matches(path.name, [file.name for file in there], n=1)
        raise DataError(f"{path}: no such file{did_you_mean(near)}; `path` names a file of problems")


def jsonl_rows(path: Path) -> Iterator[Row]:
    """One JSON object for each line that is not blank, whatever the file's name ends with."""
    _check_exists(path)
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                line = data.decode("utf-8")
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                row = f"not JSON, {error.msg} at column {error.colno}"
            except (ValueError, RecursionError) as error:
                row = f"not JSON, {error}"
            if row is None and not data.strip():
                continue
            if not isinstance(row, dict):
                raise DataError(f"{place}: each line must be one JSON object {{...}}, got {row!r:.200}")
            yield str(number), place, row


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of objects; or lines, which many files with this ending have."""
    with path.open("rb") as file:
        start = file.read(1 << 16).lstrip()
    if not start.startswith(b"["):
        yield from jsonl_rows(path)
        return
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON, {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {number}: each must be one JSON object {{...}}, got {row!r:.200}")
        yield str(number), f"{path} row {number}", row


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(CELL_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), start=1):
                if None in row:
                    raise DataError(f"{path} row {number}: it has more cells than the first line has names")
                yield str(number), f"{path} row {number}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not CSV, {error}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield str(number), f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not Parquet, or damaged: {error}") from error


def _data_set_rows(path: str, name: str | None, split: str | None, *, saved: bool) -> Iterator[Row]:
    """A data set that `datasets` opens: a folder that it has saved, a folder of files, or one on the hub."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{path}: {INSTALL} ({error})") from error
    if saved and name is not None:
        raise ConfigError(f"{path}: a folder of `save_to_disk` has no names; leave `name: {name}` out")
    try:
        opened = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, name)
    except Exception as error:  # whatever the library, its readers and the network raise
        here = "" if Path(path).is_dir() else " (no folder of this name is here, and as a name on the hub it fails)"
        raise DataError(f"{path}: no data set can be opened{here}: {type(error).__name__}: {error}") from error
    place = path
    if isinstance(opened, Mapping):
        chosen = split or ("train" if "train" in opened or len(opened) > 1 else next(iter(opened)))
        if chosen not in opened:
            near = did_you_mean(difflib.get_close_matches(chosen, opened, n=1))
            raise DataError(f"{path}: no split {chosen!r}{near}; set `split` to one of {', '.join(opened)}")
        opened, place = opened[chosen], f"{path} {chosen}"
    elif split is not None:
        raise ConfigError(f"{path}: it has one part only; leave `split: {split}` out")
    for number, row in enumerate(opened, start=1):
        yield str(number), f"{place} row {number}", row


def did_you_mean(near: Sequence[str]) -> str:
    """A hint for an error, where a name is near."""
    return f" (did you mean {near[0]!r}?)" if near else ""
