import numpy as np
from numpy.typing import NDArray

__all__ = [
    "STREAM",
    "__version__",
    "column",
    "debug_build",
    "derive_key",
    "element",
    "philox",
    "simd",
    "span",
    "threshold",
    "unpack",
]

STREAM: str
__version__: str

def element(
    seed: int,
    step: int,
    branch: int,
    layer: int,
    site: int,
    samples: NDArray[np.uint64],
    heads: int,
    rows: int,
    columns: int,
    threshold: int,
) -> NDArray[np.uint32]: ...
def column(
    seed: int,
    step: int,
    branch: int,
    layer: int,
    site: int,
    samples: NDArray[np.uint64],
    heads: int,
    columns: int,
    threshold: int,
) -> NDArray[np.uint32]: ...
def span(
    seed: int,
    step: int,
    branch: int,
    layer: int,
    site: int,
    samples: NDArray[np.uint64],
    lengths: NDArray[np.uint32],
    heads: int,
    columns: int,
    threshold: int,
) -> NDArray[np.uint32]: ...
def unpack(words: NDArray[np.uint32], columns: int) -> NDArray[np.bool_]: ...
def philox(counters: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]: ...
def derive_key(seed: int, step: int, branch: int, layer: int, site: int) -> tuple[int, int]: ...
def threshold(rate: float) -> int: ...
def simd() -> str: ...
def debug_build() -> bool: ...
