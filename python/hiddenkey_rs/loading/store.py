"""The examples of a training set as flat arrays of tokens, memory-mapped by Arrow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..masks import check_integer
from .arrow import Array, Flat
from .columns import IDS, SAMPLE_ID, read_columns
from .digest import BLOCK, content_digest
from .rows import RowBatch
from .stored import Header, Stamp, read_file, write_file

if TYPE_CHECKING:
    from .packed import PackedStore


class TokenStore:
    """Tokenised examples: one flat array of token ids, where each example begins, and further columns beside them.

    Args:
        tokens: what holds the ids. A ``pyarrow`` list column; a ``pyarrow`` table, a ``datasets.Dataset`` or the path of
            an Arrow or Parquet file, with the ids in ``column``; or a pair of NumPy arrays ``(values, offsets)``, where
            example k is ``values[offsets[k]:offsets[k + 1]]``. Ids are integers, 0 <= id < 2**63.
        column: of a table, data set or file, the list column of the ids.
        columns: its other columns to take along. Default: all that a batch can hold (numbers, and integer lists as long
            as the ids); :attr:`ignored` names the rest. ``attention_mask`` is left out once it is seen to be all ones.
        token_columns: further columns with one integer a token, by name: flat arrays or list columns.
        row_columns: further columns with one number an example, by name.
        sample_ids: (rows,) integers in [0, 2**40), the examples' identities, by which masks are drawn. Default: the
            column ``sample_id`` if there is one, else row numbers.

    Attributes:
        values: (tokens,) int32 or int64, every id. offsets: (rows + 1,) int64, from 0 to the number of tokens.
        token_columns: name -> (tokens,) int32 or int64. row_columns: name -> (rows,) int64 or float32/float64.
        sample_ids: (rows,) int64, or None where they are the row numbers.
        ignored: names of columns that were not taken along.
        path: of the file that the store was opened from, or None. origin: what :meth:`save` was told of its making.

    Nothing is copied that need not be: see :mod:`hiddenkey_rs.loading.arrow`. A file that :meth:`save` wrote is mapped as
    a whole: it takes no memory of its own, in however many processes. A store that was opened from a file pickles as the
    file's path; any other one pickles with its arrays, so save a large one before workers are spawned. A mapped file must
    not be overwritten in place while a store uses it; :meth:`save` never does that.

    Raises:
        DataError: no examples; a column that is missing, of another type or another length; nulls; negative ids;
            offsets that go backwards or beyond; a file that is missing, truncated or not what its suffix says.

    Example:
        >>> store = TokenStore((np.array([5, 6, 7, 8, 9]), np.array([0, 3, 5])), row_columns={"labels": [1, 0]})
        >>> len(store), store.lengths.tolist(), store[1]["input_ids"].tolist(), store[1]["labels"]
        (2, [3, 2], [8, 9], 0)
    """

    def __init__(
        self,
        tokens: Any,
        *,
        column: str = IDS,
        columns: Sequence[str] | None = None,
        token_columns: Mapping[str, Any] | None = None,
        row_columns: Mapping[str, Any] | None = None,
        sample_ids: Any = None,
    ) -> None:
        extras = {"token_columns": token_columns, "row_columns": row_columns, "sample_ids": sample_ids}
        self.path: Path | None = None
        self.origin, header = "", None
        if isinstance(tokens, (str, os.PathLike)):
            self.path = Path(tokens).absolute()
            tokens, header = read_file(tokens, None if columns is None else [column, *columns])
            self._opened = (Stamp.of(self.path), {"column": column, "columns": columns, **extras})
            self.origin = header.origin if header else ""
        found = read_columns(tokens, column, columns)
        found.extend(**extras)
        if found.rows == 0:
            raise DataError("a store needs examples (got 0 rows); check where the data come from")
        self.values, self.offsets = found.tokens.values, found.tokens.offsets
        self.token_columns, self.row_columns = found.token_columns, found.row_columns
        self.sample_ids, self.ignored = found.sample_ids, found.ignored
        whole = column == IDS and columns is None and all(value is None for value in extras.values())
        if header is not None and whole:
            self.__dict__.update(digest=header.digest, limits=(header.smallest, header.largest))
        if self.limits[0] < 0:
            row = self._row_where(lambda block: block < 0)
            raise DataError(f"token ids must not be negative (got {self.limits[0]}, first in row {row}); mend the data")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) int64, how many tokens each example has."""
        return np.diff(self.offsets)

    @cached_property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest id; (0, -1) where there are no tokens."""
        blocks = range(0, len(self.values), BLOCK)
        found = [(int(block.min()), int(block.max())) for block in (self.values[at : at + BLOCK] for at in blocks)]
        return (min(low for low, _ in found), max(high for _, high in found)) if found else (0, -1)

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of the whole content; see :func:`~hiddenkey_rs.loading.digest.content_digest`.

        The same whatever the file, the chunks and the integers' width; reading it back from a file of :meth:`save` costs
        nothing, finding it out takes a second a core and gigabyte.
        """
        return content_digest(self._content())

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One example: ``input_ids`` and the token columns as views, the row columns as numbers, ``sample_id``.

        Raises:
            IndexError: outside 0..len - 1. Rows do not count from the end: to a batch, row -1 is a padding row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"a row lies outside 0..{len(self) - 1} (got {row}); rows do not count from the end")
        span = slice(self.offsets[row], self.offsets[row + 1])
        return {
            IDS: self.values[span],
            **{name: values[span] for name, values in self.token_columns.items()},
            **{name: values[row].item() for name, values in self.row_columns.items()},
            SAMPLE_ID: int(row if self.sample_ids is None else self.sample_ids[row]),
        }

    def __getitems__(self, rows: Sequence[int]) -> RowBatch:
        """The rows of a batch, named and not read: what a ``DataLoader`` asks for, and the collator takes."""
        return RowBatch.of(self, rows)

    @property
    def column_names(self) -> list[str]:
        """The keys of an example."""
        return [IDS, *self.token_columns, *self.row_columns, SAMPLE_ID]

    def packed(self, capacity: int, *, too_long: str = "refuse") -> PackedStore:
        """The same documents packed into rows of ``capacity`` tokens; see :class:`PackedStore`."""
        from .packed import PackedStore

        return PackedStore(self, capacity, too_long=too_long)

    def check_vocabulary(self, size: int) -> None:
        """Refuse ids that a model's embedding of ``size`` rows does not hold.

        Raises:
            DataError: an id >= size, named with its first row. ConfigError: a size that is no positive integer.
        """
        check_integer(size, "vocabulary", 1 << 62)
        if self.limits[1] >= size:
            row = self._row_where(lambda block: block >= size)
            raise DataError(
                f"a token id lies beyond the vocabulary of {size} (got {self.limits[1]}, such ids begin in row {row}); "
                "use the tokenizer that belongs to the model"
            )

    def save(self, path: str | os.PathLike[str], *, origin: str = "") -> TokenStore:
        """Write everything as one Arrow IPC file, and open it: the store of that file, memory-mapped.

        The file replaces an older one in one step. Any Arrow reader reads it: ``large_list`` columns ``input_ids`` and
        those beside it, numbers for the row columns, ``sample_id`` if ids were given. ``origin`` is kept with it.

        Raises:
            DataError: another suffix than ``.arrow``, or a place that cannot be written.
        """
        numbers = self.row_columns if self.sample_ids is None else {**self.row_columns, SAMPLE_ID: self.sample_ids}
        lists = {IDS: self.values, **self.token_columns}
        write_file(Path(path), self.offsets, lists, numbers, Header(self.digest, *self.limits, origin))
        return TokenStore(path)

    def verify(self) -> None:
        """Read everything once, and compare it with the digest that :meth:`save` wrote into the file.

        Raises:
            DataError: the content is another one: the file is damaged.
        """
        found = content_digest(self._content())
        if found != self.digest:
            raise DataError(
                f"a store is damaged (got digest {found}, not {self.digest}, from {self.path}); make it again"
            )

    def __getstate__(self) -> dict[str, Any]:
        if self.path is not None:
            return {"path": self.path, "opened": self._opened}
        return {name: value for name, value in self.__dict__.items() if name != "lengths"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "opened" not in state:
            self.__dict__.update(state)
            return
        path, (stamp, arguments) = state["path"], state["opened"]
        if Stamp.of(path) != stamp:
            raise DataError(
                f"a store's file changed while it was in use (got {str(path)!r}); leave it alone, or save anew"
            )
        self.__init__(path, **arguments)  # type: ignore[misc]

    def __repr__(self) -> str:
        beside = ", ".join(
            [*self.token_columns, *self.row_columns, *([SAMPLE_ID] if self.sample_ids is not None else [])]
        )
        where = f", {str(self.path)!r}" if self.path else ""
        return f"TokenStore({len(self)} rows, {len(self.values)} tokens{', ' if beside else ''}{beside}{where})"

    def _content(self) -> Iterator[tuple[str, Array]]:
        yield "offsets", self.offsets
        yield IDS, self.values
        yield from ((f"token {name}", values) for name, values in sorted(self.token_columns.items()))
        yield from ((f"row {name}", values) for name, values in sorted(self.row_columns.items()))
        if self.sample_ids is not None:
            yield SAMPLE_ID, self.sample_ids

    def _row_where(self, wrong: Callable[[Array], Array]) -> int:
        """The first row with a token for which ``wrong`` is true."""
        for at in range(0, len(self.values), BLOCK):
            places = np.flatnonzero(wrong(self.values[at : at + BLOCK]))
            if len(places):
                return Flat(self.values, self.offsets).row_of(at + int(places[0]))
        raise AssertionError("asked for what is not there")
