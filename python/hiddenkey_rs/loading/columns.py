"""Which columns of a table, a data set or a pair of arrays a store takes, and as what."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError
from .arrow import Array, Flat, arrow, column_kind, dataset_table, flat_column, flat_pair, row_column

IDS, SAMPLE_ID = "input_ids", "sample_id"
ATTENTION_MASK = "attention_mask"
_SAMPLES = 1 << 40  # the masks' keys hold 40 bits of a sample id


@dataclass
class Columns:
    """Everything that a store holds; see :class:`~hiddenkey_rs.loading.store.TokenStore` for the parts."""

    tokens: Flat
    token_columns: dict[str, Array] = field(default_factory=dict)
    row_columns: dict[str, Array] = field(default_factory=dict)
    sample_ids: NDArray[np.int64] | None = None
    ignored: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """How many examples there are."""
        return len(self.tokens.offsets) - 1

    def add_tokens(self, name: str, column: Any) -> None:
        """Add one integer a token: a flat array, or a list column whose rows are as long as the ids'."""
        self._check_new(name)
        if hasattr(column, "null_count"):
            column = self._parallel(name, flat_column(column, name))
        array = flat_pair(column, [0, np.size(column)], name).values
        if len(array) != len(self.tokens.values):
            raise DataError(
                f"{name} must have one number a token (got {len(array)} for {len(self.tokens.values)} tokens); "
                "it goes with other data"
            )
        self.token_columns[name] = array

    def add_rows(self, name: str, column: Any) -> None:
        """Add one number an example. ``sample_id`` becomes the examples' identities."""
        if name == SAMPLE_ID:
            return self.add_sample_ids(column)
        if name == ATTENTION_MASK:
            raise DataError(
                f"{ATTENTION_MASK} has one number a token (got it among the columns of one number a row); leave it out: "
                "batches bring their own"
            )
        self._check_new(name)
        self.row_columns[name] = self._one_a_row(name, row_column(column, name))
        return None

    def add_sample_ids(self, column: Any) -> None:
        """Set the examples' identities: integers in [0, 2**40)."""
        ids = self._one_a_row(SAMPLE_ID, row_column(column, SAMPLE_ID))
        if ids.dtype.kind != "i":
            raise DataError(f"sample ids must be integers (got {ids.dtype}); number the examples")
        if len(ids) and not 0 <= ids.min() <= ids.max() < _SAMPLES:
            row = int(np.flatnonzero((ids < 0) | (ids >= _SAMPLES))[0])
            raise DataError(f"a sample id lies outside 0..2**40 - 1 (got {ids[row]} in row {row}); number the examples")
        self.sample_ids = ids

    def extend(self, token_columns: Any, row_columns: Any, sample_ids: Any) -> None:
        """Add mappings of columns, and identities, where there are any."""
        for name, column in (token_columns or {}).items():
            if name == ATTENTION_MASK:
                _check_all_seen(self, column)
            else:
                self.add_tokens(name, column)
        for name, column in (row_columns or {}).items():
            self.add_rows(name, column)
        if sample_ids is not None:
            self.add_sample_ids(sample_ids)

    def _check_new(self, name: str) -> None:
        if name in (IDS, SAMPLE_ID, *self.token_columns, *self.row_columns):
            raise DataError(f"a column has a name that is taken (got {name!r}); rename it")

    def _one_a_row(self, name: str, array: Array) -> Array:
        if len(array) != self.rows:
            raise DataError(
                f"{name} must have one number a row (got {len(array)} for {self.rows} rows); it goes with other data"
            )
        return array

    def _parallel(self, name: str, flat: Flat) -> Array:
        """The values of a list column, once its rows are known to be as long as the ids'."""
        ours, theirs = self.tokens.offsets, flat.offsets
        self._one_a_row(name, theirs[1:])
        if not np.array_equal(ours, theirs):
            row = int(np.flatnonzero(ours[1:] != theirs[1:])[0])
            sizes = [int(offsets[row + 1] - offsets[row]) for offsets in (theirs, ours)]
            raise DataError(
                f"{name} must be as long as the ids in every row (got {sizes[0]} for {sizes[1]} tokens in row {row}); "
                "leave it out with columns=, or mend the row"
            )
        return flat.values


def read_columns(source: Any, column: str, columns: Sequence[str] | None) -> Columns:
    """The columns of whatever a store can be made of, but for files. Arguments and errors as of ``TokenStore``."""
    if isinstance(source, tuple) and len(source) == 2:
        tokens = flat_pair(*source, "tokens")
    elif hasattr(source, "null_count") and hasattr(source, "type"):
        tokens = flat_column(source, "tokens")
    else:
        return _of_table(*_table(source, column, columns), column, columns)
    if columns is not None:
        raise ConfigError(
            f"only a table, a data set or a file has columns to choose from (got columns={columns!r}); give arrays in "
            "token_columns and row_columns"
        )
    return Columns(tokens)


def _table(source: Any, column: str, columns: Sequence[str] | None) -> tuple[Any, list[str]]:
    """(table with the chosen columns, all the source's columns)."""
    if hasattr(source, "_indices") and hasattr(source, "features"):  # a datasets.Dataset
        names = list(source.column_names)
        return dataset_table(source, _chosen(names, column, columns)), names
    pa = arrow()
    if isinstance(source, pa.RecordBatch):
        source = pa.Table.from_batches([source])
    if not isinstance(source, pa.Table):
        hint = "choose one of its splits" if isinstance(source, dict) else "see TokenStore for what it takes"
        raise DataError(f"a store cannot be made of this (got {type(source).__name__}); {hint}")
    names = list(source.column_names)
    return source.select(_chosen(names, column, columns)), names


def _chosen(names: list[str], column: str, columns: Sequence[str] | None) -> list[str]:
    for name in [column, *(columns or ())]:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(f"there is no such column (got {name!r}); {hint}the data have {', '.join(names) or 'none'}")
    wanted = list(dict.fromkeys(names if columns is None else [column, *columns]))
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise DataError(f"two columns have one name (got {twice[0]!r}); rename one")
    return wanted


def _of_table(table: Any, names: list[str], column: str, columns: Sequence[str] | None) -> Columns:
    found = Columns(flat_column(table.column(column), column))
    for name in table.column_names:
        kind = column_kind(table.column(name).type)
        if name in (column, IDS):
            continue
        if name == ATTENTION_MASK:
            _check_all_seen(found, table.column(name))
        elif kind == "list":
            found.add_tokens(name, table.column(name))
        elif kind == "number" or columns is not None:
            found.add_rows(name, table.column(name))
    taken = {column, ATTENTION_MASK, SAMPLE_ID, *found.token_columns, *found.row_columns}
    found.ignored = tuple(name for name in names if name not in taken)
    return found


def _check_all_seen(found: Columns, column: Any) -> None:
    """Examples are stored without padding; an attention mask that hides something would be lost without a word."""
    found.add_tokens(ATTENTION_MASK, column)
    hidden = np.flatnonzero(found.token_columns.pop(ATTENTION_MASK) != 1)
    if len(hidden):
        raise DataError(
            f"{ATTENTION_MASK} hides a token (got 0 in row {found.tokens.row_of(int(hidden[0]))}); tokenise without "
            "padding: batches are padded when they are made"
        )
