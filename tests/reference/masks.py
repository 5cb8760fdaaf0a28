"""Masks of stream hk1, one decision at a time, straight from the table in DESIGN.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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


@lru_cache(maxsize=1 << 18)
def block(key: tuple[int, int], pattern: str, sample: int, head: int, row: int, number: int) -> tuple[int, ...]:
    return philox4x32((row | head << 20, number, sample & MASK, sample >> 32 | PATTERNS[pattern] << 30), key)


def lane(key: tuple[int, int], pattern: str, sample: int, head: int, row: int, column: int) -> int:
    """The 16-bit number that decides one place of a mask."""
    number = 16 * (column // 128) + (column % 32) // 2
    word = block(key, pattern, sample, head, row, number)[(column % 128) // 32]
    return word >> 16 * (column % 2) & 0xFFFF


def element(
    seed: int, step: int, branch: int, layer: int, site: str, samples: Sequence[int], rows: int, columns: int, rate: float, heads: int = 1
) -> np.ndarray:
    """bool (samples, heads, rows, columns), True = keep."""
    return _grid("element", seed, step, branch, layer, site, samples, heads, rows, columns, rate)


def column(
    seed: int, step: int, branch: int, layer: int, site: str, samples: Sequence[int], columns: int, rate: float, heads: int = 1
) -> np.ndarray:
    """bool (samples, heads, 1, columns)."""
    return _grid("column", seed, step, branch, layer, site, samples, heads, 1, columns, rate)


def span(
    seed: int, step: int, branch: int, layer: int, site: str, samples: Sequence[int], lengths: Sequence[int], rate: float, heads: int = 1
) -> np.ndarray:
    """bool (samples, heads, 1, max(lengths))."""
    key, t = site_key(seed, step, branch, layer, SITES.index(site)), threshold(rate)
    keep = np.zeros((len(samples), heads, 1, max(lengths, default=0)), dtype=bool)
    for b, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        for head in range(heads):
            dropped = 0 if t == 0 or length == 0 else min(length, max(1, (t * int(length) + 32768) >> 16))
            draw = block(key, "span", int(sample), head, 0, 0)[0]
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
    keep = np.empty((len(samples), heads, rows, columns), dtype=bool)
    for b, sample in enumerate(samples):
        for head in range(heads):
            for row in range(rows):
                keep[b, head, row] = [lane(key, pattern, int(sample), head, row, c) >= t for c in range(columns)]
    return keep


def pack(keep: np.ndarray) -> np.ndarray:
    """uint32 words: bit i of word j is column 32 j + i."""
    columns = keep.shape[-1]
    padded = np.zeros((*keep.shape[:-1], -(-columns // 32) * 32), dtype=np.uint64)
    padded[..., :columns] = keep
    bits = padded.reshape(*keep.shape[:-1], -1, 32) << np.arange(32, dtype=np.uint64)
    return bits.sum(axis=-1).astype(np.uint32)
