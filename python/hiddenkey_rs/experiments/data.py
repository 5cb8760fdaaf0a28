"""Rows of text and labels from files, task folders and ``datasets`` names. Whatever is wrong is named with its line."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import math
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import ConfigError, DataError
from ..loading.arrow import load_hub
from .extras import extra
from .tasks import FOLDERS, Task

logger = logging.getLogger(__name__)

Row = dict[str, Any]
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
_HELD_OUT = 0.1
_SUBSET = 1
"""What a permutation is for: part of its seed."""


@dataclass(frozen=True)
class Splits:
    """Training, development and (where there is a labelled one) test rows; ``labels`` names the classes."""

    train: list[Row]
    dev: list[Row]
    test: list[Row] | None
    labels: tuple[str, ...] = ()


def read_rows(path: str | Path, label: str | None = None) -> list[Row]:
    """The rows of a JSON-lines, JSON, CSV (plain or gzip) or Parquet file; each knows its place as ``__line__``.

    CSV knows only text, so that is what its cells are; those of the column ``label`` are the numbers that they look like.

    Raises:
        DataError: missing, empty, truncated or malformed, with the file's name and the line.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"there is no such data file (got {str(file)!r}); {_neighbours(file)}")
    suffixes = [s for s in file.suffixes if s != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in FORMATS:
        raise DataError(f"unknown kind of data file (got {str(file)!r}); use one of {', '.join(FORMATS)}, plain or .gz")
    rows: list[Row] = []
    try:
        if suffix == ".parquet":
            rows = _parquet(file)
        else:
            with _open(file) as text:
                reader = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}[suffix]
                for row in reader(text, file):
                    if suffix == ".csv" and label in row:
                        row[label] = _number(row[label])
                    rows.append(row)
    except EOFError:
        raise DataError(
            f"a gzip file ends too early (got {str(file)!r} after line {len(rows)}); fetch it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"a data file cannot be read (got {str(file)!r}, line {len(rows) + 1}: {error}); mend it"
        ) from None
    if not rows:
        raise DataError(f"a data file holds no rows (got {str(file)!r}); give one row an example")
    return rows


def task_splits(task: Task, folder: str | Path | None) -> Splits:
    """The splits of a named task below ``folder``: ``<folder>/<task.folder>/{train,dev,test}.jsonl.gz``.

    A task that has a place in the ``datasets`` library comes from there without a folder, and, which is logged, if the
    folder is one of other tasks.

    Raises:
        ConfigError: no folder, and no such place. DataError: the files are missing or hold something else.
    """
    if folder is None:
        if task.hub is None:
            raise ConfigError(f"the task is in no library (got {task.name!r} without data); give --data DIR")
        return hub_splits(task, *task.hub, seed=0)
    root = Path(folder) / task.folder
    if task.hub is not None and not root.is_dir() and any((Path(folder) / name).is_dir() for name in FOLDERS):
        logger.warning(
            "%s has no folder %s: the task comes from %s of the datasets library", folder, task.folder, task.hub[0]
        )
        return hub_splits(task, *task.hub, seed=0)
    if not root.is_dir():
        found = sorted(p.name for p in Path(folder).glob("*") if p.is_dir()) if Path(folder).is_dir() else []
        raise DataError(
            f"the data folder does not hold the task (got {str(folder)!r} without {task.folder!r}; it holds "
            f"{', '.join(found) or 'nothing'}); point --data at the folder of task folders"
            + (", or leave it out: the task comes from the hub" if task.hub else "")
        )
    train, dev = (checked(read_rows(_split_file(root, name)), task, root / name) for name in ("train", "dev"))
    test = None
    for suffix in (".jsonl.gz", ".jsonl"):
        file = root / f"test{suffix}"
        if file.is_file():
            rows = read_rows(file)
            if task.classes:  # a test set may hold classes that training has not
                rows = [row for row in rows if row.get(task.label or "") in task.classes]
            labelled = bool(rows) and (task.label is None or task.label in rows[0])
            test = checked(rows, task, file) if labelled else None
    return Splits(train, dev, test, task.classes)


