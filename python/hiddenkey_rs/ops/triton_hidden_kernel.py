"""Triton kernel of dropout on hidden states, with the residual added on the way."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, N803

from __future__ import annotations

from .triton_philox import jit, keep_tile, ones, sample_words, tl


# What changes with the batch: Triton would compile a variant for multiples of 16, and one for 1, of each.
@jit(do_not_specialize=["rows", "rows_each", "threshold"])
def drop_kernel(
    hidden, residual, out, counts, keys, samples, positions, flags,
    hidden_row, residual_row, out_row, rows, rows_each, column_blocks, scale, threshold,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr, RESIDUAL: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A tile (ROWS, COLUMNS): ``out = residual + (keep ? hidden * scale : 0)``, rounded after the product and after the sum.

    Element pattern: a row's place is (sample, position) under its branch's key, and sample -1 is padding. Otherwise one
    flag a row.
    """
    program = tl.program_id(0)
    first = (program % column_blocks) * COLUMNS
    row = (program // column_blocks) * ROWS + tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    there = row < rows
    inside = there[:, None] & (column < FEATURES)[None, :]
    wide = row.to(tl.int64)[:, None]
    states = tl.load(hidden + wide * hidden_row + column[None, :], mask=inside, other=0.0)
    if RESIDUAL:  # now, so that it is on its way while the mask is drawn
        added = tl.load(residual + wide * residual_row + column[None, :], mask=inside, other=0.0)
    if ELEMENT:
        sample = tl.load(samples + row, mask=there, other=-1)
        position = tl.load(positions + row, mask=there, other=0)
        key = keys + (tl.minimum(row, rows - 1) // rows_each) * 2
        k0, k1 = tl.load(key).to(tl.uint32)[:, None], tl.load(key + 1).to(tl.uint32)[:, None]
        c2, c3 = sample_words(sample)
        c0 = position.to(tl.uint32)[:, None]
        keep = keep_tile(c0, c2[:, None], c3[:, None], k0, k1, threshold.to(tl.uint32), first, ROWS, COLUMNS)
        keep = keep & (sample >= 0)[:, None]
    else:
        keep = (tl.load(flags + row, mask=there, other=0) != 0)[:, None]
    # Chosen, not multiplied: a dropped infinity or NaN becomes zero.
    chosen = ones(keep, states)
    values = tl.where(chosen != 0, states.to(tl.float32) * scale, 0.0)
    if RESIDUAL:
        values = values.to(out.dtype.element_ty).to(tl.float32) + added.to(tl.float32)
    tl.store(out + wide * out_row + column[None, :], values.to(out.dtype.element_ty), mask=inside)
    if COUNT:
        tl.atomic_add(counts, tl.sum(tl.sum(tl.where(inside, chosen, 0), 1), 0).to(tl.int64), sem="relaxed")
