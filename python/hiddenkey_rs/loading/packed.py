"""A store whose rows are packed: each holds several documents, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batches.pack import pack
from ..batches.pad import Gatherer, Layout, Source
from .rows import RowBatch


class PackedStore:
    """Rows of ``capacity`` tokens, each made of whole documents of a store (or pieces of them, if they are split).

    It is a data set like the store itself: ``BatchSampler`` draws its rows, ``Collator(layout="packed")`` makes batches of
    them. It pickles as the store and the capacity: a worker packs again, which takes less time than sending the result.

    Args:
        store: a :class:`TokenStore`. capacity, too_long: as of :func:`hiddenkey_rs.pack`.

    Attributes:
        packing: which documents share a row.
        lengths: (rows,) int64, the places that each row takes in a batch: ``capacity``.

    Raises:
        ConfigError, DataError: as :func:`hiddenkey_rs.pack`.

    Example:
        >>> import hiddenkey_rs as hk
        >>> store = hk.TokenStore((np.arange(1, 8), np.array([0, 3, 5, 7])))
        >>> packed = PackedStore(store, 5)
        >>> len(packed), packed[0]["input_ids"].tolist(), packed[0]["position_ids"].tolist()
        (2, [1, 2, 3, 4, 5], [0, 1, 2, 0, 1])
    """

    def __init__(self, store: Any, capacity: int, *, too_long: str = "refuse") -> None:
        self.store, self.capacity, self.too_long = store, capacity, too_long
        self.packing = pack(store.lengths, capacity, too_long=too_long)

    def __len__(self) -> int:
        return len(self.packing)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) int64, the places that each row takes in a batch."""
        return np.full(len(self), self.packing.capacity, np.int64)

    @property
    def digest(self) -> str:
        """The store's digest with capacity and ``too_long``: equal where the rows are equal."""
        return f"{self.store.digest}-{self.packing.capacity}-{self.too_long}"

    @property
    def column_names(self) -> list[str]:
        """The keys of a row."""
        return ["input_ids", "position_ids", "sample_id"]

    def __getitem__(self, row: int) -> dict[str, NDArray[np.int64]]:
        """One row without the padding at its end: ``input_ids``, ``position_ids``, ``sample_id``, each (tokens,) int64.

        Raises:
            IndexError: outside 0..len - 1.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"a row lies outside 0..{len(self) - 1} (got {row}); rows do not count from the end")
        source = Source(self.store.values, self.store.offsets, sample_ids=self.store.sample_ids)
        made = Gatherer(source, Layout(mask=False, positions=True)).join_packed(self.packing, [row])
        real = made.samples[0] >= 0
        return {**{name: plane[0][real] for name, plane in made.arrays().items()}, "sample_id": made.samples[0][real]}

    def __getitems__(self, rows: Sequence[int]) -> RowBatch:
        """The rows of a batch, named and not read: what a ``DataLoader`` asks for, and the collator takes."""
        return RowBatch.of(self, rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.store, self.capacity, self.too_long)

    def __repr__(self) -> str:
        return f"PackedStore({self.packing!r} of {self.store!r})"


def _again(store: Any, capacity: int, too_long: str) -> PackedStore:
    return PackedStore(store, capacity, too_long=too_long)
