"""The arrays of a batch, place by place.

A row is a list of pieces (document, start, length); document -1 is padding that takes part, one token long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Piece = tuple[int, int, int]


def document(offsets: Sequence[int], row: int, max_length: int | None) -> Piece:
    if row == -1:
        return (-1, 0, 1)
    length = int(offsets[row + 1] - offsets[row])
    return (row, 0, length if max_length is None else min(length, max_length))


def width_of(rows: Sequence[Sequence[Piece]], multiple: int) -> int:
    used = max(sum(length for _, _, length in row) for row in rows)
    return max(1, (used + multiple - 1) // multiple) * multiple


def lay(
    values: Any,
    offsets: Any,
    rows: Sequence[Sequence[Piece]],
    width: int,
    *,
    pad: int = 0,
    left: bool = False,
    joined: bool = False,
    labels: Any = None,
    types: Any = None,
    sample_ids: Any = None,
) -> dict[str, np.ndarray]:
    """Every array that a batch may bring, int64 (rows, width); ``labels`` are a column, or the values themselves."""
    names = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", "sample_id")
    batch = {name: np.zeros((len(rows), width), np.int64) for name in names}
    for number, row in enumerate(rows):
        places: list[dict[str, int]] = []
        for which, start, length in row:
            for index in range(length):
                at = None if which == -1 else int(offsets[which]) + start + index
                hidden = at is None or (joined and index == 0)
                places.append(
                    {
                        "input_ids": pad if at is None else int(values[at]),
                        "attention_mask": 1,
                        "labels": -100 if hidden else int((values if labels is None else labels)[at]),
                        "token_type_ids": 0 if at is None or types is None else int(types[at]),
                        "position_ids": index,
                        "sample_id": which if at is None or sample_ids is None else int(sample_ids[which]),
                    }
                )
        empty = [
            {
                "input_ids": pad,
                "attention_mask": 0,
                "labels": -100,
                "token_type_ids": 0,
                "position_ids": index if joined else 0,
                "sample_id": -1,
            }
            for index in range(width - len(places))
        ]
        for column, place in enumerate(empty + places if left else places + empty):
            for name, value in place.items():
                batch[name][number, column] = value
    return batch


def boundaries(rows: Sequence[Sequence[Piece]], width: int) -> list[int]:
    """Where documents begin in the flattened rows, and the end of all; padding at a row's end is a document."""
    ends = [0]
    for number, row in enumerate(rows):
        for _, _, length in row:
            ends.append(ends[-1] + length)
        if ends[-1] < (number + 1) * width:
            ends.append((number + 1) * width)
    return ends
