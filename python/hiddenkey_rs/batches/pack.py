"""Packing: which documents share a row of fixed capacity. First fit decreasing over a histogram of lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import DataError
from ..serialise import choice
from .checks import check_integer, contiguous

TOO_LONG = {"refuse": 0, "truncate": 1, "split": 2}
MAX_CAPACITY = 1 << 24


@dataclass(frozen=True, eq=False)
class Packing:
    """Which documents share a row.

    Attributes:
        capacity: tokens a row.
        offsets: (rows + 1,) int64: row r holds the pieces ``offsets[r]:offsets[r + 1]``.
        documents: (pieces,) int64, the document that each piece is of. Without splits a document is one piece. An empty
            document is in no row.
        starts, lengths: (pieces,) int64 with ``too_long="split"``: where in its document a piece starts, and its length.
            ``None`` otherwise: a piece is its document's first ``capacity`` tokens.
        tokens: in all rows.

    Example:
        >>> packing = pack([3, 2, 2], 5)
        >>> [packing[row].tolist() for row in range(len(packing))], packing.fill
        ([[0, 1], [2]], 0.7)
    """

    capacity: int
    offsets: NDArray[np.int64]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64] | None
    lengths: NDArray[np.int64] | None
    tokens: int

    @property
    def fill(self) -> float:
        """The share of all rows' capacity that holds tokens; 1.0 if there are no rows."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        """The documents of one row; an IndexError outside 0..len - 1."""
        if not 0 <= row < len(self):
            raise IndexError(f"a row lies outside 0..{len(self) - 1} (got {row}); rows do not count from the end")
        return self.documents[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"Packing({len(self)} rows of {self.capacity}, {len(self.documents)} pieces, fill {self.fill:.4f})"


def pack(lengths: Any, capacity: int, *, too_long: str = "refuse") -> Packing:
    """Pack documents into rows of ``capacity`` tokens, so that few places stay empty and no document is cut.

    First fit decreasing: the longest first, equal lengths by their number, each document goes into the first row that
    still has room. Ten million documents take a fraction of a second, whatever the capacity; the result depends on
    nothing but the arguments.

    Args:
        lengths: (documents,) integers >= 0; a store's ``lengths``.
        capacity: tokens a row, 1..2**24.
        too_long: what becomes of a document that is longer than a row. ``"refuse"``: an error that names the first one.
            ``"truncate"``: its first ``capacity`` tokens are used. ``"split"``: it is cut into pieces of ``capacity``
            tokens, the last one shorter, and each is packed for itself.

    Raises:
        ConfigError: a capacity out of range, an unknown ``too_long``. DataError: lengths that are no integers or
            negative, a document that is too long, more than 2**28 pieces.

    Example:
        >>> packing = pack([3, 9, 1, 7, 0], capacity=10)
        >>> [row.tolist() for row in packing], packing.fill
        ([[1, 2], [3, 0]], 1.0)
    """
    capacity = check_integer(capacity, "capacity", 1, MAX_CAPACITY, "use the model's context length")
    code = TOO_LONG[choice(too_long, TOO_LONG, "too_long")]
    offsets, documents, starts, sizes, tokens = _core.pack(_lengths(lengths), capacity, code)
    split = too_long == "split"
    return Packing(capacity, offsets, documents, starts if split else None, sizes if split else None, tokens)


def _lengths(lengths: Any) -> NDArray[Any]:
    """As contiguous int32 or int64; whether they are negative is the core's question."""
    try:
        array = contiguous(lengths)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"lengths must be a list or an array of integers (got no array: {error}); convert them"
        ) from None
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DataError(
            f"lengths must be a list or a one-dimensional array of integers (got {array.dtype} of shape {array.shape}); "
            "convert them"
        )
    if array.dtype in (np.int32, np.int64):
        return array
    return array.astype(np.int64) if array.dtype != np.uint64 else np.minimum(array, 2**63 - 1).astype(np.int64)
