"""Writes order.txt from the slow reference: `python tests/vectors/generate_order.py`. Stream hko1 never changes: a difference
after regeneration is a bug, or a new stream."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from reference import order, schedule  # noqa: E402
from vectors.generate import digest  # noqa: E402

KEYS = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 2**32 - 1, 2**62), (0xDEADBEEF12345678, 77, 3)]
SMALL = (1, 2, 3, 5, 16, 17, 255, 1000, 1023, 1024)
LARGE = (1025, 1500, 2047, 2048, 2049, 4096, 65537, 10**6, 2**31 + 1, 10**12, 2**53 + 1, 2**61, 2**62 - 1, 2**62)
SIZES = (1, 7, 60, 1100)
SCHEDULES = [
    # seed epoch shuffle batch_size token_budget window tail
    (1, 0, 1, 4, 0, 12, "pad"),
    (1, 0, 1, 4, 0, 12, "drop"),
    (2**64 - 1, 5, 1, 7, 0, 700, "pad"),
    (3, 1, 0, 6, 0, 24, "pad"),
    (4, 2, 1, 0, 61, 16, "pad"),
    (4, 3, 1, 0, 997, 300, "pad"),
    (5, 0, 0, 0, 200, 2000, "pad"),
]


def lengths(size: int) -> list[int]:
    """1..61, most of them small, none of them drawn."""
    return [1 + (7 * i * i + 3 * i) % 61 * (i % 5 + 1) // 5 for i in range(size)]


def numbers_digest(numbers: list[int]) -> str:
    """The digest of numbers as pairs of 32-bit words, low word first."""
    return digest(np.array(numbers, dtype="<u8").view("<u4"))


def schedule_lines() -> list[str]:
    lines = []
    for size in SIZES:
        for seed, epoch, shuffle, batch_size, budget, window, tail in SCHEDULES:
            if tail == "drop" and size < batch_size:
                continue
            windows = schedule.global_batches(
                lengths(size),
                batch_size=batch_size or None,
                token_budget=budget or None,
                window=window,
                tail=tail,
                shuffle=bool(shuffle),
                seed=seed,
                epoch=epoch,
            )
            flat = [n for batches in windows for batch in batches for n in (len(batch), *batch)]
            numbers = (size, seed, epoch, shuffle, batch_size, budget, window, tail, len(windows))
            lines.append(f"schedule {' '.join(map(str, numbers))} {numbers_digest(flat)}")
    return lines


def text() -> str:
    lines = [
        "# Stream hko1, frozen. From tests/reference/order.py and schedule.py; digests are FNV-1a (64 bits) of numbers, each",
        "# eight bytes, little-endian.",
        "# whole seed epoch which size -> digest of the samples at all positions",
        "# at seed epoch which size position -> sample",
        "# schedule size seed epoch shuffle batch_size token_budget window tail -> windows, digest of the epoch's batches: of",
        "# each the number of its samples, then they. Sample i has 1 + floor(((7 i i + 3 i) mod 61) (i mod 5 + 1) / 5) tokens.",
    ]
    for seed, epoch, which in KEYS:
        for size in SMALL:
            samples = order.shuffled(seed, epoch, which, size)
            lines.append(f"whole {seed} {epoch} {which} {size} {numbers_digest(samples)}")
        for size in LARGE:
            for position in (0, 1, size // 3, size - 1):
                sample = order.order(seed, epoch, size, position, which)
                lines.append(f"at {seed} {epoch} {which} {size} {position} {sample}")
    return "\n".join(lines + schedule_lines()) + "\n"


if __name__ == "__main__":
    (HERE / "order.txt").write_text(text())
