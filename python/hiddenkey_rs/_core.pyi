from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ORDER_STREAM",
    "STREAM",
    "__version__",
    "block_mask",
    "column",
    "derive_key",
    "dropout",
    "dropout_rows",
    "element",
    "extent",
    "gather",
    "info",
    "keep_rows",
    "order",
    "order_at",
    "pack",
    "plan",
    "schedule",
    "schedule_counts",
    "seen_keys",
    "set_threads",
    "share",
    "span",
    "unpack",
]

STREAM: str
ORDER_STREAM: str
__version__: str

_Site: TypeAlias = tuple[int, int, int, int, int]
_Integers: TypeAlias = NDArray[np.int32] | NDArray[np.int64]
_Hidden: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]] | tuple[NDArray[np.uint16], NDArray[np.uint16]]

def element(
    site: _Site,
    samples: NDArray[np.uint64],
    heads: int,
    rows: int,
    columns: int,
    threshold: int,
    out: NDArray[np.uint32] | NDArray[np.uint8],
) -> None: ...
def column(
    site: _Site,
    samples: NDArray[np.uint64],
    lengths: NDArray[np.uint32] | None,
    heads: int,
    columns: int,
    threshold: int,
    out: NDArray[np.uint32],
) -> None: ...
def span(
    site: _Site,
    samples: NDArray[np.uint64],
    lengths: NDArray[np.uint32],
    heads: int,
    columns: int,
    threshold: int,
    out: NDArray[np.uint32],
) -> None: ...
def unpack(words: NDArray[np.uint32], columns: int, out: NDArray[np.uint8]) -> None: ...
def plan(
    seed: int,
    step: int,
    entries: NDArray[np.uint64],
    samples: NDArray[np.uint64],
    branches: NDArray[np.uint64],
    lengths: NDArray[np.uint32],
    columns: int,
    words: NDArray[np.uint32],
    counts: NDArray[np.uint32],
) -> None: ...
def dropout(
    site_key: tuple[int, int],
    samples: NDArray[np.int64],
    positions: NDArray[np.int64],
    threshold: int,
    scale: float,
    hidden: _Hidden,
) -> int: ...
def dropout_rows(keep: NDArray[np.uint8], scale: float, hidden: _Hidden) -> None: ...
def keep_rows(
    keep: NDArray[np.uint8],
    places: NDArray[np.uint32],
    features: int,
    heads_inside: bool,
    back: bool,
    hidden: _Hidden,
) -> None: ...
def seen_keys(allowed: NDArray[np.uint8], out: NDArray[np.uint32]) -> None: ...
def block_mask(
    allowed: NDArray[np.uint8],
    seen: NDArray[np.uint32],
    keep: NDArray[np.uint8],
    own: bool,
    rows: tuple[int, int],
    columns: tuple[int, int],
    forbidden: int,
    out: NDArray[np.uint32] | NDArray[np.uint16],
    empty: NDArray[np.uint8],
) -> tuple[int, int]: ...
def derive_key(site: _Site) -> tuple[int, int]: ...
def info() -> dict[str, Any]: ...
def set_threads(count: int) -> None: ...
def pack(
    lengths: _Integers, capacity: int, too_long: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]: ...
def extent(offsets: NDArray[np.int64], values: int, rows: NDArray[np.int64], limit: int) -> tuple[int, int]: ...
def gather(
    columns: tuple[_Integers, _Integers | None, _Integers | None],
    offsets: NDArray[np.int64],
    pieces: tuple[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int64]] | None, NDArray[np.int64] | None],
    numbers: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool],
    samples: tuple[NDArray[np.int64] | None, NDArray[np.int64]],
    out: NDArray[np.int64],
) -> tuple[NDArray[np.int32], int] | None: ...
def order(seed: int, epoch: int, size: int, start: int, out: NDArray[np.int64]) -> None: ...
def order_at(seed: int, epoch: int, size: int, place: int, inverse: bool) -> int: ...
def schedule(
    drawn: tuple[int, int, bool],
    sizes: tuple[int, int, int, int],
    lengths: NDArray[np.uint32],
    window: int,
    samples: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> int: ...
def schedule_counts(
    drawn: tuple[int, int, bool],
    sizes: tuple[int, int, int, int],
    lengths: NDArray[np.uint32],
    counts: NDArray[np.int64],
) -> None: ...
def share(samples: NDArray[np.int64], lengths: NDArray[np.uint32], out: NDArray[np.int64]) -> None: ...
