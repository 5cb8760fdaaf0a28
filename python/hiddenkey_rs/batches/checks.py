"""Arguments of batches, checked once and named when they are wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError, shown


def check_integer(value: Any, name: str, least: int, most: int, hint: str) -> int:
    """``value`` as a plain integer in least..=most; else a :class:`ConfigError` that names it and ends in ``hint``."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        raise ConfigError(f"{name} must be an integer in {least}..={most} (got {shown(value)}); {hint}")
    return int(value)


def room(count: int) -> NDArray[np.int64]:
    """Memory for ``count`` sample numbers; a :class:`ConfigError` if there is not so much."""
    try:
        return np.empty(count, np.int64)
    except (MemoryError, ValueError) as error:
        raise ConfigError(f"so many samples do not fit into memory (got {count}: {error}); ask for fewer") from None


def check_signed(rows: NDArray[Any]) -> None:
    """A :class:`DataError` for row numbers that would become other ones as int64: 2^64 - 1 is no padding row."""
    if rows.dtype == np.uint64 and rows.size and rows.max() >= 1 << 63:
        raise DataError(f"row numbers lie below 2^63 (got {rows.max()}); -1 is a padding row")


def contiguous(values: Any, dtype: Any = None) -> NDArray[Any]:
    """``np.ascontiguousarray``, and aligned: an array cut out of bytes may begin anywhere, and the core reads no such memory.

    Example:
        >>> contiguous(np.frombuffer(bytes(10), np.int32, offset=2)).flags.aligned
        True
    """
    array = np.ascontiguousarray(values, dtype)
    return array if array.flags.aligned else array.copy()
