"""First fit decreasing, a document at a time, straight from its definition."""

from __future__ import annotations

from collections.abc import Sequence


def cut(lengths: Sequence[int], capacity: int, too_long: str) -> list[tuple[int, int, int]]:
    """(document, start, length) of every piece, in order."""
    pieces = []
    for document, length in enumerate(lengths):
        if length > capacity and too_long == "refuse":
            raise ValueError(document)
        if too_long == "split":
            starts = range(0, length, capacity)
            pieces += [(document, start, min(capacity, length - start)) for start in starts]
        elif length:
            pieces.append((document, 0, min(capacity, length)))
    return pieces


def pack(lengths: Sequence[int], capacity: int, too_long: str = "refuse") -> list[list[tuple[int, int, int]]]:
    """The pieces of every row: longest first, equal ones in order, each into the first row that has room for it."""
    rows: list[list[tuple[int, int, int]]] = []
    for piece in sorted(cut(lengths, capacity, too_long), key=lambda piece: -piece[2]):
        for row in rows:
            if sum(length for _, _, length in row) + piece[2] <= capacity:
                row.append(piece)
                break
        else:
            rows.append([piece])
    return rows
