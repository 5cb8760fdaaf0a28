"""Masks of the three patterns, packed, as a pure function of their coordinates. Imports NumPy and nothing heavier.

Every function takes a :class:`MaskKey` and the examples' ids, and returns a :class:`BitMask` in which 1 means keep.
Stream ``hk1``: the counter table is in DESIGN.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .config import RATE_LEVELS, threshold
from .errors import ConfigError, DataError, shown
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

_WORD, _BOOL = np.dtype(np.uint32), np.dtype(np.bool_)
_SIGNED, _UNSIGNED = np.dtype(np.int64), np.dtype(np.uint64)


@dataclass(frozen=True)
class MaskKey:
    """What a mask is of, besides the example: seed, optimiser step, branch, layer and site.

    seed < 2**64, step < 2**32, branch < 2**8, layer < 2**10; ``site`` is a name of :data:`SITES`.

    Raises:
        ConfigError: a number out of its range, an unknown site.

    Example:
        >>> MaskKey(seed=7, step=3, layer=11, site="ffn")
        MaskKey(seed=7, step=3, branch=0, layer=11, site='ffn')
    """

    seed: int = 0
    step: int = 0
    branch: int = 0
    layer: int = 0
    site: str = "attention"
    words: tuple[int, int, int, int, int] = field(init=False, repr=False, compare=False)
    """(seed, step, branch, layer, site code), as the core takes them."""

    def __post_init__(self) -> None:
        for name, bits in (("seed", 64), ("step", 32), ("branch", 8), ("layer", 10)):
            check_integer(getattr(self, name), name, (1 << bits) - 1)
        choice(self.site, SITES, "site")
        words = (int(self.seed), int(self.step), int(self.branch), int(self.layer), SITES[self.site])
        object.__setattr__(self, "words", words)

    def derive(self) -> tuple[int, int]:
        """The Philox key of this site, two 32-bit words."""
        return _core.derive_key(self.words)


class BitMask:
    """A packed mask. Bit i of word j of a row is column 32 j + i; 1 = keep; bits past the last column are 0.

    Attributes:
        words: uint32 (..., ceil(columns / 32)).
        columns: how many columns a row has.

    Example:
        >>> mask = column(MaskKey(), samples=[4], columns=40, rate=0.5)
        >>> mask.shape, mask.words.shape, mask.to_bool().dtype
        ((1, 1, 1, 40), (1, 1, 1, 2), dtype('bool'))
    """

    __slots__ = ("columns", "words")

    def __init__(self, words: NDArray[np.uint32], columns: int) -> None:
        self.words = words
        self.columns = int(columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """The mask's shape, (samples, heads, rows, columns)."""
        return (*self.words.shape[:-1], self.columns)

    def to_bool(self, out: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """One bool a decision, True = keep, of :attr:`shape`; written into ``out`` if given.

        Raises:
            DataError: words of another type, an ``out`` of another shape or type.
        """
        keep = np.empty(self.shape, _BOOL) if out is None else _fitting(out, self.shape, _BOOL)
        if self.words.dtype != _WORD:
            raise DataError(f"packed words are uint32 (got {self.words.dtype}); convert them")
        _core.unpack(np.ascontiguousarray(self.words), self.columns, keep.view(np.uint8))
        return keep

    def to_torch(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """:meth:`to_bool` as a torch tensor on ``device``."""
        import torch

        from .transfer import to_device

        return to_device(torch.from_numpy(self.to_bool()), torch.device(device))

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


def element(
    key: MaskKey,
    samples: Any,
    rows: int,
    columns: int,
    rate: float,
    heads: int = 1,
    out: NDArray[np.uint32] | None = None,
) -> BitMask:
    """Every (row, column) dropped on its own with probability ``rate``.

    Args:
        key: what the mask is of.
        samples: (B,) integers in [0, 2**40), the examples' ids.
        rows, columns: 0..2**20. heads: 0..2**10.
        rate: in [0, 1]; realised as :func:`realised`.
        out: uint32 (B, heads, rows, ceil(columns / 32)), contiguous; memory to write into and hand back.

    Returns:
        A mask of shape (B, heads, rows, columns).

    Raises:
        ConfigError: a rate, extent or key out of range, a mask too large for memory.
        DataError: sample ids that are not integers in [0, 2**40).

    Example:
        >>> element(MaskKey(seed=1), [0, 1], rows=2, columns=3, rate=0.5).to_bool().shape
        (2, 1, 2, 3)
    """
    ids = _samples(samples)
    words = _room(out, (ids.size, heads, rows, columns), _WORD)
    _drawn(samples, _core.element, key.words, ids, heads, rows, columns, threshold(rate), words)
    return BitMask(words, columns)


def element_bool(
    key: MaskKey,
    samples: Any,
    rows: int,
    columns: int,
    rate: float,
    heads: int = 1,
    out: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """The mask of :func:`element` unpacked, bool (B, heads, rows, columns), without ever packing it.

    ``out``: a contiguous bool array of that shape to write into and hand back. The rest, errors too, as :func:`element`.

    Example:
        >>> how = {"key": MaskKey(seed=1), "samples": [7], "rows": 2, "columns": 5, "rate": 0.5}
        >>> bool(np.array_equal(element_bool(**how), element(**how).to_bool()))
        True
    """
    ids = _samples(samples)
    keep = _room(out, (ids.size, heads, rows, columns), _BOOL)
    _drawn(samples, _core.element, key.words, ids, heads, rows, columns, threshold(rate), keep.view(np.uint8))
    return keep


def column(
    key: MaskKey,
    samples: Any,
    columns: int,
    rate: float,
    heads: int = 1,
    lengths: Any = None,
    out: NDArray[np.uint32] | None = None,
) -> BitMask:
    """Whole columns dropped, for all rows of a head: shape (B, heads, 1, columns).

    ``lengths``: (B,) integers in [0, columns], the examples' real lengths; columns past one are 0. Default: all are real.
    The rest, errors too, as :func:`element`.

    Example:
        >>> column(MaskKey(seed=1), [7, 8], 5, 0.0, lengths=[5, 3]).to_bool()[:, 0, 0].astype(int)
        array([[1, 1, 1, 1, 1],
               [1, 1, 1, 0, 0]])
    """
    ids = _samples(samples)
    words = _room(out, (ids.size, heads, 1, columns), _WORD)
    counts = None if lengths is None else _lengths(lengths)
    _drawn(samples, _core.column, key.words, ids, counts, heads, columns, threshold(rate), words)
    return BitMask(words, columns)


def span(
    key: MaskKey,
    samples: Any,
    lengths: Any,
    rate: float,
    heads: int = 1,
    columns: int | None = None,
    out: NDArray[np.uint32] | None = None,
) -> BitMask:
    """One contiguous block dropped of each example's ``lengths`` columns: shape (B, heads, 1, columns).

    ``lengths``: (B,) integers in [0, 2**20]. Of a length n > 0 and a rate > 0, round(rate n), at least 1, columns go;
    every place where the whole block fits is equally likely. Columns past a length are 0; ``columns`` defaults to
    max(lengths). The rest, errors too, as :func:`element`.

    Example:
        >>> mask = span(MaskKey(seed=1), samples=[7], lengths=[10], rate=0.3)
        >>> int((~mask.to_bool()).sum()), mask.shape
        (3, (1, 1, 1, 10))
    """
    counts = _lengths(lengths)
    width = int(counts.max(initial=0)) if columns is None else columns
    ids = _samples(samples)
    words = _room(out, (ids.size, heads, 1, width), _WORD)
    _drawn(samples, _core.span, key.words, ids, counts, heads, width, threshold(rate), words)
    return BitMask(words, width)


def fill_plan(
    seed: int,
    step: int,
    entries: NDArray[np.uint64],
    samples: NDArray[np.int64],
    branches: NDArray[np.int64],
    lengths: NDArray[np.int64],
    columns: int,
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Column and span masks of many sites at once; :func:`hiddenkey_rs.plan_step` is what people call.

    Args:
        seed, step: as in :class:`MaskKey`.
        entries: (n, 5): layer, site code, pattern (1 column, 2 span), heads, threshold.
        samples, branches, lengths: (D,), one a document.
        columns: of every mask; at least max(lengths).

    Returns:
        (words, counts): one entry's masks behind the other, flat: (D, heads, ceil(columns / 32)) words, (D, heads) counts.
    """
    rows = int(entries[:, 3].sum()) * len(samples)
    words = _room(None, (rows, 1, 1, columns), _WORD).reshape(-1)
    counts = _room(None, (rows, 1, 1, 32), _WORD).reshape(-1)
    ids, passes = _samples(samples), branches.astype(np.uint64)
    _core.plan(seed, step, np.ascontiguousarray(entries), ids, passes, _lengths(lengths), columns, words, counts)
    return words, counts


def drop_elements(
    site_key: tuple[int, int],
    samples: NDArray[np.int64],
    positions: NDArray[np.int64],
    rate_threshold: int,
    scale: float,
    hidden: NDArray[Any],
    out: NDArray[Any],
) -> int:
    """``out = keep ? hidden * scale : 0``, the element mask's row being (sample, position); nothing else is stored.

    Args:
        site_key: :meth:`MaskKey.derive`. rate_threshold: 0..65536. scale: the product is taken in float32.
        samples, positions: (N,), one a row of ``hidden``; a row of sample -1 is padding and becomes zero.
        hidden, out: contiguous, N rows of equal width; float32, or bfloat16 as uint16.

    Returns:
        How many places were kept, those of padding not counted.
    """
    return _core.dropout(site_key, samples, positions, rate_threshold, scale, (hidden, out))


def drop_rows(keep: NDArray[np.bool_], scale: float, hidden: NDArray[Any], out: NDArray[Any]) -> None:
    """``out = keep ? hidden * scale : 0`` for one ``keep`` (N,) a row; ``hidden`` and ``out`` as :func:`drop_elements`."""
    _core.dropout_rows(keep.view(np.uint8), scale, (hidden, out))


def gather_rows(
    keep: NDArray[np.bool_], places: NDArray[np.uint32], rows: NDArray[Any], out: NDArray[Any], *, heads_inside: bool
) -> None:
    """Write each head's kept rows one behind the other into ``out``; spare places become zero.

    Args:
        keep: bool (B, H, L), contiguous. places: (B,), how many places each head of an example has in ``out``.
        rows: contiguous, (B, L, H, D) if ``heads_inside``, else (B, H, L, D); 32-bit floats, or 16-bit ones as uint16.
        out: flat; for each example (H, places, D).
    """
    _core.keep_rows(keep.view(np.uint8), places, rows.shape[-1], heads_inside, False, (rows, out))


def scatter_rows(
    keep: NDArray[np.bool_], places: NDArray[np.uint32], rows: NDArray[Any], out: NDArray[Any], *, heads_inside: bool
) -> None:
    """The way back of :func:`gather_rows`: flat ``rows`` at the places they came from in ``out``, zero elsewhere."""
    _core.keep_rows(keep.view(np.uint8), places, out.shape[-1], heads_inside, True, (rows, out))


def seen_keys(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """What each query may attend to: its first key, the place behind its last one, and how many, (n, Q, 3).

    ``allowed``: bool (n, 1, Q, K), contiguous. A query without any key has (K, 0, 0).
    """
    out = np.empty((len(allowed), allowed.shape[2], 3), np.uint32)
    _core.seen_keys(allowed.view(np.uint8), out)
    return out


def block_mask(
    allowed: NDArray[np.bool_],
    seen: NDArray[np.uint32],
    keep: NDArray[np.bool_],
    own: bool,
    rows: tuple[int, int],
    columns: tuple[int, int],
    forbidden: int,
    out: NDArray[Any],
    empty: NDArray[np.bool_],
) -> tuple[int, int]:
    """Write the mask of the queries ``rows[0]:rows[1]`` over the keys ``columns[0]:columns[1]`` as numbers to add.

    Args:
        allowed: bool (1 or B, 1, Q, K). keep: bool (1 or B, H, 1 or Q, K), the drawn mask. Both contiguous.
        seen: :func:`seen_keys` of ``allowed``; ``columns`` must reach over all that the queries see.
        own: a query that lost all its keys keeps its own one, if it may, and not all that it may attend to.
        forbidden: the bits of what is written where a pair is not kept (0 elsewhere).
        out: flat, (B, H, rows, columns): uint32 or uint16, as wide as the numbers.
        empty: flat, (B, H, rows): True for a query that sees no key; its row of ``out`` is all 0.

    Returns:
        How many pairs are kept, and how many queries (of all heads) see no key.
    """
    pairs = (allowed.view(np.uint8), seen, keep.view(np.uint8))
    return _core.block_mask(*pairs, own, rows, columns, forbidden, out, empty.view(np.uint8))


def realised(rate: float) -> float:
    """The probability of dropping that masks realise for a rate: its 16-bit threshold / 65536."""
    return threshold(rate) / RATE_LEVELS


def engine() -> dict[str, Any]:
    """What makes the masks: ``stream``, ``simd`` (portable, avx2 or avx512), ``threads`` and ``build``.

    ``HIDDENKEY_SIMD`` forces an instruction set; every one makes the same bits.
    """
    return _core.info()


def set_num_threads(count: int) -> None:
    """Use at most ``count`` threads for a call, 1..1024. Bits do not depend on it.

    Default: ``RAYON_NUM_THREADS``, else the processors that affinity and control groups leave the process, shared with the
    ranks that torchrun started beside it (``LOCAL_WORLD_SIZE``).
    """
    check_integer(count, "threads", 1024)
    if count == 0:
        raise ConfigError("threads must be an integer in 1..=1024 (got 0); 1 works on the calling thread alone")
    _core.set_threads(int(count))


def get_num_threads() -> int:
    """How many threads a call uses at most."""
    return int(_core.info()["threads"])


def _room(out: NDArray[Any] | None, shape: tuple[int, int, int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory for a mask of ``shape`` (samples, heads, rows, columns): ``out`` if it is that, else new."""
    count, heads, rows, columns = shape
    # Told apart in one breath: small masks take two microseconds, and three calls would be a third of that.
    if not (
        type(heads) is int
        and type(rows) is int
        and type(columns) is int
        and 0 <= heads <= 1 << 10
        and 0 <= rows <= 1 << 20
        and 0 <= columns <= 1 << 20
    ):
        for name, value, bits in (("heads", heads, 10), ("rows", rows, 20), ("columns", columns, 20)):
            check_integer(value, name, 1 << bits)
        heads, rows, columns = int(heads), int(rows), int(columns)  # NumPy's narrow integers would wrap below
    places = (count, heads, rows, (columns + 31) >> 5 if dtype is _WORD else columns)
    if out is None:
        try:
            return np.empty(places, dtype)
        except (MemoryError, ValueError) as error:
            raise ConfigError(
                f"the mask does not fit into memory (got shape {shape}: {error}); draw fewer rows at a time"
            ) from None
    return _fitting(out, places, dtype)


def _fitting(out: NDArray[Any], places: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if not isinstance(out, np.ndarray):
        raise ConfigError(f"out must be a NumPy array (got {type(out).__name__}); pass {dtype} of shape {places}")
    if out.shape != places or out.dtype != dtype or not out.flags.carray:
        raise ConfigError(
            f"out must be a writeable, contiguous array of the mask's shape (got {out.dtype} of shape {out.shape}); "
            f"pass {dtype} of shape {places}"
        )
    return out


def check_integer(value: Any, name: str, most: int) -> None:
    """A :class:`ConfigError` that names ``value``, unless it is an integer in 0..=most."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 0 <= value <= most:
        raise ConfigError(f"{name} must be an integer in 0..={most} (got {shown(value)}); stay within its limits")


def _samples(samples: Any) -> NDArray[np.uint64]:
    """Sample ids as the core takes them. It checks their range: negative ones arrive there as huge ones."""
    array = _array(samples, "sample ids")
    if array.ndim == 1 and (array.dtype is _SIGNED or array.dtype is _UNSIGNED):
        return array.view(np.uint64)
    return check_integers(samples, "sample ids", (1 << 40) - 1).astype(np.uint64)


def _drawn(samples: Any, draw: Callable[..., None], *arguments: Any) -> None:
    """Call the core; if it refuses, and that was about the ids, complain about them as they were given."""
    try:
        draw(*arguments)
    except DataError:
        check_integers(samples, "sample ids", (1 << 40) - 1)
        raise


def _lengths(lengths: Any) -> NDArray[np.uint32]:
    return check_integers(lengths, "lengths", 1 << 20).astype(np.uint32)


def _array(values: Any, name: str) -> NDArray[Any]:
    try:
        array = np.ascontiguousarray(values)
        return array if array.flags.aligned else array.copy()  # cut out of bytes; the core reads no such memory
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"{name} must be a list or an array of integers (got no array: {error}); convert them"
        ) from None


def check_integers(values: Any, name: str, most: int) -> NDArray[Any]:
    """``values`` as a contiguous array (n,) of integers in 0..=most; else a :class:`DataError` that names the worst."""
    array = _array(values, name)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DataError(
            f"{name} must be a list or a one-dimensional array of integers (got {array.dtype} of shape {array.shape}); "
            "convert them"
        )
    worst = array.min() if array.min() < 0 else array.max()
    if not 0 <= worst <= most:
        raise DataError(f"{name} must lie in 0..={most} (got {worst}); number the examples from 0")
    return array
