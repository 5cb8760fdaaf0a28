"""The rows of a batch, named and not yet read: what travels from a store to the collator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..batches.checks import check_signed
from ..errors import DataError

_INT64 = np.dtype(np.int64)


class RowBatch:
    """Which rows of which store make a batch. The collator reads their tokens, all of them in one call.

    Attributes:
        store: a :class:`TokenStore` or a :class:`PackedStore`.
        rows: int64 (B,), row numbers; -1 is a padding row.
        epoch, step, micro: where in the run the batch stands, if a :class:`BatchSampler` said so, else None; ``step``
            counts global batches since the start of the epoch.
    """

    __slots__ = ("epoch", "micro", "rows", "step", "store")

    def __init__(
        self,
        store: Any,
        rows: NDArray[np.int64],
        epoch: int | None = None,
        step: int | None = None,
        micro: int | None = None,
    ) -> None:
        self.store, self.rows, self.epoch, self.step, self.micro = store, rows, epoch, step, micro

    @classmethod
    def of(cls, store: Any, rows: Sequence[int] | NDArray[np.int64]) -> Self:
        """The batch of ``rows``; a sampler's own list also says where in the run it stands.

        Example:
            >>> RowBatch.of(None, [3, -1]).rows.tolist()
            [3, -1]
        """
        if type(rows) is np.ndarray:
            check_signed(rows)
        try:
            numbers = np.array(rows, _INT64)
        except OverflowError:
            raise DataError(f"row numbers lie below 2^63 (got {max(rows)}); -1 is a padding row") from None
        if not hasattr(rows, "epoch"):
            return cls(store, numbers)
        return cls(store, numbers, *(getattr(rows, name, None) for name in ("epoch", "step", "micro")))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"RowBatch({len(self)} rows of {self.store!r})"