def file_splits(task: Task, train: str, dev: str | None, test: str | None, seed: int) -> Splits:
    """The user's own files. Without a development file a tenth of the training rows is held out, chosen by the seed."""
    rows = checked(read_rows(train, task.label), task, train)
    if dev is not None:
        held = checked(read_rows(dev, task.label), task, dev)
    else:
        rows, held = hold_out(rows, seed, train, task.unit)
    splits = Splits(rows, held, checked(read_rows(test, task.label), task, test) if test else None)
    return with_label_numbers(splits, task)


def hub_splits(task: Task, name: str, config: str | None, seed: int) -> Splits:
    """A data set of the ``datasets`` library, by hub name or local folder, its fields named as the task's."""
    loaded = load_hub(name, config)
    if "train" not in loaded:
        raise DataError(f"the data set has no training split (got {name!r} with {', '.join(loaded)}); choose another")
    ours = dict(zip(task.hub_fields, task.fields, strict=False))
    rows = {
        split: [
            {ours.get(column, column): value for column, value in row.items()} | {"__line__": n}
            for n, row in enumerate(part)
        ]
        for split, part in loaded.items()
    }
    train = checked(rows["train"], task, name)
    dev = next((rows[split] for split in ("validation", "dev") if split in rows), None)
    if dev is None:
        train, dev = hold_out(train, seed, name, task.unit)
    return with_label_numbers(Splits(train, checked(dev, task, name), None), task)


def checked(rows: list[Row], task: Task, source: str | Path) -> list[Row]:
    """``rows``, once every one holds the task's fields and a label of its kind."""
    for row in rows:
        place = f"{source}, line {row['__line__']}"
        for field in task.fields:
            if not isinstance(row.get(field), str):
                has = ", ".join(sorted(name for name in row if name != "__line__"))
                what = "is no text" if field in row else "is absent"
                raise DataError(f"the text field {field!r} {what} (got {place} with fields {has}); see --text-fields")
        if task.label is not None:
            _check_label(row, task, place)
    return rows


def _check_label(row: Row, task: Task, place: str) -> None:
    label = row.get(task.label or "")
    if label is None or label == "":
        raise DataError(f"the label field {task.label!r} is absent (got {place}); see --label-field")
    if task.kind == "regression":
        try:
            row[task.label or ""] = float(label)
        except (TypeError, ValueError):
            raise DataError(f"a regression label is no number (got {label!r} in {place}); mend the row") from None
        if not math.isfinite(row[task.label or ""]):
            raise DataError(f"a regression label is not finite (got {label!r} in {place}); mend the row")
    elif task.classes:
        if label not in task.classes:
            names = ", ".join(task.classes)
            raise DataError(f"there is no such class (got {label!r} in {place}); the task knows {names}")
        row[task.label or ""] = task.classes.index(label)
    elif task.folder or task.name == "demo":
        if label not in range(task.num_labels):
            raise DataError(
                f"a class label lies outside 0..{task.num_labels - 1} (got {label!r} in {place}); mend the row"
            )
    elif isinstance(label, float) and not label.is_integer():
        raise DataError(f"a class label is no class (got {label!r} in {place}); use --kind regression for numbers")
    elif not isinstance(label, (str, int, float)):
        raise DataError(f"a class label is neither word nor number (got {label!r} in {place}); see --label-field")


def with_label_numbers(splits: Splits, task: Task) -> Splits:
    """Class labels of any spelling as numbers, in sorted order of their names."""
    if task.kind != "classification" or task.label is None:
        return splits
    label = task.label
    names = sorted({row[label] for row in splits.train}, key=lambda name: (isinstance(name, str), name))
    number = {name: n for n, name in enumerate(names)}
    for split in (splits.train, splits.dev, splits.test or []):
        for row in split:
            if row[label] not in number:
                raise DataError(
                    f"a class never occurs in training (got {row[label]!r} in line {row['__line__']}, training has "
                    f"{', '.join(map(str, names))}); mend the label"
                )
            row[label] = number[row[label]]
    if len(names) < 2:
        raise DataError(f"training needs at least two classes (got {names[0]!r} only); see --label-field")
    return Splits(splits.train, splits.dev, splits.test, tuple(map(str, names)))


