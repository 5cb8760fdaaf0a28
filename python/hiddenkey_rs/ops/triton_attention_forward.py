"""Triton kernels of attention with dropped keys: which pairs a tile may use, and the forward pass."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, N803, N806, SIM108

from __future__ import annotations

from .triton_gather_kernel import kept_columns, kept_range, list_of
from .triton_philox import drawn_columns, jit, keep_tile, ones, sample_words, tl

VARYING = {
    # What changes with the batch: Triton would compile a variant for multiples of 16, and one for 1, of each.
    "do_not_specialize": ["queries", "flag_columns", "documents_each", "blocks", "threshold"],
    # What changes with the model: a variant for 1 is worth it, as it saves divisions.
    "do_not_specialize_on_alignment": ["heads", "group", "mask_group", "mask_heads"],
}
"""How kernels of attention are made variants of."""


@jit
def load_document(documents, number):
    """One row of the table: batch row, query start and count, key start and count, sample, first positions."""
    entry = documents + number * 8
    return (
        tl.load(entry),
        tl.load(entry + 1),
        tl.load(entry + 2).to(tl.int32),
        tl.load(entry + 3),
        tl.load(entry + 4).to(tl.int32),
        tl.load(entry + 5),
        tl.load(entry + 6).to(tl.int32),
        tl.load(entry + 7).to(tl.int32),
    )


@jit
def load_key(keys, number, documents_each, PATTERN: tl.constexpr):
    """The site key of a document, if its mask is drawn here: the documents are split evenly among the keys."""
    k0, k1 = 0, 0
    if PATTERN == 1:
        entry = keys + (number // documents_each) * 2
        k0, k1 = tl.load(entry).to(tl.uint32), tl.load(entry + 1).to(tl.uint32)
    return k0, k1


@jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """Total + left @ right in float32."""
    if PRECISION == "interpreter":  # which multiplies bfloat16 by its bits
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@jit
def scores_of(left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """Products of every row of ``left`` with every row of ``right``: float32 (ROWS, COLUMNS)."""
    return dot(left, tl.trans(right), tl.zeros((ROWS, COLUMNS), tl.float32), PRECISION)


@jit
def load_rows(base, stride, rows, bound, HEAD: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows of a (tokens, head size) matrix, (rows, BLOCK); zero outside the bound (``WHOLE``: none is) and the head size."""
    features = tl.arange(0, BLOCK)
    pointers = base + rows.to(tl.int64)[:, None] * stride + features[None, :]
    inside = ((rows >= 0) & (rows < bound))[:, None]
    if HEAD != BLOCK:
        inside = inside & (features < HEAD)[None, :]
    if WHOLE and HEAD == BLOCK:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, mask=inside, other=0.0)
    return loaded


