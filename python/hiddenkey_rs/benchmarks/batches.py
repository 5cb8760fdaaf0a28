"""``hiddenkey bench batches``: collating, packing, the order of an epoch, padding, the balance of ranks, and a run's waiting.

The cases are in ``batches_collate``, ``batches_pack``, ``batches_order``, ``batches_spread``, ``batches_memory`` and
``batches_training``; this file puts them together and reads the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import (
    batches_collate,
    batches_memory,
    batches_order,
    batches_pack,
    batches_spread,
    batches_training,
    picture,
)
from .harness import Case, Row


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Attributes:
        rows, lengths: of a batch that is collated, and its shortest and longest example.
        documents: to pack.
        samples: of the epochs that are sought in. known: of the epoch whose micro-batches are made.
        budgets: tokens of a micro-batch, for the padding.
        batches: for the memory. steps: of a run.
    """

    rows: int = 32
    lengths: tuple[tuple[int, int], ...] = ((16, 128), (16, 512), (256, 2048))
    documents: tuple[int, ...] = (100_000, 10_000_000)
    samples: tuple[int, ...] = (10**6, 10**9, 10**12)
    known: int = 1_000_000
    budgets: tuple[int, ...] = (1024, 4096, 16384)
    batches: int = 300_000
    steps: int = 63  # with the first, which warms up, an epoch


WHOLE = Sizes()
QUICK = Sizes(
    lengths=((16, 512),), documents=(100_000,), samples=(10**6, 10**12), known=100_000, budgets=(4096,), batches=20_000, steps=4
)  # fmt: skip


def cases(sizes: Sizes, threads: Sequence[int]) -> Iterator[Case]:
    """All cases that are timed in turns, on one thread."""
    yield from batches_collate.cases(sizes.rows, sizes.lengths)
    yield from batches_pack.cases(sizes.documents)
    yield from batches_order.cases(sizes.samples, sizes.known)


def derived(rows: Sequence[Row], sizes: Sizes, place: Mapping[str, Any]) -> Iterator[Row]:
    """What is counted, or takes long: padding, memory, whole runs."""
    yield from batches_pack.a_document(rows, place)
    yield from batches_spread.rows(sizes.budgets, place)
    yield from batches_memory.rows(sizes.batches, place)
    yield from batches_training.rows(sizes.steps, 1, place)


def simulate(ranks: Sequence[int], place: Mapping[str, Any]) -> list[Row]:
    """``--simulate-ranks``: how evenly so many ranks would be loaded, and what planning costs each."""
    return list(batches_spread.simulate(ranks, place))


def tables(rows: Sequence[Row]) -> list[list[dict[str, str]]]:
    """One table of all rows."""
    return [[row.cells() for row in rows]]


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know to judge the rows."""
    found = []
    if any(row.case == batches_collate.PADDED for row in rows):
        found.append(
            "collators of transformers get lists, as data sets give them; DataCollatorWithPadding makes no labels"
        )
    if any(row.case == batches_spread.HEAVIEST for row in rows):
        found.append("heaviest rank over the mean: padded tokens, the median of the steps of an epoch")
    return found


def plot(rows: Sequence[Row], path: str) -> None:
    """The picture of ``--plot``: how many times faster than each peer."""
    shown = {
        f"{row.case}, {row.peer['name']}": row.speedup for row in rows if row.unit in ("us/batch", "ms") and row.speedup
    }
    picture.speedups(shown, path, f"Batches on the CPU, {rows[0].about['cpu']}: times as fast as")
