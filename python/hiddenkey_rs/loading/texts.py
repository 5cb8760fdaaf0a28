"""Examples of text and label, read a batch at a time from rows, tables, data sets and files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .arrow import Array, dataset_table, load_hub
from .stored import ARROW, PARQUET, read_file

BATCH = 1000
"""Examples handed over at a time: some milliseconds of work."""


@dataclass(frozen=True)
class TextBatch:
    """Some examples. ``texts``: one list a text field; ``targets``, ``labels``: where there are such fields.

    ``first``: the number of the first one; ``lines``: how messages call them, where their reader said so.
    """

    first: int
    texts: list[list[str]]
    targets: list[str] | None
    labels: Array | None
    lines: list[int] | None = None

    def __len__(self) -> int:
        return len(self.texts[0])

    def place(self, row: int) -> str:
        """How a message names the example ``row`` of this batch."""
        return f"row {self.first + row}" if self.lines is None else f"line {self.lines[row]}"


@dataclass(frozen=True)
class Texts:
    """A source and the fields that are wanted of it."""

    source: _Rows | _Table
    text_fields: tuple[str, ...]
    label_field: str | None
    target_field: str | None

    @classmethod
    def of(cls, data: Any, text_fields: Sequence[str], label_field: str | None, target_field: str | None) -> Texts:
        """The fields of whatever :func:`~hiddenkey_rs.loading.text.tokenize` takes; errors as there."""
        fields = (text_fields,) if isinstance(text_fields, str) else tuple(text_fields)
        most = 2 if target_field is None else 1
        if not 1 <= len(fields) <= most:
            raise ConfigError(
                f"there must be one text field{' or a pair' if most == 2 else ' before a target'} (got {fields!r}); join "
                "texts before they are tokenised"
            )
        if target_field is not None and label_field is not None:
            raise ConfigError(
                f"an example has a target to learn or a label (got target field {target_field!r} and label field "
                f"{label_field!r}); leave one out"
            )
        wanted = [*fields, *(name for name in (label_field, target_field) if name is not None)]
        source = _source(data, wanted)
        if len(source) == 0:
            raise DataError("there is nothing to tokenise (got 0 rows); check where the data come from")
        return cls(source, fields, label_field, target_field)

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, size: int = BATCH) -> Iterator[TextBatch]:
        """All examples in their order, ``size`` at a time, texts and labels checked."""
        for first in range(0, len(self), size):
            yield self._batch(first, size)

    def _batch(self, first: int, count: int) -> TextBatch:
        def column(name: str) -> list[Any]:
            return self.source.column(name, first, count)

        lines = self.source.lines(first, count)
        empty = TextBatch(first, [], None, None, lines)
        texts = [_checked_texts(column(name), name, empty) for name in self.text_fields]
        targets = (
            None if self.target_field is None else _checked_texts(column(self.target_field), self.target_field, empty)
        )
        labels = (
            None if self.label_field is None else _checked_labels(column(self.label_field), self.label_field, empty)
        )
        return TextBatch(first, texts, targets, labels, lines)


class _Rows:
    """Mappings in a sequence."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows
        self.numbered = "__line__" in rows[0] if rows and isinstance(rows[0], Mapping) else False

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str, first: int, count: int) -> list[Any]:
        rows = self.rows[first : first + count]
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"an example must be a mapping of fields (got {type(row).__name__} in row {first + number}); pass dicts"
                )
            if name not in row:
                has = ", ".join(str(field) for field in row if field != "__line__")
                where = f"line {row['__line__']}" if self.numbered else f"row {first + number}"
                raise DataError(
                    f"the field {name!r} is absent (got {where} with fields {has or 'none'}); name another field"
                )
        return [row[name] for row in rows]

    def lines(self, first: int, count: int) -> list[int] | None:
        return [row["__line__"] for row in self.rows[first : first + count]] if self.numbered else None


class _Table:
    """Columns of an Arrow table: Python objects are made for one batch at a time."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str, first: int, count: int) -> list[Any]:
        values: list[Any] = self.table.column(name).slice(first, count).to_pylist()
        return values

    def lines(self, first: int, count: int) -> None:
        return None


def _source(data: Any, names: list[str]) -> _Rows | _Table:
    if isinstance(data, (str, os.PathLike)):
        data = _loaded(data)
    if isinstance(getattr(data, "column_names", None), dict):
        raise DataError(f"there are several data sets (got splits {', '.join(data)}); choose one of its splits")
    if hasattr(data, "_indices") and hasattr(data, "features"):
        _check_names(data.column_names, names)
        return _Table(dataset_table(data, list(dict.fromkeys(names))))
    if hasattr(data, "num_rows") and hasattr(data, "column_names") and hasattr(data, "slice"):
        _check_names(data.column_names, names)
        return _Table(data)
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return _Rows(data)
    raise DataError(
        f"there are no rows to read (got {type(data).__name__}); pass a list of dicts, a table or a data set"
    )


def _check_names(found: list[str], names: list[str]) -> None:
    for name in names:
        if name not in found:
            raise DataError(f"the field {name!r} is absent (got columns {', '.join(found)}); name another field")


def _loaded(data: str | os.PathLike[str]) -> Any:
    file = Path(data)
    if file.suffix in ARROW + PARQUET:
        return read_file(file)[0]
    if file.is_file() or not isinstance(data, str):
        raise DataError(
            f"such a file is not read here (got {str(file)!r}); give Parquet or Arrow, or its rows as a list of dicts"
        )
    return load_hub(data, split="train")


def _checked_texts(values: list[Any], name: str, batch: TextBatch) -> list[str]:
    try:
        "".join(values).encode()
    except (TypeError, UnicodeEncodeError):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(
                    f"the field {name!r} is no text (got {value!r} in {batch.place(row)}); mend the row or drop it"
                ) from None
            if any(0xD800 <= ord(sign) < 0xE000 for sign in value):
                raise DataError(
                    f"the field {name!r} is no valid Unicode (got half a character in {batch.place(row)}); mend the row"
                ) from None
        raise
    return values


def _checked_labels(values: list[Any], name: str, batch: TextBatch) -> Array:
    for row, value in enumerate(values):
        if not isinstance(value, (bool, int, float, np.integer, np.floating)) or not np.isfinite(value):
            hint = "number the classes" if isinstance(value, str) else "mend the row or drop it"
            raise DataError(f"the label {name!r} is no number (got {value!r} in {batch.place(row)}); {hint}")
    array = np.asarray(values)
    return array if array.dtype.kind == "f" else array.astype(np.int64)
