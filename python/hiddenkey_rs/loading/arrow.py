"""Arrow columns as flat NumPy arrays: views wherever the bytes lie in one piece.

What a column's bytes are decides whether they are copied:

* one chunk of ``list``, ``large_list`` or ``fixed_size_list`` of int32 or int64: a view;
* several chunks: copied once, into one piece (a batch may need rows of any of them);
* narrower integers (the int8 of ``token_type_ids``) are widened, so copied: the gather knows two widths, not eight.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batches.checks import contiguous
from ..errors import DataError, HiddenKeyError

Array = NDArray[Any]


def arrow(module: str = "pyarrow") -> Any:
    """The package pyarrow or one of its modules, imported where it is needed: a store of NumPy arrays does without."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HiddenKeyError(
            f"Arrow data need the package {module.partition('.')[0]} (got {error}); install hiddenkey_rs with its extra [train]"
        ) from None


def load_hub(name: str, *which: Any, **how: Any) -> Any:
    """A data set of the ``datasets`` library, by hub name or local folder, or a :class:`DataError`."""
    datasets = arrow("datasets")
    try:
        return datasets.load_dataset(name, *which, **how)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"the data set cannot be loaded (got {name!r}: {text}); give a folder, or a hub name that is reachable or cached"
        ) from None


@dataclass(frozen=True)
class Flat:
    """A list column laid flat: row k is ``values[offsets[k]:offsets[k + 1]]``.

    Attributes:
        values: (tokens,) int32 or int64. offsets: (rows + 1,) int64, from 0 to the number of tokens.
    """

    values: Array
    offsets: NDArray[np.int64]

    def row_of(self, place: int) -> int:
        """The row that ``values[place]`` belongs to."""
        return int(np.searchsorted(self.offsets, place, side="right")) - 1


def flat_pair(values: Any, offsets: Any, name: str) -> Flat:
    """Checked flat arrays of one's own: ``offsets`` begin anywhere in ``values`` and end with them.

    Raises:
        DataError: not integers, not one-dimensional, offsets that go backwards or beyond.
    """
    values, offsets = _array(values, f"{name}: values"), _array(offsets, f"{name}: offsets")
    for part, array in (("values", values), ("offsets", offsets)):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"{name}: {part} must be a one-dimensional array of integers (got {array.dtype} of shape {array.shape}); "
                "convert them"
            )
    if len(offsets) and offsets[-1] < len(values):
        raise DataError(
            f"{name}: offsets end before the values do (got {offsets[-1]} of {len(values)} values); a store of n rows "
            "has n + 1 offsets, the last one the number of values"
        )
    start, count = check_offsets(offsets, len(values), name)
    return Flat(widened(values[start : start + count], name), _rebased(offsets, start))


def flat_column(column: Any, name: str) -> Flat:
    """A list column of integers, whole or in chunks, sliced or not, as flat arrays.

    Raises:
        DataError: another type, a null row or token (the row is named), offsets that go backwards or beyond.
    """
    pa = arrow()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    kind = column_kind(column.type)
    if kind != "list":
        raise DataError(f"{name} must be a list column of integers (got {column.type}); tokenise the text first")
    parts, rows = [], 0
    for chunk in chunks:
        parts.append(_flat_chunk(chunk, name, rows))
        rows += len(chunk)
    if not parts:
        return Flat(np.empty(0, np.int32), np.zeros(1, np.int64))
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.values) for part in parts[:-1])])
    shifted = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=True)]
    values = np.concatenate([part.values for part in parts])
    return Flat(values, np.concatenate([np.zeros(1, np.int64), *shifted]))


def row_column(column: Any, name: str) -> Array:
    """A column of one number a row, (rows,) int64 or float32/float64: whole numbers and truth values become int64.

    Raises:
        DataError: no numbers, a null, NaN or infinity (the row is named).
    """
    if hasattr(column, "to_numpy") and hasattr(column, "null_count"):
        if column_kind(column.type) != "number":
            raise DataError(f"{name} must be a column of numbers (got {column.type}); leave it out, or convert it")
        if column.null_count:
            raise DataError(
                f"{name} has a missing value (got null in row {_first_null(column)}); fill it or drop the row"
            )
        chunked = isinstance(column, arrow().ChunkedArray)
        column = column.to_numpy() if chunked else column.to_numpy(zero_copy_only=False)
    array = _array(column, name)
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise DataError(
            f"{name} must be one number a row (got {array.dtype} of shape {array.shape}); leave it out, or convert it"
        )
    if array.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(array))
        if len(bad):
            raise DataError(f"{name} is not finite (got {array[bad[0]]} in row {bad[0]}); mend the row or drop it")
        return array.astype(np.float32, copy=False) if array.dtype.itemsize < 4 else array
    return contiguous(array, np.int64)


