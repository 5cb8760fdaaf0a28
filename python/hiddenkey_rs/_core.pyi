from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "STREAM",
    "__version__",
    "column",
    "derive_key",
    "dropout",
    "dropout_rows",
    "element",
    "info",
    "keep_rows",
    "plan",
    "set_threads",
    "span",
    "unpack",
]

STREAM: str
__version__: str

_Site: TypeAlias = tuple[int, int, int, int, int]
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
def derive_key(site: _Site) -> tuple[int, int]: ...
def info() -> dict[str, Any]: ...
def set_threads(count: int) -> None: ...
