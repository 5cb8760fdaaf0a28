"""Triton kernel that lists the keys which each head keeps, and how the attention kernels read its lists.

A list is two rows of int32, one number longer than the mask: for every position of a document's keys how many kept keys
stand before it, and those positions themselves, of the kept keys in ascending order and then of the dropped ones. A range of
positions thus becomes a range of the list by two loads. What lies outside a document's keys is never written, nor read.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, N803

from __future__ import annotations

from .triton_philox import jit, tl


@jit
def fill(flags, ranks, low, high, list_columns, EVERY: tl.constexpr, BLOCK: tl.constexpr):
    """Write the list of the flags in [low, high), or of every key there; returns how many it holds."""
    total = low * 0
    for first in range(low, high, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        kept = (columns < high).to(tl.int32)
        if not EVERY:
            kept = (tl.load(flags + columns, mask=columns < high, other=0) != 0).to(tl.int32)
        before = total + tl.cumsum(kept, 0) - kept
        tl.store(ranks + columns, before, mask=columns < high)
        # Dropped keys fill the list from its end.
        place = tl.where(kept != 0, before, high - 1 - (columns - before))
        tl.store(ranks + list_columns + place, columns, mask=columns < high)
        total += tl.sum(kept, 0)
    tl.store(ranks + high, total)
    return total


@jit(do_not_specialize=["mask_heads", "list_columns"])
def list_kernel(documents, flags, lists, mask_heads, list_columns, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """The list of one head of one document, flags (documents, mask heads, columns) -> int32 (.., .., 2, columns + 1)."""
    program = tl.program_id(0)
    entry = documents + (program // mask_heads) * 8
    low = tl.load(entry + 7).to(tl.int32)
    high = low + tl.load(entry + 4).to(tl.int32)
    flags += program.to(tl.int64) * (list_columns - 1)
    lists += program.to(tl.int64) * 2 * list_columns
    total = fill(flags, lists, low, high, list_columns, False, BLOCK)
    if not OWN:
        # In cross-attention a head that lost every key keeps them all: so its list says.
        fill(flags, lists, low, tl.where(total == 0, high, low), list_columns, True, BLOCK)


@jit
def list_of(lists, number, mask_heads, mask_head, list_columns):
    """Where the list of a head of a document begins."""
    return lists + (number * mask_heads + mask_head).to(tl.int64) * 2 * list_columns


@jit
def kept_range(lists, start, end, low, high):
    """Positions [start, end) of a document whose keys are [low, high), as places [start, end) of a list."""
    start = tl.minimum(tl.maximum(start, low), high)
    end = tl.minimum(tl.maximum(end, low), high)
    return tl.load(lists + start), tl.load(lists + end)


@jit
def kept_columns(lists, list_columns, first, end, COLUMNS: tl.constexpr):
    """Positions of the kept keys at places [first, first + COLUMNS) of a list, (COLUMNS,); -1 from place ``end`` on."""
    places = first + tl.arange(0, COLUMNS)
    return tl.load(lists + list_columns + places, mask=places < end, other=-1)
