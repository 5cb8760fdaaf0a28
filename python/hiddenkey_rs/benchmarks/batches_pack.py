"""Packing documents into rows of fixed capacity, against TRL's best fit decreasing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batches.pack import Packing, pack
from ..experiments.extras import extra
from .batches_data import document_lengths
from .harness import Case, Entrant, Goal, Pair, Row

CAPACITY = 2048
PACK = f"pack into {CAPACITY}"
_FILL = 0.002
_MOST_FOR_TRL = 1 << 18  # its time grows in proportion: a second for every 2^17 documents


def cases(sizes: tuple[int, ...]) -> Iterator[Case]:
    """So many documents into rows of 2048."""
    for size in sizes:
        yield _pack(size)


def a_document(rows: Sequence[Row], place: Mapping[str, Any]) -> Iterator[Row]:
    """The largest packing against the peer's by the document: the peer was given fewer."""
    packed = [row for row in rows if row.case == PACK and row.checked]
    if packed:
        row = max(packed, key=lambda row: row.sizes["documents"])
        ours, peer = (
            _each(entry, count) for entry, count in zip((row.ours, row.peer), row.sizes.values(), strict=True)
        )
        name = {"name": row.peer["name"]}
        yield Row(
            row.bench,
            f"{PACK}, a document",
            row.sizes,
            1,
            "ns",
            ours,
            {**name, **peer},
            Goal("speedup", 300),
            about=place,
        )


def _each(figures: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {**{name: 1e6 * figures[name] / count for name in ("median", "p10", "p90")}, "n": figures["n"]}


def _pack(size: int) -> Case:
    lengths = document_lengths(size, CAPACITY)
    few = lengths[:_MOST_FOR_TRL]
    name = "TRL, bfd" if len(few) == size else f"TRL, bfd, 2^{_MOST_FOR_TRL.bit_length() - 1} of them"
    entrants = [
        Entrant("ours", lambda: pack(lengths, CAPACITY), lambda: _right(pack(lengths, CAPACITY), lengths)),
        Entrant(name, lambda: _trl(few), lambda: _close(few)),
    ]
    goal = Goal("speedup", 300) if len(few) == size else Goal("median", 300) if size >= 10_000_000 else None
    sizes = {"documents": size, "of peer": len(few)}
    return Case("batches", sizes, "ms", 1e3, 1, entrants, [Pair(PACK, "ours", name, goal)])


def _right(packing: Packing, lengths: NDArray[np.int64]) -> bool:
    """Every document in one row, no row over its capacity."""
    once = len(packing.documents) == len(lengths) and bool((np.bincount(packing.documents) == 1).all())
    held = np.add.reduceat(lengths[packing.documents], packing.offsets[:-1])
    return once and int(held.max()) <= CAPACITY


def _close(lengths: NDArray[np.int64]) -> bool:
    """Ours fills its rows as well as the peer's, within .2 points."""
    return pack(lengths, CAPACITY).fill >= peer_fill(lengths) - _FILL


def peer_fill(lengths: NDArray[np.int64]) -> float:
    """The share of its rows' places that TRL fills."""
    return float(lengths.sum()) / (CAPACITY * len(_trl(lengths)))


def _trl(lengths: NDArray[np.int64]) -> Any:
    """Its packing of a table whose tokens are one byte each: what it spends on gathering them is small beside the rest."""
    return extra("trl.data_utils", "trl")._pack_bfd(_table(len(lengths)), CAPACITY)


@lru_cache(maxsize=2)
def _table(size: int) -> Any:
    arrow = extra("pyarrow")
    lengths = document_lengths(size, CAPACITY)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = arrow.array(np.ones(offsets[-1], np.int8))
    return arrow.table({"input_ids": arrow.ListArray.from_arrays(arrow.array(offsets.astype(np.int32)), tokens)})
