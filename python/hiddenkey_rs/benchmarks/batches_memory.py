"""Whether memory grows with the number of batches made."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..loading.collator import Collator
from ..loading.sampler import BatchSampler
from .batches_data import glue_lengths, store_of
from .harness import Goal, Row

_WARM = 10_000


def rows(batches: int, place: Mapping[str, Any]) -> Iterator[Row]:
    """``batches`` batches of 32 examples by sampler and collator; MiB by which the process grew, for every 10^5."""
    store = store_of(glue_lengths(20_000))
    collate, sampler = Collator(), BatchSampler(store, batch_size=32)
    made = grown = begun = 0
    while made < batches + _WARM:
        for numbers in sampler:
            collate(store.__getitems__(numbers))
            made += 1
            if made == _WARM:
                gc.collect()
                begun = _resident()
    gc.collect()
    grown = _resident() - begun
    each = grown / 2**20 * 1e5 / (made - _WARM)
    mine, none = ({"median": value, "p10": value, "p90": value, "n": 1} for value in (each, 0.0))
    sizes = {"batches": made - _WARM}
    yield Row(
        "batches", "memory, grown in 10^5 batches", sizes, 1, "MiB", mine, {"name": "flat", **none}, Goal("median", 1),
        about=place,
    )  # fmt: skip


def _resident() -> int:
    """Bytes that the process holds in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