def hold_out(rows: list[Row], seed: int, source: str | Path, unit: str | None = None) -> tuple[list[Row], list[Row]]:
    """About a tenth of the rows, chosen by the seed, held out for development: those that share a ``unit`` together."""
    keys = [n if unit is None else row[unit] for n, row in enumerate(rows)]
    sizes = Counter(keys)
    order = list(sizes)
    random.Random(seed).shuffle(order)
    wanted, count, held = max(1, round(_HELD_OUT * len(rows))), 0, set()
    # What is more by itself would leave little to train on; where all are, the least.
    for key in [key for key in order if sizes[key] <= wanted] or sorted(order, key=sizes.__getitem__)[:1]:
        if count >= wanted:
            break
        held.add(key)
        count += sizes[key]
    if not held or 2 * count > len(rows):
        alike = "" if unit is None else f" that share few values of {unit!r}"
        raise DataError(
            f"too few rows to hold some out for development (got {len(rows)}{alike} in {str(source)!r}); give --dev-file"
        )
    parts: tuple[list[Row], list[Row]] = ([], [])
    for key, row in zip(keys, rows, strict=True):
        parts[key in held].append(row)
    return parts


def subset_order(count: int, seed: int) -> list[int]:
    """The numbers of ``count`` training rows in the order of this seed: subsets are its beginnings, so they are nested."""
    order: list[int] = np.random.default_rng([seed, _SUBSET]).permutation(count).tolist()
    return order


def subset(rows: list[Row], size: int | None, seed: int) -> list[Row]:
    """So many training rows, chosen by the seed; smaller subsets of a seed are contained in its larger ones.

    Raises:
        DataError: more rows than there are.
    """
    if size is not None and size > len(rows):
        raise DataError(f"there are too few training rows (got train_size {size} of {len(rows)}); lower train_size")
    return [rows[n] for n in subset_order(len(rows), seed)[:size]]


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _json_lines(text: IO[str], file: Path) -> Iterator[Row]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"a line is no JSON (got {str(file)!r}, line {number}: {error.msg}); mend or remove it"
                ) from None
            yield _as_row(row, file, number)


def _json(text: IO[str], file: Path) -> Iterator[Row]:
    try:
        rows = json.load(text)
    except json.JSONDecodeError as error:
        raise DataError(f"the file is no JSON (got {str(file)!r}, line {error.lineno}: {error.msg}); mend it") from None
    if not isinstance(rows, list):
        raise DataError(
            f"a JSON data file is a list of rows (got {type(rows).__name__} in {str(file)!r}); or use JSON lines"
        )
    for number, row in enumerate(rows, start=1):
        yield _as_row(row, file, number)


def _csv(text: IO[str], file: Path) -> Iterator[Row]:
    reader = csv.DictReader(text, strict=True)  # an open quote is an error, and not the rest of the file
    twice = [name for name, count in Counter(reader.fieldnames or []).items() if count > 1]
    if twice:
        raise DataError(f"a column stands twice (got {twice[0]!r} in {str(file)!r}); rename one")
    for row in reader:
        if None in row or None in row.values():
            wanted = len(reader.fieldnames or [])
            raise DataError(f"a row has not {wanted} columns (got {str(file)!r}, line {reader.line_num}); mend it")
        yield {**row, "__line__": reader.line_num}


def _number(value: str) -> Any:
    whole = value.isascii() and value.removeprefix("-").isdigit() and len(value) < 16
    if whole and str(int(value)) == value:
        return int(value)
    try:
        number = float(value)
    except ValueError:
        return value
    return number if "." in value and math.isfinite(number) else value


def _parquet(file: Path) -> list[Row]:
    parquet = extra("pyarrow.parquet")
    try:
        table = parquet.read_table(file)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"a Parquet file cannot be read (got {str(file)!r}: {text}); write it again") from None
    return [{**row, "__line__": number} for number, row in enumerate(table.to_pylist(), start=1)]


def _as_row(row: Any, file: Path, number: int) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"a row is no object of fields (got {type(row).__name__} in {str(file)!r}, line {number}); mend it"
        )
    return {**row, "__line__": number}


def _split_file(root: Path, name: str) -> Path:
    for suffix in (".jsonl.gz", ".jsonl"):
        if (root / f"{name}{suffix}").is_file():
            return root / f"{name}{suffix}"
    return root / f"{name}.jsonl.gz"


def _neighbours(file: Path) -> str:
    if not file.parent.is_dir():
        return f"the folder {str(file.parent)!r} does not exist either"
    found = sorted(p.name for p in file.parent.iterdir() if p.is_file())[:8]
    return f"its folder holds {', '.join(found) or 'no files'}"
