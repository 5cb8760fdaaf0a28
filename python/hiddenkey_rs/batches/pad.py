"""Flat tokens and offsets into the arrays of a batch: padded rows, or rows of joined documents. NumPy only.

The core writes all arrays of a batch in one call, into memory that the caller chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import ConfigError, DataError
from .checks import check_integer, check_signed, contiguous
from .pack import Packing

PADDING = -1
"""The row number of padding: one token that carries no weight."""
IGNORED = -100
"""The label that no loss is computed for."""
UNLIMITED = (1 << 63) - 1
_INT64 = np.dtype(np.int64)

Integers = NDArray[np.int32] | NDArray[np.int64]
Room = Callable[[tuple[int, int, int]], NDArray[np.int64]]
"""Memory for a batch: an int64 array of the shape asked for, (planes, rows, width), whatever it holds."""


@dataclass(frozen=True, eq=False)
class Source:
    """Flat columns that batches are gathered from.

    That offsets are in order and within the values is checked for each row that is gathered, and costs nothing.

    Attributes:
        values: (tokens,) int32 or int64, contiguous: row r holds ``values[offsets[r]:offsets[r + 1]]``.
        offsets: (rows + 1,) int64.
        labels, types: (tokens,) like ``values``, or None.
        sample_ids: (rows,) int64, or None: the row numbers.

    Raises:
        DataError: an array of another kind or another length.
    """

    values: Integers
    offsets: NDArray[np.int64]
    labels: Integers | None = None
    types: Integers | None = None
    sample_ids: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        tokens, rows = np.size(self.values), np.size(self.offsets) - 1
        _check_column("tokens", self.values, (tokens,), "token", narrow=True)
        _check_column("offsets", self.offsets, (max(rows + 1, 1),), "row, and one more")
        for name, column in (("labels", self.labels), ("token types", self.types)):
            if column is not None:
                _check_column(name, column, (tokens,), "token", narrow=True)
        if self.sample_ids is not None:
            _check_column("sample ids", self.sample_ids, (rows,), "row")


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch are laid out.

    Attributes:
        pad_token_id: what stands at padding. left: it stands before the tokens, in rows that hold one document.
        multiple_of: the width of rows is rounded up to a multiple of it.
        max_length: more tokens of a document are cut off at its end. None: nothing is.
        vocabulary: token ids lie below it. None: they only must not be negative.
        mask, positions: whether to make ``attention_mask`` and ``position_ids``.
        copy_labels: ``labels`` are the tokens, where the source has no labels of its own.

    Raises:
        ConfigError: a number out of its range.
    """

    pad_token_id: int = 0
    left: bool = False
    multiple_of: int = 1
    max_length: int | None = None
    vocabulary: int | None = None
    mask: bool = True
    positions: bool = False
    copy_labels: bool = False
    numbers: tuple[int, int, int] = field(init=False, repr=False, compare=False)
    """The most tokens a document, the padding's id, the size of the vocabulary: as the core takes them."""

    def __post_init__(self) -> None:
        check_integer(self.pad_token_id, "pad_token_id", 0, 1 << 62, "use the tokenizer's")
        multiple = check_integer(self.multiple_of, "pad_to_multiple_of", 1, 1 << 20, "8 or 64 suit most devices")
        object.__setattr__(self, "multiple_of", multiple)  # NumPy's narrow integers cannot be reckoned with
        numbers = [UNLIMITED, int(self.pad_token_id), UNLIMITED]
        if self.max_length is not None:
            numbers[0] = check_integer(self.max_length, "max_length", 1, 1 << 62, "leave it out to cut nothing")
        if self.vocabulary is not None:
            numbers[2] = check_integer(self.vocabulary, "vocabulary", 1, 1 << 62, "use the embedding's rows")
        object.__setattr__(self, "numbers", tuple(numbers))


class Gathered(NamedTuple):
    """The arrays of a batch.

    Attributes:
        names: what each plane is: ``input_ids``, ``attention_mask``, ``labels``, ``token_type_ids``, ``position_ids``.
        planes: (planes, rows, width) int64.
        samples: int64 ids: (rows,) of padded rows, (rows, width) of joined ones, -1 at padding.
        documents: (pieces,) int64, the document that each piece in the rows is of; -1 is padding.
        lengths: (pieces,) int64, or None: as long as the document, if ``max_length`` allows it.
        starts: (pieces,) int64, where each piece begins in its document, if documents are split; else None: at 0.
        boundaries: (documents + 1,) int32, where documents begin in the flattened rows, with the end of all; padding at
            a row's end is one more document. None of padded rows.
        longest: tokens of the longest document, its padding included.
    """

    names: tuple[str, ...]
    planes: NDArray[np.int64]
    samples: NDArray[np.int64]
    documents: NDArray[np.int64]
    lengths: NDArray[np.int64] | None
    boundaries: NDArray[np.int32] | None
    longest: int
    starts: NDArray[np.int64] | None = None

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """Each plane by its name."""
        return dict(zip(self.names, self.planes, strict=True))


