"""Draws every whole mask of digests.txt with the library and compares it; a process of its own for each instruction set."""

from __future__ import annotations

import numpy as np

from hiddenkey_rs import MaskKey, masks
from hiddenkey_rs.masks import SITES

from . import read
from .generate import digest


def whole_cases():
    """Pattern, site, samples, heads, rows, columns, threshold, lengths and digest of every whole mask."""
    for kind, pattern, *numbers, expected in read("digests.txt"):
        if kind == "whole":
            site = tuple(map(int, numbers[:5]))
            samples, lengths = ([int(n) for n in numbers[at].split(",") if n != "-"] for at in (5, 10))
            yield pattern, site, samples, *map(int, numbers[6:10]), lengths, expected


def main() -> None:
    for pattern, site, samples, heads, rows, columns, t, lengths, expected in whole_cases():
        key, rate = MaskKey(*site[:4], list(SITES)[site[4]]), t / 65536
        if pattern == "element":
            mask = masks.element(key, samples, rows, columns, rate, heads)
            assert np.array_equal(masks.element_bool(key, samples, rows, columns, rate, heads), mask.to_bool())
        elif pattern == "column":
            mask = masks.column(key, samples, columns, rate, heads)
        else:
            mask = masks.span(key, samples, lengths, rate, heads, columns)
        assert digest(mask.words) == expected, (pattern, site)
    print(masks.engine()["simd"])


if __name__ == "__main__":
    main()
