"""The order of an epoch as a pure function: which sample stands where is computed, never stored. Stream ``hko1``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .checks import check_integer, room

STREAM: str = _core.ORDER_STREAM
"""The name of the stream of orders: any change of any order is a new name."""
MAX_SIZE = 1 << 62
MAX_EPOCH = (1 << 32) - 1
MAX_SEED = (1 << 64) - 1
_SLICE = 4096


class Order:
    """A permutation of ``range(size)`` drawn by (seed, epoch): one place costs half a microsecond, and a few below 1025.

    A Feistel network of eight rounds on the next power of two, applied again to what falls outside ``range(size)``; up to
    1,024 samples a plain shuffle. The same everywhere, for ever: DESIGN.md defines the stream.

    Args:
        seed: 0 <= seed < 2**64.
        epoch: 0 <= epoch < 2**32.
        size: 1 <= size <= 2**62.

    Raises:
        ConfigError: one of them is out of its range.

    Example:
        >>> order = Order(seed=1, epoch=0, size=10**12)
        >>> order.position(order[123_456_789])
        123456789
        >>> sorted(Order(seed=1, epoch=0, size=5).slice(0, 5).tolist())
        [0, 1, 2, 3, 4]
    """

    __slots__ = ("epoch", "seed", "size")

    def __init__(self, seed: int, epoch: int, size: int) -> None:
        self.seed = check_integer(seed, "seed", 0, MAX_SEED, "it is a 64-bit number")
        self.epoch = check_integer(epoch, "epoch", 0, MAX_EPOCH, "count epochs from 0")
        self.size = check_integer(size, "size", 1, MAX_SIZE, "an order has at least one sample")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        """The sample at a position in 0..=size-1. Raises ConfigError beyond it."""
        place = check_integer(position, "position", 0, self.size - 1, "it counts from the epoch's start")
        return _core.order_at(self.seed, self.epoch, self.size, place, False)

    def position(self, sample: int) -> int:
        """Where a sample in 0..=size-1 stands: the inverse of ``order[position]``. Raises ConfigError beyond it."""
        place = check_integer(sample, "sample", 0, self.size - 1, "it is a row of the data set")
        return _core.order_at(self.seed, self.epoch, self.size, place, True)

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at the positions start..stop-1, int64; nanoseconds each. 0 <= start <= stop <= size.

        Raises:
            ConfigError: a position out of range, or more than memory holds.
        """
        last = check_integer(stop, "stop", 0, self.size, "it is at most the size")
        first = check_integer(start, "start", 0, last, "it is at most stop")
        out = room(last - first)
        _core.order(self.seed, self.epoch, self.size, first, out)
        return out

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.size, _SLICE):
            yield from self.slice(start, min(start + _SLICE, self.size)).tolist()

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Order) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"Order(seed={self.seed}, epoch={self.epoch}, size={self.size})"
