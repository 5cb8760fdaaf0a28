"""Writes the vector files from the slow reference: `python tests/vectors/generate.py`. Stream hk1 never changes: a
difference after regeneration is a bug, or a new stream."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

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


THRESHOLDS = (1, 655, 6554, 32768, 58982, 65535)
SAMPLES = (0, 2**32 - 1, 2**32, BIG)
HEADS = (0, 1, 1023)
ROWS = (0, 1, 2**19, 2**20 - 1)
TILES = (0, 1, 8191)
LENGTHS = (1, 2, 31, 32, 33, 1000, 2**20 - 1, 2**20)


def digest(words: np.ndarray) -> str:
    """FNV-1a, 64 bits, of uint32 words in memory order, each little-endian: few lines in any language."""
    state = 0xCBF29CE484222325
    for byte in words.astype("<u4").tobytes():
        state = (state ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{state:016x}"


def grid_sites() -> Iterator[tuple[int, int, int, int, int]]:
    """Every site and branch, under small and extreme seeds, steps and layers."""
    seeds, steps, layers = (0, 1, 2**32, 2**63, 2**64 - 1), (0, 1, 2**31, 2**32 - 1), (0, 1, 23, 511, 1022, 1023)
    for n, (branch, site) in enumerate(itertools.product((0, 1, 255), range(len(masks.SITES)))):
        yield seeds[n % 5], steps[n % 4], branch, layers[n % 6], site
    yield 2**64 - 1, 2**32 - 1, 255, 1023, 9


def grid_words(pattern: str, site: tuple[int, int, int, int, int]) -> np.ndarray:
    """What is digested of one site's grid: corners of the counter that no mask of bearable size would reach together."""
    key = masks.site_key(*site)
    if pattern == "span":
        found = []
        for sample, head, length, t in itertools.product(SAMPLES, HEADS, LENGTHS, THRESHOLDS):
            dropped = min(length, max(1, (t * length + 32768) >> 16))
            found += [masks.span_draw(key, sample, head) * (length - dropped + 1) >> 32, dropped]
        return np.array(found, dtype=np.uint32)
    axes = [SAMPLES, HEADS, ROWS if pattern == "element" else (0,), TILES, range(128)]
    sample, head, row, tile, place = np.ix_(*[np.array(axis, dtype=np.uint64) for axis in axes])
    lanes = masks.lanes(key, pattern, sample, head, row, 128 * tile + place)
    return masks.pack(lanes[..., None, :] >= np.array(THRESHOLDS, dtype=np.uint64)[:, None])


def whole_cases() -> list[tuple[str, tuple[int, int, int, int, int], list[int], int, int, int, int, list[int] | None]]:
    """Masks as people draw them, each of whose axes reaches its limit once."""
    site, other = (2**64 - 1, 2**32 - 1, 255, 1023, 9), (42, 7, 1, 11, 1)
    return [
        ("element", site, [BIG], 1, 1, 2**20, 6554, None),
        ("element", other, [3], 1, 2**16, 3, 32768, None),
        ("element", site, [2**32], 1024, 2, 33, 655, None),
        ("element", other, list(range(40)), 3, 5, 517, 9830, None),
        ("column", site, [BIG], 1, 1, 2**20, 6554, None),
        ("column", other, [0, BIG], 1024, 1, 130, 32768, None),
        ("span", site, [BIG, 2**32 - 1], 3, 1, 2**16, 6554, [2**16, 2**16 - 1]),
        ("span", other, [0, BIG], 1024, 1, 33, 32768, [33, 20]),
    ]


def drawn(
    pattern: str, site: tuple[int, ...], samples, heads: int, rows: int, columns: int, t: int, lengths
) -> np.ndarray:
    """The words of one case, by the reference."""
    where, rate = (*site[:4], masks.SITES[site[4]], samples), t / 65536
    if pattern == "span":
        return masks.pack(masks.span(*where, lengths, rate, heads=heads))
    if pattern == "column":
        return masks.pack(masks.column(*where, columns, rate, heads=heads))
    return masks.pack(masks.element(*where, rows, columns, rate, heads=heads))


def digests() -> str:
    lines = [
        "# Stream hk1, frozen. FNV-1a (64 bits) of uint32 words, little-endian, in memory order. From tests/reference/masks.py.",
        "# grid pattern seed step branch layer site -> digest of the packed words (span: of start and length) for every sample,",
        "# head, row (element only), tile of 128 columns (span: length) and threshold, the last changing fastest, of samples",
        f"# {SAMPLES}, heads {HEADS}, rows {ROWS}, tiles {TILES},",
        f"# lengths {LENGTHS}, thresholds {THRESHOLDS}.",
        "# whole pattern seed step branch layer site samples heads rows columns threshold lengths -> digest of the mask's words",
    ]
    for site, pattern in itertools.product(grid_sites(), masks.PATTERNS):
        lines.append(f"grid {pattern} {' '.join(map(str, site))} {digest(grid_words(pattern, site))}")
    for pattern, site, samples, heads, rows, columns, t, lengths in whole_cases():
        words = drawn(pattern, site, samples, heads, rows, columns, t, lengths)
        joined = [",".join(map(str, values or [])) or "-" for values in (samples, lengths)]
        numbers = (*site, joined[0], heads, rows, columns, t, joined[1])
        lines.append(f"whole {pattern} {' '.join(map(str, numbers))} {digest(words)}")
    return "\n".join(lines) + "\n"


PHILOX = """\
# Philox4x32-10: counter c0 c1 c2 c3, key k0 k1 -> output, hexadecimal. From Random123's tests/kat_vectors.
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""

if __name__ == "__main__":
    for name, text in (
        ("philox.txt", PHILOX),
        ("keys.txt", keys()),
        ("masks.txt", mask_lines()),
        ("digests.txt", digests()),
    ):
        (HERE / name).write_text(text)
