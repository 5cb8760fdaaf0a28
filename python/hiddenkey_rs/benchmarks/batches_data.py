"""What the batch benchmarks run on: random tokens of real lengths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..loading.store import TokenStore

VOCABULARY = 30_000
# How many training examples of MRPC and SST-2 together have 0, 1, 2, ... tokens under the uncased BERT tokenizer.
_COUNTS = """
0 0 0 1978 5322 6065 5345 4749 4155 3713 3267 2947 2650 2413 2138 1950 1777 1661 1515 1375 1285 1134 1109 1048 911 831 821
745 721 647 558 522 488 485 446 383 367 356 324 256 275 278 228 222 222 201 179 176 149 143 135 155 124 145 128 116 113 101
105 121 107 121 94 79 107 75 71 69 59 68 56 44 43 36 40 26 24 19 23 13 11 14 5 10 8 1 3 4 2 3 1 1 0 0 0 0 2 1 1 0 2 0 0 1
"""


def glue_lengths(size: int | None = None) -> NDArray[np.int64]:
    """Lengths of the 71,017 training examples of MRPC and SST-2, in no order; or ``size`` drawn from them."""
    counts = np.array(_COUNTS.split(), np.int64)
    random = np.random.default_rng(0)
    if size is None:
        return random.permutation(np.repeat(np.arange(len(counts)), counts))
    return random.choice(len(counts), size, p=counts / counts.sum())


def even_lengths(size: int, low: int, high: int) -> NDArray[np.int64]:
    """``size`` lengths, each of low..high equally likely."""
    return np.random.default_rng(1).integers(low, high, size, endpoint=True)


def document_lengths(size: int, most: int) -> NDArray[np.int64]:
    """``size`` lengths as instruction data have them: log-normal about 200 tokens, at most ``most``."""
    drawn = np.random.default_rng(2).lognormal(5.3, 0.9, size)
    return np.clip(drawn, 8, most).astype(np.int64)


def store_of(lengths: NDArray[np.int64]) -> TokenStore:
    """A store of random tokens with these lengths, and a class for each example."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    random = np.random.default_rng(3)
    values = random.integers(1000, VOCABULARY, offsets[-1], dtype=np.int32)
    return TokenStore((values, offsets), row_columns={"labels": random.integers(0, 2, len(lengths))})
