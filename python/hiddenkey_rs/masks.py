"""Masks of the three patterns, packed, as a pure function of their coordinates. Imports NumPy and nothing heavier.

Every function takes a :class:`MaskKey` and the examples' ids, and returns a :class:`BitMask` in which 1 means keep.
Stream ``hk1``: the counter table is in DESIGN.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .config import RATE_LEVELS, threshold
from .errors import ConfigError, DataError
from .serialise import choice

if TYPE_CHECKING:
    import torch

SITES = {
    "attention": 0,
    "ffn": 1,
    "input": 2,
    "output": 3,
    "decoder-attention": 4,
    "decoder-ffn": 5,
    "decoder-input": 6,
    "cross-attention": 7,
    "adapter-input": 8,
    "adapter-rank": 9,
}
"""Places that draw masks, and their codes in the stream. The plain names are the only stack's or the encoder's."""


@dataclass(frozen=True)
class MaskKey:
    """What a mask is of, besides the example: seed, optimiser step, branch, layer and site.

    seed < 2**64, step < 2**32, branch < 2**8, layer < 2**10; ``site`` is a name of :data:`SITES`.
    """

    seed: int = 0
    step: int = 0
    branch: int = 0
    layer: int = 0
    site: str = "attention"

    def __post_init__(self) -> None:
        for name, bits in (("seed", 64), ("step", 32), ("branch", 8), ("layer", 10)):
            _integer(getattr(self, name), name, (1 << bits) - 1)
        choice(self.site, SITES, "site")

    @property
    def words(self) -> tuple[int, int, int, int, int]:
        """(seed, step, branch, layer, site code), as the core takes them."""
        return self.seed, self.step, self.branch, self.layer, SITES[self.site]


class BitMask:
    """A packed mask. Bit i of word j of a row is column 32 j + i; 1 = keep; bits past the last column are 0.

    Attributes:
        words: uint32 (..., ceil(columns / 32)), the core's own memory.
        shape: the mask's shape, (samples, heads, rows, columns).
    """

    __slots__ = ("shape", "words")

    def __init__(self, words: NDArray[np.uint32], columns: int) -> None:
        self.words = words
        self.shape: tuple[int, ...] = (*words.shape[:-1], columns)

    def to_bool(self) -> NDArray[np.bool_]:
        """One bool a decision, True = keep, of :attr:`shape`."""
        return _core.unpack(self.words, self.shape[-1])

    def to_torch(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """:meth:`to_bool` as a torch tensor on ``device``."""
        import torch

        return torch.from_numpy(self.to_bool()).to(device)

    def kept(self) -> int:
        """How many decisions keep."""
        return int(np.bitwise_count(self.words).sum()) if hasattr(np, "bitwise_count") else int(self.to_bool().sum())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BitMask) and self.shape == other.shape and bool(np.array_equal(self.words, other.words))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"BitMask(shape={self.shape}, kept={self.kept()})"


def element(key: MaskKey, samples: Any, rows: int, columns: int, rate: float, heads: int = 1) -> BitMask:
    """Every (row, column) dropped on its own with probability ``rate``.

    Args:
        key: what the mask is of.
        samples: (B,) integers in [0, 2**40), the examples' ids.
        rows, columns: 0..2**20. heads: 0..2**10.
        rate: in [0, 1]; realised as :func:`realised`.

    Returns:
        A mask of shape (B, heads, rows, columns).

    Raises:
        ConfigError: a rate, extent or key out of range. DataError: sample ids that are none.

    Example:
        >>> element(MaskKey(seed=1), [0, 1], rows=2, columns=3, rate=0.5).to_bool().shape
        (2, 1, 2, 3)
    """
    _extents(heads=heads, rows=rows, columns=columns)
    return BitMask(_core.element(*key.words, _samples(samples), heads, rows, columns, threshold(rate)), columns)


def column(key: MaskKey, samples: Any, columns: int, rate: float, heads: int = 1) -> BitMask:
    """Whole columns dropped, for all rows of a head: shape (B, heads, 1, columns). Arguments as :func:`element`."""
    _extents(heads=heads, columns=columns)
    return BitMask(_core.column(*key.words, _samples(samples), heads, columns, threshold(rate)), columns)


def span(key: MaskKey, samples: Any, lengths: Any, rate: float, heads: int = 1) -> BitMask:
    """One contiguous block dropped of each example's ``lengths`` columns: shape (B, heads, 1, max(lengths)).

    ``lengths``: (B,) integers in [0, 2**20]. Of a length n > 0 and a rate > 0, round(rate n), at least 1, columns go;
    every place where the whole block fits is equally likely. Columns past a length are 0. The rest as
    :func:`element`.
    """
    counts = _integers(lengths, "lengths", 1 << 20)
    columns = int(counts.max(initial=0))
    _extents(heads=heads)
    ids = _samples(samples)
    return BitMask(_core.span(*key.words, ids, counts.astype(np.uint32), heads, columns, threshold(rate)), columns)


def realised(rate: float) -> float:
    """The probability of dropping that masks realise for a rate: its 16-bit threshold / 65536."""
    return threshold(rate) / RATE_LEVELS


def engine() -> dict[str, str]:
    """What makes the masks: the stream's name, the instruction set, and whether it is a debug build."""
    return {"stream": _core.STREAM, "simd": _core.simd(), "build": "debug" if _core.debug_build() else "release"}


def _extents(**extents: int) -> None:
    for name, value in extents.items():
        _integer(value, name, 1 << 10 if name == "heads" else 1 << 20)


def _integer(value: Any, name: str, most: int) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 0 <= value <= most:
        raise ConfigError(f"{name} must be an integer in 0..={most} (got {value!r}); stay within the stream's limits")


def _samples(samples: Any) -> NDArray[np.uint64]:
    return _integers(samples, "sample ids", (1 << 40) - 1).astype(np.uint64)


def _integers(values: Any, name: str, most: int) -> NDArray[Any]:
    array = np.ascontiguousarray(values)
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DataError(
            f"{name} must be a list or a one-dimensional array of integers (got {array.dtype} of shape {array.shape}); "
            "convert them"
        )
    worst = array.min() if array.min() < 0 else array.max()
    if not 0 <= worst <= most:
        raise DataError(f"{name} must lie in 0..={most} (got {worst}); number the examples from 0")
    return array