def empty(shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """New memory for a batch; a :class:`ConfigError` if there is not so much."""
    try:
        return np.empty(shape, _INT64)
    except (MemoryError, ValueError) as error:
        raise ConfigError(
            f"a batch does not fit into memory (got shape {shape}: {error}); set max_length, or take fewer rows"
        ) from None


_Pieces = tuple[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int64]] | None, NDArray[np.int64] | None]
"""Documents; starts and lengths of pieces of them, or None; where each row's pieces begin, or None: one piece a row."""


class Gatherer:
    """Batches of one source in one layout.

    Errors of all methods:
        DataError: no rows, a row that does not exist, offsets or ids that are wrong; the row is named.
        ConfigError: more than fits into memory.

    Example:
        >>> source = Source(np.array([5, 6, 7, 8, 9]), np.array([0, 3, 5]))
        >>> Gatherer(source, Layout(copy_labels=True)).pad(np.array([1, 0])).arrays()["labels"].tolist()
        [[8, 9, -100], [5, 6, 7]]
        >>> joined = Gatherer(source, Layout(mask=False, copy_labels=True)).join(np.array([1, 0]))
        >>> joined.arrays()["labels"].tolist(), joined.boundaries.tolist()
        ([[-100, 9, -100, 6, 7]], [0, 2, 5])
    """

    def __init__(self, source: Source, layout: Layout) -> None:
        self.source, self.layout = source, layout
        self._columns = (source.values, source.labels, source.types)
        self._bounds = (source.offsets, len(source.values))
        self._flags = (layout.left, layout.mask, layout.copy_labels, layout.positions)
        names = ["input_ids"]
        names += ["attention_mask"] if layout.mask else []
        names += ["labels"] if layout.copy_labels or source.labels is not None else []
        names += ["token_type_ids"] if source.types is not None else []
        names += ["position_ids"] if layout.positions else []
        self.names = tuple(names)

    def pad(self, rows: Any, room: Room = empty) -> Gathered:
        """One document a row, padded to the longest one's length.

        Args:
            rows: (rows,) int64, row numbers; -1 is a padding row: one padding token that is attended to, with label -100
                and sample id -1. An empty document becomes a row of padding alone.
            room: where to write.
        """
        rows, layout = _rows(rows), self.layout
        longest, _ = _core.extent(*self._bounds, rows, layout.numbers[0])
        planes = room((len(self.names), len(rows), _rounded(longest, layout.multiple_of)))
        samples = np.empty(len(rows), _INT64)
        self._gather((rows, None, None), samples, planes)
        return Gathered(self.names, planes, samples, rows, None, None, longest)

    def join(self, rows: Any, room: Room = empty) -> Gathered:
        """All documents in a single row, one behind the other, without padding between them. Arguments as of :meth:`pad`.

        Positions restart with each document, and each document's first label is -100: nothing before it predicts it.
        Places that ``multiple_of`` adds are a document of padding at the end.
        """
        rows = _rows(rows)
        _, total = _core.extent(*self._bounds, rows, self.layout.numbers[0])
        bounds = np.array([0, len(rows)], np.int64)
        return self._joined((rows, None, bounds), 1, _rounded(total, self.layout.multiple_of), room)

    def join_packed(self, packing: Packing, rows: Any, room: Room = empty) -> Gathered:
        """Rows of a packing, each ``packing.capacity`` wide: documents one behind the other, then a document of padding.

        ``rows``: (rows,) int64, rows of the packing; -1 is a row of padding alone. The rest as of :meth:`join`;
        ``max_length`` and ``multiple_of`` have no say.
        """
        rows = _rows(rows)
        if rows.min() < PADDING or rows.max() >= len(packing):
            wrong = rows[(rows < PADDING) | (rows >= len(packing))][0]
            raise DataError(
                f"there is no such row (got {wrong}, the packing has {len(packing)}); pass 0..{len(packing)}, or -1 for a "
                "padding row"
            )
        spans = [slice(*packing.offsets[row : row + 2].tolist()) if row >= 0 else slice(0, 0) for row in rows.tolist()]
        bounds = np.cumsum([0, *(span.stop - span.start for span in spans)], dtype=np.int64)
        documents, starts, lengths = (
            None if column is None else np.concatenate([column[span] for span in spans])
            for column in (packing.documents, packing.starts, packing.lengths)
        )
        assert documents is not None
        split = starts
        if starts is None or lengths is None:
            lengths = np.minimum(self._lengths(documents), packing.capacity)
            starts = np.zeros_like(lengths)
        made = self._joined((documents, (starts, lengths), bounds), len(rows), packing.capacity, room)
        return made._replace(starts=split)

    def places(self, gathered: Gathered) -> NDArray[np.int64] | None:
        """Every token's place in its document, (rows, width) int64, -1 at padding; None where sample ids say it already.

        They do where documents are whole and no two of one id stand side by side: places then count from the start of a
        run of equal ids. Only of joined rows.
        """
        samples, boundaries, starts = gathered.samples, gathered.boundaries, gathered.starts
        assert boundaries is not None
        flat, begins = samples.reshape(-1), boundaries[:-1].astype(np.int64)
        inner = begins[begins % samples.shape[1] > 0]
        if starts is None and not np.any((flat[inner] == flat[inner - 1]) & (flat[inner] >= 0)):
            return None
        sizes = np.diff(boundaries)
        first = -begins
        if starts is not None:  # a piece of padding is none of the packing's: it stands at a row's end
            first[flat[begins] >= 0] += starts
        return np.where(flat < 0, PADDING, np.arange(len(flat)) + np.repeat(first, sizes)).reshape(samples.shape)

    def real_documents(self, gathered: Gathered) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sample ids, lengths) of a batch's documents, in order.

        Of padded rows, one a row: a padding row has id -1 and length 1. Of joined ones, those that have tokens. A piece
        of a document that was split counts up to its end: masks are the whole document's.
        """
        documents, lengths = gathered.documents, gathered.lengths
        if lengths is None:
            lengths = np.minimum(self._lengths(documents), self.layout.numbers[0])
        if gathered.samples.ndim == 1:
            return gathered.samples, np.where(documents < 0, 1, lengths)
        ids = documents if self.source.sample_ids is None else self.source.sample_ids[documents]
        real = (documents >= 0) & (lengths > 0)
        lengths = lengths if gathered.starts is None else lengths + gathered.starts
        return ids[real], lengths[real]

    def _joined(self, pieces: _Pieces, rows: int, width: int, room: Room) -> Gathered:
        planes = room((len(self.names), rows, width))
        samples = np.empty((rows, width), np.int64)
        found = self._gather(pieces, samples, planes)
        assert found is not None
        return Gathered(self.names, planes, samples, pieces[0], None if pieces[1] is None else pieces[1][1], *found)

    def _gather(
        self, pieces: _Pieces, samples: NDArray[np.int64], planes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], int] | None:
        source, ids = self.source, (self.source.sample_ids, samples)
        return _core.gather(self._columns, source.offsets, pieces, self.layout.numbers, self._flags, ids, planes)

    def _lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        offsets = self.source.offsets
        if documents.size and documents.max() >= len(offsets) - 1:
            raise DataError(
                f"a document does not exist (got number {documents.max()} of {len(offsets) - 1}); pass the packing of this source"
            )
        return offsets[documents + 1] - offsets[documents]


def _rounded(length: int, multiple: int) -> int:
    return max(-(-length // multiple), 1) * multiple


def _rows(rows: Any) -> NDArray[np.int64]:
    # The usual case in one breath: a batch takes 15 microseconds in all.
    if type(rows) is np.ndarray and rows.dtype is _INT64 and rows.ndim == 1 and rows.size and rows.flags.carray:
        return rows
    array = np.asarray(rows)
    if array.size and array.dtype.kind not in "iu":
        raise DataError(f"row numbers must be integers (got {array.dtype}); pass a list or an int64 array")
    if array.ndim != 1 or not array.size:
        raise DataError(f"a batch needs rows (got shape {array.shape}); leave an empty batch out")
    check_signed(array)
    return contiguous(array, np.int64)


def _check_column(name: str, array: Any, shape: tuple[int, ...], each: str, narrow: bool = False) -> None:
    kinds = ("int32", "int64") if narrow else ("int64",)
    good = isinstance(array, np.ndarray) and array.dtype in kinds and array.flags.c_contiguous
    if not good or not array.flags.aligned:
        got = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        got += ", which is not aligned" if good else ""
        raise DataError(f"{name} must be a contiguous array of {' or '.join(kinds)} (got {got}); convert it")
    if array.shape != shape:
        raise DataError(
            f"{name} must have one number a {each} (got shape {array.shape}, not {shape}); pass what belongs together"
        )
