"""``hiddenkey bench masks``: the mask engine against what people use today, and against its own limits.

The cases are in ``masks_element``, ``masks_structured`` (columns, spans, plans) and ``masks_fused`` (dropout applied to
hidden states); this file puts them together and reads the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import masks
from . import masks_element, masks_fused, masks_structured, picture
from .harness import Case, Goal, Row, short
from .masks_element import FULL, LIMIT, SMALL

LINEAR = "element, packed, slowest size, less a call's cost"


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Attributes:
        exponents: of element masks, base 2.
        structured: samples, heads and columns of column and span masks.
        layers: of a plan.
        hidden: samples, length and features of hidden states.
    """

    exponents: tuple[int, ...] = (12, 16, 20, 23, FULL)
    structured: tuple[int, int, int] = (32, 16, 512)
    layers: int = 24
    hidden: tuple[int, int, int] = (32, 512, 1024)


WHOLE = Sizes()
QUICK = Sizes(exponents=(12, 16, 20), layers=8, hidden=(4, 512, 1024))


def cases(sizes: Sizes, threads: Sequence[int]) -> Iterator[Case]:
    """All cases, made one after another so that only one holds memory."""
    simd = masks.engine()["simd"]
    yield masks_element.small_call()
    for count in threads:
        for exponent in sizes.exponents:
            yield masks_element.elements(exponent, count, simd)
    if len(threads) > 1:
        yield masks_element.scaling(max(sizes.exponents), min(threads), max(threads))
    yield from masks_structured.cases(sizes.structured, sizes.layers, simd)
    yield from masks_fused.cases(sizes.hidden, threads)


def derived(rows: Sequence[Row], sizes: Sizes, place: Mapping[str, Any]) -> Iterator[Row]:
    """Rows that need no clock of their own: memory of a plan, and how linear the time of element masks is in their size."""
    yield from masks_structured.memory(sizes.structured, sizes.layers, place)
    calls = [row for row in rows if row.case == SMALL and row.checked]
    packed = [row for row in rows if row.case == "element, packed" and row.threads == 1 and row.first and row.checked]
    if not calls or len(packed) < 2:
        return
    # A call's own cost is most of the time of a small mask, and says nothing about how time grows.
    cost = 1e3 * calls[0].ours["median"]
    rates = {row.sizes["decisions"]: _less(row.ours, cost / row.sizes["decisions"]) for row in packed}
    quickest = min(rates, key=lambda size: rates[size]["median"])
    slowest = max(rates, key=lambda size: rates[size]["median"])
    yield Row(
        "masks",
        LINEAR,
        {"decisions": slowest},
        1,
        "ns/decision",
        rates[slowest],
        {"name": f"quickest, {short({'decisions': quickest})}", **rates[quickest]},
        Goal("speedup", 1 / 1.5),
        about=place,
    )


def tables(rows: Sequence[Row]) -> list[list[dict[str, str]]]:
    """What the terminal shows: the rows that matter, then element masks of every generator by size."""
    short = [row.cells() for row in rows if row.first or row.goal is not None or not row.checked]
    return [short, *(_by_size(rows, threads) for threads in sorted({row.threads for row in rows}))]


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know to judge the rows."""
    found = []
    for row in rows:
        if row.case == LIMIT and row.speedup is not None:
            cores = "whole cores" if row.speedup > 0.9 * row.threads else "not whole cores, or not idle ones"
            found.append(
                f"this machine's limit: {row.threads} workers that share nothing do {row.speedup:.2f}x the work of one "
                f"({cores})"
            )
    return found


def plot(rows: Sequence[Row], path: str) -> None:
    """The picture of ``--plot``."""
    threads = min(row.threads for row in rows)
    place = rows[0].about
    title = f"Dropout masks, {place['cpu']}, {place['simd']}, p = 0.1, {threads} thread"
    picture.generators(series(rows, threads), path, title)


def series(rows: Sequence[Row], threads: int) -> dict[str, dict[int, float]]:
    """Generator -> (decisions -> nanoseconds a decision), of the element masks."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.case in ("element, packed", "element, as bool") and row.threads == threads and row.checked:
            mine = row.case.replace("element", "ours")
            for name, entry in ((mine, row.ours), (row.peer["name"], row.peer)):
                found.setdefault(name, {})[row.sizes["decisions"]] = entry["median"]
    return {name: found[name] for name in sorted(found, key=lambda name: not name.startswith("ours"))}


def _by_size(rows: Sequence[Row], threads: int) -> list[dict[str, str]]:
    lines = series(rows, threads)
    sizes = sorted({size for line in lines.values() for size in line})
    head = f"ns/decision, {threads} thread(s)"
    return [
        {head: name, **{f"2^{size.bit_length() - 1}": f"{line[size]:.3f}" if size in line else "-" for size in sizes}}
        for name, line in lines.items()
    ]


def _less(ours: Mapping[str, Any], cost: float) -> dict[str, Any]:
    return {**ours, **{name: max(ours[name] - cost, 1e-4) for name in ("median", "p10", "p90")}}
