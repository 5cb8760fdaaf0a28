"""Masks of stream hk1, a whole Philox block for every single decision, straight from the table in DESIGN.md."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .philox import MASK, philox4x32

SITES = ["attention", "ffn", "input", "output", "decoder-attention", "decoder-ffn", "decoder-input", "cross-attention"]
SITES += ["adapter-input", "adapter-rank"]
PATTERNS = {"element": 0, "column": 1, "span": 2}


def threshold(rate: float) -> int:
    return int(np.floor(np.float64(65536) * np.float64(rate) + 0.5))


def site_key(seed: int, step: int, branch: int, layer: int, site: int) -> tuple[int, int]:
    left, right = step, layer | site << 10 | branch << 16
    for r in range(4):
        left, right = right, left ^ philox4x32((right, r, 0, MASK), (seed & MASK, seed >> 32))[0]
    return left, right


def lanes(
    key: tuple[int, int], pattern: str, sample: np.ndarray, head: np.ndarray, row: np.ndarray, column: np.ndarray
) -> np.ndarray:
    """The 16-bit numbers that decide places of a mask; the coordinates are uint64 arrays that broadcast."""
    sample, head, row, column = np.broadcast_arrays(sample, head, row, column)
    number = 16 * (column // 128) + (column % 32) // 2
    tag = np.uint64(PATTERNS[pattern] << 30)
    words = philox4x32((row | head << 20, number, sample & MASK, sample >> 32 | tag), key)
    word = np.choose((column % 128 // 32).astype(np.int64), words)
    return word >> 16 * (column % 2) & 0xFFFF


def span_draw(key: tuple[int, int], sample: int, head: int) -> int:
    return philox4x32((head << 20, 0, sample & MASK, sample >> 32 | PATTERNS["span"] << 30), key)[0]


def element(
    seed: int,
    step: int,
    branch: int,
    layer: int,
    site: str,
    samples: Sequence[int],
    rows: int,
    columns: int,
    rate: float,
    heads: int = 1,
) -> np.ndarray:
    """bool (samples, heads, rows, columns), True = keep."""
    return _grid("element", seed, step, branch, layer, site, samples, heads, rows, columns, rate)


def column(
    seed: int,
    step: int,
    branch: int,
    layer: int,
    site: str,
    samples: Sequence[int],
    columns: int,
    rate: float,
    heads: int = 1,
) -> np.ndarray:
    """bool (samples, heads, 1, columns)."""
    return _grid("column", seed, step, branch, layer, site, samples, heads, 1, columns, rate)


def span(
    seed: int,
    step: int,
    branch: int,
    layer: int,
    site: str,
    samples: Sequence[int],
    lengths: Sequence[int],
    rate: float,
    heads: int = 1,
) -> np.ndarray:
    """bool (samples, heads, 1, max(lengths))."""
    key, t = site_key(seed, step, branch, layer, SITES.index(site)), threshold(rate)
    keep = np.zeros((len(samples), heads, 1, max(lengths, default=0)), dtype=bool)
    for b, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        for head in range(heads):
            dropped = 0 if t == 0 or length == 0 else min(length, max(1, (t * int(length) + 32768) >> 16))
            draw = span_draw(key, int(sample), head)
            start = draw * (int(length) - dropped + 1) >> 32
            for c in range(length):
                keep[b, head, 0, c] = not start <= c < start + dropped
    return keep


def _grid(
    pattern: str,
    seed: int,
    step: int,
    branch: int,
    layer: int,
    site: str,
    samples: Sequence[int],
    heads: int,
    rows: int,
    columns: int,
    rate: float,
) -> np.ndarray:
    key, t = site_key(seed, step, branch, layer, SITES.index(site)), threshold(rate)
    axes = [np.asarray(axis, dtype=np.uint64) for axis in (samples, range(heads), range(rows), range(columns))]
    sample, head, row, column = np.ix_(*axes)
    return lanes(key, pattern, sample, head, row, column) >= t


def pack(keep: np.ndarray) -> np.ndarray:
    """uint32 words: bit i of word j is column 32 j + i."""
    columns = keep.shape[-1]
    padded = np.zeros((*keep.shape[:-1], -(-columns // 32) * 32), dtype=np.uint64)
    padded[..., :columns] = keep
    bits = padded.reshape(*keep.shape[:-1], -1, 32) << np.arange(32, dtype=np.uint64)
    return bits.sum(axis=-1).astype(np.uint32)