def column_kind(type_: Any) -> str | None:
    """``"list"`` for lists of integers, ``"number"`` for numbers and truth values, None for what a batch cannot hold."""
    types = arrow().types
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return "list" if types.is_integer(type_.value_type) else None
    return "number" if types.is_integer(type_) or types.is_floating(type_) or types.is_boolean(type_) else None


def widened(values: Array, name: str) -> Array:
    """``values`` as int32 or int64, the same memory where they are that already."""
    if values.dtype in (np.int32, np.int64) and values.dtype.isnative:
        return contiguous(values)
    if values.dtype.itemsize == 8 and len(values) and values.max() > np.iinfo(np.int64).max:
        raise DataError(f"{name} exceeds 64 bits with sign (got {values.max()}); mend the data")
    narrow = values.dtype.itemsize < 4 or (values.dtype.kind == "i" and values.dtype.itemsize == 4)
    return values.astype(np.int32 if narrow else np.int64)


def dataset_table(dataset: Any, names: list[str]) -> Any:
    """The named columns of a ``datasets.Dataset`` as a table.

    After ``shuffle`` or ``select`` a data set is an index into its table: its rows are then gathered, once, into memory.
    A loader that shuffles by itself does not need that.
    """
    table, rows = dataset.data.table.select(names), dataset._indices
    if rows is None:
        return table
    pa = arrow()
    fields = [pa.field(field.name, _wide(field.type)) for field in table.schema]
    return table.cast(pa.schema(fields)).take(rows.column(0).combine_chunks())


def _wide(type_: Any) -> Any:
    """The same type with 64-bit offsets: 32-bit ones could overflow while rows are gathered."""
    pa = arrow()
    if column_kind(type_) == "list":
        return pa.large_list(type_.value_type)
    return pa.large_string() if pa.types.is_string(type_) else type_


def _flat_chunk(chunk: Any, name: str, first: int) -> Flat:
    """One chunk, whose first row is row ``first`` of its column."""
    if chunk.null_count:
        raise DataError(f"{name} has a missing row (got null in row {first + _first_null(chunk)}); drop the row")
    if arrow().types.is_fixed_size_list(chunk.type):
        values = chunk.flatten()
        offsets = np.arange(len(chunk) + 1, dtype=np.int64) * chunk.type.list_size
    else:
        values, offsets = chunk.values, chunk.offsets.to_numpy()
    start, count = check_offsets(offsets, len(values), name, first)
    values, offsets = values.slice(start, count), _rebased(offsets, start)
    if values.null_count:
        row = first + Flat(offsets, offsets).row_of(_first_null(values))
        raise DataError(f"{name} has a missing token (got null in row {row}); mend the row or drop it")
    return Flat(widened(values.to_numpy(zero_copy_only=False), name), offsets)


def check_offsets(offsets: Array, size: int, name: str, first: int = 0) -> tuple[int, int]:
    """(start, count) of the values that ``offsets`` span, once they are known to go forwards within ``size`` values."""
    if len(offsets) == 0:
        raise DataError(f"{name}: there are no offsets (got 0); a store of n rows has n + 1")
    back = np.flatnonzero(offsets[1:] < offsets[:-1])  # no difference is taken: unsigned ones would wrap
    if len(back):
        row = int(back[0])
        raise DataError(
            f"{name}: offsets go backwards (got {offsets[row]} then {offsets[row + 1]} at row {first + row}); the data "
            "are damaged, make them again"
        )
    start, stop = int(offsets[0]), int(offsets[-1])
    if start < 0 or stop > size:
        wrong = start if start < 0 else stop
        raise DataError(
            f"{name}: offsets lie outside the values (got {wrong} with {size} values); the data are damaged, make them again"
        )
    return start, stop - start


def _rebased(offsets: Array, start: int) -> NDArray[np.int64]:
    offsets = contiguous(offsets, np.int64)
    return offsets - start if start else offsets


def _array(values: Any, name: str) -> Array:
    try:
        return np.asarray(values)
    except ValueError as error:  # lists of unequal lists
        raise DataError(f"{name} must be a one-dimensional array (got {error}); flatten them") from None


def _first_null(column: Any) -> int:
    chunks = column.chunks if isinstance(column, arrow().ChunkedArray) else [column]
    rows = 0
    for chunk in chunks:
        if chunk.null_count:
            return rows + int(np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False))[0])
        rows += len(chunk)
    return rows
