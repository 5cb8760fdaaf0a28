"""Writes the vector files from the slow reference: `python tests/vectors/generate.py`. Stream hk1 never changes: a
difference after regeneration is a bug, or a new stream."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from reference import masks  # noqa: E402

SITES = [
    (0, 0, 0, 0, 0),
    (1, 2, 1, 3, 1),
    (2**64 - 1, 2**32 - 1, 255, 1023, 63),
    (0xDEADBEEF12345678, 77, 0, 5, 9),
    *(
        (9, step, branch, layer, site)
        for step, branch, layer, site in itertools.product((0, 1), (0, 1), (0, 511), (2, 7))
    ),
]
BIG = 2**40 - 1


def keys() -> str:
    lines = ["# seed step branch layer site -> derived key k0 k1, hexadecimal. From tests/reference/masks.py."]
    for site in SITES:
        k0, k1 = masks.site_key(*site)
        lines.append(f"{' '.join(map(str, site))} {k0:08x}{k1:08x}")
    return "\n".join(lines) + "\n"


def cases() -> list[tuple[str, tuple[int, ...], list[int], int, int, int, float, list[int] | None]]:
    found = []
    rates = (0.0, 2**-16, 0.1, 0.5, 0.9, 1.0)
    for n, columns in enumerate((1, 3, 31, 32, 33, 127, 128, 129, 300)):
        for rate in rates:
            site = SITES[(n + rates.index(rate)) % 4 if columns != 300 else 1]
            site = (*site[:4], min(site[4], 9))
            samples = [n, 2**32 + 5, BIG]
            found.append(("element", site, samples[: 1 + n % 3], 1 + n % 2, 2, columns, rate, None))
            found.append(("column", site, samples, 2, 1, columns, rate, None))
            found.append(("span", site, samples, 2, 1, columns, rate, [columns, columns // 2, max(columns - 1, 0)]))
    return found


def mask_lines() -> str:
    head = (
        "# pattern seed step branch layer site samples heads rows columns threshold [lengths] -> packed words in memory order,\n"
        "# each as eight hexadecimal digits. Lists are joined by commas. From tests/reference/masks.py."
    )
    lines = [head]
    for pattern, site, samples, heads, rows, columns, rate, lengths in cases():
        name = masks.SITES[site[4]]
        if pattern == "span":
            keep = masks.span(*site[:4], name, samples, lengths, rate, heads=heads)
        elif pattern == "column":
            keep = masks.column(*site[:4], name, samples, columns, rate, heads=heads)
        else:
            keep = masks.element(*site[:4], name, samples, rows, columns, rate, heads=heads)
        words = "".join(f"{word:08x}" for word in masks.pack(keep).ravel())
        joined = [",".join(map(str, samples)), heads, rows, columns, masks.threshold(rate)]
        joined += [] if lengths is None else [",".join(map(str, lengths))]
        lines.append(" ".join(map(str, (pattern, *site, *joined, words))))
    return "\n".join(lines) + "\n"


PHILOX = """\
# Philox4x32-10: counter c0 c1 c2 c3, key k0 k1 -> output, hexadecimal. From Random123's tests/kat_vectors.
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""

if __name__ == "__main__":
    for name, text in (("philox.txt", PHILOX), ("keys.txt", keys()), ("masks.txt", mask_lines())):
        (HERE / name).write_text(text)