@jit
def load_block(base, stride, first, bound, ROWS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """:func:`load_rows` of ``ROWS`` neighbours from ``first`` on.

    What differs from block to block is one number: a tenth of a kernel's instructions less. Places of wide heads would not
    fit into its registers.
    """
    rows, features = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    if BLOCK > 64:
        loaded = load_rows(base, stride, first + rows, bound, HEAD, BLOCK)
    else:
        inside = (rows < bound - first)[:, None]
        if HEAD != BLOCK:
            inside = inside & (features < HEAD)[None, :]
        pointers = base + first.to(tl.int64) * stride + (rows[:, None] * stride + features[None, :])
        loaded = tl.load(pointers, mask=inside, other=0.0)
    return loaded


@jit
def store_rows(base, stride, rows, bound, values, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of :func:`load_rows`."""
    features = tl.arange(0, BLOCK)
    inside = ((rows >= 0) & (rows < bound))[:, None]
    if HEAD != BLOCK:
        inside = inside & (features < HEAD)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + features[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@jit
def allowed_tile(rows, columns, low, high, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Pairs of positions that attention may use, int1 (rows, columns) (or (1, columns)): inside [low, high) and seen.

    Args:
        rows: (rows, 1). columns: (1, columns).
    """
    allowed = (columns >= low) & (columns < high)
    if CAUSAL:
        allowed = allowed & (columns <= rows)
    if WINDOW:
        allowed = allowed & (columns > rows - window)
        if not CAUSAL:
            allowed = allowed & (columns < rows + window)
    return allowed


@jit
def drawn_tile(
    rows, columns, first, head, sample, k0, k1, threshold, flags, flag_columns,
    PATTERN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The drawn mask of a tile, int1 (ROWS, COLUMNS) or, for flags of keys, (1, COLUMNS)."""
    if PATTERN == 1:
        c2, c3 = sample_words(sample)
        c0 = (rows | (head << 20)).to(tl.uint32)[:, None]
        keep = keep_tile(c0, c2, c3, k0, k1, threshold.to(tl.uint32), first, ROWS, COLUMNS)
    else:
        keep = (tl.load(flags + columns, mask=columns < flag_columns, other=0) != 0)[None, :]
    return keep


@jit
def tile_pairs(
    rows, columns, first, low, high, window, head, sample, k0, k1, threshold, flags, flag_columns,
    PATTERN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile attention may use (``WHOLE``: all), and which the mask keeps; broadcastable to (ROWS, COLUMNS)."""
    allowed = tl.full((1, 1), 1, tl.int1)
    if not WHOLE:
        allowed = allowed_tile(rows[:, None], columns[None, :], low, high, window, CAUSAL, WINDOW)
    keep = tl.full((1, 1), 1, tl.int1)
    if PATTERN == 1 or PATTERN == 2:
        keep = drawn_tile(
            rows, columns, first, head, sample, k0, k1, threshold, flags, flag_columns, PATTERN, ROWS, COLUMNS
        )
    return allowed, keep


@jit
def head_flags(flags, number, mask_heads, mask_head, flag_columns, PATTERN: tl.constexpr):
    """Where the flags (pattern 2) or the list (3) of a head of a document begin."""
    if PATTERN == 2:
        flags += (number * mask_heads + mask_head).to(tl.int64) * flag_columns
    if PATTERN == 3:
        flags = list_of(flags, number, mask_heads, mask_head, flag_columns)
    return flags


@jit
def tile_columns(first, end, flags, flag_columns, PATTERN: tl.constexpr, COLUMNS: tl.constexpr):
    """Positions of a tile's keys: those from ``first`` on (element masks: around it), or of a list, -1 behind its end."""
    columns = first + tl.arange(0, COLUMNS)
    if PATTERN == 1:
        columns = drawn_columns(first, COLUMNS)
    if PATTERN == 3:
        columns = kept_columns(flags, flag_columns, first, end, COLUMNS)
    return columns


@jit
def key_range(
    row_low, row_high, low, high, window, flags,
    PATTERN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keys [from, to) that rows [row_low, row_high) can see: positions, of whole tiles, or places of a list."""
    start, end = low, high
    if CAUSAL:
        end = tl.minimum(end, row_high)
    if WINDOW:
        start = tl.maximum(start, row_low - window + 1)
        if not CAUSAL:
            end = tl.minimum(end, row_high + window - 1)
    if PATTERN == 3:
        start, end = kept_range(flags, start, end, low, high)
    else:
        SPAN: tl.constexpr = 128 if PATTERN == 1 else COLUMNS
        start = start // SPAN * SPAN
        end = tl.cdiv(end, SPAN) * SPAN
    return start, end


@jit
def whole_end(
    start, end, row_low, low, high, flags,
    PATTERN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where the whole tiles of :func:`key_range` end, of which every query from ``row_low`` on sees every key.

    They need no mask but the drawn one: half the instructions a pair.
    """
    SPAN: tl.constexpr = 128 if PATTERN == 1 else COLUMNS
    seen = high
    if CAUSAL:
        seen = tl.minimum(row_low + 1, high)
    if PATTERN == 3:
        _, seen = kept_range(flags, low, seen, low, high)
    else:
        seen = tl.where(start < low, start, seen)  # the first tile begins before the document
    if WINDOW:
        seen = start
    return start + tl.maximum(tl.minimum(seen, end) - start, 0) // SPAN * SPAN


@jit
def add_kept(scores, scale, values, maximum, total, output, EVERY: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax in base 2: a tile's scores (before scaling; -inf is not kept) join the running maximum, sum and output.

    ``EVERY``: each row keeps a pair of this tile.
    """
    highest = tl.maximum(maximum, tl.max(scores, 1) * scale)
    base = highest
    if not EVERY:
        # A row that has kept nothing yet has -inf for its maximum; -inf - -inf would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(maximum - base)
    total = total * shrink + tl.sum(weights, 1)
    output = output * shrink[:, None]
    output = dot(weights.to(values.dtype), values, output, PRECISION)
    return highest, total, output


@jit
def visit_tiles(
    maximum, total, output, dropped_maximum, dropped_total, kept_pairs, start, end,
    q, key, key_token, value, value_token, key_first, key_count, rows, low, high, window, scale,
    head, sample, k0, k1, threshold, flags, flag_columns,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PATTERN: tl.constexpr, DROPATTENTION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from ``start`` to ``end`` join a block's running sums. ``WHOLE``: see :func:`whole_end`."""
    for first in range(start, end, COLUMNS):
        columns = tile_columns(first, end, flags, flag_columns, PATTERN, COLUMNS)
        k = load_rows(key, key_token, columns - key_first, key_count, HEAD, BLOCK_D, WHOLE)
        v = load_rows(value, value_token, columns - key_first, key_count, HEAD_V, BLOCK_V, WHOLE)
        scores = scores_of(q, k, ROWS, COLUMNS, PRECISION)
        allowed, keep = tile_pairs(
            rows, columns, first, low, high, window, head, sample, k0, k1, threshold, flags, flag_columns,
            PATTERN, ROWS, COLUMNS, CAUSAL, WINDOW, WHOLE,
        )  # fmt: skip
        kept = allowed & keep
        if DROPATTENTION:
            dropped = allowed & (keep == 0)
            dropped_highest = tl.maximum(dropped_maximum, tl.max(tl.where(dropped, scores, float("-inf")), 1) * scale)
            base = tl.where(dropped_highest == float("-inf"), 0.0, dropped_highest)
            highest = tl.maximum(maximum, tl.max(tl.where(kept, scores, float("-inf")), 1) * scale)
            kept_base = tl.where(highest == float("-inf"), 0.0, highest)
            shifted = scores * scale - tl.where(keep, kept_base[:, None], base[:, None])
            if not WHOLE:
                shifted = tl.where(allowed, shifted, float("-inf"))
            weights = tl.exp2(shifted)
            kept_weights = tl.where(keep, weights, 0.0)
            shrink = tl.exp2(maximum - kept_base)
            dropped_total = dropped_total * tl.exp2(dropped_maximum - base) + tl.sum(weights - kept_weights, 1)
            total = total * shrink + tl.sum(kept_weights, 1)
            output = output * shrink[:, None]
            output = dot(kept_weights.to(v.dtype), v, output, PRECISION)
            maximum = highest
            dropped_maximum = dropped_highest
        else:
            every: tl.constexpr = WHOLE and PATTERN != 1 and PATTERN != 2
            if not every:
                scores = tl.where(kept, scores, float("-inf"))
            maximum, total, output = add_kept(scores, scale, v, maximum, total, output, every, PRECISION)
        if COUNT:
            kept_pairs += tl.sum(ones(tl.broadcast_to(kept, (ROWS, COLUMNS)), scores), 1)
    return maximum, total, output, dropped_maximum, dropped_total, kept_pairs


@jit(**VARYING)
def forward_kernel(
    query, key, value, out, log_kept, log_allowed, lost_rows, counts, documents, keys, flags,
    query_row, query_head, query_token, key_row, key_head, key_token,
    value_row, value_head, value_token, out_row, out_head, out_token,
    heads, queries, group, mask_group, mask_heads, flag_columns, documents_each, blocks,
    scale, window, threshold,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PATTERN: tl.constexpr, DROPATTENTION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head and document. Logits, sums and maxima are in base 2 (``scale`` includes log2 e).

    Leaves for the backward pass, one number a query: the log-sum over the kept set, for DropAttention also that over the
    allowed keys, and whether the row was rescued.
    """
    program = tl.program_id(0)
    # The last blocks of a causal document are the longest: they start first.
    block = blocks - 1 - program % blocks
    head = (program // blocks) % heads
    number = (program // blocks) // heads
    row, query_start, query_count, key_start, key_count, sample, query_first, key_first = load_document(
        documents, number
    )
    if block * ROWS >= query_count:
        return
    mask_head = head // mask_group
    k0, k1 = load_key(keys, number, documents_each, PATTERN)
    flags = head_flags(flags, number, mask_heads, mask_head, flag_columns, PATTERN)
    index = block * ROWS + tl.arange(0, ROWS)
    rows = query_first + index
    real = index < query_count
    far, near = head.to(tl.int64), (head // group).to(tl.int64)  # a head may begin beyond 2^31 numbers
    query += row * query_row + far * query_head + query_start * query_token
    key += row * key_row + near * key_head + key_start * key_token
    value += row * value_row + near * value_head + key_start * value_token
    q = load_rows(query, query_token, index, query_count, HEAD, BLOCK_D)

    low, high = key_first, key_first + key_count
    row_low = query_first + block * ROWS
    row_high = tl.minimum(row_low + ROWS, query_first + query_count)
    start, end = key_range(row_low, row_high, low, high, window, flags, PATTERN, CAUSAL, WINDOW, COLUMNS)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, BLOCK_V), tl.float32)
    # DropAttention's gradient also needs the sum over dropped keys. It runs under a maximum of its own, so that neither
    # sum can be lost beside the other, and no pair costs a second exponential.
    dropped_maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    dropped_total = tl.zeros((ROWS,), tl.float32)
    kept_pairs = tl.zeros((ROWS,), tl.int32)
    whole = whole_end(start, end, row_low, low, high, flags, PATTERN, CAUSAL, WINDOW, COLUMNS)
    if not WINDOW:
        maximum, total, output, dropped_maximum, dropped_total, kept_pairs = visit_tiles(
            maximum, total, output, dropped_maximum, dropped_total, kept_pairs, start, whole,
            q, key, key_token, value, value_token, key_first, key_count, rows, low, high, window, scale,
            mask_head, sample, k0, k1, threshold, flags, flag_columns,
            HEAD, HEAD_V, BLOCK_D, BLOCK_V, ROWS, COLUMNS, PATTERN, DROPATTENTION, CAUSAL, WINDOW, COUNT, PRECISION, True,
        )  # fmt: skip
    maximum, total, output, dropped_maximum, dropped_total, kept_pairs = visit_tiles(
        maximum, total, output, dropped_maximum, dropped_total, kept_pairs, whole, end,
        q, key, key_token, value, value_token, key_first, key_count, rows, low, high, window, scale,
        mask_head, sample, k0, k1, threshold, flags, flag_columns,
        HEAD, HEAD_V, BLOCK_D, BLOCK_V, ROWS, COLUMNS, PATTERN, DROPATTENTION, CAUSAL, WINDOW, COUNT, PRECISION, False,
    )  # fmt: skip

    if DROPATTENTION:
        # log2 of the sum over the allowed keys = kept and dropped together, before any rescue.
        top = tl.maximum(maximum, dropped_maximum)
        base = tl.where(top == float("-inf"), 0.0, top)
        both = total * tl.exp2(maximum - base) + dropped_total * tl.exp2(dropped_maximum - base)
        every = tl.where(both > 0, base + tl.log2(both), float("inf"))
    place = (row * heads + head) * queries + query_start + index
    if PATTERN == 1 or PATTERN == 2:
        lost = (total == 0) & real
        tl.store(lost_rows + place, lost.to(tl.int8), mask=real)
        # Only now is it known who kept nothing. Those rows run again, over their own key or all allowed keys; blocks
        # without such a row skip this loop. The sums of other rows stay as they are: they keep no pair here.
        if OWN:
            start, end = (row_low // COLUMNS) * COLUMNS, row_high
        end = tl.where(tl.max(lost.to(tl.int32), 0) > 0, end, start)
        for first in range(start, end, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            k = load_rows(key, key_token, columns - key_first, key_count, HEAD, BLOCK_D)
            v = load_rows(value, value_token, columns - key_first, key_count, HEAD_V, BLOCK_V)
            kept = allowed_tile(rows[:, None], columns[None, :], low, high, window, CAUSAL, WINDOW) & lost[:, None]
            if OWN:
                kept = kept & (columns[None, :] == rows[:, None])
            scores = tl.where(kept, scores_of(q, k, ROWS, COLUMNS, PRECISION), float("-inf"))
            maximum, total, output = add_kept(scores, scale, v, maximum, total, output, False, PRECISION)
            if COUNT:
                kept_pairs += tl.sum(kept.to(tl.int32), 1)

    # A row without any allowed key: zeros, and a log-sum of +inf makes every weight of the backward pass zero.
    some = total > 0
    output = output / tl.where(some, total, 1.0)[:, None]
    if PATTERN == 3 and OWN:
        # One key alone has weight one, whatever its score: a row that kept nothing takes its own value. To the loops of
        # the backward pass it is like a row without keys.
        own = rows - key_first
        lost = (total == 0) & real & (own >= 0) & (own < key_count)
        output += load_rows(value, value_token, tl.where(lost, own, -1), key_count, HEAD_V, BLOCK_V).to(tl.float32)
        tl.store(lost_rows + place, lost.to(tl.int8), mask=real)
        if COUNT:
            kept_pairs += lost.to(tl.int32)
    out += row * out_row + far * out_head + query_start * out_token
    store_rows(out, out_token, index, query_count, output, HEAD_V, BLOCK_V)
    if (PATTERN == 1 or PATTERN == 2) and OWN and not DROPATTENTION:
        some = some & (lost == 0)  # one key alone: as without a list, backward has nothing to do but for its value
    kept_log = tl.where(some, maximum + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(log_kept + place, kept_log, mask=real)
    if DROPATTENTION:
        tl.store(log_allowed + place, every, mask=real)
    if COUNT:
        tl.atomic_add(counts, tl.sum(tl.where(real, kept_pairs, 0).to(tl.int64), 0), sem="relaxed")
