"""What a store holds, as a short string: the same on every machine, and another one as soon as one token differs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 20
"""Numbers hashed at a time. Blocks are counted from an array's start, so threads and chunks do not show in the digest."""

_VERSION = "hiddenkey-store-1"
_THREADS = 4


def content_digest(arrays: Iterable[tuple[str, NDArray[Any]]]) -> str:
    """32 hexadecimal digits of named arrays of numbers: BLAKE2b of the BLAKE2b of their blocks.

    Whole numbers are hashed by value: as 32 bits where a block fits, else 64, so int32 and int64 columns of the same
    tokens agree. Floats are hashed as 64 bits. Every number is read; it runs at about a gigabyte a second and core.

    Example:
        >>> tokens = np.array([5, 7], np.int32)
        >>> content_digest([("ids", tokens)]) == content_digest([("ids", tokens.astype(np.int64))])
        True
        >>> content_digest([("ids", tokens)]) == content_digest([("ids", tokens + 1)])
        False
    """
    root = hashlib.blake2b(_VERSION.encode(), digest_size=16)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for name, array in arrays:
            root.update(f"\n{name} {'f' if array.dtype.kind == 'f' else 'i'} {len(array)}\n".encode())
            for leaf in pool.map(_leaf, (array[at : at + BLOCK] for at in range(0, len(array), BLOCK))):
                root.update(leaf)
    return root.hexdigest()


def _leaf(block: NDArray[Any]) -> bytes:
    if block.dtype.kind == "f":
        plain = block.astype("<f8", copy=False)
    else:
        limits = np.iinfo(np.int32)
        narrow = block.dtype == np.int32 or (block.min() >= limits.min and block.max() <= limits.max)
        plain = block.astype("<i4" if narrow else "<i8", copy=False)
    hashed = hashlib.blake2b(plain.dtype.str.encode(), digest_size=16)
    hashed.update(np.ascontiguousarray(plain).data)
    return hashed.digest()
